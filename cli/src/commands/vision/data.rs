//! Samples: which files, and what is done to pictures. `nibble vision data` writes what a model would see.

use crate::commands::Run;
use crate::output;
use crate::session::Session;
use anyhow::{Context, Result};
use nibble_models::graph::{Input, inputs};
use nibble_models::vision::data::{Data as Samples, DataOptions};
use nibble_models::vision::picture::{PREPROCESS, preprocess};
use nibble_quant::onnx::{Model, fold};
use serde_json::json;
use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};

/// How samples are made of files.
#[derive(Debug, Clone, clap::Args)]
pub struct Preparation {
    /// What is done to pictures: imagenet, lite, half, clip, unit or pixel
    #[arg(long, value_name = "NAME", default_value = "imagenet")]
    preprocess: String,
    /// Take so many drawn crops of each picture instead of its middle
    #[arg(long, value_name = "N", default_value_t = 0)]
    crops: usize,
    /// Seed of the crops
    #[arg(long, value_name = "SEED", default_value_t = 0)]
    seed: u64,
    /// Pictures go in with blue first
    #[arg(long)]
    bgr: bool,
    /// Use at most this many samples
    #[arg(long, value_name = "N")]
    samples: Option<usize>,
    /// The tokenizer.json that makes tokens of texts: each line of a .txt file is a sample
    #[arg(long, value_name = "FILE")]
    tokenizer: Option<PathBuf>,
    /// Use at most this many tokens of a text
    #[arg(long, value_name = "N", default_value_t = 128)]
    tokens: usize,
}

impl Preparation {
    /// The samples of a file or folder for a model with these inputs.
    pub fn open(&self, session: &Session, path: &Path, inputs: &[Input]) -> Result<Samples> {
        let options = DataOptions {
            preprocess: preprocess(&self.preprocess)?,
            crops: self.crops,
            seed: self.seed,
            bgr: self.bgr,
            limit: self.samples,
            tokenizer: self.tokenizer.clone(),
            tokens: self.tokens,
        };
        let samples = Samples::open(path, inputs, options)?;
        if let [first, rest @ ..] = samples.passed_over() {
            let more = if rest.is_empty() { String::new() } else { format!(" and {} more", rest.len()) };
            session.remark(format!("{}{more}: passed over, no pictures, arrays or texts", first.display()));
        }
        Ok(samples)
    }
}

/// A file to write.
#[derive(Debug, Clone, clap::Args)]
pub struct Output {
    /// The file to write
    #[arg(long, short, value_name = "FILE")]
    pub output: PathBuf,
    /// Replace it if it is there
    #[arg(long)]
    force: bool,
}

impl Output {
    /// Refuses a file that is there.
    pub fn check(&self) -> Result<()> {
        output::may_write(&self.output, self.force)
    }
}

/// What of a model's inputs is fixed.
#[derive(Debug, Clone, clap::Args)]
pub struct Shapes {
    /// Fix the batch size, which lets more be folded
    #[arg(long, value_name = "N")]
    batch: Option<usize>,
    /// Fix an input's shape: NAME=1x3x224x224
    #[arg(long = "shape", value_name = "NAME=DIMS")]
    shapes: Vec<String>,
}

impl Shapes {
    /// Fixes them in a model.
    pub fn freeze(&self, model: &mut Model) -> Result<()> {
        let mut shapes = BTreeMap::new();
        for text in &self.shapes {
            let (name, dims) =
                text.rsplit_once('=').with_context(|| format!("shape `{text}`: wanted NAME=1x3x224x224"))?;
            let dims = dims.split(['x', ',']).map(|d| d.trim().parse::<usize>().ok().filter(|&d| d > 0));
            let dims = dims
                .collect::<Option<Vec<usize>>>()
                .with_context(|| format!("shape `{text}`: wanted NAME=1x3x224x224"))?;
            shapes.insert(name.to_owned(), dims);
        }
        Ok(fold::freeze(model, self.batch, &shapes)?)
    }
}

/// Write the samples that a model would be given as an .npy file, to look at or to give to other tools
#[derive(Debug, clap::Args)]
#[command(after_help = after_help())]
pub struct Data {
    /// The model whose input is made
    #[arg(value_name = "MODEL.onnx")]
    model: PathBuf,
    /// A folder of pictures or arrays, or one of them
    #[arg(value_name = "DATA")]
    data: PathBuf,
    #[command(flatten)]
    output: Output,
    #[command(flatten)]
    shapes: Shapes,
    #[command(flatten)]
    preparation: Preparation,
}

fn after_help() -> String {
    let rows = PREPROCESS.iter().map(|p| format!("  {:<9} {}", p.name, p.summary)).collect::<Vec<_>>().join("\n");
    format!("Example: nibble vision data model.onnx photos -o samples.npy --crops 8\n\nWhat --preprocess does:\n{rows}")
}

impl Run for Data {
    fn run(self, session: &Session) -> Result<()> {
        self.output.check()?;
        let mut model = Model::open(&self.model)?;
        self.shapes.freeze(&mut model)?;
        let inputs = inputs(&model);
        let data = self.preparation.open(session, &self.data, &inputs)?;
        let (mut values, mut dims): (Vec<f32>, Vec<usize>) = (Vec::new(), Vec::new());
        let count = data.each(&mut |sample, file| {
            for (name, tensor) in &sample {
                let floats = tensor.as_floats(name)?;
                if dims.is_empty() {
                    dims = tensor.dims.clone();
                }
                if dims != tensor.dims {
                    let why = format!("gives a sample of shape {:?}, the others have {dims:?}", tensor.dims);
                    return Err(nibble_models::ModelError::Damaged { path: file.to_owned(), why });
                }
                values.extend_from_slice(floats);
            }
            Ok(true)
        })?;
        if let Some(batch) = dims.first_mut() {
            *batch = count;
        }
        let path = &self.output.output;
        write_npy(path, &dims, &values)?;
        if session.json {
            return output::json(&json!({"path": path, "shape": dims, "samples": count}));
        }
        output::say(&format!("{}: {count} samples of shape {:?}", path.display(), &dims[1..]))
    }
}

/// Writes an array in NumPy's format (version 1.0), whole or not at all.
fn write_npy(path: &Path, dims: &[usize], values: &[f32]) -> Result<()> {
    // As NumPy itself writes it: some readers know no other spacing.
    let mut shape = dims.iter().map(usize::to_string).collect::<Vec<_>>().join(", ");
    if dims.len() == 1 {
        shape.push(',');
    }
    let mut header = format!("{{'descr': '<f4', 'fortran_order': False, 'shape': ({shape}), }}");
    // Magic, version, length and header together are a multiple of 64 bytes, and end in a newline.
    while (10 + header.len() + 1) % 64 != 0 {
        header.push(' ');
    }
    header.push('\n');
    let temp = path.with_extension("npy.part");
    let attempt = || -> std::io::Result<()> {
        let mut out = std::io::BufWriter::new(std::fs::File::create(&temp)?);
        out.write_all(b"\x93NUMPY\x01\x00")?;
        out.write_all(&(header.len() as u16).to_le_bytes())?;
        out.write_all(header.as_bytes())?;
        for value in values {
            out.write_all(&value.to_le_bytes())?;
        }
        out.into_inner().map_err(|e| e.into_error())?.sync_all()?;
        std::fs::rename(&temp, path)
    };
    attempt().with_context(|| format!("can't write {}", path.display()))
}
