//! One layer of a decoder in candle's tensors: where gradients flow through it, and where a conversion goes through a
//! model a block at a time.
//!
//! It has to give what [`crate::decoder`] gives; a test holds them together.

mod attention;

use crate::config::{Activation, ModelConfig};
pub(crate) use crate::decoder::PARTS;
use crate::error::{ModelError, Result};
use attention::Attention;
use candle_core::{Device, Tensor};
use nibble_quant::format::source::TensorSource;

type Candle<T> = candle_core::Result<T>;

const Q: usize = 0;
const K: usize = 1;
const V: usize = 2;
const O: usize = 3;
const GATE: usize = 4;
const UP: usize = 5;
const DOWN: usize = 6;

/// The name of a linear layer's weight.
pub(crate) fn weight_name(layer: usize, part: usize) -> String {
    format!("model.layers.{layer}.{}.weight", PARTS[part])
}

/// (outputs, inputs) of a linear layer.
pub(crate) fn part_shape(config: &ModelConfig, part: usize) -> [usize; 2] {
    let (d, f, qd, kd) = (config.hidden, config.ffn, config.q_width(), config.kv_width());
    match part {
        Q => [qd, d],
        K | V => [kd, d],
        O => [d, qd],
        GATE | UP => [f, d],
        _ => [d, f],
    }
}

/// A vector or matrix of exactly this shape, gains as they multiply.
pub(crate) fn read(source: &dyn TensorSource, config: &ModelConfig, name: &str, shape: &[usize]) -> Result<Tensor> {
    let found = &source.info(name)?.shape;
    if found != shape {
        let why = format!("tensor `{name}` is {found:?}; config.json asks for {shape:?}");
        return Err(ModelError::Damaged { path: source.path().to_path_buf(), why });
    }
    let mut values = Vec::new();
    source.read_f32(name, &mut values)?;
    source.release(name);
    if name.ends_with("norm.weight") && config.norm_add_one {
        values.iter_mut().for_each(|g| *g += 1.0);
    }
    Ok(Tensor::from_vec(values, shape, &Device::Cpu)?)
}

/// The parameters of a layer but for its weights.
pub(crate) struct Block {
    layer: usize,
    attention_norm: Tensor,
    ffn_norm: Tensor,
    q_norm: Option<Tensor>,
    k_norm: Option<Tensor>,
    biases: [Option<Tensor>; 7],
}

/// Rotary positions, and how many tokens a sequence has.
pub(crate) struct Positions {
    /// (tokens, 1, rotated pairs)
    cos: Tensor,
    sin: Tensor,
    tokens: usize,
}

impl Positions {
    pub(crate) fn new(config: &ModelConfig, tokens: usize) -> Candle<Positions> {
        let rope = config.rope.frequencies();
        let angle = |f: fn(f64) -> f64| -> Candle<Tensor> {
            let values: Vec<f32> = (0..tokens)
                .flat_map(|p| rope.inv_freq.iter().map(move |w| f(p as f64 * *w as f64) as f32))
                .map(|v| v * rope.attention_factor)
                .collect();
            Tensor::from_vec(values, (tokens, 1, rope.inv_freq.len()), &Device::Cpu)
        };
        Ok(Positions { cos: angle(f64::cos)?, sin: angle(f64::sin)?, tokens })
    }
}

impl Block {
    pub(crate) fn load(source: &dyn TensorSource, config: &ModelConfig, layer: usize) -> Result<Block> {
        let vector = |part: &str, n: usize| read(source, config, &format!("model.layers.{layer}.{part}"), &[n]);
        let head_norm = |part: &str| match config.qk_norm {
            true => vector(part, config.head_dim).map(Some),
            false => Ok(None),
        };
        let mut biases: [Option<Tensor>; 7] = Default::default();
        for (part, bias) in biases.iter_mut().enumerate() {
            let has = match part {
                Q | K | V => config.qkv_bias,
                O => config.o_bias,
                _ => config.mlp_bias,
            };
            if has {
                *bias = Some(vector(&format!("{}.bias", PARTS[part]), part_shape(config, part)[0])?);
            }
        }
        Ok(Block {
            layer,
            attention_norm: vector("input_layernorm.weight", config.hidden)?,
            ffn_norm: vector("post_attention_layernorm.weight", config.hidden)?,
            q_norm: head_norm("self_attn.q_norm.weight")?,
            k_norm: head_norm("self_attn.k_norm.weight")?,
            biases,
        })
    }

    /// What the layer makes of the residual stream `x`, (sequences * tokens, hidden). `product` multiplies the input of a
    /// linear layer, (sequences * tokens, k), by the weight of one of [`PARTS`].
    pub(crate) fn forward(
        &self,
        config: &ModelConfig,
        positions: &Positions,
        x: &Tensor,
        product: &mut dyn FnMut(usize, &Tensor) -> Candle<Tensor>,
    ) -> Candle<Tensor> {
        let c = config;
        let mut linear = |part: usize, x: &Tensor| -> Candle<Tensor> {
            let y = product(part, &x.contiguous()?)?;
            match &self.biases[part] {
                Some(bias) => y.broadcast_add(bias),
                None => Ok(y),
            }
        };
        let scaled = |y: Tensor| -> Candle<Tensor> {
            match c.residual_scale {
                Some(scale) => y * scale as f64,
                None => Ok(y),
            }
        };
        let h = rms_norm(x, &self.attention_norm, c.rms_eps)?;
        let (tokens, turn) = (positions.tokens, c.layers[self.layer].rope);
        let sequences = x.dim(0)? / tokens.max(1);
        let heads = |x: Tensor, norm: Option<&Tensor>, heads: usize, turn: bool| -> Candle<Tensor> {
            let mut x = x.reshape((sequences, tokens, heads, c.head_dim))?;
            if let Some(gain) = norm {
                x = rms_norm(&x, gain, c.rms_eps)?;
            }
            if turn {
                x = rotate(&x, positions)?;
            }
            x.transpose(1, 2)?.contiguous()?.reshape((sequences * heads, tokens, c.head_dim))
        };
        let q = heads(linear(Q, &h)?, self.q_norm.as_ref(), c.heads, turn)?;
        let k = heads(linear(K, &h)?, self.k_norm.as_ref(), c.kv_heads, turn)?;
        let v = heads(linear(V, &h)?, None, c.kv_heads, false)?;
        let op = Attention {
            heads: c.heads,
            kv_heads: c.kv_heads,
            scale: c.query_scale,
            softcap: c.attention_softcap,
            window: c.layers[self.layer].window,
        };
        let attended = op.apply(&q, &k, &v)?.reshape((sequences, c.heads, tokens, c.head_dim))?;
        let attended = attended.transpose(1, 2)?.contiguous()?.reshape((sequences * tokens, c.q_width()))?;
        let x = (x + scaled(linear(O, &attended)?)?)?;
        let h = rms_norm(&x, &self.ffn_norm, c.rms_eps)?;
        let gate = linear(GATE, &h)?;
        let gate = match c.activation {
            Activation::Silu => gate.silu()?,
            Activation::GeluTanh => gate.gelu()?,
        };
        let product = (gate * linear(UP, &h)?)?;
        x + scaled(linear(DOWN, &product)?)?
    }
}

/// x / rms(x) * gain over the last dimension.
pub(crate) fn rms_norm(x: &Tensor, gain: &Tensor, eps: f32) -> Candle<Tensor> {
    let width = x.dims().last().copied().unwrap_or(1);
    let mean = (x.sqr()?.sum_keepdim(candle_core::D::Minus1)? / width as f64)?;
    x.broadcast_div(&(mean + eps as f64)?.sqrt()?)?.broadcast_mul(gain)
}

/// Rotary positions by halves, (sequences, tokens, heads, head width).
fn rotate(x: &Tensor, positions: &Positions) -> Candle<Tensor> {
    let (_, _, _, width) = x.dims4()?;
    let pairs = positions.cos.dim(2)?;
    let (a, b) = (x.narrow(3, 0, pairs)?, x.narrow(3, pairs, pairs)?);
    let first = (a.broadcast_mul(&positions.cos)? - b.broadcast_mul(&positions.sin)?)?;
    let second = (b.broadcast_mul(&positions.cos)? + a.broadcast_mul(&positions.sin)?)?;
    match width - 2 * pairs {
        0 => Tensor::cat(&[first, second], 3),
        rest => Tensor::cat(&[first, second, x.narrow(3, 2 * pairs, rest)?], 3),
    }
}
