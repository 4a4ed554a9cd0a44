//! `nibble vision inspect`: what is in an ONNX model.

use crate::commands::Run;
use crate::output::{self, Table};
use crate::session::Session;
use anyhow::Result;
use nibble_models::graph::inputs;
use nibble_quant::onnx::groups::groups;
use nibble_quant::onnx::tensor::raw_len;
use nibble_quant::onnx::{Graph, Model};
use serde_json::json;
use std::collections::BTreeMap;
use std::path::PathBuf;

/// Show what is in an ONNX model: operators, weights by type, inputs and outputs, groups of nodes that are one operation
#[derive(Debug, clap::Args)]
#[command(after_help = "Example: nibble vision inspect model.onnx")]
pub struct Inspect {
    /// The model
    #[arg(value_name = "MODEL.onnx")]
    model: PathBuf,
}

impl Run for Inspect {
    fn run(self, session: &Session) -> Result<()> {
        let model = Model::open(&self.model)?;
        let graph = Graph::new(model.graph())?;
        let mut operators: BTreeMap<String, usize> = BTreeMap::new();
        for (_, node) in graph.nodes() {
            let name = match node.domain() {
                "" | "ai.onnx" => node.op_type().to_owned(),
                domain => format!("{domain}.{}", node.op_type()),
            };
            *operators.entry(name).or_default() += 1;
        }
        let mut weights: BTreeMap<String, (usize, usize)> = BTreeMap::new();
        for tensor in &model.graph().initializer {
            let entry = weights.entry(format!("{:?}", tensor.data_type()).to_lowercase()).or_default();
            entry.0 += 1;
            entry.1 += raw_len(tensor)?.unwrap_or(0);
        }
        let mut kinds: BTreeMap<&str, usize> = BTreeMap::new();
        groups(&graph).iter().for_each(|g| *kinds.entry(g.kind.name()).or_default() += 1);
        let inputs = inputs(&model);
        let dims = |dims: &[Option<usize>]| {
            dims.iter().map(|d| d.map_or("?".to_owned(), |d| d.to_string())).collect::<Vec<_>>().join(" x ")
        };
        let outputs: Vec<&str> = model.graph().output.iter().map(|o| o.name()).collect();
        if session.json {
            return output::json(&json!({
                "path": self.model, "opset": model.opset(""), "ir_version": model.proto.ir_version(),
                "producer": model.proto.producer_name(), "operators": operators,
                "weights": weights.iter().map(|(ty, (tensors, bytes))| json!({"type": ty, "tensors": tensors, "bytes": bytes})).collect::<Vec<_>>(),
                "groups": kinds, "outputs": outputs,
                "inputs": inputs.iter().map(|i| json!({"name": i.name, "shape": i.dims})).collect::<Vec<_>>(),
                "unknown_fields": model.unknown,
            }));
        }
        let opset = model.opset("").map_or("none".to_owned(), |v| v.to_string());
        output::say(&format!("{}: opset {opset}, {} nodes", self.model.display(), model.graph().node.len()))?;
        for input in &inputs {
            output::say(&format!("input {}: {}", input.name, dims(&input.dims)))?;
        }
        output::say(&format!("outputs: {}", outputs.join(", ")))?;
        for (kind, count) in kinds {
            output::say(&format!("{count} groups of nodes are {kind}"))?;
        }
        let mut table = Table::new(&["weights", "tensors", "bytes"]);
        for (ty, (tensors, bytes)) in weights {
            table.row(vec![ty, tensors.to_string(), output::bytes(bytes as u64)]);
        }
        output::say(&table.render())?;
        let mut table = Table::new(&["operator", "nodes"]);
        for (operator, nodes) in operators {
            table.row(vec![operator, nodes.to_string()]);
        }
        output::say(&table.render())
    }
}
