//! Moving a model to a newer operator set: what moved is rewritten, what changed its meaning is refused.

use crate::small::{constant, model, node};
use nibble_quant::onnx::opset::{BLOCKS, raise, upgrade};
use nibble_quant::onnx::proto::*;
use nibble_quant::onnx::tensor::ints;
use nibble_quant::onnx::{Graph, Model};

/// A model of an opset with these nodes after `x`.
fn of(version: i64, nodes: Vec<NodeProto>) -> Model {
    let output = nodes.last().unwrap().out().to_owned();
    let mut made = model(nodes, vec![constant("c", &[4], 1)], ("x", &[2, 4]), &[&output]);
    made.proto.opset_import[0].version = Some(version);
    made
}

fn axes(op: &str) -> NodeProto {
    node(op, &["x"], "y").with(AttributeProto::new_ints("axes", &[1]))
}

#[test]
fn attributes_that_became_inputs_are_moved_with_their_set() {
    // The operator, the set that it moved with, and which of its inputs that is.
    for (op, moved, slot) in [
        ("Squeeze", 13, 1),
        ("Unsqueeze", 13, 1),
        ("ReduceSum", 13, 1),
        ("ReduceMean", 18, 1),
        ("ReduceMax", 18, 1),
        ("ReduceL2", 18, 1),
    ] {
        for from in 11..21 {
            for to in [13, 21] {
                // Newer models have the axes where they belong already.
                if from >= moved {
                    continue;
                }
                let mut made = of(from, vec![axes(op)]);
                assert_eq!(raise(&mut made, to).unwrap(), from < to, "{op} from {from} to {to}");
                assert_eq!(made.opset(""), Some(from.max(to)));
                let found = &made.graph().node[0];
                let is_input = found.attr("axes").is_none() && !found.arg(slot).is_empty();
                assert_eq!(is_input, moved <= to.max(from) && from < to, "{op} from {from} to {to}");
                if is_input {
                    let graph = Graph::new(made.graph()).unwrap();
                    assert_eq!(ints(graph.constant(found.arg(slot)).unwrap()).unwrap(), [1]);
                }
            }
        }
    }
    let mut parts = NodeProto::new("Split", "split", &["x"], &["a", "y"]);
    parts.attribute = vec![AttributeProto::new_int("axis", 1)];
    let mut made = of(17, vec![parts]);
    raise(&mut made, BLOCKS).unwrap();
    assert_eq!(made.graph().node[0].int("num_outputs", 0), 2);
    assert_eq!((made.opset(""), made.proto.ir_version()), (Some(21), 10), "4-bit integers are of IR version 10");
    assert!(!raise(&mut made, BLOCKS).unwrap(), "once");
}

#[test]
fn what_means_something_else_later_is_refused_by_node() {
    let mut softmax = of(12, vec![node("Softmax", &["x"], "y").with(AttributeProto::new_int("axis", 0))]);
    let error = upgrade(&mut softmax).unwrap_err().to_string();
    assert!(error.contains("node `Softmax.y` works on all dimensions from 0 on"), "{error}");
    let mut last = of(12, vec![node("Softmax", &["x"], "y").with(AttributeProto::new_int("axis", 1))]);
    upgrade(&mut last).unwrap();
    assert_eq!(last.graph().node[0].int("axis", 7), -1);
    for (op, from, refused) in
        [("RoiAlign", 15, true), ("RoiAlign", 16, false), ("GridSample", 16, true), ("GridSample", 20, false)]
    {
        let mut made = of(from, vec![node(op, &["x", "c", "c"], "y")]);
        match raise(&mut made, BLOCKS) {
            Err(error) => assert!(refused && error.to_string().contains(&format!("node `{op}.y`")), "{error}"),
            Ok(_) => assert!(!refused, "{op} from {from}"),
        }
    }
    for version in [1, 10] {
        let error = upgrade(&mut of(version, vec![axes("Squeeze")])).unwrap_err().to_string();
        assert!(error.contains(&format!("version {version}; 11 and later are understood")), "{error}");
    }
}
