//! Rewrites of a decoder that leave its float function as it is, a row of [`TRANSFORMS`] each.
//!
//! RMS norms commute with rotations: once their gains are folded into the linears that follow, the residual stream can
//! be turned by any orthogonal Q.
//! ```text
//! E <- E Q      q, k, v, gate, up, head <- W diag(gain) Q      o, down <- Q^T W, biases too      gains <- 1
//! ```
//! The output head sees another gain than the embedding, so it gets weights of its own.
//!
//! [`Transformed`] is a [`TensorSource`] over another one: rows are rewritten in f64 as they are read, and no more than
//! one tensor is in memory. Factors on columns ([`Factored`]) are the other kind.

mod factors;
mod rotation;

pub use factors::{Factored, Site};
pub use rotation::Rotation;

use crate::error::Result;
use crate::format::source::encode_f32;
use crate::format::{Dtype, Stored, TensorInfo, TensorSource, tensor_error};
use crate::stats::Stats;
use crate::{QuantError, names};
use rayon::prelude::*;
use std::borrow::Cow;
use std::collections::HashMap;
use std::ops::Range;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

/// A rewrite with a name.
#[derive(Debug, Clone, Copy)]
pub struct Transform {
    /// The word for it in flags.
    pub name: &'static str,
    /// One line on what it does.
    pub summary: &'static str,
    /// What it rewrites.
    pub kind: Kind,
}

/// What a transform rewrites.
#[derive(Debug, Clone, Copy)]
pub enum Kind {
    /// Turns the residual stream by this, for a width and a seed.
    Rotation(fn(usize, u64) -> Rotation),
    /// Multiplies the columns of linear layers by factors that come from statistics of what they read.
    Factors(fn(&Site) -> Result<Vec<f32>>),
}

/// What a transform may need beside the model.
#[derive(Debug, Clone, Copy)]
pub struct Arguments<'a> {
    /// Where randomness starts.
    pub seed: u64,
    /// What was observed of the linear layers' inputs.
    pub stats: Option<&'a Stats>,
}

impl Transform {
    /// The source rewritten; its tensors are made as they are read.
    ///
    /// # Errors
    /// A tensor's place in the model isn't known, sizes contradict each other, a tensor is codes or can't be read; or the
    /// transform needs statistics and there are none.
    pub fn apply<'a>(&self, source: &'a dyn TensorSource, arguments: &Arguments) -> Result<Box<dyn TensorSource + 'a>> {
        match (self.kind, arguments.stats) {
            (Kind::Rotation(rotation), _) => Ok(Box::new(Transformed::new(source, rotation, arguments.seed)?)),
            (Kind::Factors(choose), Some(stats)) => Ok(Box::new(Factored::new(source, stats, choose)?)),
            (Kind::Factors(_), None) => Err(QuantError::Spec {
                what: format!("transform `{}`", self.name),
                why: "needs statistics of what layers read, and there are none".into(),
            }),
        }
    }
}

/// Every transform.
pub static TRANSFORMS: &[Transform] = &[
    Transform {
        name: "none",
        summary: "gains of norms go into the linears that follow",
        kind: Kind::Rotation(|_, _| Rotation::Identity),
    },
    Transform {
        name: "hadamard",
        summary: "the same, and a Hadamard rotation with random signs spreads large values over all columns",
        kind: Kind::Rotation(Rotation::hadamard),
    },
    Transform {
        name: "cayley",
        summary: "the same, and a random rotation near the identity: moves weights off a grid that they lie on",
        kind: Kind::Rotation(Rotation::cayley),
    },
    Transform {
        name: "smooth",
        summary: "SmoothQuant: columns that are read large get smaller inputs and larger weights; needs statistics",
        kind: Kind::Factors(factors::smooth),
    },
    Transform {
        name: "awq",
        summary: "AWQ: the same with the exponent of least output error for 4 bits in groups of 128; needs statistics",
        kind: Kind::Factors(factors::awq),
    },
];

/// The transform of that name.
///
/// # Errors
/// There is none.
pub fn transform(name: &str) -> Result<&'static Transform> {
    TRANSFORMS.iter().find(|t| t.name == name).ok_or_else(|| QuantError::Spec {
        what: format!("transform `{name}`"),
        why: names::unknown(name, TRANSFORMS.iter().map(|t| t.name)),
    })
}

const EMBEDDING: &str = "model.embed_tokens.weight";
const HEAD: &str = "lm_head.weight";
const LAST_NORM: &str = "model.norm.weight";

/// Why a tensor stops a transform.
const UNKNOWN: &str = "it isn't known how it meets the residual stream; no transform is known for such models";

fn refuse_codes(info: &TensorInfo) -> Result<()> {
    match matches!(info.stored, Stored::Quantized(_)) || !info.stored.is_float() {
        true => Err(tensor_error(&info.name, format!("is {}, wanted floats", info.stored.name()))),
        false => Ok(()),
    }
}

fn find<'s>(source: &'s dyn TensorSource, name: &str) -> Result<&'s TensorInfo> {
    let found = source.infos().iter().find(|info| info.name == name);
    found.ok_or_else(|| QuantError::NoTensor { name: name.to_owned(), path: source.path().to_owned() })
}

/// The bytes of a tensor that is made as it is read.
fn made<'s>(source: &'s dyn TensorSource, name: &str) -> Result<Cow<'s, [u8]>> {
    let mut values = Vec::new();
    source.read_f32(name, &mut values)?;
    Ok(Cow::Owned(encode_f32(name, &values, Dtype::F32)?))
}

/// How a tensor meets the residual stream.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Place {
    /// Its rows are vectors of the stream.
    Embedding,
    /// It reads the stream behind this norm.
    Reads(String),
    /// It adds its outputs to the stream.
    Writes,
    /// Gains of a norm of the stream.
    Gains,
    /// Not at all.
    Aside,
}

impl Place {
    /// By the names that all families of the decoder share; `None` for others.
    fn of(name: &str) -> Option<Place> {
        match name {
            EMBEDDING => return Some(Place::Embedding),
            HEAD => return Some(Place::Reads(LAST_NORM.to_owned())),
            LAST_NORM => return Some(Place::Gains),
            _ => {}
        }
        let (layer, part) = name.strip_prefix("model.layers.")?.split_once('.')?;
        let reads = |norm: &str| Some(Place::Reads(format!("model.layers.{layer}.{norm}.weight")));
        match part {
            "self_attn.q_proj.weight" | "self_attn.k_proj.weight" | "self_attn.v_proj.weight" => {
                reads("input_layernorm")
            }
            "mlp.gate_proj.weight" | "mlp.up_proj.weight" => reads("post_attention_layernorm"),
            "self_attn.o_proj.weight" | "self_attn.o_proj.bias" | "mlp.down_proj.weight" | "mlp.down_proj.bias" => {
                Some(Place::Writes)
            }
            "input_layernorm.weight" | "post_attention_layernorm.weight" => Some(Place::Gains),
            "self_attn.q_norm.weight" | "self_attn.k_norm.weight" | "self_attn.rotary_emb.inv_freq" => {
                Some(Place::Aside)
            }
            // Biases of what reads the stream are added behind it.
            _ if part.ends_with("_proj.bias") => Some(Place::Aside),
            _ => None,
        }
    }
}

/// One tensor of the rewritten model, and the tensor of the source that it is made from.
struct Part {
    from: String,
    place: Place,
}

/// A tensor that was turned as a whole, and its name.
type Turned = (String, Arc<Vec<f32>>);

/// A checkpoint with its residual stream turned, in f32.
pub struct Transformed<'a> {
    source: &'a dyn TensorSource,
    infos: Vec<TensorInfo>,
    parts: HashMap<String, Part>,
    gains: HashMap<String, Vec<f32>>,
    rotation: Rotation,
    /// The last one: whoever reads some rows of it mostly reads the others next.
    turned: Mutex<Option<Turned>>,
}

impl<'a> Transformed<'a> {
    /// The source rewritten. The norms are taken to multiply by their weights, without a mean that is taken off.
    ///
    /// # Errors
    /// A tensor whose place isn't known, sizes that contradict each other, codes, or a norm that can't be read.
    fn new(source: &'a dyn TensorSource, rotation: fn(usize, u64) -> Rotation, seed: u64) -> Result<Self> {
        let embedding = source.info(EMBEDDING)?;
        let (rows, width) = embedding.rows_cols();
        let mut made = Transformed {
            source,
            infos: Vec::new(),
            parts: HashMap::new(),
            gains: HashMap::new(),
            rotation: rotation(width, seed),
            turned: Mutex::new(None),
        };
        for info in source.infos() {
            made.add(info, &info.name, width)?;
        }
        if source.info(HEAD).is_err() {
            let head = TensorInfo { shape: vec![rows, width], ..embedding.clone() };
            made.add(&head, HEAD, width)?;
        }
        made.check_norms()?;
        Ok(made)
    }

    fn add(&mut self, info: &TensorInfo, name: &str, width: usize) -> Result<()> {
        let refuse = |why: String| Err(tensor_error(&info.name, why));
        let Some(place) = Place::of(name) else {
            return refuse(UNKNOWN.into());
        };
        refuse_codes(info)?;
        let (rows, cols) = info.rows_cols();
        let (side, which) = match place {
            Place::Embedding | Place::Reads(_) => (cols, "columns"),
            Place::Writes if info.shape.len() == 1 => (cols, "values"),
            Place::Writes => (rows, "rows"),
            Place::Gains => (cols, "values"),
            Place::Aside => (width, ""),
        };
        if side != width {
            return refuse(format!("{side} {which}, wanted {width} as the embedding has columns"));
        }
        if place == Place::Gains {
            let mut gains = Vec::new();
            self.source.read_f32(&info.name, &mut gains)?;
            self.gains.insert(name.to_owned(), gains);
        }
        let stored = Stored::Plain(Dtype::F32);
        self.infos.push(TensorInfo { name: name.to_owned(), stored, bytes: 4 * info.elements(), ..info.clone() });
        self.parts.insert(name.to_owned(), Part { from: info.name.clone(), place });
        Ok(())
    }

    /// Every reader's norm is there.
    fn check_norms(&self) -> Result<()> {
        for (name, part) in &self.parts {
            if let Place::Reads(norm) = &part.place
                && !self.gains.contains_key(norm)
            {
                return Err(tensor_error(
                    name,
                    format!("reads the residual stream behind `{norm}`, which isn't there"),
                ));
            }
        }
        Ok(())
    }

    /// Q^T W: each column of W is a vector of the stream.
    fn turn_columns(&self, part: &Part, info: &TensorInfo) -> Result<Arc<Vec<f32>>> {
        let turned = || self.turned.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, values)) = turned().as_ref().filter(|(name, _)| *name == info.name) {
            return Ok(Arc::clone(values));
        }
        // Not under the lock, which threads that help with this one may want.
        let mut values = Vec::new();
        self.source.read_f32(&part.from, &mut values)?;
        let cols = if info.shape.len() == 1 { 1 } else { info.rows_cols().1 };
        let columns: Vec<Vec<f32>> = (0..cols)
            .into_par_iter()
            .map(|col| {
                let column: Vec<f64> = values.iter().skip(col).step_by(cols).map(|v| *v as f64).collect();
                self.rotation.turn(&column, 0..column.len()).into_iter().map(|v| v as f32).collect()
            })
            .collect();
        values.par_chunks_mut(cols.max(1)).enumerate().for_each(|(row, values)| {
            values.iter_mut().zip(&columns).for_each(|(value, column)| *value = column[row]);
        });
        let values = Arc::new(values);
        *turned() = Some((info.name.clone(), Arc::clone(&values)));
        Ok(values)
    }
}

impl TensorSource for Transformed<'_> {
    fn path(&self) -> &Path {
        self.source.path()
    }

    fn infos(&self) -> &[TensorInfo] {
        &self.infos
    }

    fn info(&self, name: &str) -> Result<&TensorInfo> {
        find(self, name)
    }

    fn bytes(&self, name: &str) -> Result<Cow<'_, [u8]>> {
        made(self, name)
    }

    fn read_rows_f32(&self, name: &str, rows: Range<usize>, out: &mut Vec<f32>) -> Result<()> {
        let info = self.info(name)?;
        let part = self.parts.get(name).ok_or_else(|| tensor_error(name, "has no source"))?;
        let gains = match &part.place {
            Place::Aside => return self.source.read_rows_f32(&part.from, rows, out),
            Place::Gains => {
                out.clear();
                out.resize(info.elements(), 1.0);
                return Ok(());
            }
            Place::Writes => {
                // A vector is one row; all of it is one vector of the stream.
                let (count, cols) = info.rows_cols();
                if rows.start > rows.end || rows.end > count {
                    return Err(tensor_error(name, format!("rows {rows:?} of {count}")));
                }
                out.clear();
                out.extend_from_slice(&self.turn_columns(part, info)?[rows.start * cols..rows.end * cols]);
                return Ok(());
            }
            Place::Embedding => None,
            Place::Reads(norm) => self.gains.get(norm),
        };
        self.source.read_rows_f32(&part.from, rows, out)?;
        let (_, width) = info.rows_cols();
        out.par_chunks_mut(width.max(1)).for_each(|row| {
            let scaled = row.iter().enumerate();
            let scaled: Vec<f64> = scaled.map(|(i, v)| *v as f64 * gains.map_or(1.0, |g| g[i] as f64)).collect();
            let turned = self.rotation.turn(&scaled, 0..width);
            row.iter_mut().zip(turned).for_each(|(to, from)| *to = from as f32);
        });
        Ok(())
    }

    fn release(&self, name: &str) {
        if let Some(part) = self.parts.get(name) {
            self.source.release(&part.from);
            self.turned.lock().unwrap_or_else(PoisonError::into_inner).take_if(|(turned, _)| turned == name);
        }
    }
}
