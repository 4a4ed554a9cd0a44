//! ONNX Runtime, the engine that most quantized models are made for, from its shared library.
//!
//! Nothing of it is linked or fetched: the library is opened when it is asked for. The PyPI package `onnxruntime` has one.

use super::{GraphRunner, Input, Packed, Tensor, Values, asking_for, inputs, refuse};
use crate::{ModelError, Result};
use nibble_quant::onnx::Model;
use ort::environment::Environment;
use ort::session::{OutputSelector, RunOptions, Session, SessionInputValue};
use ort::value::{DynValue, Tensor as OrtTensor, TensorElementType, ValueType};
use std::borrow::Cow;
use std::collections::HashMap;
use std::path::Path;
use std::sync::{Mutex, PoisonError};

/// The library that this process has opened: it can't have a second one, nor the first one again once it is dropped.
static OPENED: Mutex<Option<Environment>> = Mutex::new(None);

/// The opened library.
pub struct OrtLibrary {
    environment: Environment,
}

/// A graph in ONNX Runtime, on its CPU provider with all of its optimizations.
pub struct Ort {
    session: Mutex<Session>,
    inputs: Vec<Input>,
    /// The type that each input wants.
    types: HashMap<String, TensorElementType>,
}

impl OrtLibrary {
    /// Opens a library; a process has one, and a second call gives the first one.
    ///
    /// # Errors
    /// A file that isn't ONNX Runtime's library, or one older than what this version talks to.
    pub fn open(path: &Path) -> Result<OrtLibrary> {
        let damaged = |why: String| ModelError::Damaged { path: path.to_owned(), why };
        // A name without a folder would be looked for beside the program and then in the system's folders.
        let path = std::path::absolute(path).map_err(ModelError::io(path))?;
        std::fs::metadata(&path).map_err(ModelError::io(&path))?;
        let mut opened = OPENED.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(environment) = &*opened {
            return Ok(OrtLibrary { environment: environment.clone() });
        }
        let builder = ort::init_from(&path).map_err(|e| damaged(format!("not ONNX Runtime's library: {e}")))?;
        let environment = builder.with_name("nibble").with_telemetry(false).build();
        let environment = environment.map_err(|e| damaged(e.to_string()))?;
        *opened = Some(environment.clone());
        Ok(OrtLibrary { environment })
    }
}

impl Ort {
    /// Loads a model; tensors named in `kept` can be asked for like its outputs. Each of them may keep operators from
    /// being fused, so that times are those of the model only without any.
    ///
    /// # Errors
    /// A graph that ONNX Runtime refuses, with what it says.
    pub fn new(library: &OrtLibrary, model: &Model, kept: &[String], threads: usize) -> Result<Ort> {
        let failed = |e: &dyn std::fmt::Display| refuse("graph", format!("ONNX Runtime can't load it: {e}"));
        let mut builder = Session::builder(&library.environment)
            .and_then(|b| Ok(b.with_intra_threads(threads.max(1))?))
            .map_err(|e| failed(&e))?;
        let session = match Packed::new(&asking_for(model, kept))? {
            Packed::Bytes(bytes) => builder.commit_from_memory(&bytes),
            Packed::File { path, _folder } => builder.commit_from_file(path),
        };
        let session = session.map_err(|e| failed(&e))?;
        let types = session.inputs().iter().filter_map(|input| match input.dtype() {
            ValueType::Tensor { ty, .. } => Some((input.name().to_owned(), *ty)),
            _ => None,
        });
        Ok(Ort { types: types.collect(), inputs: inputs(model), session: Mutex::new(session) })
    }
}

impl GraphRunner for Ort {
    fn inputs(&self) -> &[Input] {
        &self.inputs
    }

    fn run(&self, feeds: &[(String, Tensor)], wanted: &[String]) -> Result<Vec<Tensor>> {
        let mut values: Vec<(Cow<str>, SessionInputValue)> = Vec::new();
        for (name, tensor) in feeds {
            let Some(&ty) = self.types.get(name) else { return Err(refuse(name, "is no input of the graph")) };
            values.push((name.as_str().into(), value(name, tensor, ty)?.into()));
        }
        let selected = wanted.iter().fold(OutputSelector::no_default(), |s, name| s.with(name));
        let options = RunOptions::new().map_err(|e| refuse("graph", e))?.with_outputs(selected);
        let mut session = self.session.lock().unwrap_or_else(PoisonError::into_inner);
        let results = session.run_with_options(values, &options).map_err(|e| refuse("graph", e))?;
        let found = |name: &String| match results.get(name.as_str()) {
            Some(value) => convert(name, value),
            None => Err(refuse(name, "isn't made by the graph")),
        };
        wanted.iter().map(found).collect()
    }
}

/// A value of the type that an input wants.
fn value(name: &str, tensor: &Tensor, ty: TensorElementType) -> Result<DynValue> {
    fn of<T: ort::value::PrimitiveTensorElementType + std::fmt::Debug + Clone + 'static>(
        dims: &[usize],
        values: Vec<T>,
    ) -> ort::Result<DynValue> {
        Ok(OrtTensor::from_array((dims.to_vec(), values))?.into_dyn())
    }
    fn narrow<T: TryFrom<i32>>(name: &str, values: &[i32], ty: TensorElementType) -> Result<Vec<T>> {
        let one = |&v: &i32| T::try_from(v).map_err(|_| refuse(name, format!("takes {ty}, a sample holds {v}")));
        values.iter().map(one).collect()
    }
    let dims = tensor.dims.as_slice();
    let made = match (&tensor.values, ty) {
        (Values::Float(v), TensorElementType::Float32) => of(dims, v.clone()),
        (Values::Float(v), TensorElementType::Float64) => of(dims, v.iter().map(|&x| f64::from(x)).collect()),
        (Values::Int(v), TensorElementType::Int64) => of(dims, v.iter().map(|&x| i64::from(x)).collect()),
        (Values::Int(v), TensorElementType::Int32) => of(dims, v.clone()),
        (Values::Int(v), TensorElementType::Uint8) => of(dims, narrow::<u8>(name, v, ty)?),
        (Values::Int(v), TensorElementType::Int8) => of(dims, narrow::<i8>(name, v, ty)?),
        (Values::Int(v), TensorElementType::Bool) => of(dims, v.iter().map(|&x| x != 0).collect()),
        (_, ty) => return Err(refuse(name, format!("takes {ty}, which no sample is made of"))),
    };
    made.map_err(|e| refuse(name, e))
}

fn convert(name: &str, value: &DynValue) -> Result<Tensor> {
    let ValueType::Tensor { ty, shape, .. } = value.dtype() else {
        return Err(refuse(name, format!("is {}, a tensor was wanted", value.dtype())));
    };
    let dims = shape.iter().map(|&d| d.max(0) as usize).collect();
    macro_rules! values {
        ($kind:ident, $from:ty, $each:expr) => {{
            let (_, values) = value.try_extract_tensor::<$from>().map_err(|e| refuse(name, e))?;
            Values::$kind(values.iter().map($each).collect())
        }};
    }
    let values = match ty {
        TensorElementType::Float32 => values!(Float, f32, |&v| v),
        TensorElementType::Float64 => values!(Float, f64, |&v| v as f32),
        TensorElementType::Int64 => values!(Int, i64, |&v| v.clamp(i32::MIN.into(), i32::MAX.into()) as i32),
        TensorElementType::Int32 => values!(Int, i32, |&v| v),
        TensorElementType::Uint8 => values!(Int, u8, |&v| v.into()),
        TensorElementType::Int8 => values!(Int, i8, |&v| v.into()),
        TensorElementType::Bool => values!(Int, bool, |&v| v.into()),
        other => return Err(refuse(name, format!("holds {other}, which isn't read here"))),
    };
    Ok(Tensor { dims, values })
}
