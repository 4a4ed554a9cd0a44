//! Quantizing a model block by block, each on what the blocks before it give now that they are quantized.
//!
//! ```text
//! float      x -> block -> y      what the block should give
//! quantized  x'-> its statistics, algorithms, learned rounding -> quantized block -> y'
//! ```
//! Two buffers of the residual stream (tokens, hidden) go through the model, and one block's weights and Gram matrices are
//! in memory at a time. Every finished block lies in a file ([`Blocks`]): going on after a stop runs the finished ones
//! forward only.

mod learn;

pub use learn::{Learned, Learning};

use crate::block::{Block, PARTS, Positions, part_shape, read, weight_name};
use crate::calibrate::CalibrationPlan;
use crate::config::ModelConfig;
use crate::error::{ModelError, Result};
use candle_core::{Device, Tensor};
use learn::Learner;
use nibble_quant::convert::{Blocks, OWN, levels_of};
use nibble_quant::format::source::TensorSource;
use nibble_quant::recipe::Action;
use nibble_quant::stats::Input;
use nibble_quant::{AlgoInput, Algorithm, QTensor, QuantError, QuantScheme, Recipe, algo};

/// Weights of a block by name.
type Quantized = Vec<(String, QTensor)>;

type Candle<T> = candle_core::Result<T>;

/// Sequences that run at once where no gradients are kept.
const BATCH: usize = 4;
/// Parts that are the first to read an input, and how many read it.
const SITES: [(usize, usize); 4] = [(0, 3), (3, 1), (4, 2), (6, 1)];

/// How to go through a model.
#[derive(Debug, Clone, Copy)]
pub struct SequentialPlan<'a> {
    /// Tokens and how they are cut up.
    pub calibration: &'a CalibrationPlan,
    /// How rounding is learned, for layers whose algorithm does.
    pub learning: Learning,
    /// Whether tables of levels are fitted to each layer.
    pub levels: bool,
    /// Seed of whatever is random.
    pub seed: u64,
}

/// What became of a block.
#[derive(Debug, Clone, PartialEq)]
pub struct BlockReport {
    /// Its number.
    pub layer: usize,
    /// Blocks of the model.
    pub of: usize,
    /// Whether it was done before.
    pub resumed: bool,
    /// What learning did, where a layer's rounding was learned.
    pub learned: Option<Learned>,
}

/// Quantizes every linear layer of a decoder that `recipe` quantizes, and keeps it in `blocks`. `progress` is told of each
/// block and answers whether to go on.
///
/// The same text gives the same tensors on any number of threads.
///
/// # Errors
/// The text is shorter than a chunk, a tensor can't be read or quantized, or a number isn't finite.
pub fn quantize_blocks(
    source: &dyn TensorSource,
    config: &ModelConfig,
    recipe: &Recipe,
    tokens: &[u32],
    plan: &SequentialPlan,
    blocks: &mut Blocks,
    mut progress: impl FnMut(&BlockReport) -> bool,
) -> Result<()> {
    let (chunks, tokens) = plan.calibration.chunks(tokens)?;
    let n_ctx = plan.calibration.n_ctx;
    let mut streams = Streams::new(source, config, &tokens[..chunks * n_ctx], plan.calibration)?;
    let of = config.layers.len();
    for layer in 0..of {
        let block = FloatBlock::load(source, config, layer)?;
        let target = block.run(&streams, &streams.float, &block.weights, &mut |_, _| Ok(()))?;
        let resumed = layer < blocks.done();
        let mut learned = None;
        if !resumed {
            let (tensors, what) = block.quantize(source, recipe, &streams, &target, plan)?;
            blocks.push(&tensors)?;
            learned = what;
        }
        let weights = block.quantized(layer, blocks)?;
        streams.quantized = block.run(&streams, &streams.quantized, &weights, &mut |_, _| Ok(()))?;
        streams.float = target;
        if !progress(&BlockReport { layer, of, resumed, learned }) {
            return Err(QuantError::Stopped.into());
        }
    }
    Ok(())
}

/// The residual stream before a block, in a float and in a quantized model.
struct Streams {
    positions: Positions,
    /// Tokens of a sequence.
    n_ctx: usize,
    /// (tokens, hidden)
    float: Vec<f32>,
    quantized: Vec<f32>,
}

impl Streams {
    fn new(source: &dyn TensorSource, config: &ModelConfig, tokens: &[u32], plan: &CalibrationPlan) -> Result<Streams> {
        const NAME: &str = "model.embed_tokens.weight";
        let (d, vocabulary) = (config.hidden, config.vocab_size);
        if source.info(NAME)?.shape != [vocabulary, d] {
            let why =
                format!("tensor `{NAME}` is {:?}; config.json asks for {vocabulary} x {d}", source.info(NAME)?.shape);
            return Err(ModelError::Damaged { path: source.path().to_path_buf(), why });
        }
        let (mut float, mut row) = (Vec::with_capacity(tokens.len() * d), Vec::new());
        for (i, token) in tokens.iter().enumerate() {
            let token = plan.bos.filter(|_| i % plan.n_ctx == 0).unwrap_or(*token) as usize;
            if token >= vocabulary {
                return Err(ModelError::Context { why: format!("token {token} of a model with {vocabulary} tokens") });
            }
            source.read_rows_f32(NAME, token..token + 1, &mut row)?;
            float.extend_from_slice(&row);
        }
        source.release(NAME);
        if let Some(scale) = config.embedding_scale {
            float.iter_mut().for_each(|v| *v *= scale);
        }
        let positions = Positions::new(config, plan.n_ctx)?;
        Ok(Streams { positions, n_ctx: plan.n_ctx, quantized: float.clone(), float })
    }
}

/// A block in floats.
struct FloatBlock<'a> {
    config: &'a ModelConfig,
    layer: usize,
    block: Block,
    /// (n, k) each, in the order of [`PARTS`].
    weights: Vec<Tensor>,
}

impl<'a> FloatBlock<'a> {
    fn load(source: &dyn TensorSource, config: &'a ModelConfig, layer: usize) -> Result<FloatBlock<'a>> {
        let weight = |part: usize| read(source, config, &weight_name(layer, part), &part_shape(config, part));
        let weights = (0..PARTS.len()).map(weight).collect::<Result<_>>()?;
        Ok(FloatBlock { config, layer, block: Block::load(source, config, layer)?, weights })
    }

    /// Sends a stream through the block with some weights; `seen` is shown the input of each linear layer.
    fn run(
        &self,
        streams: &Streams,
        stream: &[f32],
        weights: &[Tensor],
        seen: &mut dyn FnMut(usize, &Tensor) -> Result<()>,
    ) -> Result<Vec<f32>> {
        let d = self.config.hidden;
        let mut out = Vec::with_capacity(stream.len());
        for part in stream.chunks(BATCH * streams.n_ctx * d) {
            let x = Tensor::from_slice(part, (part.len() / d.max(1), d), &Device::Cpu)?;
            let mut refused = None;
            let y = self.block.forward(self.config, &streams.positions, &x, &mut |part, h| {
                if let Err(why) = seen(part, h) {
                    refused.get_or_insert(why);
                }
                h.matmul(&weights[part].t()?)
            })?;
            if let Some(why) = refused {
                return Err(why);
            }
            out.extend(y.flatten_all()?.to_vec1::<f32>()?);
        }
        match out.iter().position(|v| !v.is_finite()) {
            None => Ok(out),
            Some(at) => {
                let why = format!("the output of layer {} is {} for token {}", self.layer, out[at], at / d.max(1));
                Err(ModelError::Eval { why })
            }
        }
    }

    /// What the linear layers read from the quantized stream.
    fn observe(&self, streams: &Streams) -> Result<[Input; 4]> {
        let width = |site: usize| part_shape(self.config, SITES[site].0)[1];
        let mut inputs: [Input; 4] = std::array::from_fn(|site| Input::new(width(site), true));
        self.run(streams, &streams.quantized, &self.weights, &mut |part, h| {
            let Some(site) = SITES.iter().position(|(first, _)| *first == part) else { return Ok(()) };
            let values = h.flatten_all()?.to_vec1::<f32>()?;
            Ok(inputs[site].observe(&weight_name(self.layer, part), &values)?)
        })?;
        Ok(inputs)
    }

    /// The layers that the recipe quantizes, by its algorithms, and what learning did.
    fn quantize(
        &self,
        source: &dyn TensorSource,
        recipe: &Recipe,
        streams: &Streams,
        target: &[f32],
        plan: &SequentialPlan,
    ) -> Result<(Quantized, Option<Learned>)> {
        let inputs = self.observe(streams)?;
        let mut learner = Learner::new(self, streams, target, plan);
        let mut learns = false;
        for (site, (first, count)) in SITES.into_iter().enumerate() {
            for part in first..first + count {
                let name = weight_name(self.layer, part);
                let shape = part_shape(self.config, part);
                let Action::Quantize { name: title, scheme, algorithm } = recipe.decide(&name, &shape)?.action else {
                    continue;
                };
                let algorithm = algo::algorithm(algorithm)?;
                let weight = self.weights[part].flatten_all()?.to_vec1::<f32>()?;
                let scheme = match plan.levels && !title.contains(OWN) {
                    true => with_levels(source, &name, scheme, &inputs[site])?,
                    false => scheme,
                };
                let tensor = start(algorithm, &name, (&weight, shape), &scheme, (&inputs[site], plan.seed))?;
                learns |= algorithm.learns;
                learner.add(part, weight, tensor, algorithm.learns)?;
            }
        }
        let learned = match learns {
            true => Some(learner.learn()?),
            false => None,
        };
        Ok((learner.finish(), learned))
    }

    /// Weights as the finished block has them.
    fn quantized(&self, layer: usize, blocks: &Blocks) -> Result<Vec<Tensor>> {
        let weight = |part: usize| match blocks.tensor(&weight_name(layer, part))? {
            Some(tensor) => Ok(Tensor::from_vec(tensor.dequantize(), self.weights[part].dims(), &Device::Cpu)?),
            None => Ok(self.weights[part].clone()),
        };
        (0..PARTS.len()).map(weight).collect()
    }
}

fn with_levels(source: &dyn TensorSource, name: &str, mut scheme: QuantScheme, seen: &Input) -> Result<QuantScheme> {
    if let Some(grid) = levels_of(source, source.info(name)?, &scheme.weight, &seen.mean_squares())? {
        scheme.weight.grid = grid;
    }
    source.release(name);
    Ok(scheme)
}

fn start(
    algorithm: &Algorithm,
    name: &str,
    (weight, shape): (&[f32], [usize; 2]),
    scheme: &QuantScheme,
    (seen, seed): (&Input, u64),
) -> Result<QTensor> {
    let importance = seen.mean_squares();
    let input = AlgoInput {
        name,
        weight,
        shape,
        spec: &scheme.weight,
        importance: Some(&importance),
        calibrated: Some(seen),
        seed,
    };
    Ok((algorithm.run)(&input)?)
}

#[cfg(test)]
mod tests;
