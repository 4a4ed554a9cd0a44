//! How a model is quantized, in flags, and what is made ready for it.

use super::data::{Preparation, Shapes};
use crate::failure::Usage;
use crate::progress::Meter;
use crate::session::Session;
use anyhow::Result;
use nibble_kernels::Isa;
use nibble_models::graph::{fold_model, inputs};
use nibble_models::qat::adaround::{Learning, learn};
use nibble_models::vision::calibrate::CalibrateOptions;
use nibble_models::vision::data::Data;
use nibble_models::vision::diagnose::layers;
use nibble_models::vision::prepare::{Equalize, Prepared, prepare, runs};
use nibble_quant::observer::{self, Choice, IntGrid, IntType};
use nibble_quant::onnx::plan::{self, Stored, plan};
use nibble_quant::onnx::weights::Rounding;
use nibble_quant::onnx::{Fine, Folded, Graph, Mode, Model, Packing, Selector, Settings, Target, opset};
use std::path::{Path, PathBuf};

/// The flags.
#[derive(Debug, Clone, clap::Args)]
pub struct Recipe {
    /// Samples to calibrate with: a folder of pictures or arrays, or one of them
    #[arg(long, value_name = "DATA")]
    pub calib: Option<PathBuf>,
    /// static, dynamic (linear layers, scales found at run time), or weights (linear layers, floats computed)
    #[arg(long, value_enum, default_value_t)]
    mode: ModeWord,
    /// How ranges are found: minmax, average, percentile[:99.999], entropy, mse, ...
    #[arg(long, value_name = "NAME", default_value = "minmax")]
    observer: String,
    /// Type of activations
    #[arg(long, value_enum, default_value_t)]
    activations: TypeWord,
    /// Zero points in the middle of the activations' type
    #[arg(long)]
    symmetric: bool,
    /// One scale a weight instead of one an output channel
    #[arg(long)]
    per_tensor: bool,
    /// Keep pairs of weights so small that the sum of their products fits in 16 bits, where it saturates on x86 processors without
    /// VNNI
    #[arg(long)]
    reduce_range: bool,
    /// What rounds weights: rtn, clip, search, gptq, or adaround (learned, layer by layer) [default: rtn]
    #[arg(long, value_name = "NAME", conflicts_with = "effort")]
    algorithm: Option<String>,
    /// How much work goes into rounding weights: fast (rtn), balanced (gptq) or max (adaround)
    #[arg(long, value_enum)]
    effort: Option<Effort>,
    /// Bits of weights with --mode weights: 4 or 8
    #[arg(long, value_name = "BITS", default_value_t = 8)]
    bits: u8,
    /// Values that share a scale with --mode weights
    #[arg(long, value_name = "N", default_value_t = 32)]
    group: usize,
    /// How the file says packed weights: ONNX Runtime's MatMulNBits, or DequantizeLinear with blocks (ONNX's own, opset 21)
    #[arg(long, value_name = "FORM", value_enum, default_value_t)]
    packing: PackingWord,
    /// Quantize only layers that fit this pattern (may be repeated)
    #[arg(long, value_name = "PATTERN")]
    include: Vec<Selector>,
    /// Leave nodes that fit this pattern in float (may be repeated)
    #[arg(long, value_name = "PATTERN")]
    exclude: Vec<Selector>,
    /// Leave layers that fit the pattern in float and store their weights as float16, int4 (groups of 32, linear layers) or
    /// int4-int8 (the same, activations rounded at run time): PATTERN=WORD (may be repeated, the first that fits decides)
    #[arg(long, value_name = "PATTERN=WORD", value_parser = plan::rule)]
    store: Vec<(Selector, Stored)>,
    /// Quantize products of two activations too
    #[arg(long)]
    attention: bool,
    /// Quantize convolutions even where they become slower
    #[arg(long)]
    force_conv: bool,
    /// Take activations of these linear layers in two terms, a second product and hardly any error of activations: gelu (those
    /// that read what a GELU makes), mlp (those before GELUs too), all, or a pattern (may be repeated) [default: gelu; mlp
    /// with --effort max]
    #[arg(long, value_name = "WHICH", conflicts_with = "no_fine")]
    fine: Vec<Fine>,
    /// Take activations of all layers in one term
    #[arg(long)]
    no_fine: bool,
    /// Multiply ranges by this: values of other samples are larger than those of the few that are seen [default: 1.1 with
    /// minmax, 1 with observers that cut values off]
    #[arg(long, value_name = "FACTOR", value_parser = factor)]
    headroom: Option<f32>,
    /// Leave the ranges of channels as they are
    #[arg(long)]
    no_equalize: bool,
    /// Leave biases as they are
    #[arg(long)]
    no_bias_correction: bool,
    /// The runtime to quantize for
    #[arg(long, value_enum, default_value_t)]
    target: TargetWord,
}

#[derive(Debug, Clone, Copy, Default, clap::ValueEnum)]
enum ModeWord {
    #[default]
    Static,
    Dynamic,
    Weights,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Effort {
    Fast,
    Balanced,
    Max,
}

#[derive(Debug, Clone, Copy, Default, clap::ValueEnum)]
enum PackingWord {
    #[default]
    Matmulnbits,
    Blocks,
}

#[derive(Debug, Clone, Copy, Default, clap::ValueEnum)]
enum TypeWord {
    #[default]
    U8,
    S8,
    U16,
    S16,
}

#[derive(Debug, Clone, Copy, Default, clap::ValueEnum)]
enum TargetWord {
    #[default]
    Onnxruntime,
    Tensorrt,
}

/// What smallest and largest values are multiplied by.
const HEADROOM: f32 = 1.1;

/// What ranges are multiplied by where the user doesn't say.
pub fn headroom(observer: Choice) -> f32 {
    if observer.observer.name == "minmax" { HEADROOM } else { 1.0 }
}

/// Reads a factor for ranges.
fn factor(text: &str) -> Result<f32, String> {
    let factor = text.parse::<f32>().ok().filter(|f| (0.1..=10.0).contains(f));
    factor.ok_or_else(|| format!("`{text}`: a factor from 0.1 to 10 is possible"))
}

/// The word for rounding that is learned: it needs samples, so that it is no row of the table of algorithms.
const LEARNED: &str = "adaround";

impl Recipe {
    /// The algorithm that weights start from, and whether their rounding is learned after that.
    fn rounding(&self) -> Result<(&'static str, bool)> {
        let name = match (self.effort, &self.algorithm) {
            (Some(Effort::Fast), _) | (None, None) => "rtn",
            (Some(Effort::Balanced), _) => "gptq",
            (Some(Effort::Max), _) => LEARNED,
            (None, Some(name)) => name,
        };
        match name {
            LEARNED if matches!(self.mode, ModeWord::Static) => Ok(("gptq", true)),
            LEARNED => Err(Usage(format!("--algorithm {LEARNED} is for static quantization")).into()),
            name => Ok((nibble_quant::algo::algorithm(name)?.name, false)),
        }
    }

    /// What is brought to like ranges.
    fn equalize(&self) -> Equalize {
        match (self.no_equalize, self.per_tensor) {
            (true, _) => Equalize::Nothing,
            (false, true) => Equalize::Weights,
            (false, false) => Equalize::Channels,
        }
    }

    /// What is wanted, in the words of the plan.
    pub fn settings(&self) -> Result<Settings> {
        let mode = match self.mode {
            ModeWord::Static => Mode::Static,
            ModeWord::Dynamic => Mode::Dynamic,
            ModeWord::Weights => Mode::WeightOnly {
                bits: self.bits,
                group: self.group,
                form: match self.packing {
                    PackingWord::Matmulnbits => Packing::MatMulNBits,
                    PackingWord::Blocks => Packing::Blocks,
                },
            },
        };
        let target = match self.target {
            TargetWord::Onnxruntime => Target::OnnxRuntime,
            TargetWord::Tensorrt => Target::TensorRt,
        };
        let int = match self.activations {
            TypeWord::U8 => IntType::U8,
            TypeWord::S8 => IntType::S8,
            TypeWord::U16 => IntType::U16,
            TypeWord::S16 => IntType::S16,
        };
        // TensorRT has one grid only.
        let activation = match target {
            Target::TensorRt => IntGrid::symmetric(IntType::S8),
            Target::OnnxRuntime => IntGrid { int, symmetric: self.symmetric, unused: 0 },
        };
        Ok(Settings {
            mode,
            target,
            activation,
            weights: Rounding {
                per_channel: !self.per_tensor,
                bits: 8,
                pairs: self.reduce_range,
                algorithm: self.rounding()?.0,
            },
            include: self.include.clone(),
            exclude: self.exclude.clone(),
            stored: self.store.clone(),
            attention: self.attention,
            force_conv: self.force_conv,
            fine: match (self.no_fine, self.fine.as_slice()) {
                (false, []) if self.effort == Some(Effort::Max) => vec![Fine::Mlp],
                (false, []) => vec![Fine::Gelu],
                (_, named) => named.to_vec(),
            },
        })
    }

    /// What is to be known of models that this makes, on the processor that it runs on.
    pub fn caution(&self) -> Option<String> {
        let bytes = matches!(self.activations, TypeWord::U8 | TypeWord::S8);
        let settings = self.settings().ok()?;
        let integers = bytes && matches!(settings.mode, Mode::Static | Mode::Dynamic);
        let saturating = integers && !settings.weights.pairs && settings.target == Target::OnnxRuntime;
        saturation("--reduce-range").filter(|_| saturating)
    }

    /// How to calibrate.
    pub fn options<'a>(&self, session: &'a Session, threads: usize) -> Result<CalibrateOptions<'a>> {
        let observer = observer::choose(&self.observer)?;
        Ok(CalibrateOptions {
            observer,
            threads,
            correct_bias: !self.no_bias_correction,
            headroom: self.headroom.unwrap_or(headroom(observer)),
            stop: session.stop(),
        })
    }

    /// The samples to calibrate with.
    pub fn samples(&self, session: &Session, preparation: &Preparation, model: &Model) -> Result<Data> {
        let Some(calib) = &self.calib else {
            return Err(Usage("--calib is needed: scales are found by running the model over samples".into()).into());
        };
        preparation.open(session, calib, &inputs(model))
    }

    /// Plans the folded model, and calibrates it where scales are static; how many samples that took.
    pub fn prepare(
        &self,
        session: &Session,
        (model, folded): (Model, Folded),
        preparation: &Preparation,
        threads: usize,
    ) -> Result<(Prepared, usize)> {
        let settings = self.settings()?;
        let before = plan(&model, &settings, &folded)?;
        let uncalibrated = match settings.mode {
            Mode::Static => false,
            Mode::Dynamic => self.calib.is_none(),
            Mode::WeightOnly { .. } => true,
        };
        if uncalibrated {
            return Ok((Prepared::uncalibrated(model, folded, before), 0));
        }
        let options = self.options(session, threads)?;
        let data = self.samples(session, preparation, &model)?;
        let meter = Meter::new(session, "calibrate", "samples");
        let (equalize, learned) = (self.equalize(), self.rounding()?.1);
        let runs = runs(&before, equalize, &options);
        let (samples, mut count) = (data.count()?, 0);
        meter.begin(runs * samples, 0);
        let mut progress = || {
            count += 1;
            meter.add_thing("");
        };
        let mut prepared = prepare(model, folded, &settings, &data, equalize, &options, &mut progress)?;
        if learned {
            let layers = layers(&Graph::new(prepared.model.graph())?, &prepared.plan).len();
            meter.begin(layers as u64, 0);
            learn(&mut prepared, Learning::default(), options.stop, &mut || meter.add_thing("rounding"))?;
        }
        Ok((prepared, count / runs as usize))
    }
}

/// Opens a model, fixes what is to be fixed, and folds it.
pub fn open(session: &Session, path: &Path, shapes: &Shapes, threads: usize) -> Result<(Model, Folded)> {
    let mut model = Model::open(path)?;
    if !model.unknown.is_empty() {
        let fields: Vec<&str> = model.unknown.iter().map(String::as_str).collect();
        session.remark(format!("fields that this version doesn't know are dropped: {}", fields.join(", ")));
    }
    shapes.freeze(&mut model)?;
    opset::upgrade(&mut model)?;
    let folded = fold_model(&mut model, threads)?;
    Ok((model, folded))
}

/// That products of bytes are added in 16 bits on this processor, and which flag avoids it; nothing where they aren't.
pub fn saturation(flag: &str) -> Option<String> {
    (cfg!(target_arch = "x86_64") && Isa::best() <= Isa::Avx2).then(|| {
        format!(
            "this processor has no VNNI: ONNX Runtime's sums of two products saturate on it, and accuracy falls; {flag} \
             avoids that"
        )
    })
}
