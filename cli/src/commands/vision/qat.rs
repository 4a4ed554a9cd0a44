//! `nibble vision qat`: a float model trained further with the rounding of integers, and written in integers.

use super::data::{Output, Shapes};
use super::recipe::saturation;
use super::train::{Samples, Training, classes, distill, run};
use crate::arguments::Threads;
use crate::commands::Run;
use crate::failure::Usage;
use crate::output;
use crate::session::Session;
use anyhow::Result;
use nibble_models::graph::{fold_model, inputs};
use nibble_models::qat::dataset::Augment;
use nibble_models::qat::net::{Net, QatSettings};
use nibble_models::qat::train;
use nibble_models::vision::data::frame;
use nibble_quant::observer;
use nibble_quant::onnx::{External, Model, Selector, opset};
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
    /// Divides both outputs where the float model's are learned
    #[arg(long, value_name = "T", default_value_t = 2.0)]
    temperature: f64,
    /// How ranges of activations are found before training: minmax, mse, percentile[:99.9], ...
    #[arg(long, value_name = "NAME", default_value = "mse")]
    observer: String,
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

impl Run for Qat {
    fn run(self, session: &Session) -> Result<()> {
        self.output.check()?;
        self.threads.set_for_conversion()?;
        // A step frees tensors of the sizes that the next one wants.
        nibble_kernels::keep_freed_memory();
        let choice = observer::choose(&self.observer)?;
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
        settings.distill = distill(self.distill, self.temperature)?;
        settings.following = self.following;
        settings.normalizing = self.batch_norm;
        if data.labels.is_none() && settings.epochs > 0 && settings.distill.is_none_or(|d| d.share < 1.0) {
            return Err(Usage("samples without labels need --distill 1".into()).into());
        }
        let how = QatSettings {
            weight_bits: self.weight_bits,
            activation_bits: self.activation_bits,
            learn: self.lsq,
            histogram: choice.observer.histogram,
            algorithm: nibble_quant::algo::algorithm(&self.algorithm)?.name,
            batch_norms: self.batch_norm > 0,
            exclude: self.exclude.clone(),
            include: self.include.clone(),
        };
        let (sample, _) = data.batch(&[0], Augment::default(), 0)?;
        let mut net = Net::quantized(&model, &folded, &how, &sample)?;
        let mut float = Net::float(&model)?;
        train::observe(&mut net, &data, self.observe, choice, settings.seed)?;
        let judge = |net: &mut Net, float: &mut Net| match &valid {
            Some(valid) => train::score(net, valid, Some(float)).map(|s| s.map(train::Score::share)),
            None => Ok(None),
        };
        let before = [judge_float(&mut float, valid.as_ref())?, judge(&mut net, &mut float)?];
        let percent = |share: Option<f64>| share.map_or("-".into(), |s| format!("{:.2} %", 100.0 * s));
        session.remark(format!("float {}, rounded {}", percent(before[0]), percent(before[1])));
        let epochs = run(session, &mut net, Some(&mut float), (&data, valid.as_ref()), &settings)?;
        let after = judge(&mut net, &mut float)?;
        let path = &self.output.output;
        net.export()?.save(path, External::Auto)?;
        let whole = self.weight_bits == 8 && self.activation_bits == 8;
        if let Some(caution) = saturation("--weight-bits 7").filter(|_| whole) {
            session.remark(caution);
        }
        let bytes = |path: &PathBuf| std::fs::metadata(path).map(|m| m.len()).unwrap_or_default();
        if session.json {
            return output::json(&json!({
                "path": path, "float": before[0], "rounded": before[1], "trained": after, "epochs": epochs,
                "weights": net.weights().len(), "activations": net.activations().len(),
                "bytes_in": bytes(&self.model), "bytes_out": bytes(path), "classes": classes(&mut net, valid.as_ref())?,
            }));
        }
        output::say(&format!(
            "{}: float {}, rounded {}, trained {}; {} -> {}",
            path.display(),
            percent(before[0]),
            percent(before[1]),
            percent(after),
            output::bytes(bytes(&self.model)),
            output::bytes(bytes(path))
        ))
    }
}

/// The float model's accuracy, where there are labels.
fn judge_float(float: &mut Net, valid: Option<&nibble_models::qat::dataset::Dataset>) -> Result<Option<f64>> {
    Ok(match valid {
        Some(valid) => train::score(float, valid, None)?.map(train::Score::share),
        None => None,
    })
}
