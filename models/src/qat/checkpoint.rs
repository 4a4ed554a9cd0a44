//! The state of a training in a safetensors file, from which it goes on as if it had never stopped.
//!
//! ```text
//! parameter.NAME   scale.NAME      what is learned
//! range.NAME       (lo, hi, zero)  of an activation
//! mean.N  var.N                    of a batch norm
//! adam.m.NAME  adam.v.NAME         of the optimizer
//! best.NAME                        the same of the best epoch, where training stops early
//! metadata: fingerprint, steps, epochs
//! ```

use super::dataset::Dataset;
use super::net::Net;
use super::optimizer::Optimizer;
use super::train::{Epoch, TrainSettings};
use crate::{ModelError, Result};
use candle_core::{Device, Tensor};
use nibble_quant::Range;
use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView};
use std::collections::{BTreeMap, HashMap};
use std::io::Write;
use std::path::Path;

/// Values by name.
pub type Values = BTreeMap<String, Vec<f32>>;

/// How far a training is.
#[derive(Debug, Clone, Default)]
pub struct Progress {
    /// What each epoch came to.
    pub epochs: Vec<Epoch>,
    /// The network of the best epoch, where training may stop early.
    pub best: Option<Values>,
}

/// More is better: accuracy or decibels of other samples if they are known, else the loss.
fn merit(epoch: &Epoch) -> f64 {
    epoch.valid.or(epoch.valid_db).unwrap_or(-epoch.loss)
}

impl Progress {
    fn best_epoch(&self) -> usize {
        let best = |best: usize, (i, e): (usize, &Epoch)| if merit(e) > merit(&self.epochs[best]) { i } else { best };
        self.epochs.iter().enumerate().fold(0, best)
    }

    /// Whether the last `patience` epochs were no better than one before them.
    pub fn worse_for(&self, patience: Option<usize>) -> bool {
        patience.is_some_and(|p| !self.epochs.is_empty() && self.epochs.len() - 1 - self.best_epoch() >= p.max(1))
    }

    /// Takes in an epoch, with the network as it is where that may be wanted again.
    pub fn take(&mut self, epoch: Epoch, snapshot: Option<Values>) {
        self.epochs.push(epoch);
        if self.best_epoch() + 1 == self.epochs.len() {
            self.best = snapshot;
        }
    }
}

fn damaged(path: &Path, why: impl ToString) -> ModelError {
    ModelError::Damaged { path: path.to_owned(), why: why.to_string() }
}

/// What two trainings must have in common for one to go on with the other's state.
pub fn fingerprint(settings: &TrainSettings, data: &Dataset) -> String {
    let TrainSettings {
        epochs,
        batch,
        rate,
        warmup,
        method,
        seed,
        augment,
        distill,
        patience,
        following,
        normalizing,
        ..
    } = settings;
    let samples = (data.len(), &data.dims);
    format!(
        "{epochs} {batch} {rate} {warmup} {method:?} {seed} {augment:?} {distill:?} {patience:?} {following} {normalizing} {samples:?}"
    )
}

/// What a network has learned, by name.
///
/// # Errors
/// What candle refuses.
pub fn snapshot(net: &Net) -> Result<Values> {
    let mut values = Values::new();
    let read = |name: &str, tensor: &Tensor| {
        let read = tensor.flatten_all().and_then(|t| t.to_vec1::<f32>());
        read.map_err(|e| ModelError::Graph { what: name.into(), why: e.to_string() })
    };
    for (name, var) in net.parameters() {
        values.insert(format!("parameter.{name}"), read(name, var.as_tensor())?);
    }
    for weight in net.weights() {
        values.insert(format!("scale.{}", weight.output), read(&weight.output, weight.scale.as_tensor())?);
    }
    for activation in net.activations() {
        let Range { lo, hi } = activation.range;
        values.insert(format!("range.{}", activation.name), vec![lo, hi, activation.zero as f32]);
        values.insert(format!("scale.{}", activation.name), read(&activation.name, activation.scale.as_tensor())?);
    }
    for (i, norm) in net.norms().iter().enumerate() {
        values.insert(format!("mean.{i}"), norm.running.means.clone());
        values.insert(format!("var.{i}"), norm.running.variances.clone());
    }
    Ok(values)
}

/// Brings a network to what it had learned.
///
/// # Errors
/// A value that is missing, or of another size.
pub fn restore(net: &mut Net, values: &Values) -> Result<()> {
    let take = |name: String, wanted: usize| match values.get(&name) {
        Some(found) if found.len() == wanted => Ok(found.clone()),
        Some(found) => Err(ModelError::Graph {
            what: name,
            why: format!("{} values in the checkpoint, {wanted} were wanted", found.len()),
        }),
        None => Err(ModelError::Graph { what: name, why: "isn't in the checkpoint".into() }),
    };
    let set = |name: &str, var: &candle_core::Var, values: Vec<f32>| {
        let set = Tensor::from_vec(values, var.dims(), &Device::Cpu).and_then(|t| var.set(&t));
        set.map_err(|e| ModelError::Graph { what: name.into(), why: e.to_string() })
    };
    for (name, var) in net.parameters() {
        set(name, var, take(format!("parameter.{name}"), var.elem_count())?)?;
    }
    let (activations, weights, norms) = net.state_mut();
    for weight in weights {
        let scales = take(format!("scale.{}", weight.output), weight.scale.elem_count())?;
        set(&weight.output, &weight.scale, scales)?;
    }
    for activation in activations {
        let [lo, hi, zero] = take(format!("range.{}", activation.name), 3)?[..] else { continue };
        activation.set_range(Range { lo, hi })?;
        activation.zero = zero as i32;
        set(&activation.name, &activation.scale, take(format!("scale.{}", activation.name), 1)?)?;
    }
    for (i, norm) in norms.iter_mut().enumerate() {
        let n = norm.running.means.len();
        norm.running.means = take(format!("mean.{i}"), n)?;
        norm.running.variances = take(format!("var.{i}"), n)?;
    }
    Ok(())
}

/// Writes the state, whole or not at all.
///
/// # Errors
/// A file operation that fails.
pub fn save(path: &Path, fingerprint: &str, net: &Net, optimizer: &Optimizer, progress: &Progress) -> Result<()> {
    let mut values = snapshot(net)?;
    let (steps, moments) = optimizer.state();
    for (name, [m, v]) in moments {
        values.insert(format!("adam.m.{name}"), m.to_vec());
        values.insert(format!("adam.v.{name}"), v.to_vec());
    }
    if let Some(best) = &progress.best {
        values.extend(best.iter().map(|(name, v)| (format!("best.{name}"), v.clone())));
    }
    let bytes: Vec<(String, usize, Vec<u8>)> =
        values.into_iter().map(|(n, v)| (n, v.len(), v.iter().flat_map(|v| v.to_le_bytes()).collect())).collect();
    let views = bytes.iter().map(|(name, n, bytes)| {
        let view = TensorView::new(Dtype::F32, vec![*n], bytes);
        view.map(|view| (name, view))
    });
    let views = views.collect::<Result<Vec<_>, _>>();
    let views = views.map_err(|e| damaged(path, e))?;
    let epochs = serde_json::to_string(&progress.epochs).map_err(|e| damaged(path, e))?;
    let metadata = HashMap::from([
        ("fingerprint".to_owned(), fingerprint.to_owned()),
        ("steps".to_owned(), steps.to_string()),
        ("epochs".to_owned(), epochs),
    ]);
    let whole = safetensors::serialize(views, Some(metadata)).map_err(|e| damaged(path, e))?;
    let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let mut temp = tempfile::Builder::new().prefix(".nibble-").tempfile_in(folder).map_err(ModelError::io(folder))?;
    temp.write_all(&whole).and_then(|()| temp.as_file().sync_all()).map_err(ModelError::io(path))?;
    temp.persist(path).map_err(|e| ModelError::Io { path: path.to_owned(), source: e.error })?;
    Ok(())
}

/// Reads the state back into a network and its optimizer.
///
/// # Errors
/// A file that can't be read, isn't a checkpoint, or is of another training.
pub fn load(path: &Path, fingerprint: &str, net: &mut Net, optimizer: &mut Optimizer) -> Result<Progress> {
    let bytes = std::fs::read(path).map_err(ModelError::io(path))?;
    let (_, header) = SafeTensors::read_metadata(&bytes).map_err(|e| damaged(path, e))?;
    let file = SafeTensors::deserialize(&bytes).map_err(|e| damaged(path, e))?;
    let metadata = header.metadata().clone().unwrap_or_default();
    let field = |name: &str| metadata.get(name).ok_or_else(|| damaged(path, format!("has no `{name}`: no checkpoint")));
    let found = field("fingerprint")?;
    if found != fingerprint {
        return Err(damaged(path, format!("is of another training: `{found}`, this one is `{fingerprint}`")));
    }
    let steps = field("steps")?.parse().map_err(|e| damaged(path, format!("steps: {e}")))?;
    let epochs = serde_json::from_str(field("epochs")?).map_err(|e| damaged(path, format!("epochs: {e}")))?;
    let mut values = Values::new();
    for (name, view) in file.tensors() {
        if view.dtype() != Dtype::F32 {
            return Err(damaged(path, format!("tensor `{name}` is of type {:?}", view.dtype())));
        }
        values.insert(name, view.data().as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect());
    }
    let at = |e: ModelError| damaged(path, e);
    restore(net, &values).map_err(at)?;
    let moment = |kind: &str, name: &str| values.get(&format!("adam.{kind}.{name}")).cloned();
    optimizer.restore(steps, |name| Some([moment("m", name)?, moment("v", name)?])).map_err(at)?;
    let best: Values =
        values.iter().filter_map(|(n, v)| Some((n.strip_prefix("best.")?.to_owned(), v.clone()))).collect();
    Ok(Progress { epochs, best: (!best.is_empty()).then_some(best) })
}
