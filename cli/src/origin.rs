//! What a conversion starts from.

use crate::gate;
use anyhow::{Context as _, Result, bail};
use clap::builder::{PossibleValue, PossibleValuesParser};
use nibble_models::{ModelConfig, Tokenizer, gguf_sidecars};
use nibble_quant::format::gguf::GgufCheckpoint;
use nibble_quant::format::{self, TensorSource};
use nibble_quant::stats::Turn;
use nibble_quant::transform::{Arguments, Kind, TRANSFORMS, transform};
use std::path::{Path, PathBuf};

/// A checkpoint's tensors, as they are or rewritten while they are read, and what goes with them.
pub struct Origin<'a> {
    path: &'a Path,
    source: &'a dyn TensorSource,
    /// config.json, where it isn't the checkpoint's own.
    config: Option<Vec<u8>>,
}

impl<'a> Origin<'a> {
    /// The checkpoint of `path` as it is, or with its residual stream [turned](turn), so that its output head has weights of
    /// its own.
    ///
    /// # Errors
    /// It is turned and has no config.json, or norms that can't be folded.
    pub fn new(
        path: &'a Path,
        source: &'a dyn TensorSource,
        turned: Option<&'a dyn TensorSource>,
    ) -> Result<Origin<'a>> {
        let Some(source) = turned else { return Ok(Origin { path, source, config: None }) };
        let config = gate::sidecars(path)?.need("config.json")?;
        let config = rewritten(&path.join("config.json"), &config, true, None)?;
        Ok(Origin { path, source, config: Some(config) })
    }

    /// Its tensors.
    pub fn source(&self) -> &'a dyn TensorSource {
        self.source
    }

    /// Its configuration.
    ///
    /// # Errors
    /// There is none, or it can't be read.
    pub fn config(&self) -> Result<ModelConfig> {
        let json = match &self.config {
            Some(bytes) => serde_json::from_slice(bytes)?,
            None => gate::sidecars(self.path)?.json("config.json")?.context("there is no config.json")?,
        };
        Ok(ModelConfig::from_json(&self.path.join("config.json"), &json)?)
    }

    /// Its tokenizer.
    ///
    /// # Errors
    /// There is none, it can't be read, or the model has fewer tokens.
    pub fn tokenizer(&self) -> Result<Tokenizer> {
        let tokenizer = gate::tokenizer(self.path)?;
        tokenizer.check_vocab(self.config()?.vocab_size)?;
        Ok(tokenizer)
    }

    /// Puts its configuration among the files that are written beside the weights.
    pub fn add_config(&self, files: &mut Vec<(PathBuf, Vec<u8>)>) {
        let Some(config) = &self.config else { return };
        files.retain(|(name, _)| name.as_os_str() != "config.json");
        files.push((PathBuf::from("config.json"), config.clone()));
    }
}

/// A checkpoint's tensors turned while they are read, if they are to be.
///
/// # Errors
/// As [`Transform::apply`](nibble_quant::transform::Transform::apply).
pub fn turn<'a>(source: &'a dyn TensorSource, by: Option<&Turn>) -> Result<Option<Box<dyn TensorSource + 'a>>> {
    let Some(by) = by else { return Ok(None) };
    let arguments = Arguments { seed: by.seed, stats: None };
    Ok(Some(transform(&by.rotation)?.apply(source, &arguments)?))
}

/// The table of rotations as words to type.
pub fn rotations() -> PossibleValuesParser {
    let rotations = TRANSFORMS.iter().filter(|row| matches!(row.kind, Kind::Rotation(_)));
    PossibleValuesParser::new(rotations.map(|row| PossibleValue::new(row.name).help(row.summary)))
}

/// config.json of the same model rewritten: with an output head of its own if it gets one, and weights in another type.
pub fn rewritten(file: &Path, bytes: &[u8], own_head: bool, dtype: Option<&str>) -> Result<Vec<u8>> {
    let mut json: serde_json::Value = serde_json::from_slice(bytes)?;
    if ModelConfig::from_json(file, &json)?.norm_add_one {
        bail!("its norms multiply by 1 + gain; what becomes of such gains isn't known here");
    }
    if own_head {
        json["tie_word_embeddings"] = false.into();
    }
    for name in ["torch_dtype", "dtype"] {
        if let (Some(dtype), Some(word)) = (dtype, json.get_mut(name)) {
            *word = dtype.into();
        }
    }
    Ok(format!("{json:#}\n").into_bytes())
}

/// A checkpoint's tensors, and the files that have to be made for it: a GGUF's configuration and tokenizer.
#[expect(clippy::type_complexity, reason = "a pair that is taken apart at once")]
pub fn open(path: &Path) -> Result<(Box<dyn TensorSource>, Vec<(PathBuf, Vec<u8>)>)> {
    if format::detect(path)?.name != "gguf" {
        return Ok((format::open(path)?, Vec::new()));
    }
    let source = GgufCheckpoint::open(path)?;
    let extra = gguf_sidecars(&source, "float32")?.into_files();
    Ok((Box::new(source), extra))
}
