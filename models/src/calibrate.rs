//! What a model's linear layers are fed with: statistics of their inputs over a text.
//!
//! The model runs in floats over chunks of the text, from an empty cache each, and [`Tap`] shows the input of every
//! linear layer once for all layers that read it. Second moments are always kept; Gram matrices, which take
//! `width^2 / 2` f32 each, as far as the memory that is granted reaches, the smallest ones first.

use crate::backend::Backend;
use crate::decoder::{ContextPlan, Decoder, Site, Tap};
use crate::error::{ModelError, Result};
use nibble_quant::QuantError;
use nibble_quant::stats::{Input, Stats, gram_bytes};
use std::sync::Arc;

/// How to calibrate.
#[derive(Debug, Clone, PartialEq)]
pub struct CalibrationPlan {
    /// Tokens of a chunk.
    pub n_ctx: usize,
    /// Most tokens to run; all of the text without it.
    pub tokens: Option<usize>,
    /// Bytes that Gram matrices may take together.
    pub gram_bytes: u64,
    /// The token that every chunk begins with, as at the beginning of a text.
    pub bos: Option<u32>,
    /// What the text is, in words.
    pub text: String,
}

impl CalibrationPlan {
    /// How many chunks are run, and the tokens that they are cut from.
    ///
    /// # Errors
    /// There is none.
    pub(crate) fn chunks<'a>(&self, tokens: &'a [u32]) -> Result<(usize, &'a [u32])> {
        let tokens = &tokens[..self.tokens.unwrap_or(tokens.len()).min(tokens.len())];
        match tokens.len().checked_div(self.n_ctx) {
            None | Some(0) => {
                let why = format!("the calibration text has {} tokens; one chunk takes {}", tokens.len(), self.n_ctx);
                Err(ModelError::Eval { why })
            }
            Some(chunks) => Ok((chunks, tokens)),
        }
    }
}

/// What calibration gave.
#[derive(Debug, Clone)]
pub struct Calibration {
    /// The statistics.
    pub stats: Stats,
    /// Tokens that were run.
    pub tokens: usize,
    /// Inputs with and without a Gram matrix.
    pub grams: (usize, usize),
}

/// Layers that read one input, by place.
pub(crate) const SITES: [(Site, &[&str]); 4] = [
    (Site::Qkv, &["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]),
    (Site::Output, &["self_attn.o_proj"]),
    (Site::GateUp, &["mlp.gate_proj", "mlp.up_proj"]),
    (Site::Down, &["mlp.down_proj"]),
];

/// Runs a model over a text and keeps what its linear layers read. `progress` is told the chunks done and of how many;
/// it answers whether to go on.
///
/// The same tokens give the same statistics on any number of threads.
///
/// # Errors
/// The text is shorter than a chunk, the model can't run, or an activation isn't finite.
pub fn calibrate<B: Backend>(
    model: &Decoder<B>,
    tokens: &[u32],
    plan: &CalibrationPlan,
    mut progress: impl FnMut(usize, usize) -> bool,
) -> Result<Calibration> {
    let (chunks, tokens) = plan.chunks(tokens)?;
    let mut watch = Watch::new(model, plan.gram_bytes);
    let context = ContextPlan { capacity: plan.n_ctx, chunk: plan.n_ctx.min(512), ..ContextPlan::default() };
    let mut cx = model.context(context)?;
    let mut chunk = Vec::with_capacity(plan.n_ctx);
    for (i, text) in tokens.chunks_exact(plan.n_ctx).enumerate() {
        cx.truncate(model.backend(), 0, 0)?;
        chunk.clear();
        chunk.extend_from_slice(text);
        if let Some(bos) = plan.bos {
            chunk[0] = bos;
        }
        for piece in chunk.chunks(cx.plan().chunk) {
            model.forward(&mut cx, &[(0, piece)], Some(&mut watch))?;
            if let Some(refused) = watch.refused.take() {
                return Err(refused.into());
            }
        }
        if !progress(i + 1, chunks) {
            return Err(QuantError::Stopped.into());
        }
    }
    Ok(watch.finish(chunks * plan.n_ctx, plan))
}

/// Gathers what the tap shows.
struct Watch {
    /// (layers) of the four sites.
    layers: Vec<[Input; 4]>,
    refused: Option<QuantError>,
}

impl Watch {
    fn new<B: Backend>(model: &Decoder<B>, memory: u64) -> Watch {
        let config = model.config();
        let widths = [config.hidden, config.q_width(), config.hidden, config.ffn];
        let layers = config.layers.len();
        let mut by_size = [0, 1, 2, 3];
        by_size.sort_by_key(|site| widths[*site]);
        let (mut left, mut granted) = (memory, [0usize; 4]);
        for site in by_size {
            let each = gram_bytes(widths[site]);
            granted[site] = layers.min(usize::try_from(left / each.max(1)).unwrap_or(usize::MAX));
            left -= granted[site] as u64 * each;
        }
        let layer = |i: usize| std::array::from_fn(|site| Input::new(widths[site], i < granted[site]));
        Watch { layers: (0..layers).map(layer).collect(), refused: None }
    }

    fn finish(self, tokens: usize, plan: &CalibrationPlan) -> Calibration {
        let made_from = format!("{} ({tokens} tokens in chunks of {})", plan.text, plan.n_ctx);
        let mut stats = Stats { made_from, ..Stats::default() };
        let mut grams = (0, 0);
        for (layer, inputs) in self.layers.into_iter().enumerate() {
            for (input, (_, names)) in inputs.into_iter().zip(SITES) {
                match input.gram() {
                    Some(_) => grams.0 += 1,
                    None => grams.1 += 1,
                }
                let input = Arc::new(input);
                let name = |part: &&str| (format!("model.layers.{layer}.{part}.weight"), Arc::clone(&input));
                stats.inputs.extend(names.iter().map(name));
            }
        }
        Calibration { stats, tokens, grams }
    }
}

impl Tap for Watch {
    fn linear_input(&mut self, layer: usize, site: Site, values: &[f32], _width: usize) {
        let Some(at) = SITES.iter().position(|(known, _)| *known == site) else { return };
        let Some(input) = self.layers.get_mut(layer).map(|inputs| &mut inputs[at]) else { return };
        let name = format!("model.layers.{layer}.{}.weight", SITES[at].1[0]);
        if let Err(refused) = input.observe(&name, values) {
            self.refused.get_or_insert(refused);
        }
    }
}
