//! The operators that can be trained, one row each.

use super::value::{Call, Value};
use crate::Result;
use crate::qat::ops::{self, ConvShape, Pooling};
use candle_core::{D, Tensor};
use nibble_quant::onnx::proto::NodeProto;

/// An operator of ONNX's own domain.
pub struct Operator {
    /// Its name.
    pub name: &'static str,
    /// What it computes.
    pub run: fn(&Call) -> Result<Value>,
}

const fn operator(name: &'static str, run: fn(&Call) -> Result<Value>) -> Operator {
    Operator { name, run }
}

/// Every operator, by name. BatchNormalization, QuantizeLinear and DequantizeLinear have state and are steps of their own.
pub static OPERATORS: &[Operator] = &[
    operator("Add", |c| binary(c, Tensor::broadcast_add)),
    operator("AveragePool", |c| {
        let padding = c.node.int("count_include_pad", 0) != 0;
        pool(c, Pooling::Mean { padding })
    }),
    operator("Cast", |c| c.inputs.first().copied().flatten().cloned().ok_or_else(|| c.refuse("input 0 is missing"))),
    operator("Clip", |c| {
        let lo = c.number(1, c.node.float("min", f32::NEG_INFINITY))?;
        let hi = c.number(2, c.node.float("max", f32::INFINITY))?;
        float(c, ops::clamp(c.tensor(0)?, lo, hi))
    }),
    operator("Concat", concat),
    operator("Conv", conv),
    operator("Div", |c| binary(c, Tensor::broadcast_div)),
    operator("Dropout", |c| Ok(c.tensor(0)?.clone().into())),
    operator("Erf", |c| float(c, c.tensor(0)?.erf())),
    operator("Exp", |c| float(c, c.tensor(0)?.exp())),
    operator("Expand", |c| {
        let wanted = sizes(c, c.ints(1)?)?;
        let x = c.tensor(0)?;
        let rank = x.rank().max(wanted.len());
        // Of each axis, counted from the back, the larger of both.
        let at = |dims: &[usize], axis: usize| (axis + dims.len()).checked_sub(rank).map_or(1, |a| dims[a]);
        let dims: Vec<usize> = (0..rank).map(|axis| at(x.dims(), axis).max(at(&wanted, axis))).collect();
        float(c, x.broadcast_as(dims))
    }),
    operator("Flatten", |c| {
        let x = c.tensor(0)?;
        let at = match c.node.int("axis", 1) {
            axis if axis == x.rank() as i64 => x.rank(),
            axis => c.axis(axis, x.rank())?,
        };
        let rows: usize = x.dims()[..at].iter().product();
        float(c, x.reshape((rows, x.elem_count() / rows.max(1))))
    }),
    operator("Gather", gather),
    operator("Gelu", |c| match c.node.attr("approximate").and_then(|a| a.s.as_deref()) {
        None | Some(b"none") => float(c, ops::gelu(c.tensor(0)?)),
        Some(_) => float(c, c.tensor(0)?.gelu()),
    }),
    operator("Gemm", gemm),
    operator("GlobalAveragePool", |c| {
        let x = c.tensor(0)?;
        let (b, channels, h, w) = c.of(x.dims4())?;
        let mean = x
            .reshape((b, channels, h * w))
            .and_then(|x| x.mean(D::Minus1))
            .and_then(|x| x.reshape((b, channels, 1, 1)));
        float(c, mean)
    }),
    operator("HardSigmoid", |c| {
        let (alpha, beta) = (c.node.float("alpha", 0.2), c.node.float("beta", 0.5));
        float(c, c.tensor(0)?.affine(alpha.into(), beta.into()).and_then(|x| ops::clamp(&x, 0.0, 1.0)))
    }),
    operator("HardSwish", |c| {
        let x = c.tensor(0)?;
        float(c, x.affine(1.0 / 6.0, 0.5).and_then(|x| ops::clamp(&x, 0.0, 1.0)).and_then(|gate| gate.mul(x)))
    }),
    operator("Identity", |c| {
        c.inputs.first().copied().flatten().cloned().ok_or_else(|| c.refuse("input 0 is missing"))
    }),
    operator("LayerNormalization", |c| {
        let x = c.tensor(0)?;
        if c.axis(c.node.int("axis", -1), x.rank())? + 1 != x.rank() {
            return Err(c.refuse("over more than the last dimension"));
        }
        let gain = c.tensor(1)?;
        let offset = match c.optional(2)? {
            Some(offset) => offset.clone(),
            None => c.of(gain.zeros_like())?,
        };
        float(c, ops::layer_norm(x, gain, &offset, c.node.float("epsilon", 1e-5)))
    }),
    operator("LeakyRelu", |c| {
        let (x, slope) = (c.tensor(0)?, f64::from(c.node.float("alpha", 0.01)));
        let parts = ops::clamp(x, 0.0, f32::INFINITY).and_then(|up| {
            let down = ops::clamp(x, f32::NEG_INFINITY, 0.0)?;
            up.add(&down.affine(slope, 0.0)?)
        });
        float(c, parts)
    }),
    operator("MatMul", matmul),
    operator("MaxPool", |c| pool(c, Pooling::Max)),
    operator("Mul", |c| binary(c, Tensor::broadcast_mul)),
    operator("Pow", |c| {
        let exponent = c.number(1, 1.0)?;
        let x = c.tensor(0)?;
        float(c, if exponent == 2.0 { x.sqr() } else { x.powf(exponent.into()) })
    }),
    operator("ReduceMean", reduce_mean),
    operator("Relu", |c| float(c, ops::clamp(c.tensor(0)?, 0.0, f32::INFINITY))),
    operator("Reshape", reshape),
    operator("Shape", shape),
    operator("Sigmoid", |c| {
        // 1 / (1 + e^-x) = (1 + tanh(x/2)) / 2, which has a gradient and no overflow.
        float(c, c.tensor(0)?.affine(0.5, 0.0).and_then(|x| x.tanh()).and_then(|x| x.affine(0.5, 0.5)))
    }),
    operator("Slice", slice),
    operator("Softmax", |c| {
        let x = c.tensor(0)?;
        match c.axis(c.node.int("axis", -1), x.rank())? + 1 == x.rank() {
            true => float(c, ops::softmax(x)),
            false => Err(c.refuse("over another dimension than the last")),
        }
    }),
    operator("Sqrt", |c| float(c, c.tensor(0)?.sqrt())),
    operator("Squeeze", |c| {
        let x = c.tensor(0)?;
        let axes = match c.list("axes", 1)? {
            Some(axes) => axes.iter().map(|&a| c.axis(a, x.rank())).collect::<Result<Vec<_>>>()?,
            None => (0..x.rank()).filter(|&a| x.dims()[a] == 1).collect(),
        };
        let dims: Vec<usize> = (0..x.rank()).filter(|a| !axes.contains(a)).map(|a| x.dims()[a]).collect();
        float(c, x.reshape(dims))
    }),
    operator("Sub", |c| binary(c, Tensor::broadcast_sub)),
    operator("Tanh", |c| float(c, c.tensor(0)?.tanh())),
    operator("Transpose", |c| {
        let x = c.tensor(0)?;
        let order = match c.node.attr("perm") {
            Some(order) => order.ints.iter().map(|&a| c.axis(a, x.rank())).collect::<Result<Vec<_>>>()?,
            None => (0..x.rank()).rev().collect(),
        };
        float(c, x.permute(order))
    }),
    operator("Unsqueeze", unsqueeze),
];

fn float(c: &Call, result: candle_core::Result<Tensor>) -> Result<Value> {
    c.of(result).map(Value::Float)
}

fn sizes(c: &Call, dims: &[i64]) -> Result<Vec<usize>> {
    dims.iter().map(|&d| usize::try_from(d).map_err(|_| c.refuse(format!("dimension {d}")))).collect()
}

fn binary(c: &Call, f: fn(&Tensor, &Tensor) -> candle_core::Result<Tensor>) -> Result<Value> {
    if let (Some(Value::Ints { dims, values: a }), Some(Value::Ints { values: b, .. })) =
        (c.inputs.first().copied().flatten(), c.inputs.get(1).copied().flatten())
    {
        let wide = a.len().max(b.len());
        let at = |v: &[i64], i: usize| v.get(if v.len() == 1 { 0 } else { i }).copied();
        let one = |i: usize| {
            let (x, y) = at(a, i).zip(at(b, i))?;
            match c.node.op_type() {
                "Add" => x.checked_add(y),
                "Sub" => x.checked_sub(y),
                "Mul" => x.checked_mul(y),
                _ => x.checked_div(y),
            }
        };
        let values = (0..wide).map(one).collect::<Option<Vec<i64>>>().ok_or_else(|| c.refuse("of whole numbers"))?;
        let dims = if values.len() == 1 { dims.clone() } else { vec![values.len()] };
        return Ok(Value::Ints { dims, values });
    }
    let (a, b) = (c.tensor(0)?, c.tensor(1)?);
    if a.dims() == b.dims() && c.node.is("Add") {
        return float(c, a.add(b));
    }
    // Biases and tables: a vector that repeats along the first dimensions has a gradient in one pass.
    if c.node.is("Add") {
        for (x, y) in [(a, b), (b, a)] {
            let ones = y.dims().iter().take_while(|&&d| d == 1).count();
            let own = &y.dims()[ones..];
            if !own.is_empty() && x.rank() >= y.rank() && x.dims().ends_with(own) {
                return float(c, ops::add_rows(x, y));
            }
        }
    }
    float(c, f(a, b))
}

/// What of a window's attributes both convolutions and pooling have.
fn window(c: &Call, kernel: Vec<i64>, size: [usize; 2]) -> Result<ConvShape> {
    let node = c.node;
    let list = |name: &str, default: i64| -> Result<[usize; 2]> {
        let values = match node.attr(name) {
            Some(found) => found.ints.clone(),
            None => vec![default; 2],
        };
        let values = sizes(c, &values)?;
        <[usize; 2]>::try_from(values).map_err(|v| c.refuse(format!("{name} {v:?}, two numbers were wanted")))
    };
    let kernel = <[usize; 2]>::try_from(sizes(c, &kernel)?)
        .map_err(|k| c.refuse(format!("a kernel of {} dimensions; two are understood", k.len())))?;
    let (strides, dilations) = (list("strides", 1)?, list("dilations", 1)?);
    let pads = match node.attr("auto_pad").and_then(|a| a.s.as_deref()) {
        None | Some(b"NOTSET" | b"") => match node.attr("pads") {
            None => [[0; 2]; 2],
            Some(found) => match sizes(c, &found.ints)?.as_slice() {
                &[top, left, bottom, right] => [[top, bottom], [left, right]],
                other => return Err(c.refuse(format!("pads {other:?}, four numbers were wanted"))),
            },
        },
        Some(b"VALID") => [[0; 2]; 2],
        Some(word) => {
            let upper = word == b"SAME_UPPER";
            let mut pads = [[0; 2]; 2];
            for axis in 0..2 {
                let reach = dilations[axis] * kernel[axis].saturating_sub(1) + 1;
                let places = size[axis].div_ceil(strides[axis].max(1));
                let total = (places.saturating_sub(1) * strides[axis] + reach).saturating_sub(size[axis]);
                let less = total / 2;
                pads[axis] = if upper { [less, total - less] } else { [total - less, less] };
            }
            pads
        }
    };
    if node.int("ceil_mode", 0) != 0 {
        return Err(c.refuse("ceil_mode"));
    }
    let groups = sizes(c, &[node.int("group", 1)])?[0];
    Ok(ConvShape { kernel, strides, pads, dilations, groups })
}

fn conv(c: &Call) -> Result<Value> {
    Ok(convolve(c, c.optional(2)?)?.into())
}

/// What a Conv computes, with this bias instead of its own.
pub fn convolve(c: &Call, bias: Option<&Tensor>) -> Result<Tensor> {
    let (x, weight) = (c.tensor(0)?, c.tensor(1)?);
    let kernel = weight.dims()[2.min(weight.rank())..].iter().map(|&d| d as i64).collect();
    let (_, _, h, w) = c.of(x.dims4())?;
    let shape = window(c, kernel, [h, w])?;
    c.of(ops::conv2d(x, weight, bias, shape))
}

fn pool(c: &Call, what: Pooling) -> Result<Value> {
    let x = c.tensor(0)?;
    let (_, _, h, w) = c.of(x.dims4())?;
    let kernel = c.node.attr("kernel_shape").map(|a| a.ints.clone()).unwrap_or_default();
    float(c, ops::pool2d(x, window(c, kernel, [h, w])?, what))
}

fn gemm(c: &Call) -> Result<Value> {
    let turned = |slot: usize, name: &str| -> Result<Tensor> {
        let x = c.tensor(slot)?;
        if c.node.int(name, 0) != 0 { c.of(x.t()) } else { Ok(x.clone()) }
    };
    let (alpha, beta) = (c.node.float("alpha", 1.0), c.node.float("beta", 1.0));
    let y = c.of(turned(0, "transA")?.matmul(&turned(1, "transB")?))?;
    let y = if alpha == 1.0 { y } else { c.of(y.affine(alpha.into(), 0.0))? };
    let Some(bias) = c.optional(2)? else { return Ok(y.into()) };
    let bias = if beta == 1.0 { bias.clone() } else { c.of(bias.affine(beta.into(), 0.0))? };
    match y.dims().last() == Some(&bias.elem_count()) {
        true => float(c, ops::add_rows(&y, &bias)),
        false => float(c, y.broadcast_add(&bias)),
    }
}

/// A matrix on the right takes all rows of the left at once.
fn matmul(c: &Call) -> Result<Value> {
    let (a, b) = (c.tensor(0)?, c.tensor(1)?);
    if b.rank() != 2 || a.rank() < 2 {
        return float(c, a.contiguous().and_then(|a| a.broadcast_matmul(&b.contiguous()?)));
    }
    float(c, ops::linear(a, b, None))
}

fn reduce_mean(c: &Call) -> Result<Value> {
    let x = c.tensor(0)?;
    let axes = match c.list("axes", 1)? {
        Some(axes) if !axes.is_empty() => axes.iter().map(|&a| c.axis(a, x.rank())).collect::<Result<Vec<_>>>()?,
        _ => (0..x.rank()).collect(),
    };
    let kept = c.of(axes.iter().try_fold(x.clone(), |x, &axis| x.mean_keepdim(axis)))?;
    if c.node.int("keepdims", 1) != 0 {
        return Ok(kept.into());
    }
    let dims: Vec<usize> = (0..x.rank()).filter(|a| !axes.contains(a)).map(|a| x.dims()[a]).collect();
    float(c, kept.reshape(dims))
}

fn reshape(c: &Call) -> Result<Value> {
    let wanted = c.ints(1)?;
    if let Some(Value::Ints { values, .. }) = c.inputs.first().copied().flatten() {
        return Ok(Value::list(values.clone()));
    }
    let x = c.tensor(0)?;
    let keep = c.node.int("allowzero", 0) == 0;
    let mut dims = Vec::with_capacity(wanted.len());
    let mut open = None;
    for (i, &d) in wanted.iter().enumerate() {
        dims.push(match d {
            -1 if open.is_none() => {
                open = Some(i);
                1
            }
            0 if keep => *x.dims().get(i).ok_or_else(|| c.refuse(format!("shape {wanted:?} of {:?}", x.dims())))?,
            d => usize::try_from(d).map_err(|_| c.refuse(format!("shape {wanted:?}")))?,
        });
    }
    // A graph of one sample says so in its shapes.
    if c.samples > 1 && dims.first() == Some(&1) && open != Some(0) && x.dims().first() == Some(&c.samples) {
        dims[0] = c.samples;
    }
    if let Some(at) = open {
        let others: usize = dims.iter().product();
        dims[at] = x.elem_count().checked_div(others).unwrap_or(0);
    }
    float(c, x.reshape(dims))
}

fn shape(c: &Call) -> Result<Value> {
    let dims: Vec<i64> = match c.inputs.first().copied().flatten() {
        Some(Value::Float(x)) => x.dims().iter().map(|&d| d as i64).collect(),
        Some(Value::Ints { dims, .. }) => dims.iter().map(|&d| d as i64).collect(),
        None => return Err(c.refuse("input 0 is missing")),
    };
    let rank = dims.len() as i64;
    let end = |name: &str, default: i64| {
        let at = c.node.int(name, default);
        (if at < 0 { at + rank } else { at }).clamp(0, rank) as usize
    };
    let (start, end) = (end("start", 0), end("end", rank));
    Ok(Value::list(dims.get(start..end).unwrap_or_default().to_vec()))
}

fn concat(c: &Call) -> Result<Value> {
    if c.inputs.iter().flatten().all(|v| matches!(v, Value::Ints { .. })) {
        let parts = (0..c.inputs.len()).map(|slot| c.ints(slot)).collect::<Result<Vec<_>>>()?;
        return Ok(Value::list(parts.concat()));
    }
    let parts = (0..c.inputs.len()).map(|slot| c.tensor(slot)).collect::<Result<Vec<_>>>()?;
    let Some(first) = parts.first() else { return Err(c.refuse("of nothing")) };
    let axis = c.axis(c.node.int("axis", 0), first.rank())?;
    let many = parts.iter().any(|p| p.dims().first() == Some(&c.samples));
    let whole = parts.iter().map(|p| match p.dims() {
        // What a graph of one sample has beside it, others have too.
        [1, rest @ ..] if c.samples > 1 && many && axis > 0 => {
            p.broadcast_as([&[c.samples], rest].concat())?.contiguous()
        }
        _ => p.contiguous(),
    });
    let whole = whole.collect::<candle_core::Result<Vec<_>>>();
    float(c, whole.and_then(|parts| Tensor::cat(&parts, axis)))
}

fn gather(c: &Call) -> Result<Value> {
    let indices = c.ints(1)?;
    let single = matches!(c.inputs.get(1).copied().flatten(), Some(Value::Ints { dims, .. }) if dims.is_empty());
    let wrap = |i: i64, n: usize| {
        let at = if i < 0 { i + n as i64 } else { i };
        usize::try_from(at).ok().filter(|&at| at < n).ok_or_else(|| c.refuse(format!("index {i} of {n}")))
    };
    if let Some(Value::Ints { values, .. }) = c.inputs.first().copied().flatten() {
        let found = indices.iter().map(|&i| Ok(values[wrap(i, values.len())?])).collect::<Result<Vec<i64>>>()?;
        return Ok(if single { Value::Ints { dims: vec![], values: found } } else { Value::list(found) });
    }
    let x = c.tensor(0)?;
    let axis = c.axis(c.node.int("axis", 0), x.rank())?;
    let n = x.dims()[axis];
    match indices {
        [one] if single => float(c, x.narrow(axis, wrap(*one, n)?, 1).and_then(|x| x.squeeze(axis))),
        many => {
            let at = many.iter().map(|&i| Ok(wrap(i, n)? as u32)).collect::<Result<Vec<u32>>>()?;
            let at = c.of(Tensor::new(at, x.device()))?;
            float(c, x.contiguous().and_then(|x| x.index_select(&at, axis)))
        }
    }
}

fn slice(c: &Call) -> Result<Value> {
    let (starts, ends) = (c.ints(1)?, c.ints(2)?);
    let axes = match c.list("axes", 3)? {
        Some(axes) => axes,
        None => (0..starts.len() as i64).collect(),
    };
    let steps = if c.inputs.len() > 4 { c.ints(4)?.to_vec() } else { vec![1; starts.len()] };
    let range = |i: usize, n: usize| -> Result<(usize, usize)> {
        let at = |v: &[i64]| {
            let v = v.get(i).copied().unwrap_or(0);
            (if v < 0 { v.saturating_add(n as i64) } else { v }).clamp(0, n as i64) as usize
        };
        match steps.get(i) {
            Some(1) => Ok((at(starts), at(ends).max(at(starts)))),
            _ => Err(c.refuse("with another step than 1")),
        }
    };
    if let Some(Value::Ints { values, .. }) = c.inputs.first().copied().flatten() {
        let (start, end) = range(0, values.len())?;
        return Ok(Value::list(values[start..end].to_vec()));
    }
    let mut x = c.tensor(0)?.clone();
    for (i, &axis) in axes.iter().enumerate() {
        let axis = c.axis(axis, x.rank())?;
        let (start, end) = range(i, x.dims()[axis])?;
        x = c.of(x.narrow(axis, start, end - start))?;
    }
    Ok(x.into())
}

fn unsqueeze(c: &Call) -> Result<Value> {
    let axes = c.list("axes", 1)?.unwrap_or_default();
    if let Some(Value::Ints { values, .. }) = c.inputs.first().copied().flatten() {
        return Ok(Value::list(values.clone()));
    }
    let x = c.tensor(0)?;
    let rank = x.rank() + axes.len();
    let axes = axes.iter().map(|&a| c.axis(a, rank)).collect::<Result<Vec<_>>>()?;
    let mut own = x.dims().iter();
    let dims: Vec<usize> =
        (0..rank).map(|a| if axes.contains(&a) { 1 } else { own.next().copied().unwrap_or(1) }).collect();
    float(c, x.reshape(dims))
}

/// The operator of a node.
pub fn find(node: &NodeProto) -> Option<&'static Operator> {
    OPERATORS.iter().find(|o| node.is(o.name))
}
