//! PyTorch checkpoints, both kinds: the archive of today, and what was written before version 1.6.
//!
//! ```text
//! before 1.6:   pickle magic | pickle version | pickle system | pickle {name: tensor} | pickle [storage key] | storages
//! a storage:    count (i64) | values, little-endian; a tensor is an offset and strides into one
//! ```

use crate::{ModelError, Result};
use candle_core::pickle::{Object, Stack};
use std::collections::{BTreeMap, HashMap};
use std::io::{BufReader, Read};
use std::path::Path;

/// A float tensor of a checkpoint: its shape and values, row-major.
pub type Weights = BTreeMap<String, (Vec<usize>, Vec<f32>)>;

/// The pickle of the number that marks the old kind.
const MAGIC: [u8; 15] = [0x80, 0x02, 0x8a, 0x0a, 0x6c, 0xfc, 0x9c, 0x46, 0xf9, 0x20, 0x6a, 0xa8, 0x50, 0x19, 0x2e];
/// Values that one storage may hold.
const LARGEST: u64 = 1 << 31;

/// A float tensor that isn't loaded yet.
struct Place {
    name: String,
    key: String,
    offset: usize,
    dims: Vec<usize>,
    strides: Vec<usize>,
}

/// Reads the float tensors of a checkpoint; others (counters) are left out.
///
/// # Errors
/// A file that can't be read, isn't a checkpoint, or ends early; tensors outside of their storage.
pub fn read(path: &Path) -> Result<Weights> {
    let mut file = BufReader::new(std::fs::File::open(path).map_err(ModelError::io(path))?);
    let damaged = |why: String| ModelError::Damaged { path: path.to_owned(), why };
    let mut magic = [0; MAGIC.len()];
    file.read_exact(&mut magic).map_err(ModelError::io(path))?;
    if magic != MAGIC {
        let candle = |e: candle_core::Error| damaged(e.to_string());
        let tensors = candle_core::pickle::read_all(path).map_err(candle)?;
        return tensors
            .into_iter()
            .filter(|(_, t)| t.dtype().is_float())
            .map(|(name, t)| {
                let flat = t.to_dtype(candle_core::DType::F32).and_then(|t| t.flatten_all()?.to_vec1());
                Ok((name, (t.dims().to_vec(), flat.map_err(candle)?)))
            })
            .collect();
    }
    let mut pickle = || -> Result<Object> {
        let mut stack = Stack::empty();
        stack.read_loop(&mut file).map_err(|e| damaged(e.to_string()))?;
        stack.finalize().map_err(|e| damaged(e.to_string()))
    };
    let (_version, _system) = (pickle()?, pickle()?);
    let (tensors, keys) = (pickle()?, pickle()?);
    let places: Vec<Place> = pairs(tensors).into_iter().filter_map(|(name, value)| place(name, value)).collect();
    let Object::List(keys) = keys else { return Err(damaged("has no list of storages".into())) };
    let mut wanted: HashMap<&str, Vec<&Place>> = HashMap::new();
    places.iter().for_each(|p| wanted.entry(&p.key).or_default().push(p));
    let mut weights = Weights::new();
    for key in keys {
        let Object::Unicode(key) = key else { return Err(damaged("a storage without a name".into())) };
        let mut count = [0; 8];
        file.read_exact(&mut count).map_err(ModelError::io(path))?;
        let count = u64::from_le_bytes(count);
        if count > LARGEST {
            return Err(damaged(format!("storage `{key}` of {count} values")));
        }
        let Some(places) = wanted.get(key.as_str()) else {
            // Only counters aren't float: 64-bit integers.
            let skipped = std::io::copy(&mut file.by_ref().take(count * 8), &mut std::io::sink());
            if skipped.map_err(ModelError::io(path))? != count * 8 {
                return Err(damaged(format!("storage `{key}` ends early")));
            }
            continue;
        };
        let mut raw = Vec::new();
        file.by_ref().take(count * 4).read_to_end(&mut raw).map_err(ModelError::io(path))?;
        if raw.len() as u64 != count * 4 {
            return Err(damaged(format!("storage `{key}` ends after {} of {} bytes", raw.len(), count * 4)));
        }
        let values: Vec<f32> = raw.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
        for place in places {
            let gathered = gather(place, &values).ok_or_else(|| {
                damaged(format!("tensor `{}` lies outside of its storage of {count} values", place.name))
            })?;
            weights.insert(place.name.clone(), (place.dims.clone(), gathered));
        }
    }
    match places.iter().find(|p| !weights.contains_key(&p.name)) {
        Some(missing) => Err(damaged(format!("the storage of tensor `{}` is missing", missing.name))),
        None => Ok(weights),
    }
}

/// Entries of a dictionary, ordered or not.
fn pairs(object: Object) -> Vec<(Object, Object)> {
    match object {
        Object::Dict(pairs) => pairs,
        Object::Build { callable, .. } => pairs(*callable),
        Object::Reduce { args, .. } => pairs(*args),
        _ => Vec::new(),
    }
}

/// A tensor of 32-bit floats, if it is one.
fn place(name: Object, value: Object) -> Option<Place> {
    let name = name.unicode().ok()?;
    let (callable, args) = value.reduce().ok()?;
    let (_, function) = callable.class().ok()?;
    let mut args = args.tuple().ok()?;
    if function == "_rebuild_parameter" {
        return place(Object::Unicode(name), args.into_iter().next()?);
    }
    if function != "_rebuild_tensor_v2" || args.len() < 4 {
        return None;
    }
    let numbers = |object: Object| -> Option<Vec<usize>> {
        let tuple = object.tuple().ok()?;
        tuple.into_iter().map(|o| usize::try_from(o.int_or_long().ok()?).ok()).collect()
    };
    let strides = numbers(args.remove(3))?;
    let dims = numbers(args.remove(2))?;
    let offset = usize::try_from(args.remove(1).int_or_long().ok()?).ok()?;
    let storage = args.remove(0).persistent_load().ok()?.tuple().ok()?;
    let mut storage = storage.into_iter().skip(1);
    let (_, class) = storage.next()?.class().ok()?;
    let key = storage.next()?.unicode().ok()?;
    (class == "FloatStorage" && dims.len() == strides.len()).then_some(Place { name, key, offset, dims, strides })
}

/// A tensor's values, row-major, if all of them lie in the storage.
fn gather(place: &Place, values: &[f32]) -> Option<Vec<f32>> {
    let count = place.dims.iter().try_fold(1usize, |n, &d| n.checked_mul(d))?;
    if count > values.len().max(1) * 2 {
        return None;
    }
    let mut out = Vec::with_capacity(count);
    let mut index = vec![0usize; place.dims.len()];
    for _ in 0..count {
        let steps = index.iter().zip(&place.strides).map(|(i, s)| i.checked_mul(*s));
        let at = steps.into_iter().try_fold(place.offset, |at, step| at.checked_add(step?))?;
        out.push(*values.get(at)?);
        for axis in (0..index.len()).rev() {
            index[axis] += 1;
            if index[axis] < place.dims[axis] {
                break;
            }
            index[axis] = 0;
        }
    }
    Some(out)
}
