//! Running ONNX graphs: values in by name, any tensor out by name.
//!
//! [`GraphRunner`] is what calibration and evaluation need of an engine. The embedded one is [`Rten`], in pure Rust: it
//! runs the float model and its quantized form, without anything to install. With the feature `ort` there is also `Ort`,
//! ONNX Runtime out of its shared library.

mod integers;
#[cfg(feature = "ort")]
mod ort;
mod rten;

#[cfg(feature = "ort")]
pub use ort::{Ort, OrtLibrary};
pub use rten::Rten;

use crate::{ModelError, Result};
use nibble_quant::onnx::file::MAX_PROTOBUF;
use nibble_quant::onnx::fold::Computed;
use nibble_quant::onnx::proto::{ModelProto, ValueInfoProto};
use nibble_quant::onnx::{External, Model, fold};
use prost::Message;
use std::path::PathBuf;

/// A tensor's values, row-major.
#[derive(Debug, Clone, PartialEq)]
pub enum Values {
    /// Floats of any width.
    Float(Vec<f32>),
    /// Integers of any width, and truth values as 0 and 1.
    Int(Vec<i32>),
}

/// A value of a graph.
#[derive(Debug, Clone, PartialEq)]
pub struct Tensor {
    /// Its shape.
    pub dims: Vec<usize>,
    /// As many values as the shape has elements.
    pub values: Values,
}

/// An input of a graph.
#[derive(Debug, Clone, PartialEq)]
pub struct Input {
    /// Its name.
    pub name: String,
    /// Its shape; open dimensions are `None`. Empty if the file doesn't say.
    pub dims: Vec<Option<usize>>,
    /// Whether it takes floats.
    pub float: bool,
}

/// An engine with a graph loaded.
pub trait GraphRunner {
    /// The graph's inputs.
    fn inputs(&self) -> &[Input];

    /// Runs the graph: `wanted` tensors, in order.
    ///
    /// # Errors
    /// A name that isn't there, a value that doesn't fit its input, or an operator that fails; each by name.
    fn run(&self, feeds: &[(String, Tensor)], wanted: &[String]) -> Result<Vec<Tensor>>;
}

impl Tensor {
    /// Floats of a shape.
    ///
    /// # Errors
    /// The number of values isn't the shape's; `what` is what the error calls it.
    pub fn floats(what: &str, dims: &[usize], values: Vec<f32>) -> Result<Tensor> {
        if dims.iter().product::<usize>() != values.len() {
            return Err(ModelError::Graph { what: what.into(), why: format!("{} values for {dims:?}", values.len()) });
        }
        Ok(Tensor { dims: dims.to_vec(), values: Values::Float(values) })
    }

    /// The values, if they are floats.
    ///
    /// # Errors
    /// They are integers; `what` is what the error calls it.
    pub fn as_floats(&self, what: &str) -> Result<&[f32]> {
        match &self.values {
            Values::Float(values) => Ok(values),
            Values::Int(_) => {
                Err(ModelError::Graph { what: what.into(), why: "holds integers, floats were wanted".into() })
            }
        }
    }
}

fn refuse(what: &str, why: impl ToString) -> ModelError {
    ModelError::Graph { what: what.into(), why: why.to_string() }
}

/// A model with more of its tensors as outputs.
fn asking_for(model: &Model, kept: &[String]) -> ModelProto {
    let mut proto = model.proto.clone();
    let outputs = &mut proto.graph.get_or_insert_default().output;
    for name in kept {
        if !outputs.iter().any(|o| o.name() == name) {
            outputs.push(ValueInfoProto { name: Some(name.clone()), ..Default::default() });
        }
    }
    proto
}

/// A model as engines load it.
enum Packed {
    /// In one piece.
    Bytes(Vec<u8>),
    /// Over 2 GB only a file with its weights beside it can be read.
    File {
        path: PathBuf,
        /// The folder goes with this value.
        _folder: tempfile::TempDir,
    },
}

impl Packed {
    fn new(proto: &ModelProto) -> Result<Packed> {
        if proto.encoded_len() as u64 <= MAX_PROTOBUF {
            return Ok(Packed::Bytes(proto.encode_to_vec()));
        }
        let folder = tempfile::tempdir().map_err(ModelError::io(std::env::temp_dir()))?;
        let path = folder.path().join("model.onnx");
        Model { proto: proto.clone(), ..Default::default() }.save(&path, External::Always)?;
        Ok(Packed::File { path, _folder: folder })
    }
}

/// The inputs of a model as its file declares them.
pub fn inputs(model: &Model) -> Vec<Input> {
    use nibble_quant::onnx::Graph;
    use nibble_quant::onnx::proto::DataType;
    // An index refuses a broken graph; the declared inputs of such a graph are of no use.
    let Ok(graph) = Graph::new(model.graph()) else { return Vec::new() };
    let dims = |name: &str| graph.shape(name).unwrap_or_default();
    let open = |d: Option<i64>| d.and_then(|d| usize::try_from(d).ok()).filter(|&d| d > 0);
    let inputs = model.graph().input.iter().filter(|i| graph.constant(i.name()).is_none());
    inputs
        .map(|input| Input {
            name: input.name().to_owned(),
            dims: dims(input.name()).into_iter().map(open).collect(),
            float: graph.elem_type(input.name()).is_none_or(DataType::is_float),
        })
        .collect()
}

/// Tensors of a model that its inputs' values don't matter to: constants, and what depends on shapes.
///
/// # Errors
/// As [`Rten::new`] and [`GraphRunner::run`].
pub fn constants(model: &Model, wanted: &[String], threads: usize) -> Result<Vec<Tensor>> {
    let runner = Rten::new(model, wanted, threads)?;
    let feed = |input: &Input| {
        // Open dimensions may be anything.
        let dims: Vec<usize> = input.dims.iter().map(|d| d.unwrap_or(1)).collect();
        let n = dims.iter().product();
        let values = if input.float { Values::Float(vec![0.0; n]) } else { Values::Int(vec![0; n]) };
        (input.name.clone(), Tensor { dims, values })
    };
    let feeds: Vec<(String, Tensor)> = runner.inputs().iter().map(feed).collect();
    runner.run(&feeds, wanted)
}

/// Folds a model, with constants computed by the embedded engine where the model's inputs and operators let it.
///
/// # Errors
/// As [`fold::fold`], and operators that the engine can't run.
pub fn fold_model(model: &mut Model, threads: usize) -> Result<fold::Folded> {
    let mut evaluate = |model: &Model, wanted: &[String]| {
        let computed = constants(model, wanted, threads).map_err(|e| match e {
            ModelError::Quant(e) => e,
            other => nibble_quant::QuantError::Spec { what: "folding".into(), why: other.to_string() },
        })?;
        let shaped = computed.into_iter().map(|t| match t.values {
            Values::Float(values) => Computed::Floats { dims: t.dims, values },
            Values::Int(values) => Computed::Ints { dims: t.dims, values },
        });
        Ok(shaped.collect())
    };
    Ok(fold::fold(model, Some(&mut evaluate))?)
}
