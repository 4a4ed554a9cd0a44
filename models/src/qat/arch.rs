//! Small models to train from scratch, as float ONNX graphs of drawn weights.
//!
//! ```text
//! cnn   conv 3x3 /2 32, [depthwise 3x3, conv 1x1 64], conv 3x3 /2 128, [depthwise, conv 1x1 256],
//!       + [depthwise, conv 1x1 256], mean, classifier; each with a batch norm and Relu
//! vit   patches of 1/4 of a side as rows, + positions, 2 blocks of width 96 with 3 heads, mean, norm, classifier
//! ```

use crate::{ModelError, Result};
use nibble_quant::onnx::proto::*;
use nibble_quant::onnx::tensor::{from_f32, from_i64};
use nibble_quant::onnx::{Graph, Model};
use rand::{Rng, SeedableRng, rngs::StdRng};

/// The first operator set with Gelu.
const OPSET: i64 = 20;

/// A model that can be trained from scratch.
pub struct Architecture {
    /// The word for it.
    pub name: &'static str,
    /// What it is.
    pub summary: &'static str,
    build: fn(&mut Builder, [usize; 3], usize) -> Result<String>,
}

/// Every one.
pub static ARCHITECTURES: &[Architecture] = &[
    Architecture { name: "cnn", summary: "convolutions, three of them depthwise, with batch norms", build: cnn },
    Architecture { name: "vit", summary: "a Vision Transformer of two blocks", build: vit },
];

/// A model for pictures (channels, height, width) of some classes, with weights drawn by `seed`.
///
/// # Errors
/// A name that isn't known, or a picture that can't be cut into patches.
pub fn build(name: &str, picture: [usize; 3], classes: usize, seed: u64) -> Result<Model> {
    let known = ARCHITECTURES.iter().map(|a| a.name);
    let architecture = ARCHITECTURES.iter().find(|a| a.name == name).ok_or_else(|| ModelError::Setting {
        what: format!("architecture `{name}`"),
        why: format!("unknown; known: {}", known.collect::<Vec<_>>().join(", ")),
    })?;
    let mut builder = Builder { graph: GraphProto::default(), rng: StdRng::seed_from_u64(seed) };
    let output = (architecture.build)(&mut builder, picture, classes)?;
    let mut graph = builder.graph;
    graph.name = Some(name.into());
    let [c, h, w] = picture.map(|d| DimensionValue::Value(d as i64));
    graph.input = vec![value("image", &[DimensionValue::Param("batch".into()), c, h, w])];
    let classes = DimensionValue::Value(classes as i64);
    graph.output = vec![value(&output, &[DimensionValue::Param("batch".into()), classes])];
    let mut model = Model::default();
    model.proto.ir_version = Some(9);
    model.proto.producer_name = Some("nibble".into());
    model.proto.graph = Some(graph);
    model.import("", OPSET);
    Graph::new(model.graph())?;
    Ok(model)
}

fn value(name: &str, dims: &[DimensionValue]) -> ValueInfoProto {
    let dim = dims.iter().map(|d| Dimension { value: Some(d.clone()), denotation: None }).collect();
    let tensor = TensorType { elem_type: Some(DataType::Float as i32), shape: Some(TensorShapeProto { dim }) };
    ValueInfoProto {
        name: Some(name.into()),
        r#type: Some(TypeProto { value: Some(TypeValue::Tensor(tensor)), denotation: None }),
        ..Default::default()
    }
}

struct Builder {
    graph: GraphProto,
    rng: StdRng,
}

impl Builder {
    /// Normal numbers of a deviation (Box and Muller).
    fn drawn(&mut self, name: &str, dims: &[usize], deviation: f32) -> String {
        let n = dims.iter().product();
        let draw = |rng: &mut StdRng| {
            let (a, b): (f32, f32) = (1.0 - rng.random::<f32>(), rng.random());
            (-2.0 * a.ln()).sqrt() * (std::f32::consts::TAU * b).cos() * deviation
        };
        let values: Vec<f32> = (0..n).map(|_| draw(&mut self.rng)).collect();
        self.constant(name, dims, &values)
    }

    fn constant(&mut self, name: &str, dims: &[usize], values: &[f32]) -> String {
        self.graph.initializer.push(from_f32(name, dims, values));
        name.to_owned()
    }

    fn ints(&mut self, name: &str, values: &[i64]) -> String {
        if !self.graph.initializer.iter().any(|t| t.name() == name) {
            self.graph.initializer.push(from_i64(name, &[values.len()], values));
        }
        name.to_owned()
    }

    /// Adds a node whose output has its name.
    fn node(&mut self, op: &str, name: &str, inputs: &[&str], attributes: Vec<AttributeProto>) -> String {
        let mut node = NodeProto::new(op, name, inputs, &[name]);
        node.attribute = attributes;
        self.graph.node.push(node);
        name.to_owned()
    }

    /// A convolution without bias, a batch norm, a Relu. `[from, to, kernel, step, groups]`.
    fn conv(&mut self, name: &str, x: &str, [from, to, kernel, step, groups]: [usize; 5]) -> String {
        let fan = from / groups * kernel * kernel;
        let weight = self.drawn(&format!("{name}.w"), &[to, from / groups, kernel, kernel], (2.0 / fan as f32).sqrt());
        let side = |v: usize| vec![v as i64; 2];
        let attributes = vec![
            AttributeProto::new_ints("kernel_shape", &side(kernel)),
            AttributeProto::new_ints("strides", &side(step)),
            AttributeProto::new_ints("pads", &[(kernel / 2) as i64; 4]),
            AttributeProto::new_int("group", groups as i64),
        ];
        let y = self.node("Conv", name, &[x, &weight], attributes);
        let vector = |b: &mut Self, part: &str, v: f32| b.constant(&format!("{name}.{part}"), &[to], &vec![v; to]);
        let parts = [("gain", 1.0), ("offset", 0.0), ("mean", 0.0), ("var", 1.0)].map(|(p, v)| vector(self, p, v));
        let [gain, offset, mean, var] = &parts;
        let y = self.node("BatchNormalization", &format!("{name}.norm"), &[&y, gain, offset, mean, var], Vec::new());
        self.node("Relu", &format!("{name}.relu"), &[&y], Vec::new())
    }

    /// A matrix and a bias, for inputs of three dimensions.
    fn linear(&mut self, name: &str, x: &str, [from, to]: [usize; 2]) -> String {
        let weight = self.drawn(&format!("{name}.w"), &[from, to], (1.0 / from as f32).sqrt());
        let y = self.node("MatMul", &format!("{name}.product"), &[x, &weight], Vec::new());
        let bias = self.constant(&format!("{name}.b"), &[to], &vec![0.0; to]);
        self.node("Add", name, &[&y, &bias], Vec::new())
    }

    fn norm(&mut self, name: &str, x: &str, width: usize) -> String {
        let gain = self.constant(&format!("{name}.gain"), &[width], &vec![1.0; width]);
        let offset = self.constant(&format!("{name}.offset"), &[width], &vec![0.0; width]);
        let attributes = vec![AttributeProto::new_int("axis", -1), AttributeProto::new_float("epsilon", 1e-5)];
        self.node("LayerNormalization", name, &[x, &gain, &offset], attributes)
    }

    /// A matrix (classes, from) and a bias over (batch, from).
    fn classifier(&mut self, x: &str, from: usize, classes: usize) -> String {
        let weight = self.drawn("classifier.w", &[classes, from], (1.0 / from as f32).sqrt());
        let bias = self.constant("classifier.b", &[classes], &vec![0.0; classes]);
        self.node("Gemm", "logits", &[x, &weight, &bias], vec![AttributeProto::new_int("transB", 1)])
    }
}

fn cnn(b: &mut Builder, [channels, _, _]: [usize; 3], classes: usize) -> Result<String> {
    let x = b.conv("stem", "image", [channels, 32, 3, 2, 1]);
    let x = b.conv("deep1", &x, [32, 32, 3, 1, 32]);
    let x = b.conv("wide1", &x, [32, 64, 1, 1, 1]);
    let x = b.conv("full", &x, [64, 128, 3, 2, 1]);
    let x = b.conv("deep2", &x, [128, 128, 3, 1, 128]);
    let x = b.conv("wide2", &x, [128, 256, 1, 1, 1]);
    let y = b.conv("deep3", &x, [256, 256, 3, 1, 256]);
    let y = b.conv("wide3", &y, [256, 256, 1, 1, 1]);
    let x = b.node("Add", "sum", &[&x, &y], Vec::new());
    let x = b.node("GlobalAveragePool", "mean", &[&x], Vec::new());
    let x = b.node("Flatten", "flat", &[&x], Vec::new());
    Ok(b.classifier(&x, 256, classes))
}

/// Patches along a side.
const GRID: usize = 4;
const WIDTH: usize = 96;
const HEADS: usize = 3;
const BLOCKS: usize = 2;

fn vit(b: &mut Builder, [channels, height, width]: [usize; 3], classes: usize) -> Result<String> {
    if !height.is_multiple_of(GRID) || !width.is_multiple_of(GRID) || height == 0 || width == 0 {
        let why = format!("pictures of {height} x {width} pixels aren't {GRID} x {GRID} patches");
        return Err(ModelError::Setting { what: "architecture `vit`".into(), why });
    }
    let (py, px, tokens) = (height / GRID, width / GRID, GRID * GRID);
    let patch = channels * py * px;
    let cut = [0, channels, GRID, py, GRID, px].map(|d| d as i64);
    let cut = b.ints("cut", &cut);
    let rows = b.ints("rows", &[0, tokens as i64, patch as i64]);
    let x = b.node("Reshape", "patches.cut", &["image", &cut], Vec::new());
    let order = vec![AttributeProto::new_ints("perm", &[0, 2, 4, 1, 3, 5])];
    let x = b.node("Transpose", "patches.order", &[&x], order);
    let x = b.node("Reshape", "patches", &[&x, &rows], Vec::new());
    let x = b.linear("embed", &x, [patch, WIDTH]);
    let positions = b.drawn("positions", &[1, tokens, WIDTH], 0.02);
    let mut x = b.node("Add", "embedded", &[&x, &positions], Vec::new());
    for i in 0..BLOCKS {
        x = block(b, &format!("b{i}"), &x);
    }
    let axes = b.ints("tokens_axis", &[1]);
    let x = b.node("ReduceMean", "mean", &[&x, &axes], vec![AttributeProto::new_int("keepdims", 0)]);
    let x = b.norm("norm", &x, WIDTH);
    Ok(b.classifier(&x, WIDTH, classes))
}

fn block(b: &mut Builder, name: &str, x: &str) -> String {
    let of = |part: &str| format!("{name}.{part}");
    let head = WIDTH / HEADS;
    let split = b.ints("split", &[0, 0, HEADS as i64, head as i64]);
    let join = b.ints("join", &[0, 0, WIDTH as i64]);
    let normed = b.norm(&of("n1"), x, WIDTH);
    let mut heads = |part: &str, perm: [i64; 4]| {
        let y = b.linear(&of(part), &normed, [WIDTH, WIDTH]);
        let y = b.node("Reshape", &of(&format!("{part}s")), &[&y, &split], Vec::new());
        b.node("Transpose", &of(&format!("{part}t")), &[&y], vec![AttributeProto::new_ints("perm", &perm)])
    };
    let (q, k, v) = (heads("q", [0, 2, 1, 3]), heads("k", [0, 2, 3, 1]), heads("v", [0, 2, 1, 3]));
    let scores = b.node("MatMul", &of("scores"), &[&q, &k], Vec::new());
    let scale = match b.graph.initializer.iter().any(|t| t.name() == "scale") {
        true => "scale".to_owned(),
        false => b.constant("scale", &[], &[1.0 / (head as f32).sqrt()]),
    };
    let scores = b.node("Mul", &of("scaled"), &[&scores, &scale], Vec::new());
    let shares = b.node("Softmax", &of("shares"), &[&scores], vec![AttributeProto::new_int("axis", -1)]);
    let y = b.node("MatMul", &of("mixed"), &[&shares, &v], Vec::new());
    let y = b.node("Transpose", &of("mt"), &[&y], vec![AttributeProto::new_ints("perm", &[0, 2, 1, 3])]);
    let y = b.node("Reshape", &of("mj"), &[&y, &join], Vec::new());
    let y = b.linear(&of("out"), &y, [WIDTH, WIDTH]);
    let x = b.node("Add", &of("r1"), &[x, &y], Vec::new());
    let normed = b.norm(&of("n2"), &x, WIDTH);
    let y = b.linear(&of("up"), &normed, [WIDTH, 4 * WIDTH]);
    let y = b.node("Gelu", &of("gelu"), &[&y], Vec::new());
    let y = b.linear(&of("down"), &y, [4 * WIDTH, WIDTH]);
    b.node("Add", &of("r2"), &[&x, &y], Vec::new())
}
