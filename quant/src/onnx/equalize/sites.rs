//! Where channels can be scaled: tensors that only layers with constant weights and channel-wise operators touch.

use crate::onnx::Graph;
use crate::onnx::groups::{GroupKind, groups};
use crate::onnx::proto::*;
use crate::onnx::tensor::{ints, scalar};
use std::collections::{BTreeMap, BTreeSet};

/// Tensors with the same factors, who makes them and who reads them.
#[derive(Debug, Clone, PartialEq)]
pub struct Site {
    /// The tensors; those that consumers read are among them.
    pub tensors: Vec<String>,
    /// Which of their dimensions the channels are, from the front (1) or the last.
    pub axis: Axis,
    /// Channels.
    pub channels: usize,
    /// What takes up the reciprocal factors.
    pub producers: Vec<Producer>,
    /// What takes up the factors.
    pub consumers: Vec<Consumer>,
    /// The least upper end of the Clips between the tensors, where sites may go through those.
    pub ceiling: Option<f32>,
}

/// Where channels are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Axis {
    /// (batch, channels, ...).
    Second,
    /// (..., channels).
    Last,
}

/// Constants that make a tensor.
#[derive(Debug, Clone, PartialEq)]
pub struct Producer {
    weight: Option<(String, Rows)>,
    /// Vectors of one number a channel: a bias, a layer norm's gain and offset.
    vectors: Vec<String>,
}

/// Where a weight's output channels are.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Rows {
    First,
    Second,
}

/// A layer that reads a tensor.
#[derive(Debug, Clone, PartialEq)]
pub struct Consumer {
    /// The tensor it reads.
    pub reads: String,
    weight: String,
    kind: Reader,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Reader {
    /// (out, in, ...).
    Rows,
    /// (in, out).
    Columns,
    /// (channels, 1, ...).
    Depthwise,
}

/// Which channel a value of a constant belongs to, by its position.
type ChannelOf = fn(&TensorProto, usize) -> usize;

fn dim(tensor: &TensorProto, axis: usize) -> usize {
    tensor.dims.get(axis).map_or(1, |&d| d.max(1) as usize)
}

fn inner(tensor: &TensorProto) -> usize {
    (2..tensor.dims.len()).map(|axis| dim(tensor, axis)).product()
}

impl Producer {
    /// Its constants, each with the channel of its values.
    pub(super) fn parts(&self) -> Vec<(&str, ChannelOf)> {
        let weight = self.weight.iter().map(|(name, rows)| {
            let of: ChannelOf = match rows {
                Rows::First => |t, i| i / (dim(t, 1) * inner(t)),
                Rows::Second => |t, i| i % dim(t, 1),
            };
            (name.as_str(), of)
        });
        let vectors = self.vectors.iter().map(|name| (name.as_str(), (|_, i| i) as ChannelOf));
        weight.chain(vectors).collect()
    }

    /// Its weight, with the channel of its values; none for a norm.
    pub(super) fn matrix(&self) -> Option<(&str, ChannelOf)> {
        self.weight.as_ref().and_then(|_| self.parts().into_iter().next())
    }

    fn constants(&self) -> impl Iterator<Item = &String> {
        self.weight.iter().map(|(name, _)| name).chain(&self.vectors)
    }
}

impl Consumer {
    /// Its weight's name.
    pub fn weight(&self) -> &str {
        &self.weight
    }

    /// Whether each output has one input channel.
    pub fn is_depthwise(&self) -> bool {
        self.kind == Reader::Depthwise
    }

    pub(super) fn outputs(&self, weight: &TensorProto) -> usize {
        dim(weight, usize::from(self.kind == Reader::Columns))
    }

    /// Output and input channel of a weight by its position.
    pub(super) fn place(&self, weight: &TensorProto, index: usize) -> (usize, usize) {
        match self.kind {
            Reader::Rows => {
                let inner = inner(weight);
                (index / (dim(weight, 1) * inner), index / inner % dim(weight, 1))
            }
            Reader::Columns => (index % dim(weight, 1), index / dim(weight, 1)),
            Reader::Depthwise => {
                let channel = index / (dim(weight, 1) * inner(weight));
                (channel, channel)
            }
        }
    }
}

/// What a tensor's maker or reader is to a site.
enum End<T> {
    Layer(T, Axis, usize),
    /// The same factors on these tensors.
    Through(Vec<String>),
    Not,
}

fn float<'a>(graph: &Graph<'a>, name: &str) -> Option<&'a TensorProto> {
    graph.constant(name).filter(|t| t.data_type() == DataType::Float)
}

/// A vector constant of `n` numbers.
fn vector(graph: &Graph, name: &str, n: usize) -> bool {
    float(graph, name).is_some_and(|t| t.dims == [n as i64])
}

/// Operators that treat channels alike and scale with them: f(s x) = s f(x) for s > 0.
fn homogeneous(node: &NodeProto) -> bool {
    pools(node) || node.is("Relu") || node.is("LeakyRelu")
}

/// The upper end of a Clip whose lower one is zero.
fn ceiling(graph: &Graph, node: &NodeProto) -> Option<f32> {
    let end = |slot: usize| float(graph, node.arg(slot)).and_then(|t| scalar(t).ok());
    (node.is("Clip") && end(1) == Some(0.0)).then(|| end(2)).flatten().filter(|&hi| hi > 0.0)
}

/// Operators over all dimensions from the third on: channels are the second.
fn pools(node: &NodeProto) -> bool {
    node.is("MaxPool") || node.is("AveragePool") || node.is("GlobalAveragePool")
}

/// What is known of a graph's groups of nodes.
struct Known {
    /// Gain and offset of a layer norm, by its output.
    norms: BTreeMap<String, (String, String)>,
    /// Values of an attention and what it makes of them, heads joined again: channel by channel a weighted mean.
    mixed: Vec<(String, String)>,
    /// Whether Clips from zero on are gone through: they are the identity for channels that stay below their end.
    clips: bool,
}

impl Known {
    fn of(graph: &Graph, clips: bool) -> Known {
        let groups = groups(graph);
        let norms = groups.iter().filter(|g| g.kind == GroupKind::LayerNorm);
        let norms = norms.filter_map(|g| Some((g.output.clone(), g.affine.clone()?))).collect();
        let attentions = groups.iter().filter(|g| g.kind == GroupKind::Attention);
        Known { norms, mixed: attentions.filter_map(|g| mixed(graph, &g.output)).collect(), clips }
    }

    fn source(&self, made: &str) -> Option<&String> {
        self.mixed.iter().find(|(_, out)| out == made).map(|(values, _)| values)
    }

    fn result(&self, values: &str) -> Option<&String> {
        self.mixed.iter().find(|(of, _)| of == values).map(|(_, out)| out)
    }
}

/// From the product of an attention's shares and values, back over the split into heads and on over their joining:
///
/// ```text
/// (b, n, h d) -> Reshape (b, n, h, d) -> Transpose (b, h, n, d) -> MatMul -> Transpose (b, n, h, d) -> Reshape (b, n, h d)
/// ```
fn mixed(graph: &Graph, product: &str) -> Option<(String, String)> {
    let swaps = |id: usize| {
        let node = graph.node(id);
        node.is("Transpose") && node.attr("perm").is_some_and(|a| a.ints == [0, 2, 1, 3])
    };
    let shape = |id: usize| graph.constant(graph.node(id).arg(1)).and_then(|t| ints(t).ok());
    let alone = |tensor: &str| graph.sole_consumer(tensor).is_some();
    let turned = graph.node(graph.producer(product)?).arg(1);
    let turn = graph.producer(turned).filter(|&id| swaps(id) && alone(turned))?;
    let split = graph.node(turn).arg(0);
    let cut = graph.producer(split).filter(|&id| graph.node(id).is("Reshape") && alone(split))?;
    let values = graph.node(cut).arg(0);
    let back = graph.sole_consumer(product).filter(|&id| swaps(id))?;
    let join = graph.sole_consumer(graph.node(back).out()).filter(|&id| graph.node(id).is("Reshape"))?;
    let (heads, whole) = (shape(cut)?, shape(join)?);
    let (&[_, _, h, d], &[_, _, all]) = (heads.as_slice(), whole.as_slice()) else { return None };
    let same = h > 0 && d > 0 && h.checked_mul(d) == Some(all);
    (same && alone(values)).then(|| (values.to_owned(), graph.node(join).out().to_owned()))
}

fn maker(graph: &Graph, tensor: &str, known: &Known) -> End<Producer> {
    if let Some(values) = known.source(tensor) {
        return End::Through(vec![values.clone()]);
    }
    if let Some((gain, offset)) = known.norms.get(tensor) {
        let n = float(graph, gain).map_or(0, |t| dim(t, 0));
        return match n > 0 && vector(graph, gain, n) && vector(graph, offset, n) {
            true => End::Layer(Producer { weight: None, vectors: vec![gain.clone(), offset.clone()] }, Axis::Last, n),
            false => End::Not,
        };
    }
    let Some(id) = graph.producer(tensor) else { return End::Not };
    let node = graph.node(id);
    if homogeneous(node) || known.clips && ceiling(graph, node).is_some() {
        return End::Through(vec![node.arg(0).to_owned()]);
    }
    let layer = |weight: &str, rows: Rows, axis: Axis, bias: &str| {
        let Some(t) = float(graph, weight).filter(|t| t.dims.len() >= 2) else { return End::Not };
        let n = dim(t, usize::from(rows == Rows::Second));
        let vectors = match bias {
            "" => Vec::new(),
            name if vector(graph, name, n) => vec![name.to_owned()],
            _ => return End::Not,
        };
        End::Layer(Producer { weight: Some((weight.to_owned(), rows)), vectors }, axis, n)
    };
    match node.op_type() {
        "Conv" => layer(node.arg(1), Rows::First, Axis::Second, node.arg(2)),
        "Gemm" if node.float("alpha", 1.0) == 1.0 && node.float("beta", 1.0) == 1.0 => {
            let rows = if node.int("transB", 0) != 0 { Rows::First } else { Rows::Second };
            layer(node.arg(1), rows, Axis::Last, node.arg(2))
        }
        "MatMul" if float(graph, node.arg(1)).is_some_and(|t| t.dims.len() == 2) => {
            layer(node.arg(1), Rows::Second, Axis::Last, "")
        }
        "Add" => {
            // The Add of a bias belongs to the MatMul before it.
            let product = (0..2).find_map(|slot| {
                let id = graph.producer(node.arg(slot)).filter(|&p| graph.node(p).is("MatMul"))?;
                let matrix = float(graph, graph.node(id).arg(1)).filter(|t| t.dims.len() == 2)?;
                let bias = node.arg(1 - slot);
                let alone = graph.sole_consumer(node.arg(slot)).is_some();
                (alone && vector(graph, bias, dim(matrix, 1))).then(|| (graph.node(id).arg(1), bias))
            });
            match product {
                Some((weight, bias)) => layer(weight, Rows::Second, Axis::Last, bias),
                None if (0..2).all(|slot| graph.constant(node.arg(slot)).is_none()) => {
                    End::Through(vec![node.arg(0).to_owned(), node.arg(1).to_owned()])
                }
                None => End::Not,
            }
        }
        _ => End::Not,
    }
}

fn reader(graph: &Graph, tensor: &str, id: usize, slot: usize, known: &Known) -> End<Consumer> {
    if let Some(out) = known.result(tensor) {
        return End::Through(vec![out.clone()]);
    }
    let node = graph.node(id);
    if known.clips && ceiling(graph, node).is_some() {
        return End::Through(vec![node.out().to_owned()]);
    }
    if homogeneous(node) || node.is("Add") && (0..2).all(|s| graph.constant(node.arg(s)).is_none()) {
        return End::Through(vec![node.out().to_owned()]);
    }
    let Some(weight) = float(graph, node.arg(1)).filter(|t| slot == 0 && t.dims.len() >= 2) else { return End::Not };
    let layer = |kind: Reader, axis: Axis, n: usize| {
        End::Layer(Consumer { reads: tensor.to_owned(), weight: weight.name().to_owned(), kind }, axis, n)
    };
    match node.op_type() {
        "Conv" if node.int("group", 1) == 1 => layer(Reader::Rows, Axis::Second, dim(weight, 1)),
        "Conv" if dim(weight, 1) == 1 && node.int("group", 1) == weight.dims[0] => {
            layer(Reader::Depthwise, Axis::Second, dim(weight, 0))
        }
        "Gemm" if node.int("transA", 0) == 0 && node.float("alpha", 1.0) == 1.0 => match node.int("transB", 0) {
            0 => layer(Reader::Columns, Axis::Last, dim(weight, 0)),
            _ => layer(Reader::Rows, Axis::Last, dim(weight, 1)),
        },
        "MatMul" if weight.dims.len() == 2 => layer(Reader::Columns, Axis::Last, dim(weight, 0)),
        _ => End::Not,
    }
}

/// Every site of a graph, in its order. No constant belongs to two roles of one site, or is read by others.
pub fn sites(graph: &Graph) -> Vec<Site> {
    with(graph, &Known::of(graph, false))
}

/// The same, and sites that go through Clips from zero on: only channels that stay below a site's ceiling can be scaled.
pub fn through_clips(graph: &Graph) -> Vec<Site> {
    with(graph, &Known::of(graph, true))
}

fn with(graph: &Graph, known: &Known) -> Vec<Site> {
    let mut done: BTreeSet<String> = BTreeSet::new();
    let mut found = Vec::new();
    for (_, node) in graph.nodes() {
        let start = node.out();
        if start.is_empty() || done.contains(start) || !matches!(maker(graph, start, known), End::Layer(..)) {
            continue;
        }
        found.extend(grow(graph, start, known, &mut done));
    }
    found
}

/// The site that a tensor belongs to, if all of its makers and readers take part.
fn grow(graph: &Graph, start: &str, known: &Known, done: &mut BTreeSet<String>) -> Option<Site> {
    let mut site = Site {
        tensors: Vec::new(),
        axis: Axis::Last,
        channels: 0,
        producers: Vec::new(),
        consumers: Vec::new(),
        ceiling: None,
    };
    let mut ends: BTreeSet<(bool, usize)> = BTreeSet::new();
    let mut open = vec![start.to_owned()];
    let (mut whole, mut pooled) = (true, false);
    while let Some(tensor) = open.pop() {
        if site.tensors.contains(&tensor) {
            continue;
        }
        done.insert(tensor.clone());
        whole &= graph.is_private(&tensor) && !graph.consumers(&tensor).is_empty();
        let mut meet = |axis: Axis, n: usize| {
            ends.insert((axis == Axis::Last, n));
        };
        let end = graph.producer(&tensor).and_then(|id| ceiling(graph, graph.node(id)));
        site.ceiling = [site.ceiling, end].into_iter().flatten().reduce(f32::min);
        pooled |= graph.producer(&tensor).is_some_and(|id| pools(graph.node(id)));
        pooled |= graph.consumers(&tensor).iter().any(|&(id, _)| pools(graph.node(id)));
        match maker(graph, &tensor, known) {
            End::Layer(producer, axis, n) => {
                meet(axis, n);
                site.producers.push(producer);
            }
            End::Through(more) => open.extend(more),
            End::Not => whole = false,
        }
        for &(id, slot) in graph.consumers(&tensor) {
            match reader(graph, &tensor, id, slot, known) {
                End::Layer(consumer, axis, n) => {
                    meet(axis, n);
                    site.consumers.push(consumer);
                }
                End::Through(more) => open.extend(more),
                End::Not => whole = false,
            }
        }
        site.tensors.push(tensor);
    }
    // All ends agree on where the channels are, and on how many.
    let [(last, channels)] = ends.into_iter().collect::<Vec<_>>()[..] else { return None };
    site.axis = if last { Axis::Last } else { Axis::Second };
    site.channels = channels;
    whole &= !(last && pooled);
    let mut constants: Vec<&String> = site.producers.iter().flat_map(Producer::constants).collect();
    constants.extend(site.consumers.iter().map(|c| &c.weight));
    let count = constants.len();
    let once: BTreeSet<&String> = constants.into_iter().collect();
    let alone = once.len() == count && once.iter().all(|name| graph.sole_consumer(name).is_some());
    (whole && alone && !site.consumers.is_empty()).then_some(site)
}

/// Tensors that no maker can scale, after a GELU or a norm that others read too, and the linear layers that read them:
/// a product by a constant between the two can. `taken` are the tensors of other sites.
pub(super) fn unscaled(graph: &Graph, taken: &BTreeSet<String>) -> Vec<Site> {
    let known = Known::of(graph, false);
    let made = groups(graph).into_iter().filter(|g| matches!(g.kind, GroupKind::LayerNorm | GroupKind::Gelu));
    let mut found = Vec::new();
    for tensor in made.map(|g| g.output).filter(|t| !taken.contains(t)) {
        let mut consumers = Vec::new();
        let mut channels = BTreeSet::new();
        for &(id, slot) in graph.consumers(&tensor) {
            if let End::Layer(consumer, Axis::Last, n) = reader(graph, &tensor, id, slot, &known)
                && graph.sole_consumer(consumer.weight()).is_some()
            {
                channels.insert(n);
                consumers.push(consumer);
            }
        }
        if let [n] = channels.into_iter().collect::<Vec<_>>()[..] {
            let site = Site {
                tensors: vec![tensor],
                axis: Axis::Last,
                channels: n,
                producers: Vec::new(),
                consumers,
                ceiling: None,
            };
            found.push(site);
        }
    }
    found
}
