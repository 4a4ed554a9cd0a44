//! `nibble vision qat`: a float model trained further with the rounding of integers, and written in integers.

use super::data::{Output, Shapes};
use super::recipe::{headroom, saturation};
use super::train::{Samples, Training, classes, run};
use crate::arguments::Threads;
use crate::commands::Run;
use crate::failure::Usage;
use crate::output;
use crate::progress::Meter;
use crate::session::Session;
use anyhow::Result;
use nibble_models::graph::{fold_model, inputs};
use nibble_models::qat::dataset::{Augment, Dataset};
use nibble_models::qat::loss::{Distill, Likeness};
use nibble_models::qat::net::{Net, QatSettings};
use nibble_models::qat::quantizer::Mode;
use nibble_models::qat::train;
use nibble_models::vision::calibrate::CalibrateOptions;
use nibble_models::vision::data::frame;
use nibble_models::vision::prepare::{Equalize, prepare, runs};
use nibble_quant::observer;
use nibble_quant::onnx::{External, Fine, Model, Selector, opset, plan};
use serde_json::json;
use std::path::PathBuf;

/// Train a float ONNX model further with the rounding that integers bring, and write it with integer weights
#[derive(Debug, clap::Args)]
#[command(after_help = "Example: nibble vision qat cnn.onnx --data mnist_5k.csv.gz --holdout 1000 --weight-bits 4 \\
    --activation-bits 4 --lsq -o cnn-w4a4.onnx

--epochs 0 rounds without training. Samples without labels need --distill 1: the float model's outputs are learned.")]
pub struct Qat {
    /// The float model
    #[arg(value_name = "MODEL.onnx")]
    model: PathBuf,
    #[command(flatten)]
    output: Output,
    #[command(flatten)]
    samples: Samples,
    /// Bits of weights, 2 to 8
    #[arg(long, value_name = "BITS", default_value_t = 8, value_parser = clap::value_parser!(u32).range(2..=8))]
    weight_bits: u32,
    /// Bits of activations, 2 to 8
    #[arg(long, value_name = "BITS", default_value_t = 8, value_parser = clap::value_parser!(u32).range(2..=8))]
    activation_bits: u32,
    /// Learn scales (LSQ) instead of taking them from the values seen
    #[arg(long)]
    lsq: bool,
    /// Learn from the float model's outputs too: their share of the loss
    #[arg(long, value_name = "SHARE", num_args = 0..=1, default_missing_value = "0.5")]
    distill: Option<f64>,
    /// How outputs are compared with the float model's [default: kl where they are (samples, classes), mse otherwise]
    #[arg(long, value_enum, value_name = "LOSS")]
    distill_loss: Option<DistillLoss>,
    /// Divides both outputs where their classes are compared
    #[arg(long, value_name = "T", default_value_t = 2.0)]
    temperature: f64,
    /// How ranges of activations are found before training: minmax, mse, percentile[:99.9], ... [default: minmax with 8 bits, mse
    /// with fewer]
    #[arg(long, value_name = "NAME")]
    observer: Option<String>,
    /// Leave the ranges of channels as they are (with fewer than 7 bits they are in any case)
    #[arg(long)]
    no_equalize: bool,
    /// Leave biases as they are before training (with --lsq they are in any case)
    #[arg(long)]
    no_bias_correction: bool,
    /// Take activations of these linear layers in two terms, as `vision quantize` does: gelu, mlp, all, or a pattern (may be
    /// repeated)
    #[arg(long, value_name = "WHICH")]
    fine: Vec<Fine>,
    /// Samples that ranges are found on
    #[arg(long, value_name = "N", default_value_t = 512)]
    observe: usize,
    /// Ranges of activations follow what is seen for so many epochs, and are frozen then; learned scales don't
    #[arg(long, value_name = "EPOCHS", default_value_t = 2)]
    following: usize,
    /// Convolutions are followed by batch norms for so many epochs; these are frozen then, and are in the weights of the
    /// file that is written
    #[arg(long, value_name = "EPOCHS", default_value_t = 0)]
    batch_norm: usize,
    /// What finds the scales of weights that learned ones start from: rtn, clip or search
    #[arg(long, value_name = "NAME", default_value = "search")]
    algorithm: String,
    /// Quantize only layers that fit this pattern (may be repeated)
    #[arg(long, value_name = "PATTERN")]
    include: Vec<Selector>,
    /// Leave nodes that fit this pattern in float (may be repeated)
    #[arg(long, value_name = "PATTERN")]
    exclude: Vec<Selector>,
    #[command(flatten)]
    training: Training,
    #[command(flatten)]
    shapes: Shapes,
    #[command(flatten)]
    threads: Threads,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum DistillLoss {
    /// Divergence of the class probabilities
    Kl,
    /// Squared error, by the float model's squares
    Mse,
}

impl Qat {
    /// Refuses numbers that distillation can't have.
    fn check_distillation(&self) -> Result<()> {
        let Self { distill, temperature, .. } = self;
        match *temperature > 0.0 && temperature.is_finite() && distill.is_none_or(|s| (0.0..=1.0).contains(&s)) {
            true => Ok(()),
            false => Err(Usage("--distill wants a share in 0..=1, --temperature a number above 0".into()).into()),
        }
    }

    /// Distillation as it is typed, for outputs of so many dimensions.
    fn distillation(&self, rank: usize) -> Option<Distill> {
        let by = match (self.distill_loss, Likeness::of_rank(rank)) {
            (Some(DistillLoss::Mse), _) | (None, Likeness::Values) => Likeness::Values,
            _ => Likeness::Classes { temperature: self.temperature },
        };
        self.distill.map(|share| Distill { share, by })
    }
}

/// How good a network is on other samples, as it is printed: right answers, or decibels of a teacher's values.
#[derive(Debug, Clone, Copy, Default)]
struct Judged {
    share: Option<f64>,
    sqnr_db: Option<f64>,
}

impl Judged {
    fn of(net: &mut Net, valid: Option<&Dataset>, float: &mut Net, distill: Option<Distill>) -> Result<Judged> {
        let Some(valid) = valid else { return Ok(Judged::default()) };
        if distill.is_some_and(|d| d.by == Likeness::Values) {
            return Ok(Judged { share: None, sqnr_db: Some(train::likeness(net, valid, float)?) });
        }
        Ok(Judged { share: train::score(net, valid, Some(float))?.map(train::Score::share), sqnr_db: None })
    }
}

impl std::fmt::Display for Judged {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match (self.share, self.sqnr_db) {
            (_, Some(db)) => write!(f, "{db:.2} dB"),
            (Some(share), None) => write!(f, "{:.2} %", 100.0 * share),
            (None, None) => write!(f, "-"),
        }
    }
}

impl Run for Qat {
    fn run(self, session: &Session) -> Result<()> {
        self.output.check()?;
        self.check_distillation()?;
        self.threads.set_for_conversion()?;
        // A step frees tensors of the sizes that the next one wants.
        nibble_kernels::keep_freed_memory();
        let named = self.observer.as_deref().unwrap_or(if self.activation_bits == 8 { "minmax" } else { "mse" });
        let choice = observer::choose(named)?;
        let mut model = Model::open(&self.model)?;
        self.shapes.freeze(&mut model)?;
        opset::upgrade(&mut model)?;
        let folded = fold_model(&mut model, self.threads.count())?;
        let declared = inputs(&model);
        let Some(input) = declared.first() else {
            return Err(Usage(format!("{}: has no input", self.model.display())).into());
        };
        let dims: Option<Vec<usize>> = input.dims.iter().skip(1).copied().collect();
        let (data, valid) = self.samples.open(&input.name, dims.as_deref(), frame(input, false).ok())?;
        let mut settings = self.training.settings(5e-4, data.len())?;
        settings.following = self.following;
        settings.normalizing = self.batch_norm;
        if data.labels.is_none() && settings.epochs > 0 && self.distill.is_none_or(|share| share < 1.0) {
            return Err(Usage("samples without labels need --distill 1".into()).into());
        }
        let how = QatSettings {
            weight_bits: self.weight_bits,
            activation_bits: self.activation_bits,
            learn: self.lsq,
            algorithm: nibble_quant::algo::algorithm(&self.algorithm)?.name,
            batch_norms: self.batch_norm > 0,
            exclude: self.exclude.clone(),
            include: self.include.clone(),
            fine: self.fine.clone(),
        };
        // Where rounding by itself ends, training starts.
        let seen = data.drawn(&input.name, self.observe, settings.seed)?;
        let options = CalibrateOptions {
            observer: choice,
            threads: self.threads.count(),
            // Biases make up for weights as they are rounded; learned scales round them otherwise.
            correct_bias: !self.no_bias_correction && !self.lsq,
            headroom: headroom(choice),
            stop: session.stop(),
        };
        // What an equal activation takes off, weights take on: with few bits they can't.
        let equal = !self.no_equalize && self.weight_bits.min(self.activation_bits) >= 7;
        let equalize = if equal { Equalize::Channels } else { Equalize::Nothing };
        let meter = Meter::new(session, "calibrate", "samples");
        meter.begin(runs(&plan(&model, &how.settings(), &folded)?, equalize, &options) * seen.count()?, 0);
        let prepared = prepare(model, folded, &how.settings(), &seen, equalize, &options, &mut || meter.add_thing(""))?;
        drop(meter);
        let mut float = Net::float(&prepared.model)?;
        let mut net = Net::quantized(&prepared, &float, &how)?;
        if self.batch_norm > 0 {
            train::observe(&mut net, &data, self.observe, settings.seed)?;
        }
        let (sample, _) = data.batch(&[0], Augment::default(), 0)?;
        settings.distill = self.distillation(float.forward(&sample, Mode::Evaluate)?.rank());
        if settings.epochs > 0 && !self.training.has_rate() {
            let bearable = train::bearable_rate(&mut net, Some(&mut float), &data, &settings)?;
            // What is said is what is used, and can be typed.
            let rate = format!("{:.1e}", bearable.map_or(settings.rate, |most| settings.rate.min(most)));
            session.remark(format!("learning rate {rate}"));
            settings.rate = rate.parse()?;
        }
        let judge = |net: &mut Net, float: &mut Net| Judged::of(net, valid.as_ref(), float, settings.distill);
        let of_float = match &valid {
            Some(valid) => train::score(&mut float, valid, None)?.map(train::Score::share),
            None => None,
        };
        let rounded = judge(&mut net, &mut float)?;
        let of_float_said = of_float.map_or("-".into(), |s| format!("{:.2} %", 100.0 * s));
        session.remark(format!("float {of_float_said}, rounded {rounded}"));
        let epochs = run(session, &mut net, Some(&mut float), (&data, valid.as_ref()), &settings)?;
        let trained = judge(&mut net, &mut float)?;
        let path = &self.output.output;
        net.export()?.save(path, External::Auto)?;
        let whole = self.weight_bits == 8 && self.activation_bits == 8;
        if let Some(caution) = saturation("--weight-bits 7").filter(|_| whole) {
            session.remark(caution);
        }
        let bytes = |path: &PathBuf| std::fs::metadata(path).map(|m| m.len()).unwrap_or_default();
        if session.json {
            return output::json(&json!({
                "path": path, "float": of_float, "rounded": rounded.share, "trained": trained.share,
                "rounded_db": rounded.sqnr_db, "trained_db": trained.sqnr_db, "epochs": epochs,
                "weights": net.weights().len(), "activations": net.activations().len(),
                "bytes_in": bytes(&self.model), "bytes_out": bytes(path), "classes": classes(&mut net, valid.as_ref())?,
            }));
        }
        output::say(&format!(
            "{}: float {of_float_said}, rounded {rounded}, trained {trained}; {} -> {}",
            path.display(),
            output::bytes(bytes(&self.model)),
            output::bytes(bytes(path))
        ))
    }
}
