//! AdamW whose state can be saved, and how fast it goes.
//!
//! candle-nn's AdamW keeps its moments to itself, so that training couldn't go on from a file; the arithmetic is the
//! same, which a test holds. Plain gradient descent is candle-nn's.

use super::ops::{Axis, lend};
use crate::{ModelError, Result};
use candle_core::backprop::GradStore;
use candle_core::{Device, Tensor, Var};
use candle_nn::Optimizer as _;

/// A parameter, and how it is treated.
pub struct Group {
    /// Its name.
    pub name: String,
    /// What is learned.
    pub var: Var,
    /// Its share of the learning rate.
    pub rate: f64,
    /// Shares of that of its channels, and where channels are; none: all alike.
    pub channels: Option<(Axis, Vec<f32>)>,
    /// Whether it decays: matrices do; biases, norms and scales don't.
    pub decays: bool,
}

impl Group {
    /// The share of the learning rate of each value.
    pub(super) fn shares(&self) -> Vec<f32> {
        let n = self.var.elem_count();
        match &self.channels {
            Some((Axis::First, shares)) => {
                let row = n / shares.len().max(1);
                shares.iter().flat_map(|&share| std::iter::repeat_n(share, row)).collect()
            }
            Some((Axis::Last, shares)) => shares.iter().copied().cycle().take(n).collect(),
            Some((Axis::Tensor, _)) | None => vec![1.0; n],
        }
    }
}

/// What moves parameters against their gradients.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Method {
    /// Adam with decoupled weight decay (arXiv 1711.05101), beta 0.9 and 0.999, epsilon 1e-8.
    AdamW {
        /// Decay.
        decay: f64,
    },
    /// Plain gradient descent.
    Sgd,
}

/// An optimizer and its state.
pub struct Optimizer {
    groups: Vec<Group>,
    method: Method,
    first: Vec<Vec<f32>>,
    second: Vec<Vec<f32>>,
    steps: u32,
}

const BETAS: [f64; 2] = [0.9, 0.999];
const EPSILON: f64 = 1e-8;

fn candle(what: &str) -> impl Fn(candle_core::Error) -> ModelError + '_ {
    move |e| ModelError::Graph { what: what.into(), why: e.to_string() }
}

impl Optimizer {
    /// Over these parameters, at rest.
    pub fn new(groups: Vec<Group>, method: Method) -> Self {
        let zeros = |g: &Group| vec![0f32; g.var.elem_count()];
        let (first, second) = (groups.iter().map(zeros).collect(), groups.iter().map(zeros).collect());
        Self { groups, method, first, second, steps: 0 }
    }

    /// One step along the gradients at a learning rate.
    ///
    /// # Errors
    /// What candle refuses.
    pub fn step(&mut self, grads: &GradStore, rate: f64) -> Result<()> {
        self.steps += 1;
        let Method::AdamW { decay } = self.method else {
            for group in &self.groups {
                let mut plain =
                    candle_nn::SGD::new(vec![group.var.clone()], rate * group.rate).map_err(candle(&group.name))?;
                plain.step(grads).map_err(candle(&group.name))?;
            }
            return Ok(());
        };
        let corrections = BETAS.map(|b| 1.0 - b.powi(self.steps as i32));
        let moments = self.first.iter_mut().zip(&mut self.second);
        for (group, (first, second)) in self.groups.iter().zip(moments) {
            let Some(grad) = grads.get(group.var.as_tensor()) else { continue };
            let (rate, decay) = (rate * group.rate, if group.decays { decay } else { 0.0 });
            let stepped = lend(grad, |grad| {
                lend(group.var.as_tensor(), |old| {
                    let [b1, b2] = BETAS.map(|b| b as f32);
                    let kept = (1.0 - rate * decay) as f32;
                    let (rate, c1, c2) = (rate as f32, 1.0 / corrections[0] as f32, 1.0 / corrections[1] as f32);
                    let shares = group.shares();
                    let state = first.iter_mut().zip(second.iter_mut()).zip(&shares);
                    let mut new = Vec::with_capacity(old.len());
                    for ((&g, &w), ((m, v), share)) in grad.iter().zip(old).zip(state) {
                        *m = b1 * *m + (1.0 - b1) * g;
                        *v = b2 * *v + (1.0 - b2) * g * g;
                        new.push(w * kept - rate * share * (*m * c1) / ((*v * c2).sqrt() + EPSILON as f32));
                    }
                    Ok(new)
                })
            });
            let new = stepped.and_then(|new| Tensor::from_vec(new, group.var.dims(), &Device::Cpu));
            new.and_then(|new| group.var.set(&new)).map_err(candle(&group.name))?;
        }
        Ok(())
    }

    /// Steps taken, and the moments of each parameter by its name.
    pub fn state(&self) -> (u32, impl Iterator<Item = (&str, [&[f32]; 2])>) {
        let moments = self.first.iter().zip(&self.second);
        let named = self.groups.iter().zip(moments).map(|(g, (m, v))| (g.name.as_str(), [m.as_slice(), v.as_slice()]));
        (self.steps, named)
    }

    /// Goes on where another one stood.
    ///
    /// # Errors
    /// A parameter whose moments are missing or of another size.
    pub fn restore(&mut self, steps: u32, moments: impl Fn(&str) -> Option<[Vec<f32>; 2]>) -> Result<()> {
        let slots = self.first.iter_mut().zip(&mut self.second);
        for (group, (first, second)) in self.groups.iter().zip(slots) {
            let found = moments(&group.name).filter(|[m, v]| m.len() == first.len() && v.len() == second.len());
            let Some([m, v]) = found else {
                let why = "its moments aren't in the checkpoint, or of another size".to_owned();
                return Err(ModelError::Graph { what: group.name.clone(), why });
            };
            (*first, *second) = (m, v);
        }
        self.steps = steps;
        Ok(())
    }
}

/// The share of the learning rate at a step: up in a line over the first `warmup` steps, then down a cosine to 0.
pub fn cosine(step: usize, warmup: usize, total: usize) -> f64 {
    if step < warmup {
        return (step + 1) as f64 / warmup as f64;
    }
    let done = (step - warmup) as f64 / total.saturating_sub(warmup).max(1) as f64;
    0.5 * (1.0 + (std::f64::consts::PI * done.min(1.0)).cos())
}
