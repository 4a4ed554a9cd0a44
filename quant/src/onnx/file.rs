//! ONNX files: opened without copying weights, external data included, and written whole or not at all.
//!
//! ```text
//! model.onnx        ModelProto                           raw_data: a range of the mapped file
//! model.onnx.data   weights of a model over 2 GB         (location, offset, length) -> a range of this mapped file
//! ```
//! An external location is a path inside of the model's folder; anything else is refused.

use super::proto::*;
use super::tensor::raw_len;
use super::wire;
use crate::QuantError;
use crate::error::Result;
use crate::format::MappedFile;
use bytes::Bytes;
use prost::Message;
use std::collections::{BTreeSet, HashMap};
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Component, Path, PathBuf};

/// Protobuf's own limit on a message.
pub const MAX_PROTOBUF: u64 = (1 << 31) - 1;
/// Tensors below this many bytes stay in the model file when the others move out of it.
const INLINE: usize = 1024;

/// An opened model.
#[derive(Debug, Clone, Default)]
pub struct Model {
    /// The model; data of external tensors is loaded as `raw_data` and their location forgotten.
    pub proto: ModelProto,
    /// Fields of the file that the schema doesn't know and that writing the model would drop.
    pub unknown: BTreeSet<String>,
    /// Files that the model's data is mapped from; they are never written over.
    pub files: Vec<PathBuf>,
}

/// When weights go to a file of their own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum External {
    /// If the model would pass protobuf's 2 GB.
    #[default]
    Auto,
    /// Always.
    Always,
}

fn damaged(path: &Path, why: impl Into<String>) -> QuantError {
    QuantError::Damaged { path: path.to_owned(), why: why.into() }
}

fn io(path: &Path) -> impl FnOnce(std::io::Error) -> QuantError + '_ {
    move |source| QuantError::Io { path: path.to_owned(), source }
}

/// A mapped file that [`Bytes`] can own.
struct Owner(MappedFile);

impl AsRef<[u8]> for Owner {
    fn as_ref(&self) -> &[u8] {
        self.0.bytes().unwrap_or(&[])
    }
}

fn map(path: &Path) -> Result<Bytes> {
    let file = MappedFile::open(path)?;
    file.bytes()?;
    Ok(Bytes::from_owner(Owner(file)))
}

impl Model {
    /// Opens a model and the external data it names.
    ///
    /// # Errors
    /// A file that can't be read, bytes that aren't an ONNX model (said where), external data that is missing, too
    /// short, of another size than its tensor, or outside of the model's folder.
    pub fn open(path: &Path) -> Result<Self> {
        let mut model = Self::decode(map(path)?, path)?;
        model.files.push(path.to_owned());
        let dir = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let mut loaded: HashMap<String, Bytes> = HashMap::new();
        let files = &mut model.files;
        visit_tensors(&mut model.proto, &mut |tensor| {
            if tensor.data_location() != DataLocation::External {
                return Ok(());
            }
            let data = external(tensor, path, dir, &mut loaded, files)?;
            tensor.raw_data = Some(data);
            tensor.external_data.clear();
            tensor.data_location = None;
            Ok(())
        })?;
        Ok(model)
    }

    /// Decodes a model's bytes; external data isn't looked for. `path` is what errors call it.
    ///
    /// # Errors
    /// Bytes that aren't an ONNX model, or limits of [`wire`] passed: says where.
    pub fn decode(bytes: Bytes, path: &Path) -> Result<Self> {
        if bytes.len() as u64 > MAX_PROTOBUF {
            return Err(damaged(path, format!("{} bytes, a protobuf has at most {MAX_PROTOBUF}", bytes.len())));
        }
        let survey = wire::survey(&bytes).map_err(|why| damaged(path, why))?;
        let proto = ModelProto::decode(bytes).map_err(|e| damaged(path, e.to_string()))?;
        if proto.graph.is_none() {
            return Err(damaged(path, "holds no graph: not an ONNX model"));
        }
        Ok(Self { proto, unknown: survey.unknown, files: Vec::new() })
    }

    /// Version of an operator set the model imports; `""` is ONNX's own.
    pub fn opset(&self, domain: &str) -> Option<i64> {
        let canonical = |d: &str| if d == "ai.onnx" { String::new() } else { d.to_owned() };
        let found = self.proto.opset_import.iter().find(|o| canonical(o.domain()) == canonical(domain));
        found.map(OperatorSetIdProto::version)
    }

    /// The graph; an empty one if the model has none.
    pub fn graph(&self) -> &GraphProto {
        static EMPTY: std::sync::LazyLock<GraphProto> = std::sync::LazyLock::new(GraphProto::default);
        self.proto.graph.as_ref().unwrap_or(&EMPTY)
    }

    /// The graph, to edit.
    pub fn graph_mut(&mut self) -> &mut GraphProto {
        self.proto.graph.get_or_insert_default()
    }

    /// Writes the model beside `path`, reads it back, compares, and renames it to `path`. Weights go to
    /// `<file name>.data` in the same folder where [`External`] says so.
    ///
    /// # Errors
    /// A file operation that fails, a target that is one of the model's own files, or bytes that read back differently.
    pub fn save(&self, path: &Path, external: External) -> Result<()> {
        let dir = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let file_name = path.file_name().ok_or_else(|| damaged(path, "not the name of a file"))?;
        let mut data_name = file_name.to_owned();
        data_name.push(".data");
        let data_path = dir.join(&data_name);
        let split = external == External::Always || self.proto.encoded_len() as u64 > MAX_PROTOBUF;
        for target in std::iter::once(path).chain(split.then_some(data_path.as_path())) {
            if self.files.iter().any(|file| same_file(file, target)) {
                return Err(damaged(target, "is what the model was read from: choose another name for the output"));
            }
        }
        if !split {
            let temp = write_temp(dir, |out| out.write_all(&self.proto.encode_to_vec()))?;
            verify(&self.proto, temp.path())?;
            return persist(temp, path);
        }
        let location = data_name.to_str().ok_or_else(|| damaged(path, "a file name that isn't UTF-8"))?;
        let mut slim = self.proto.clone();
        let mut blobs: Vec<(u64, Bytes)> = Vec::new();
        let mut end = 0u64;
        visit_tensors(&mut slim, &mut |tensor| {
            if let Some(data) = tensor.raw_data.take_if(|data| data.len() >= INLINE) {
                // Whole pages, so that a reader can map each tensor by itself.
                let offset = end.next_multiple_of(4096);
                end = offset + data.len() as u64;
                let entry =
                    |key: &str, value: String| StringStringEntryProto { key: Some(key.into()), value: Some(value) };
                tensor.external_data = vec![
                    entry("location", location.to_owned()),
                    entry("offset", offset.to_string()),
                    entry("length", data.len().to_string()),
                ];
                tensor.data_location = Some(DataLocation::External as i32);
                blobs.push((offset, data));
            }
            Ok(())
        })?;
        let data = write_temp(dir, |out| {
            let mut at = 0u64;
            for (offset, blob) in &blobs {
                std::io::copy(&mut std::io::Read::take(std::io::repeat(0), offset - at), out)?;
                out.write_all(blob)?;
                at = offset + blob.len() as u64;
            }
            Ok(())
        })?;
        let back = if end == 0 { Bytes::new() } else { map(data.path())? };
        for (offset, blob) in &blobs {
            if back.get(*offset as usize..*offset as usize + blob.len()) != Some(blob) {
                return Err(damaged(&data_path, format!("reads back differently at {offset}")));
            }
        }
        let temp = write_temp(dir, |out| out.write_all(&slim.encode_to_vec()))?;
        verify(&slim, temp.path())?;
        persist(data, &data_path)?;
        persist(temp, path)
    }
}

fn same_file(a: &Path, b: &Path) -> bool {
    matches!((a.canonicalize(), b.canonicalize()), (Ok(a), Ok(b)) if a == b)
}

fn write_temp(
    dir: &Path,
    write: impl FnOnce(&mut BufWriter<&mut File>) -> std::io::Result<()>,
) -> Result<tempfile::NamedTempFile> {
    let mut temp = tempfile::Builder::new().prefix(".nibble-").tempfile_in(dir).map_err(io(dir))?;
    let attempt = || {
        let mut out = BufWriter::with_capacity(1 << 20, temp.as_file_mut());
        write(&mut out)?;
        out.flush()?;
        drop(out);
        temp.as_file().sync_all()
    };
    attempt().map_err(io(dir))?;
    Ok(temp)
}

fn persist(temp: tempfile::NamedTempFile, path: &Path) -> Result<()> {
    // Temporary files are private; a model is as readable as any other file of its folder.
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        temp.as_file().set_permissions(std::fs::Permissions::from_mode(0o644)).map_err(io(path))?;
    }
    temp.persist(path).map_err(|e| QuantError::Io { path: path.to_owned(), source: e.error })?;
    Ok(())
}

fn verify(wanted: &ModelProto, path: &Path) -> Result<()> {
    let found = Model::decode(map(path)?, path)?;
    if &found.proto != wanted {
        return Err(damaged(path, "reads back as another model than was written"));
    }
    Ok(())
}

/// The range of an external file that a tensor's data lies in.
fn external(
    tensor: &TensorProto,
    model: &Path,
    dir: &Path,
    loaded: &mut HashMap<String, Bytes>,
    files: &mut Vec<PathBuf>,
) -> Result<Bytes> {
    let bad = |why: String| damaged(model, format!("external data of tensor `{}`: {why}", tensor.name()));
    let entry = |key: &str| tensor.external_data.iter().find(|e| e.key() == key).map(StringStringEntryProto::value);
    let location = entry("location").filter(|l| !l.is_empty()).ok_or_else(|| bad("no location".into()))?;
    let number = |key: &str| -> Result<Option<usize>> {
        entry(key).map(|v| v.parse().map_err(|_| bad(format!("{key} `{v}` isn't a number")))).transpose()
    };
    let relative = Path::new(location);
    if !relative.components().all(|c| matches!(c, Component::Normal(_) | Component::CurDir)) {
        return Err(bad(format!("location `{location}` leads outside of the model's folder")));
    }
    if !loaded.contains_key(location) {
        let file = dir.join(relative);
        let root = dir.canonicalize().map_err(io(dir))?;
        if !file.canonicalize().map_err(io(&file))?.starts_with(root) {
            return Err(bad(format!("location `{location}` leads outside of the model's folder")));
        }
        loaded.insert(location.to_owned(), map(&file)?);
        files.push(file);
    }
    let data = &loaded[location];
    let offset = number("offset")?.unwrap_or(0);
    let wanted = raw_len(tensor)?.ok_or_else(|| bad(format!("type {:?} has no raw form", tensor.data_type())))?;
    let len = number("length")?.unwrap_or(wanted);
    if len != wanted {
        return Err(bad(format!("length {len}, shape {:?} asks for {wanted}", tensor.dims)));
    }
    match offset.checked_add(len) {
        Some(end) if end <= data.len() => Ok(data.slice(offset..end)),
        _ => Err(bad(format!("{len} bytes at {offset}, `{location}` has {}", data.len()))),
    }
}

/// Calls `f` on every tensor of a model: initializers, attributes, sub-graphs, functions.
///
/// # Errors
/// The first that `f` returns.
pub fn visit_tensors(model: &mut ModelProto, f: &mut dyn FnMut(&mut TensorProto) -> Result<()>) -> Result<()> {
    for graph in model.graph.iter_mut() {
        visit_graph(graph, f)?;
    }
    for training in &mut model.training_info {
        for graph in training.initialization.iter_mut().chain(training.algorithm.iter_mut()) {
            visit_graph(graph, f)?;
        }
    }
    for function in &mut model.functions {
        visit_nodes(&mut function.node, f)?;
        visit_attributes(&mut function.attribute_proto, f)?;
    }
    Ok(())
}

fn visit_sparse(sparse: &mut SparseTensorProto, f: &mut dyn FnMut(&mut TensorProto) -> Result<()>) -> Result<()> {
    sparse.values.iter_mut().chain(sparse.indices.iter_mut()).try_for_each(f)
}

fn visit_graph(graph: &mut GraphProto, f: &mut dyn FnMut(&mut TensorProto) -> Result<()>) -> Result<()> {
    graph.initializer.iter_mut().try_for_each(&mut *f)?;
    graph.sparse_initializer.iter_mut().try_for_each(|sparse| visit_sparse(sparse, f))?;
    visit_nodes(&mut graph.node, f)
}

fn visit_nodes(nodes: &mut [NodeProto], f: &mut dyn FnMut(&mut TensorProto) -> Result<()>) -> Result<()> {
    nodes.iter_mut().try_for_each(|node| visit_attributes(&mut node.attribute, f))
}

fn visit_attributes(
    attributes: &mut [AttributeProto],
    f: &mut dyn FnMut(&mut TensorProto) -> Result<()>,
) -> Result<()> {
    for attribute in attributes {
        attribute.t.iter_mut().chain(&mut attribute.tensors).try_for_each(&mut *f)?;
        let sparse = attribute.sparse_tensor.iter_mut().chain(&mut attribute.sparse_tensors);
        sparse.into_iter().try_for_each(|sparse| visit_sparse(sparse, f))?;
        attribute.g.iter_mut().chain(&mut attribute.graphs).try_for_each(|graph| visit_graph(graph, f))?;
    }
    Ok(())
}
