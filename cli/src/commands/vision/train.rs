//! `nibble vision train`: small models from scratch, and what training has in common with [`super::qat`].

use super::data::Output;
use crate::arguments::Threads;
use crate::commands::Run;
use crate::failure::Usage;
use crate::output;
use crate::progress::Meter;
use crate::session::Session;
use anyhow::Result;
use nibble_models::qat::arch::{self, ARCHITECTURES};
use nibble_models::qat::dataset::{Augment, Dataset};
use nibble_models::qat::net::Net;
use nibble_models::qat::optimizer::Method;
use nibble_models::qat::train::{self, Epoch, TrainSettings};
use nibble_models::vision::picture::{Frame, preprocess};
use nibble_quant::onnx::External;
use serde_json::json;
use std::path::{Path, PathBuf};

/// Train a small model from scratch on labelled pictures, and write it as a float ONNX model
#[derive(Debug, clap::Args)]
#[command(after_help = after_help())]
pub struct Train {
    /// What to train: cnn or vit
    #[arg(long, value_name = "NAME")]
    arch: String,
    #[command(flatten)]
    output: Output,
    #[command(flatten)]
    samples: Samples,
    #[command(flatten)]
    training: Training,
    #[command(flatten)]
    threads: Threads,
}

fn after_help() -> String {
    let rows = ARCHITECTURES.iter().map(|a| format!("  {:<5} {}", a.name, a.summary)).collect::<Vec<_>>().join("\n");
    format!(
        "Example: nibble vision train --arch cnn --data mnist_5k.csv.gz --holdout 1000 -o cnn.onnx\n\n--arch:\n{rows}"
    )
}

/// Where samples with labels come from.
#[derive(Debug, Clone, clap::Args)]
pub struct Samples {
    /// Samples: .csv or .csv.gz (values 0 to 255, the class last), .npz (arrays x and y), .npy, or a folder of classes
    #[arg(long, short, value_name = "DATA")]
    pub data: PathBuf,
    /// Other samples, to judge by
    #[arg(long, value_name = "DATA", conflicts_with = "holdout")]
    valid: Option<PathBuf>,
    /// Draw so many of the samples to judge by, and don't train on them
    #[arg(long, value_name = "N")]
    holdout: Option<usize>,
    /// What is done to pictures of a folder
    #[arg(long, value_name = "NAME", default_value = "unit")]
    preprocess: String,
}

impl Samples {
    /// Samples to train on, and those to judge by: of the shape that an input takes, if it is known.
    pub fn open(
        &self,
        input: &str,
        dims: Option<&[usize]>,
        frame: Option<Frame>,
    ) -> Result<(Dataset, Option<Dataset>)> {
        let preprocess = preprocess(&self.preprocess)?;
        let open = |path: &Path| Dataset::open(path, input, dims, frame.map(|frame| (frame, preprocess)));
        let data = open(&self.data)?;
        match (&self.valid, self.holdout) {
            (Some(valid), _) => Ok((data, Some(open(valid)?))),
            // The same samples whatever the seed of the training is.
            (None, Some(count)) => data.split(count, 0).map(|(data, valid)| (data, Some(valid))).map_err(Into::into),
            (None, None) => Ok((data, None)),
        }
    }
}

/// How to train.
#[derive(Debug, Clone, clap::Args)]
pub struct Training {
    /// Passes over the samples
    #[arg(long, value_name = "N", default_value_t = 20)]
    epochs: usize,
    /// Samples of a step
    #[arg(long, value_name = "N", default_value_t = 64)]
    batch_size: usize,
    /// The learning rate at its highest; it rises in the first steps and falls along a cosine [default: 0.002; qat: 0.0005, or
    /// less if the first gradient says so]
    #[arg(long, value_name = "RATE")]
    rate: Option<f64>,
    /// What moves parameters
    #[arg(long, value_enum, default_value_t)]
    optimizer: OptimizerWord,
    /// AdamW's weight decay
    #[arg(long, value_name = "DECAY", default_value_t = 0.01)]
    decay: f64,
    /// Move pictures by up to so many pixels
    #[arg(long, value_name = "PIXELS", default_value_t = 0)]
    shift: usize,
    /// Where randomness starts: the same seed gives the same model
    #[arg(long, value_name = "SEED", default_value_t = 0)]
    seed: u64,
    /// Stop after so many epochs that bring nothing, and take the best one
    #[arg(long, value_name = "EPOCHS")]
    patience: Option<usize>,
    /// Write the state after each epoch to this file
    #[arg(long, value_name = "FILE.safetensors")]
    checkpoint: Option<PathBuf>,
    /// Go on from the checkpoint, if it is there
    #[arg(long, requires = "checkpoint")]
    resume: bool,
}

#[derive(Debug, Clone, Copy, Default, clap::ValueEnum)]
enum OptimizerWord {
    #[default]
    Adamw,
    Sgd,
}

impl Training {
    /// Whether the user chose the learning rate.
    pub fn has_rate(&self) -> bool {
        self.rate.is_some()
    }

    /// The settings; `rate` is what the learning rate is by default.
    pub fn settings(&self, rate: f64, samples: usize) -> Result<TrainSettings> {
        if self.batch_size == 0 {
            return Err(Usage("--batch-size 0: a step needs a sample".into()).into());
        }
        let method = match self.optimizer {
            OptimizerWord::Adamw => Method::AdamW { decay: self.decay },
            OptimizerWord::Sgd => Method::Sgd,
        };
        // A twentieth of all steps.
        let warmup = (samples.div_ceil(self.batch_size) * self.epochs).div_ceil(20);
        Ok(TrainSettings {
            epochs: self.epochs,
            batch: self.batch_size,
            rate: self.rate.unwrap_or(rate),
            warmup,
            method,
            seed: self.seed,
            augment: Augment { shift: self.shift },
            distill: None,
            patience: self.patience,
            following: 0,
            normalizing: 0,
            checkpoint: self.checkpoint.clone(),
            resume: self.resume,
            stop_after: None,
        })
    }
}

/// Trains with a progress bar and a line an epoch.
pub fn run(
    session: &Session,
    net: &mut Net,
    teacher: Option<&mut Net>,
    (data, valid): (&Dataset, Option<&Dataset>),
    settings: &TrainSettings,
) -> Result<Vec<Epoch>> {
    let meter = Meter::new(session, "train", "steps");
    let steps = data.len().div_ceil(settings.batch) * settings.epochs;
    meter.begin(steps as u64, 0);
    let percent = |share: Option<f64>| share.map_or("-".into(), |s| format!("{:.2} %", 100.0 * s));
    let epochs = train::train(
        net,
        teacher,
        (data, valid),
        settings,
        session.stop(),
        &mut |_, _| meter.add_thing(""),
        &mut |e| {
            let right = e.accuracy.map_or(String::new(), |_| format!(", right {}", percent(e.accuracy)));
            let held_out = match e.valid_db {
                Some(db) => format!(", those held out {db:.2} dB"),
                None => e.valid.map_or(String::new(), |_| format!(", of those held out {}", percent(e.valid))),
            };
            meter.remark(&format!(
                "epoch {}/{}: loss {:.5}{right}{held_out}, {:.2} s",
                e.epoch, settings.epochs, e.loss, e.seconds
            ));
        },
    )?;
    Ok(epochs)
}

/// The classes that a network gives to the samples held out.
pub fn classes(net: &mut Net, valid: Option<&Dataset>) -> Result<Option<Vec<u32>>> {
    Ok(valid.map(|valid| train::classes(net, valid)).transpose()?)
}

impl Run for Train {
    fn run(self, session: &Session) -> Result<()> {
        self.output.check()?;
        self.threads.set_for_conversion()?;
        // A step frees tensors of the sizes that the next one wants.
        nibble_kernels::keep_freed_memory();
        let (data, valid) = self.samples.open("image", None, None)?;
        let (Some(count), &[c, h, w]) = (data.classes(), data.dims.as_slice()) else {
            return Err(Usage(format!("{}: has no labels to learn from", self.samples.data.display())).into());
        };
        let count = count.max(valid.as_ref().and_then(Dataset::classes).unwrap_or(0));
        let settings = self.training.settings(2e-3, data.len())?;
        let mut net = Net::float(&arch::build(&self.arch, [c, h, w], count, settings.seed)?)?;
        let parameters: usize = net.parameters().values().map(|v| v.elem_count()).sum();
        session.remark(format!("{parameters} parameters, {} samples of {count} classes", data.len()));
        let epochs = run(session, &mut net, None, (&data, valid.as_ref()), &settings)?;
        let score = match &valid {
            Some(valid) => train::score(&mut net, valid, None)?,
            None => None,
        };
        let path = &self.output.output;
        net.export()?.save(path, External::Auto)?;
        if session.json {
            let score = score.map(|s| json!({"right": s.right, "samples": s.samples, "accuracy": s.share()}));
            let classes = classes(&mut net, valid.as_ref())?;
            return output::json(&json!({
                "path": path, "parameters": parameters, "epochs": epochs, "valid": score, "classes": classes,
            }));
        }
        let judged = score.map_or(String::new(), |s| format!(", {} of {} held out right", s.right, s.samples));
        output::say(&format!("{}: {parameters} parameters{judged}", path.display()))
    }
}
