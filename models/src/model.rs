//! A model on a device: checkpoint, tokenizer and chat template, ready to generate.

use crate::backend::Backend;
use crate::config::ModelConfig;
use crate::cpu::CpuBackend;
use crate::decoder::Decoder;
use crate::error::{ModelError, Result};
use crate::sidecars::Sidecars;
use crate::template::ChatTemplate;
use crate::tokenizer::{GgufVocab, Tokenizer};
use crate::weights::Weights;
use nibble_kernels::{ActKind, Pool};
use nibble_quant::format::gguf::GgufCheckpoint;
use nibble_quant::format::{self, TensorSource};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// How a model is to be run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ModelOptions {
    /// Threads; the physical cores this process may use if absent.
    pub threads: Option<usize>,
    /// In which numbers activations meet quantized weights.
    pub activations: ActKind,
}

impl Default for ModelOptions {
    fn default() -> Self {
        ModelOptions { threads: None, activations: ActKind::I8 }
    }
}

impl ModelOptions {
    /// Everything but the weights in single precision.
    pub fn exact() -> ModelOptions {
        ModelOptions { activations: ActKind::F32, ..ModelOptions::default() }
    }
}

/// A checkpoint on a device, the CPU if nothing else is said.
pub struct Model<B: Backend = CpuBackend> {
    path: PathBuf,
    sidecars: Sidecars,
    decoder: Decoder<B>,
    file_bytes: u64,
    parameters: u64,
}

impl Model {
    /// Opens a checkpoint of any format that nibble reads, a folder or a GGUF file, and packs its weights.
    ///
    /// # Errors
    /// The folder, config.json or a tensor can't be used; the error names it.
    pub fn load(path: impl AsRef<Path>, options: &ModelOptions) -> Result<Model> {
        let pool = Arc::new(Pool::new(options.threads.unwrap_or_else(Pool::default_threads)));
        Self::load_on(path, pool, options.activations)
    }

    /// The same on threads that are there already.
    ///
    /// # Errors
    /// As [`Model::load`].
    pub fn load_on(path: impl AsRef<Path>, pool: Arc<Pool>, activations: ActKind) -> Result<Model> {
        Self::load_with(path, CpuBackend::new(pool, activations))
    }
}

impl<B: Backend> Model<B> {
    /// The same on any device.
    ///
    /// # Errors
    /// As [`Model::load`]; or the device refuses.
    pub fn load_with(path: impl AsRef<Path>, backend: B) -> Result<Model<B>> {
        Self::open(path.as_ref(), |path, source, sidecars| Self::pack(path, source, sidecars, backend))
    }

    /// A model and its tokenizer, which are read at the same time.
    ///
    /// # Errors
    /// As [`Model::load_with`] and [`Model::tokenizer`].
    pub fn load_speaking(path: impl AsRef<Path>, backend: B) -> Result<(Model<B>, Tokenizer)> {
        Self::open(path.as_ref(), |path, source, sidecars| {
            // Not after a minute of packing.
            Tokenizer::json(&sidecars)?;
            std::thread::scope(|scope| {
                let files = sidecars.clone();
                let tokenizer = scope.spawn(move || {
                    let tokenizer = Tokenizer::from_sidecars(&files);
                    // Several times the file, for its parsing.
                    nibble_kernels::give_back_freed_memory();
                    tokenizer
                });
                let model = Self::pack(path, source, sidecars, backend);
                let tokenizer = tokenizer.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
                let (model, tokenizer) = (model?, tokenizer?);
                tokenizer.check_vocab(model.decoder.config().vocab_size)?;
                Ok((model, tokenizer))
            })
        })
    }

    fn open<R>(path: &Path, then: impl FnOnce(&Path, &dyn TensorSource, Sidecars) -> Result<R>) -> Result<R> {
        match format::detect(path)?.name {
            "gguf" => {
                let source = GgufCheckpoint::open(path)?;
                let sidecars = gguf_sidecars(&source, "float32")?;
                then(path, &source, sidecars)
            }
            _ => then(path, &*format::open(path)?, Sidecars::folder(path)),
        }
    }

    fn pack(path: &Path, source: &dyn TensorSource, sidecars: Sidecars, backend: B) -> Result<Model<B>> {
        let file = sidecars.file("config.json");
        let json = serde_json::from_slice(&sidecars.need("config.json")?)
            .map_err(|e| ModelError::Damaged { path: file.clone(), why: format!("not JSON: {e}") })?;
        let config = ModelConfig::from_json(&file, &json)?;
        let decoder = Decoder::load(&config, Weights::new(source), backend)?;
        let file_bytes = source.infos().iter().map(|info| info.bytes as u64).sum();
        let parameters = source.infos().iter().map(|info| info.elements() as u64).sum();
        Ok(Model { path: path.to_path_buf(), sidecars, decoder, file_bytes, parameters })
    }

    /// The decoder.
    pub fn decoder(&self) -> &Decoder<B> {
        &self.decoder
    }

    /// The decoder alone.
    pub fn into_decoder(self) -> Decoder<B> {
        self.decoder
    }

    /// The folder or file it was loaded from.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its configuration and tokenizer files.
    pub fn sidecars(&self) -> &Sidecars {
        &self.sidecars
    }

    /// Bytes of all tensors in the checkpoint.
    pub fn file_bytes(&self) -> u64 {
        self.file_bytes
    }

    /// Values of all tensors in the checkpoint.
    pub fn parameters(&self) -> u64 {
        self.parameters
    }

    /// Its tokenizer, checked against the embedding.
    ///
    /// # Errors
    /// The files are missing or damaged, or name tokens that the model lacks.
    pub fn tokenizer(&self) -> Result<Tokenizer> {
        let tokenizer = Tokenizer::from_sidecars(&self.sidecars)?;
        tokenizer.check_vocab(self.decoder.config().vocab_size)?;
        Ok(tokenizer)
    }

    /// Its chat template.
    ///
    /// # Errors
    /// There is none, or it can't be read.
    pub fn chat_template(&self) -> Result<ChatTemplate> {
        ChatTemplate::from_sidecars(&self.sidecars)?.ok_or_else(|| ModelError::Damaged {
            path: self.path.clone(),
            why: "no chat template: neither chat_template.jinja nor `chat_template` in tokenizer_config.json"
                .to_string(),
        })
    }
}

/// A checkpoint's tensors by their Hugging Face names, whatever its format.
pub(crate) fn open(path: &Path) -> Result<Box<dyn TensorSource>> {
    match format::detect(path)?.name {
        "gguf" => Ok(Box::new(GgufCheckpoint::open(path)?)),
        _ => Ok(format::open(path)?),
    }
}

/// The files that a GGUF file's metadata amounts to: `config.json`, `generation_config.json`, `tokenizer.json` and
/// `tokenizer_config.json` with the chat template. `dtype` is what config.json says of the weights' type.
///
/// # Errors
/// The metadata lacks or contradicts what one of them needs.
pub fn gguf_sidecars(source: &GgufCheckpoint, dtype: &str) -> Result<Sidecars> {
    let path = source.path();
    let tokenizer = GgufVocab::from_metadata(path, source.gguf().metadata())?.to_files()?;
    let files = [
        ("config.json", source.config(dtype)?),
        ("generation_config.json", source.generation_config()?),
        ("tokenizer.json", tokenizer.tokenizer),
        ("tokenizer_config.json", tokenizer.tokenizer_config),
    ];
    let held = files.into_iter().map(|(name, value)| (name.to_owned(), format!("{value:#}\n").into_bytes()));
    Ok(Sidecars::held(path, held.collect()))
}
