//! A walk over an ONNX file's protobuf bytes before anything is allocated for them.
//!
//! ```text
//! field = tag varint (number << 3 | wire type), then   0: varint   1: 8 bytes   2: length varint + bytes   5: 4 bytes
//! ```
//! The walk knows the schema. It refuses what can't be decoded and says where (`graph.node[17].attribute[2]`), it bounds
//! nesting and the memory that decoded structure takes (an empty node is 2 bytes in the file and some 250 in memory),
//! and it lists fields that the schema doesn't have, which a round trip would drop.

use super::proto::*;
use std::collections::BTreeSet;

/// What a walk found in bytes that can be decoded.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Survey {
    /// Fields outside of the schema, as `NodeProto field 27`: decoding drops them.
    pub unknown: BTreeSet<String>,
    /// Bytes that the decoded messages will take, not counting data that stays in the file.
    pub structure: usize,
}

/// Nested messages that are accepted; a sub-graph is three deeper than the graph around it.
pub const MAX_DEPTH: usize = 90;
/// Bytes of decoded structure that are accepted: a million nodes with names and attributes fit.
pub const MAX_STRUCTURE: usize = 512 << 20;

#[derive(Clone, Copy)]
enum Kind {
    /// A sub-message, once.
    One(M),
    /// Sub-messages, counted in the path.
    Many(M),
    Text,
    Bytes,
    /// A varint.
    Int,
    /// Varints, alone or packed.
    Ints,
    /// A 4-byte value.
    Float,
    /// 4-byte values, alone or packed.
    F32,
    /// 8-byte values, alone or packed.
    F64,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum M {
    Model,
    Graph,
    Node,
    Attribute,
    Tensor,
    Segment,
    Sparse,
    ValueInfo,
    Type,
    TensorType,
    ElementType,
    MapType,
    Opaque,
    Shape,
    Dimension,
    Entry,
    Annotation,
    Opset,
    Function,
    Training,
    Device,
    NodeDevice,
    Sharding,
    IntList,
    ShardedDim,
    SimpleDim,
}

/// A field: number, name, what it holds.
type Field = (u32, &'static str, Kind);

/// The schema's message: name, size of the decoded struct, fields.
fn message(m: M) -> (&'static str, usize, &'static [Field]) {
    use Kind::*;
    match m {
        M::Model => (
            "ModelProto",
            size_of::<ModelProto>(),
            &[
                (1, "ir_version", Int),
                (2, "producer_name", Text),
                (3, "producer_version", Text),
                (4, "domain", Text),
                (5, "model_version", Int),
                (6, "doc_string", Text),
                (7, "graph", One(M::Graph)),
                (8, "opset_import", Many(M::Opset)),
                (14, "metadata_props", Many(M::Entry)),
                (20, "training_info", Many(M::Training)),
                (25, "functions", Many(M::Function)),
                (26, "configuration", Many(M::Device)),
            ],
        ),
        M::Graph => (
            "GraphProto",
            size_of::<GraphProto>(),
            &[
                (1, "node", Many(M::Node)),
                (2, "name", Text),
                (5, "initializer", Many(M::Tensor)),
                (10, "doc_string", Text),
                (11, "input", Many(M::ValueInfo)),
                (12, "output", Many(M::ValueInfo)),
                (13, "value_info", Many(M::ValueInfo)),
                (14, "quantization_annotation", Many(M::Annotation)),
                (15, "sparse_initializer", Many(M::Sparse)),
                (16, "metadata_props", Many(M::Entry)),
            ],
        ),
        M::Node => (
            "NodeProto",
            size_of::<NodeProto>(),
            &[
                (1, "input", Text),
                (2, "output", Text),
                (3, "name", Text),
                (4, "op_type", Text),
                (5, "attribute", Many(M::Attribute)),
                (6, "doc_string", Text),
                (7, "domain", Text),
                (8, "overload", Text),
                (9, "metadata_props", Many(M::Entry)),
                (10, "device_configurations", Many(M::NodeDevice)),
            ],
        ),
        M::Attribute => (
            "AttributeProto",
            size_of::<AttributeProto>(),
            &[
                (1, "name", Text),
                (2, "f", Float),
                (3, "i", Int),
                (4, "s", Bytes),
                (5, "t", One(M::Tensor)),
                (6, "g", One(M::Graph)),
                (7, "floats", F32),
                (8, "ints", Ints),
                (9, "strings", Bytes),
                (10, "tensors", Many(M::Tensor)),
                (11, "graphs", Many(M::Graph)),
                (13, "doc_string", Text),
                (14, "tp", One(M::Type)),
                (15, "type_protos", Many(M::Type)),
                (20, "type", Int),
                (21, "ref_attr_name", Text),
                (22, "sparse_tensor", One(M::Sparse)),
                (23, "sparse_tensors", Many(M::Sparse)),
            ],
        ),
        M::Tensor => (
            "TensorProto",
            size_of::<TensorProto>(),
            &[
                (1, "dims", Ints),
                (2, "data_type", Int),
                (3, "segment", One(M::Segment)),
                (4, "float_data", F32),
                (5, "int32_data", Ints),
                (6, "string_data", Bytes),
                (7, "int64_data", Ints),
                (8, "name", Text),
                (9, "raw_data", Bytes),
                (10, "double_data", F64),
                (11, "uint64_data", Ints),
                (12, "doc_string", Text),
                (13, "external_data", Many(M::Entry)),
                (14, "data_location", Int),
                (16, "metadata_props", Many(M::Entry)),
            ],
        ),
        M::Segment => ("TensorProto.Segment", size_of::<Segment>(), &[(1, "begin", Int), (2, "end", Int)]),
        M::Sparse => (
            "SparseTensorProto",
            size_of::<SparseTensorProto>(),
            &[(1, "values", One(M::Tensor)), (2, "indices", One(M::Tensor)), (3, "dims", Ints)],
        ),
        M::ValueInfo => (
            "ValueInfoProto",
            size_of::<ValueInfoProto>(),
            &[
                (1, "name", Text),
                (2, "type", One(M::Type)),
                (3, "doc_string", Text),
                (4, "metadata_props", Many(M::Entry)),
            ],
        ),
        M::Type => (
            "TypeProto",
            size_of::<TypeProto>(),
            &[
                (1, "tensor_type", One(M::TensorType)),
                (4, "sequence_type", One(M::ElementType)),
                (5, "map_type", One(M::MapType)),
                (6, "denotation", Text),
                (7, "opaque_type", One(M::Opaque)),
                (8, "sparse_tensor_type", One(M::TensorType)),
                (9, "optional_type", One(M::ElementType)),
            ],
        ),
        M::TensorType => {
            ("TypeProto.Tensor", size_of::<TensorType>(), &[(1, "elem_type", Int), (2, "shape", One(M::Shape))])
        }
        M::ElementType => ("TypeProto.Sequence", size_of::<ElementType>(), &[(1, "elem_type", One(M::Type))]),
        M::MapType => ("TypeProto.Map", size_of::<MapType>(), &[(1, "key_type", Int), (2, "value_type", One(M::Type))]),
        M::Opaque => ("TypeProto.Opaque", size_of::<OpaqueType>(), &[(1, "domain", Text), (2, "name", Text)]),
        M::Shape => ("TensorShapeProto", size_of::<TensorShapeProto>(), &[(1, "dim", Many(M::Dimension))]),
        M::Dimension => (
            "TensorShapeProto.Dimension",
            size_of::<Dimension>(),
            &[(1, "dim_value", Int), (2, "dim_param", Text), (3, "denotation", Text)],
        ),
        M::Entry => {
            ("StringStringEntryProto", size_of::<StringStringEntryProto>(), &[(1, "key", Text), (2, "value", Text)])
        }
        M::Annotation => (
            "TensorAnnotation",
            size_of::<TensorAnnotation>(),
            &[(1, "tensor_name", Text), (2, "quant_parameter_tensor_names", Many(M::Entry))],
        ),
        M::Opset => {
            ("OperatorSetIdProto", size_of::<OperatorSetIdProto>(), &[(1, "domain", Text), (2, "version", Int)])
        }
        M::Function => (
            "FunctionProto",
            size_of::<FunctionProto>(),
            &[
                (1, "name", Text),
                (4, "input", Text),
                (5, "output", Text),
                (6, "attribute", Text),
                (7, "node", Many(M::Node)),
                (8, "doc_string", Text),
                (9, "opset_import", Many(M::Opset)),
                (10, "domain", Text),
                (11, "attribute_proto", Many(M::Attribute)),
                (12, "value_info", Many(M::ValueInfo)),
                (13, "overload", Text),
                (14, "metadata_props", Many(M::Entry)),
            ],
        ),
        M::Training => (
            "TrainingInfoProto",
            size_of::<TrainingInfoProto>(),
            &[
                (1, "initialization", One(M::Graph)),
                (2, "algorithm", One(M::Graph)),
                (3, "initialization_binding", Many(M::Entry)),
                (4, "update_binding", Many(M::Entry)),
            ],
        ),
        M::Device => (
            "DeviceConfigurationProto",
            size_of::<DeviceConfigurationProto>(),
            &[(1, "name", Text), (2, "num_devices", Int), (3, "device", Text)],
        ),
        M::NodeDevice => (
            "NodeDeviceConfigurationProto",
            size_of::<NodeDeviceConfigurationProto>(),
            &[(1, "configuration_id", Text), (2, "sharding_spec", Many(M::Sharding)), (3, "pipeline_stage", Int)],
        ),
        M::Sharding => (
            "ShardingSpecProto",
            size_of::<ShardingSpecProto>(),
            &[
                (1, "tensor_name", Text),
                (2, "device", Ints),
                (3, "index_to_device_group_map", Many(M::IntList)),
                (4, "sharded_dim", Many(M::ShardedDim)),
            ],
        ),
        M::IntList => {
            ("IntIntListEntryProto", size_of::<IntIntListEntryProto>(), &[(1, "key", Int), (2, "value", Ints)])
        }
        M::ShardedDim => (
            "ShardedDimProto",
            size_of::<ShardedDimProto>(),
            &[(1, "axis", Int), (2, "simple_sharding", Many(M::SimpleDim))],
        ),
        M::SimpleDim => (
            "SimpleShardedDimProto",
            size_of::<SimpleShardedDimProto>(),
            &[(1, "dim_value", Int), (2, "dim_param", Text), (3, "num_shards", Int)],
        ),
    }
}

/// Walks a `ModelProto`'s bytes.
///
/// # Errors
/// Says where in the model the bytes can't be decoded, or which limit they pass.
pub fn survey(bytes: &[u8]) -> Result<Survey, String> {
    let mut walk = Walk { survey: Survey::default(), path: Vec::new() };
    walk.message(M::Model, bytes, 0)?;
    Ok(walk.survey)
}

struct Walk {
    survey: Survey,
    /// Field names from the model down, with the index of repeated messages.
    path: Vec<(&'static str, Option<usize>)>,
}

impl Walk {
    fn here(&self) -> String {
        let mut out = String::from("model");
        for (name, index) in &self.path {
            out.push('.');
            out.push_str(name);
            if let Some(index) = index {
                out.push_str(&format!("[{index}]"));
            }
        }
        out
    }

    fn fail<T>(&self, why: impl std::fmt::Display) -> Result<T, String> {
        Err(format!("{}: {why}", self.here()))
    }

    fn charge(&mut self, bytes: usize) -> Result<(), String> {
        self.survey.structure = self.survey.structure.saturating_add(bytes);
        if self.survey.structure > MAX_STRUCTURE {
            return self.fail(format_args!("more than {} MiB of graph structure", MAX_STRUCTURE >> 20));
        }
        Ok(())
    }

    fn varint(&self, bytes: &mut &[u8]) -> Result<u64, String> {
        let mut value = 0u64;
        for shift in 0..10 {
            let Some((&byte, rest)) = bytes.split_first() else {
                return self.fail("the bytes end inside of a number");
            };
            *bytes = rest;
            if shift == 9 && byte > 1 {
                break;
            }
            value |= u64::from(byte & 0x7f) << (7 * shift);
            if byte < 0x80 {
                return Ok(value);
            }
        }
        self.fail("a number of more than 64 bits")
    }

    fn take<'a>(&self, bytes: &mut &'a [u8], len: u64, field: &str) -> Result<&'a [u8], String> {
        if len > bytes.len() as u64 {
            return self.fail(format_args!("`{field}` should have {len} bytes, {} are left", bytes.len()));
        }
        let (head, tail) = bytes.split_at(len as usize);
        *bytes = tail;
        Ok(head)
    }

    fn message(&mut self, m: M, mut bytes: &[u8], depth: usize) -> Result<(), String> {
        let (name, size, fields) = message(m);
        if depth > MAX_DEPTH {
            return self.fail(format_args!("nested deeper than {MAX_DEPTH} messages"));
        }
        self.charge(size)?;
        let mut counts = [0usize; 32];
        while !bytes.is_empty() {
            let tag = self.varint(&mut bytes)?;
            let (number, wire) = (tag >> 3, tag & 7);
            if number == 0 || number >= 1 << 29 {
                return self.fail(format_args!("field number {number} in a {name}"));
            }
            let Some(&(_, field, kind)) = fields.iter().find(|f| u64::from(f.0) == number) else {
                self.skip(&mut bytes, wire, number)?;
                self.survey.unknown.insert(format!("{name} field {number}"));
                continue;
            };
            let wrong = |walk: &Self| walk.fail(format_args!("`{field}` is stored with wire type {wire}"));
            match (kind, wire) {
                (Kind::One(child) | Kind::Many(child), 2) => {
                    let len = self.varint(&mut bytes)?;
                    let body = self.take(&mut bytes, len, field)?;
                    let count = &mut counts[number as usize];
                    self.path.push((field, matches!(kind, Kind::Many(_)).then_some(*count)));
                    *count += 1;
                    self.message(child, body, depth + 1)?;
                    self.path.pop();
                }
                (Kind::Text, 2) => {
                    let len = self.varint(&mut bytes)?;
                    let body = self.take(&mut bytes, len, field)?;
                    if std::str::from_utf8(body).is_err() {
                        return self.fail(format_args!("`{field}` isn't UTF-8"));
                    }
                    self.charge(size_of::<String>() + body.len())?;
                }
                (Kind::Bytes, 2) => {
                    let len = self.varint(&mut bytes)?;
                    self.take(&mut bytes, len, field)?;
                    self.charge(size_of::<::bytes::Bytes>())?;
                }
                (Kind::Int | Kind::Ints, 0) => {
                    self.varint(&mut bytes)?;
                    self.charge(8)?;
                }
                (Kind::Ints, 2) => {
                    let len = self.varint(&mut bytes)?;
                    let mut body = self.take(&mut bytes, len, field)?;
                    while !body.is_empty() {
                        self.varint(&mut body)?;
                        self.charge(8)?;
                    }
                }
                (Kind::Float | Kind::F32, 5) => drop(self.take(&mut bytes, 4, field)?),
                (Kind::F64, 1) => drop(self.take(&mut bytes, 8, field)?),
                (Kind::F32 | Kind::F64, 2) => {
                    let len = self.varint(&mut bytes)?;
                    let width = if matches!(kind, Kind::F32) { 4 } else { 8 };
                    self.take(&mut bytes, len, field)?;
                    if len % width != 0 {
                        return self.fail(format_args!("`{field}` has {len} bytes, not a multiple of {width}"));
                    }
                }
                _ => return wrong(self),
            }
        }
        Ok(())
    }

    fn skip(&mut self, bytes: &mut &[u8], wire: u64, number: u64) -> Result<(), String> {
        match wire {
            0 => drop(self.varint(bytes)?),
            1 => drop(self.take(bytes, 8, "an unknown field")?),
            2 => {
                let len = self.varint(bytes)?;
                self.take(bytes, len, "an unknown field")?;
            }
            5 => drop(self.take(bytes, 4, "an unknown field")?),
            _ => return self.fail(format_args!("field {number} is stored with wire type {wire}")),
        }
        Ok(())
    }
}
