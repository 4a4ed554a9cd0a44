//! The index and edits: what is read is checked, what is applied is ordered, and what nothing reads any more is gone.

use nibble_quant::onnx::graph::{fresh, sort};
use nibble_quant::onnx::proto::*;
use nibble_quant::onnx::{Edit, Graph, apply, tensor};

fn value(name: &str) -> ValueInfoProto {
    ValueInfoProto { name: Some(name.into()), ..Default::default() }
}

fn graph(nodes: Vec<NodeProto>, initializers: &[&str], inputs: &[&str], outputs: &[&str]) -> GraphProto {
    GraphProto {
        node: nodes,
        initializer: initializers.iter().map(|n| tensor::from_f32(n, &[1], &[1.0])).collect(),
        input: inputs.iter().map(|n| value(n)).collect(),
        output: outputs.iter().map(|n| value(n)).collect(),
        ..Default::default()
    }
}

fn node(op: &str, inputs: &[&str], outputs: &[&str]) -> NodeProto {
    NodeProto::new(op, &format!("{op}_{}", outputs[0]), inputs, outputs)
}

/// An `If` whose branch reads `outer` and makes `inner`.
fn branch(outer: &str, out: &str) -> NodeProto {
    let body = graph(vec![node("Neg", &[outer], &["inner"])], &[], &[], &["inner"]);
    let attribute =
        |name: &str| AttributeProto { name: Some(name.into()), g: Some(body.clone()), ..Default::default() };
    node("If", &["x"], &[out]).with(attribute("then_branch")).with(attribute("else_branch"))
}

#[test]
fn an_index_knows_who_makes_and_who_reads() {
    let proto = graph(
        vec![
            node("Relu", &["x"], &["a"]),
            node("Add", &["a", "w"], &["b"]),
            node("Mul", &["a", "a"], &["c"]),
            branch("b", "d"),
        ],
        &["w"],
        &["x"],
        &["c", "d"],
    );
    let index = Graph::new(&proto).unwrap();
    assert_eq!(index.producer("b"), Some(1));
    assert_eq!(index.producer("x"), None);
    assert_eq!(index.producer("w"), None);
    assert_eq!(index.consumers("a"), [(1, 0), (2, 0), (2, 1)]);
    assert_eq!(index.sole_consumer("x"), None, "Relu and If read it");
    assert_eq!(index.sole_consumer("b"), None, "a sub-graph reads it");
    assert!(index.captured("b") && !index.captured("inner"));
    assert_eq!(index.sole_consumer("w"), Some(1));
    assert!(index.constant("w").is_some() && index.constant("a").is_none());
    assert!(index.is_output("c") && !index.is_private("c") && index.is_private("a"));
}

#[test]
fn broken_graphs_are_refused_by_tensor_and_node() {
    let add = |a, b, out| node("Add", &[a, b], &[out]);
    let cases = [
        (graph(vec![add("x", "y", "a")], &[], &["x"], &["a"]), "tensor `y`: read by node `Add_a`"),
        (graph(vec![add("x", "b", "a"), add("x", "x", "b")], &[], &["x"], &["a"]), "tensor `b`: read by node `Add_a`"),
        (graph(vec![add("x", "x", "a"), add("x", "x", "a")], &[], &["x"], &["a"]), "tensor `a`: made by node `Add_a`"),
        (graph(vec![add("x", "x", "x")], &[], &["x"], &["x"]), "tensor `x`: made by node `Add_x`"),
        (graph(vec![], &[], &["x"], &["z"]), "tensor `z`: an output"),
        (graph(vec![], &["w", "w"], &["x"], &[]), "tensor `w`: two initializers"),
        (graph(vec![branch("nowhere", "a")], &[], &["x"], &["a"]), "tensor `nowhere`: read inside of node `If_a`"),
    ];
    for (proto, wanted) in cases {
        let e = Graph::new(&proto).unwrap_err().to_string();
        assert!(e.starts_with(wanted), "{e}");
    }
}

#[test]
fn sorting_keeps_an_order_that_is_right_and_finds_cycles() {
    let make = |order: [usize; 4]| {
        let nodes =
            [node("A", &["x"], &["a"]), node("B", &["x"], &["b"]), branch("b", "c"), node("D", &["a", "c"], &["d"])];
        graph(order.map(|i| nodes[i].clone()).to_vec(), &[], &["x"], &["d"])
    };
    let ops = |g: &GraphProto| g.node.iter().map(|n| n.op_type().to_owned()).collect::<Vec<_>>();
    for (order, wanted) in [
        ([0, 1, 2, 3], ["A", "B", "If", "D"]),
        ([1, 0, 2, 3], ["B", "A", "If", "D"]),
        ([3, 2, 1, 0], ["B", "If", "A", "D"]),
        ([2, 0, 1, 3], ["A", "B", "If", "D"]),
    ] {
        let mut g = make(order);
        sort(&mut g).unwrap();
        assert_eq!(ops(&g), wanted);
        Graph::new(&g).unwrap();
    }
    let mut cycle = graph(vec![node("A", &["b"], &["a"]), node("B", &["a"], &["b"])], &[], &[], &["a"]);
    assert!(sort(&mut cycle).unwrap_err().to_string().contains("node `A_a` waits for its own output"));
}

#[test]
fn edits_put_a_node_between_others_and_drop_what_nothing_reads() {
    let mut g = graph(
        vec![
            node("Conv", &["x", "w"], &["a"]),
            node("Clip", &["a", "lo", "hi"], &["b"]),
            node("Add", &["b", "k"], &["c"]),
        ],
        &["w", "lo", "hi", "k", "never_read"],
        &["x"],
        &["c"],
    );
    g.value_info = vec![value("a"), value("b")];
    apply(
        &mut g,
        vec![
            Edit::Remove(1),
            Edit::Output { node: 0, slot: 0, to: "b".into() },
            Edit::Input { node: 2, slot: 0, to: "b_q".into() },
            Edit::Add(node("Round", &["b"], &["b_q"])),
            Edit::Input { node: 0, slot: 2, to: "bias".into() },
            Edit::Initializer(tensor::from_f32("bias", &[1], &[3.0])),
            Edit::Initializer(tensor::from_f32("k", &[1], &[5.0])),
            Edit::Attribute { node: 0, attribute: Box::new(AttributeProto::new_int("group", 1)) },
            Edit::Attribute { node: 0, attribute: Box::new(AttributeProto::new_int("group", 2)) },
        ],
    )
    .unwrap();
    let ops: Vec<_> = g.node.iter().map(|n| n.op_type()).collect();
    assert_eq!(ops, ["Conv", "Round", "Add"]);
    assert_eq!(g.node[0].input, ["x", "w", "bias"]);
    assert_eq!(g.node[0].attribute.len(), 1);
    assert_eq!(g.node[0].int("group", 1), 2);
    let names: Vec<_> = g.initializer.iter().map(|t| t.name()).collect();
    assert_eq!(names, ["w", "k", "never_read", "bias"]);
    assert_eq!(tensor::scalar(&g.initializer[1]).unwrap(), 5.0);
    assert_eq!(g.value_info, [value("b")]);
}

#[test]
fn edits_that_contradict_themselves_or_break_the_graph_are_refused() {
    let base = || graph(vec![node("A", &["x"], &["a"]), node("B", &["a"], &["b"])], &[], &["x"], &["b"]);
    let input = |to: &str| Edit::Input { node: 1, slot: 0, to: to.into() };
    let cases = [
        (vec![Edit::Remove(2)], "graph edit: node 2 of 2"),
        (vec![Edit::Output { node: 0, slot: 1, to: "c".into() }], "graph edit: output 1 of node 0"),
        (vec![input("x"), input("a")], "becomes `x` and `a`"),
        (vec![Edit::Remove(0)], "tensor `a`: read by node `B_b`"),
        (vec![Edit::Remove(1)], "tensor `b`: an output"),
        (vec![Edit::Input { node: 0, slot: 0, to: "b".into() }], "waits for its own output"),
        (vec![Edit::Add(node("C", &["x"], &["a"]))], "tensor `a`: made by node `C_a`"),
    ];
    for (edits, wanted) in cases {
        let e = apply(&mut base(), edits).unwrap_err().to_string();
        assert!(e.contains(wanted), "{e}");
    }
}

#[test]
fn new_names_differ_from_all_others() {
    let g = graph(vec![node("A", &["x"], &["a"])], &["w"], &["x"], &["a"]);
    let mut names = Graph::new(&g).unwrap().names();
    let made: Vec<_> = ["a", "a", "w", "x", "A_a", "new"].iter().map(|n| fresh(&mut names, n)).collect();
    assert_eq!(made, ["a_1", "a_2", "w_1", "x_1", "A_a_1", "new"]);
}

#[test]
fn shapes_and_types_are_what_the_file_says() {
    let dim = |value| Dimension { value, denotation: None };
    let shape = TensorShapeProto {
        dim: vec![dim(Some(DimensionValue::Param("batch".into()))), dim(Some(DimensionValue::Value(3))), dim(None)],
    };
    let ty = TensorType { elem_type: Some(DataType::Float16 as i32), shape: Some(shape) };
    let mut g = graph(vec![node("A", &["x"], &["a"])], &["w"], &["x"], &["a"]);
    g.input[0].r#type = Some(TypeProto { value: Some(TypeValue::Tensor(ty)), denotation: None });
    let index = Graph::new(&g).unwrap();
    assert_eq!(index.shape("x"), Some(vec![None, Some(3), None]));
    assert_eq!(index.elem_type("x"), Some(DataType::Float16));
    assert_eq!(index.shape("w"), Some(vec![Some(1)]));
    assert_eq!((index.shape("a"), index.elem_type("a")), (None, None));
}
