//! What commands that run a model share: how it is run, how tokens are chosen, and loading it.

use crate::arguments::{Threads, unescape};
use crate::output;
use crate::progress::duration;
use crate::session::Session;
use anyhow::{Context as _, Result};
use clap::ValueEnum;
use nibble_kernels::{ActKind, Pool};
use nibble_models::Model;
use nibble_models::backend::{Backend, KvKind};
use nibble_models::cpu::CpuBackend;
use nibble_models::generate::{GenerateOptions, Generation};
use nibble_models::sample::SampleSettings;
use nibble_models::tokenizer::Tokenizer;
use serde::Deserialize;
use serde_json::{Value, json};
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

/// How a model is run.
#[derive(Debug, Clone, clap::Args)]
pub struct Running {
    #[command(flatten)]
    pub threads: Threads,
    /// Numbers that activations are in when they meet quantized weights
    #[arg(long, value_enum, value_name = "TYPE", default_value_t = Activations::Auto)]
    pub activations: Activations,
    /// How keys and values are kept
    #[arg(long, value_enum, value_name = "TYPE", default_value_t = Kv::F16)]
    pub kv: Kv,
    /// Where the model runs; on a GPU --threads and --activations have no effect
    #[arg(long, value_enum, value_name = "DEVICE", default_value_t = Device::Cpu)]
    pub device: Device,
}

/// Where a model runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Device {
    /// This machine's processor
    Cpu,
    /// The first NVIDIA GPU
    Cuda,
}

impl Device {
    /// As it is typed.
    pub fn name(self) -> &'static str {
        match self {
            Device::Cpu => "cpu",
            Device::Cuda => "cuda",
        }
    }
}

/// Numbers that activations are in when they meet quantized weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Activations {
    /// bfloat16 for many rows where this CPU multiplies tiles of them (AMX), int8 otherwise: fastest
    Auto,
    /// int8 with a scale every 32 values: fast, and the same bits on every CPU
    Int8,
    /// Single precision: exact
    F32,
}

impl Activations {
    /// As kernels know it.
    pub fn kind(self) -> ActKind {
        match self {
            Activations::Auto => ActKind::Bf16,
            Activations::Int8 => ActKind::I8,
            Activations::F32 => ActKind::F32,
        }
    }

    /// As it is typed.
    pub fn name(self) -> &'static str {
        match self {
            Activations::Auto => "auto",
            Activations::Int8 => "int8",
            Activations::F32 => "f32",
        }
    }
}

/// How keys and values are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Kv {
    /// Half precision
    F16,
    /// int8 with a scale a head and position
    Int8,
    /// Single precision
    F32,
}

impl Kv {
    /// As the backend knows it.
    pub fn kind(self) -> KvKind {
        match self {
            Kv::F16 => KvKind::F16,
            Kv::Int8 => KvKind::Int8,
            Kv::F32 => KvKind::F32,
        }
    }
}

/// A model ready to speak.
pub struct Speaker<B: Backend> {
    /// Its weights.
    pub model: Model<B>,
    /// Its tokenizer.
    pub tokenizer: Tokenizer,
    /// Seconds that loading took.
    pub load_seconds: f64,
    /// The threads that were asked for; the model's own where it runs on them.
    pub pool: Arc<Pool>,
}

/// What a command does with a model, wherever that runs.
pub trait WithSpeaker {
    /// Does it.
    ///
    /// # Errors
    /// Whatever the command can't do.
    fn run<B: Backend>(self, speaker: Speaker<B>) -> Result<()>;
}

impl Running {
    /// Loads a model with its tokenizer on the device that was asked for, and does `work` with it.
    pub fn with(&self, session: &Session, checkpoint: &str, work: impl WithSpeaker) -> Result<()> {
        let path = crate::hub::checkpoint(session, checkpoint)?;
        let start = Instant::now();
        let pool = Arc::new(Pool::new(self.threads.threads.map_or_else(Pool::default_threads, Into::into)));
        match self.device {
            Device::Cpu => {
                let backend = CpuBackend::new(Arc::clone(&pool), self.activations.kind());
                work.run(load(&path, backend, pool, start)?)
            }
            #[cfg(feature = "cuda")]
            Device::Cuda => work.run(load(&path, open_gpu(session)?, pool, start)?),
            #[cfg(not(feature = "cuda"))]
            Device::Cuda => Err(without_cuda()),
        }
    }
}

fn load<B: Backend>(path: &Path, backend: B, pool: Arc<Pool>, start: Instant) -> Result<Speaker<B>> {
    let (model, tokenizer) = Model::load_speaking(path, backend)?;
    Ok(Speaker { model, tokenizer, load_seconds: start.elapsed().as_secs_f64(), pool })
}

/// Opens the first GPU and says which it is.
#[cfg(feature = "cuda")]
pub fn open_gpu(session: &Session) -> Result<nibble_models::cuda::CudaBackend<nibble_kernels::cuda::driver::Driver>> {
    let driver = nibble_kernels::cuda::driver::Driver::open(0)?;
    session.remark(format!("on {}", driver.name()?));
    Ok(nibble_models::cuda::CudaBackend::new(nibble_kernels::cuda::Cuda::new(driver)?)?)
}

/// What a build without CUDA says to `--device cuda`.
#[cfg(not(feature = "cuda"))]
pub fn without_cuda() -> anyhow::Error {
    let why = "this nibble was built without CUDA; build it with `cargo build --release --features cuda`";
    crate::failure::Usage(why.to_string()).into()
}

/// How tokens are chosen and when an answer ends.
#[derive(Debug, Clone, clap::Args)]
pub struct Sampling {
    /// Most tokens to generate
    #[arg(short = 'n', long, value_name = "N", default_value_t = 256)]
    pub max_tokens: usize,
    /// 0 takes the likeliest token; above, the larger the wilder [default: the model's generation_config.json, else 0]
    #[arg(long, alias = "temp", value_name = "T")]
    pub temperature: Option<f32>,
    /// Choose among this many of the likeliest tokens, 0 for all
    #[arg(long, value_name = "K")]
    pub top_k: Option<usize>,
    /// Choose among the likeliest tokens that together have this probability
    #[arg(long, value_name = "P")]
    pub top_p: Option<f32>,
    /// Leave out tokens below this share of the likeliest one's probability
    #[arg(long, value_name = "P")]
    pub min_p: Option<f32>,
    /// Above 1: makes tokens that were there already less likely
    #[arg(long, alias = "repeat-penalty", value_name = "R")]
    pub repetition_penalty: Option<f32>,
    /// Seed of the random numbers: the same seed gives the same text
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub seed: u64,
    /// Text that ends the answer (may be given several times; \n and \t are understood)
    #[arg(long, value_name = "TEXT", value_parser = unescape)]
    pub stop: Vec<String>,
    /// Go on past the tokens that end an answer
    #[arg(long)]
    pub ignore_eos: bool,
}

/// What generation_config.json says about sampling.
#[derive(Debug, Default, Deserialize)]
struct GenerationConfig {
    do_sample: Option<bool>,
    temperature: Option<f32>,
    top_k: Option<usize>,
    top_p: Option<f32>,
    min_p: Option<f32>,
    repetition_penalty: Option<f32>,
}

impl Sampling {
    /// The options for a model: what was typed, else what its generation_config.json says, else the likeliest token.
    pub fn options<B: Backend>(&self, model: &Model<B>) -> Result<GenerateOptions> {
        let own = GenerationConfig::read(model)?;
        let neutral = SampleSettings::default();
        let own_temperature = match own.do_sample {
            Some(true) => Some(own.temperature.unwrap_or(1.0)),
            _ => None,
        };
        let sample = SampleSettings {
            temperature: self.temperature.or(own_temperature).unwrap_or(0.0),
            top_k: self.top_k.or(own.top_k).unwrap_or(neutral.top_k),
            top_p: self.top_p.or(own.top_p).unwrap_or(neutral.top_p),
            min_p: self.min_p.or(own.min_p).unwrap_or(neutral.min_p),
            repetition_penalty: self
                .repetition_penalty
                .or(own.repetition_penalty)
                .unwrap_or(neutral.repetition_penalty),
            seed: self.seed,
            ..neutral
        };
        Ok(GenerateOptions {
            max_tokens: self.max_tokens,
            sample,
            stop: self.stop.clone(),
            ignore_eos: self.ignore_eos,
        })
    }
}

impl GenerationConfig {
    fn read<B: Backend>(model: &Model<B>) -> Result<GenerationConfig> {
        const NAME: &str = "generation_config.json";
        let Some(json) = model.sidecars().json(NAME)? else { return Ok(GenerationConfig::default()) };
        let path = model.sidecars().file(NAME);
        serde_json::from_value(json).with_context(|| format!("{}: can't be read", path.display()))
    }
}

/// What generating took, in a line.
pub fn timings(answer: &Generation, load_seconds: Option<f64>) -> String {
    let load = load_seconds.map(|s| format!("loaded in {}; ", duration(s))).unwrap_or_default();
    let finish = finish(answer);
    format!(
        "[{load}prompt {} tokens, {:.1} t/s; answer {} tokens, {:.1} t/s; ended by {finish}]",
        answer.prompt_tokens,
        answer.prompt_tokens_per_second(),
        answer.tokens.len(),
        answer.tokens_per_second(),
    )
}

fn finish(answer: &Generation) -> &'static str {
    use nibble_models::generate::Finish;
    match answer.finish {
        Finish::Stop => "the model",
        Finish::Length => "--max-tokens",
        Finish::Context => "a full context",
        Finish::Cancelled => "the user",
    }
}

/// An answer as JSON.
pub fn answer_json(answer: &Generation) -> Value {
    json!({
        "text": answer.text,
        "tokens": answer.tokens,
        "finish": answer.finish,
        "prompt_tokens": answer.prompt_tokens,
        "completion_tokens": answer.tokens.len(),
        "prompt_seconds": answer.prompt_seconds,
        "decode_seconds": answer.decode_seconds,
        "prompt_tokens_per_second": answer.prompt_tokens_per_second(),
        "tokens_per_second": answer.tokens_per_second(),
    })
}

/// Takes an answer's text as it comes: prints it, unless all of it is printed as JSON at the end.
pub struct Stream<'a> {
    session: &'a Session,
    failed: Option<anyhow::Error>,
}

impl<'a> Stream<'a> {
    /// A stream to stdout.
    pub fn new(session: &'a Session) -> Stream<'a> {
        Stream { session, failed: None }
    }

    /// Takes a piece and says whether more is wanted: not after Ctrl-C, and not without a reader.
    pub fn take(&mut self, piece: &str) -> bool {
        if !self.session.json
            && let Err(error) = output::write(piece)
        {
            self.failed = Some(error);
        }
        self.failed.is_none() && !self.session.stopped()
    }

    /// Ends the answer's line, or says why it couldn't be printed.
    pub fn end(self) -> Result<()> {
        match self.failed {
            Some(error) => Err(error),
            None if self.session.json => Ok(()),
            None => output::write("\n"),
        }
    }
}
