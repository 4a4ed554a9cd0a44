//! Which engine runs graphs.

use crate::failure::Usage;
use anyhow::Result;
use nibble_models::graph::{GraphRunner, Rten};
use nibble_quant::onnx::Model;
use std::path::PathBuf;

/// The choice of an engine.
#[derive(Debug, Clone, clap::Args)]
pub struct Engine {
    /// What runs the models: the embedded engine, or ONNX Runtime
    #[arg(long, value_enum, default_value_t)]
    engine: EngineWord,
    /// ONNX Runtime's shared library (the PyPI package onnxruntime has one: onnxruntime/capi/libonnxruntime.so...)
    #[arg(long, value_name = "FILE", env = "NIBBLE_ORT_LIBRARY")]
    ort_library: Option<PathBuf>,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, clap::ValueEnum)]
enum EngineWord {
    #[default]
    Rten,
    Ort,
}

impl Engine {
    /// Loads models that can be asked for these tensors.
    pub fn load(&self, models: &[Model], kept: &[String], threads: usize) -> Result<Vec<Box<dyn GraphRunner>>> {
        match self.engine {
            EngineWord::Ort => self.onnx_runtime(models, kept, threads),
            EngineWord::Rten => {
                let load = |model| Ok(Box::new(Rten::new(model, kept, threads)?) as Box<dyn GraphRunner>);
                models.iter().map(load).collect()
            }
        }
    }

    /// Loads models in ONNX Runtime, whichever engine was chosen.
    #[cfg(feature = "ort")]
    pub fn onnx_runtime(&self, models: &[Model], kept: &[String], threads: usize) -> Result<Vec<Box<dyn GraphRunner>>> {
        use nibble_models::graph::{Ort, OrtLibrary};
        let Some(path) = &self.ort_library else {
            let why = "--ort-library (or NIBBLE_ORT_LIBRARY) is needed: the path of ONNX Runtime's shared library";
            return Err(Usage(why.into()).into());
        };
        let library = OrtLibrary::open(path)?;
        let load = |model| Ok(Box::new(Ort::new(&library, model, kept, threads)?) as Box<dyn GraphRunner>);
        models.iter().map(load).collect()
    }

    /// Says that it can't.
    #[cfg(not(feature = "ort"))]
    pub fn onnx_runtime(&self, _: &[Model], _: &[String], _: usize) -> Result<Vec<Box<dyn GraphRunner>>> {
        let why = "this nibble was built without ONNX Runtime; build it with `--features ort`";
        Err(Usage(why.into()).into())
    }
}
