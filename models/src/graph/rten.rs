//! The embedded engine: rten, a pure Rust runtime that loads ONNX.

use super::{GraphRunner, Input, Packed, Tensor, Values, asking_for, inputs, integers, refuse};
use crate::Result;
use nibble_quant::onnx::Model;
use nibble_quant::onnx::proto::{AttributeProto, GraphProto, ModelProto};
use rten::{ModelOptions, RunOptions, ThreadPool, Value, ValueOrView, ValueView};
use rten_tensor::prelude::*;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

/// A graph in rten.
pub struct Rten {
    model: rten::Model,
    inputs: Vec<Input>,
    /// Threads of a run.
    threads: usize,
    /// Those that no run has now, if each has its own; else one for all.
    pools: Pools,
}

enum Pools {
    Shared(Arc<ThreadPool>),
    Own(Mutex<Vec<Arc<ThreadPool>>>),
}

impl Rten {
    /// Loads a model; tensors named in `kept` can be asked for like its outputs, all others may be optimized away.
    ///
    /// # Errors
    /// An operator that rten doesn't have, by its node, or a graph that it can't load.
    pub fn new(model: &Model, kept: &[String], threads: usize) -> Result<Rten> {
        Rten::with(model, kept, threads, ModelOptions::with_all_ops())
    }

    /// The same for many runs: weights are kept a second time, as products want them, and products of integers are
    /// computed in integers where that is exact.
    ///
    /// # Errors
    /// As [`Rten::new`].
    pub fn packed(model: &Model, kept: &[String], threads: usize) -> Result<Rten> {
        let mut options = ModelOptions::with_all_ops();
        options.prepack_weights(true);
        match integers::exact() {
            true => Rten::with(&integers::spelled_out(model)?, kept, threads, options),
            false => Rten::with(model, kept, threads, options),
        }
    }

    /// For so many runs at a time, each by a thread of its own, rayon's workers not among them: those take up other work
    /// while they wait. Each run has its share of the threads for itself, and none waits for pieces of another's products.
    pub fn side_by_side(mut self, runs: usize) -> Rten {
        self.threads /= runs.clamp(1, self.threads);
        self.pools = Pools::Own(Mutex::default());
        self
    }

    fn with(model: &Model, kept: &[String], threads: usize, mut options: ModelOptions) -> Result<Rten> {
        let mut proto = asking_for(model, kept);
        // The version is how rten tells ONNX from other files.
        proto.ir_version.get_or_insert(8);
        spell_out_kernels(proto.graph.get_or_insert_default());
        // The optimizer gives up where it finds that two of the tensors asked for are one; without it they are two.
        let loaded = match load(&proto, &options) {
            Err(_) => load(&proto, options.enable_optimization(false))?,
            Ok(loaded) => loaded,
        };
        let threads = threads.max(1);
        let pools = Pools::Shared(Arc::new(ThreadPool::with_num_threads(threads)));
        Ok(Rten { model: loaded, inputs: inputs(model), threads, pools })
    }

    /// [`GraphRunner::run`] with values that are somebody else's.
    ///
    /// # Errors
    /// As there.
    pub fn run_borrowed(&self, feeds: &[(&str, &Tensor)], wanted: &[String]) -> Result<Vec<Tensor>> {
        let mut values: Vec<(rten::NodeId, ValueOrView)> = Vec::new();
        for &(name, tensor) in feeds {
            let id = self.model.node_id(name).map_err(|e| refuse(name, e))?;
            let view = match &tensor.values {
                Values::Float(values) => {
                    ValueView::from_shape(&tensor.dims, values.as_slice()).map_err(|e| e.to_string())
                }
                Values::Int(values) => {
                    ValueView::from_shape(&tensor.dims, values.as_slice()).map_err(|e| e.to_string())
                }
            };
            values.push((id, view.map_err(|e| refuse(name, e))?.into()));
        }
        // A tensor that is asked for twice is computed once.
        let mut place: HashMap<&str, usize> = HashMap::new();
        let mut ids = Vec::new();
        for name in wanted {
            if !place.contains_key(name.as_str()) {
                ids.push(self.model.node_id(name).map_err(|e| refuse(name, e))?);
                place.insert(name, ids.len() - 1);
            }
        }
        let pool = match &self.pools {
            Pools::Shared(pool) => Arc::clone(pool),
            Pools::Own(free) => {
                let kept = free.lock().unwrap_or_else(PoisonError::into_inner).pop();
                kept.unwrap_or_else(|| Arc::new(ThreadPool::with_num_threads(self.threads)))
            }
        };
        let options = RunOptions::default().with_thread_pool(Some(Arc::clone(&pool)));
        let results = self.model.run(values, &ids, Some(options));
        if let Pools::Own(free) = &self.pools {
            free.lock().unwrap_or_else(PoisonError::into_inner).push(pool);
        }
        let results = results.map_err(|e| refuse("graph", e))?;
        let mut converted = Vec::with_capacity(results.len());
        for (value, (name, _)) in results.into_iter().zip(sorted(&place)) {
            converted.push(convert(name, value)?);
        }
        if wanted.len() == converted.len() {
            return Ok(converted);
        }
        Ok(wanted.iter().map(|name| converted[place[name.as_str()]].clone()).collect())
    }
}

/// Convolutions get the kernel's shape where they leave it to their weights, as ONNX lets them: rten counts dimensions
/// by it.
fn spell_out_kernels(graph: &mut GraphProto) {
    let mut shapes: HashMap<String, Vec<i64>> =
        graph.initializer.iter().map(|t| (t.name().to_owned(), t.dims.clone())).collect();
    for node in graph.node.iter().filter(|n| n.is("DequantizeLinear") || n.is("Cast")) {
        if let Some(dims) = shapes.get(node.arg(0)).cloned() {
            shapes.insert(node.out().to_owned(), dims);
        }
    }
    for node in graph.node.iter_mut().filter(|n| n.is("Conv") || n.is("ConvTranspose")) {
        let dims = shapes.get(node.arg(1)).filter(|_| node.attr("kernel_shape").is_none());
        if let Some([_, _, kernel @ ..]) = dims.map(Vec::as_slice) {
            node.attribute.push(AttributeProto::new_ints("kernel_shape", kernel));
        }
    }
}

fn load(proto: &ModelProto, options: &ModelOptions) -> Result<rten::Model> {
    let loaded = match Packed::new(proto)? {
        Packed::Bytes(bytes) => options.load(bytes),
        Packed::File { path, _folder } => options.load_file(path),
    };
    loaded.map_err(|e| refuse(e.node().unwrap_or("graph"), format!("rten can't load it: {e}")))
}

impl GraphRunner for Rten {
    fn inputs(&self) -> &[Input] {
        &self.inputs
    }

    fn run(&self, feeds: &[(String, Tensor)], wanted: &[String]) -> Result<Vec<Tensor>> {
        let feeds: Vec<(&str, &Tensor)> = feeds.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
        self.run_borrowed(&feeds, wanted)
    }
}

fn sorted<'a>(place: &HashMap<&'a str, usize>) -> Vec<(&'a str, usize)> {
    let mut all: Vec<(&str, usize)> = place.iter().map(|(&name, &at)| (name, at)).collect();
    all.sort_by_key(|&(_, at)| at);
    all
}

fn convert(name: &str, value: Value) -> Result<Tensor> {
    let dims = value.shape().to_vec();
    let values = match value {
        Value::FloatTensor(t) => Values::Float(t.into_data()),
        Value::Int32Tensor(t) => Values::Int(t.into_data()),
        Value::Int8Tensor(t) => Values::Int(t.into_data().into_iter().map(i32::from).collect()),
        Value::UInt8Tensor(t) => Values::Int(t.into_data().into_iter().map(i32::from).collect()),
        other => return Err(refuse(name, format!("is a {}, a tensor was wanted", other.dtype()))),
    };
    Ok(Tensor { dims, values })
}
