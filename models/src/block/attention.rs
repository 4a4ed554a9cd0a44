//! Causal attention as one operator: composed of candle's, every score would pass through memory a dozen times.
//!
//! ```text
//! s = cap(scale q k)   p = softmax(s) over the keys that a query sees   out = p v
//! dv = p^T dout   ds = p (dout v - sum of p dout v)   dq = ds cap' scale k   dk = ds cap' scale q
//! ```

use candle_core::{CpuStorage, CustomOp3, Device, Error, Layout, Result, Shape, Tensor};
use nibble_kernels::Isa;
use nibble_kernels::ops::math;
use nibble_kernels::simd::{LANES, Simd, SimdOp, add_rows, dispatch, dot, dots};
use rayon::prelude::*;
use std::ops::Range;

/// Queries whose gradients go to a key at once.
const QUERIES: usize = 4;

/// What is the same for all heads.
#[derive(Debug, Clone, Copy)]
pub(super) struct Attention {
    pub heads: usize,
    pub kv_heads: usize,
    pub scale: f32,
    pub softcap: Option<f32>,
    pub window: Option<usize>,
}

impl Attention {
    /// `q` is (heads, tokens, width), `k` and `v` (key heads, tokens, width); gives (heads, tokens, width).
    pub(super) fn apply(self, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
        q.contiguous()?.apply_op3(&k.contiguous()?, &v.contiguous()?, self)
    }

    /// The keys that query `i` sees.
    fn seen(&self, i: usize) -> Range<usize> {
        self.window.map_or(0, |window| (i + 1).saturating_sub(window))..i + 1
    }

    /// Scores of query `i` against the keys it sees, as shares in their places.
    #[inline(always)]
    fn shares<S: Simd>(&self, s: S, head: Head, i: usize, shares: &mut [f32]) {
        let keys = self.seen(i);
        let shares = &mut shares[keys.clone()];
        dots(s, head.row(head.q, i), &head.k[keys.start * head.width..], shares);
        let mut most = f32::NEG_INFINITY;
        for score in shares.iter_mut() {
            *score *= self.scale;
        }
        if let Some(cap) = self.softcap {
            for part in shares.chunks_mut(LANES) {
                let soft = math::tanh(s, s.div(s.load_partial(part), s.splat(cap)));
                s.store_partial(s.mul(s.splat(cap), soft), part);
            }
        }
        for score in shares.iter() {
            most = most.max(*score);
        }
        let mut sum = s.splat(0.0);
        for part in shares.chunks_mut(LANES) {
            s.store_partial(math::exp(s, s.sub(s.load_partial(part), s.splat(most))), part);
            sum = s.add(sum, s.load_partial(part));
        }
        let by = 1.0 / s.sum(sum);
        for share in shares.iter_mut() {
            *share *= by;
        }
    }
}

/// One head's (tokens, width) rows.
#[derive(Clone, Copy)]
struct Head<'a> {
    width: usize,
    q: &'a [f32],
    k: &'a [f32],
    v: &'a [f32],
}

impl Head<'_> {
    #[inline(always)]
    fn row<'r>(&self, of: &'r [f32], i: usize) -> &'r [f32] {
        &of[i * self.width..(i + 1) * self.width]
    }
}

struct Forward<'a> {
    op: Attention,
    head: Head<'a>,
    out: &'a mut [f32],
}

impl SimdOp for Forward<'_> {
    type Output = ();

    #[inline(always)]
    fn eval<S: Simd>(self, s: S) {
        let head = self.head;
        let mut shares = vec![0f32; self.out.len() / head.width.max(1)];
        for (i, out) in self.out.chunks_exact_mut(head.width).enumerate() {
            self.op.shares(s, head, i, &mut shares);
            let keys = self.op.seen(i);
            add_rows(s, out, &head.v[keys.start * head.width..], &shares[keys]);
        }
    }
}

/// Gradients by one key head and the query heads that share it.
struct Back<'a> {
    op: Attention,
    /// (query heads of the group, tokens, width)
    q: &'a [f32],
    k: &'a [f32],
    v: &'a [f32],
    width: usize,
    gradient: &'a [f32],
    dq: &'a mut [f32],
    dk: &'a mut [f32],
    dv: &'a mut [f32],
}

impl SimdOp for Back<'_> {
    type Output = ();

    #[inline(always)]
    fn eval<S: Simd>(self, s: S) {
        let Back { op, q, k, v, width, gradient, dq, dk, dv } = self;
        let tokens = k.len() / width.max(1);
        // Of a few queries at a time, (queries, tokens): keys and values take in all of them at once.
        let (mut shares, mut slopes) = (vec![0f32; QUERIES * tokens], vec![0f32; QUERIES * tokens]);
        let each = q.chunks_exact(k.len()).zip(gradient.chunks_exact(k.len())).zip(dq.chunks_exact_mut(k.len()));
        for ((q, gradient), dq) in each {
            let head = Head { width, q, k, v };
            for from in (0..tokens).step_by(QUERIES) {
                let queries = from..(from + QUERIES).min(tokens);
                shares.fill(0.0);
                slopes.fill(0.0);
                for i in queries.clone() {
                    let row = (i - from) * tokens..(i - from + 1) * tokens;
                    let (p, by) = (&mut shares[row.clone()], &mut slopes[row]);
                    op.shares(s, head, i, p);
                    let keys = op.seen(i);
                    let k = &k[keys.start * width..];
                    let (p, by) = (&p[keys.clone()], &mut by[keys.clone()]);
                    dots(s, head.row(gradient, i), &v[keys.start * width..], by);
                    let mean = dot(s, p, by);
                    for (by, p) in by.iter_mut().zip(p) {
                        *by = p * (*by - mean) * op.scale;
                    }
                    if let Some(cap) = op.softcap {
                        for (j, by) in by.iter_mut().enumerate() {
                            let score = op.scale * dot(s, head.row(q, i), head.row(k, j));
                            *by *= 1.0 - (score / cap).tanh().powi(2);
                        }
                    }
                    add_rows(s, &mut dq[i * width..(i + 1) * width], k, by);
                }
                let (q, gradient) = (&q[from * width..], &gradient[from * width..]);
                for j in op.seen(from).start..queries.end {
                    let (mut p, mut by) = ([0f32; QUERIES], [0f32; QUERIES]);
                    for i in 0..queries.len() {
                        (p[i], by[i]) = (shares[i * tokens + j], slopes[i * tokens + j]);
                    }
                    let at = j * width..(j + 1) * width;
                    add_rows(s, &mut dv[at.clone()], gradient, &p[..queries.len()]);
                    add_rows(s, &mut dk[at], q, &by[..queries.len()]);
                }
            }
        }
    }
}

impl CustomOp3 for Attention {
    fn name(&self) -> &'static str {
        "attention"
    }

    fn cpu_fwd(
        &self,
        s1: &CpuStorage,
        l1: &Layout,
        s2: &CpuStorage,
        l2: &Layout,
        s3: &CpuStorage,
        l3: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (_, tokens, width) = l1.shape().dims3()?;
        let (q, k, v) = (floats(s1, l1)?, floats(s2, l2)?, floats(s3, l3)?);
        let (own, isa) = (tokens * width, Isa::best());
        let group = self.heads / self.kv_heads.max(1);
        let mut out = vec![0f32; q.len()];
        out.par_chunks_mut(own.max(1)).zip(q.par_chunks(own.max(1))).enumerate().for_each(|(h, (out, q))| {
            let at = h / group * own..(h / group + 1) * own;
            dispatch(isa, Forward { op: *self, head: Head { width, q, k: &k[at.clone()], v: &v[at] }, out });
        });
        Ok((CpuStorage::F32(out), l1.shape().clone()))
    }

    fn bwd(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        _: &Tensor,
        gradient: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let (_, tokens, width) = q.dims3()?;
        let (own, isa) = ((tokens * width).max(1), Isa::best());
        let group = self.heads / self.kv_heads.max(1);
        let values = |t: &Tensor| t.flatten_all()?.to_vec1::<f32>();
        let (qs, ks, vs, gs) = (values(q)?, values(k)?, values(v)?, values(gradient)?);
        let (mut dq, mut dk, mut dv) = (vec![0f32; qs.len()], vec![0f32; ks.len()], vec![0f32; vs.len()]);
        let outputs = dq.par_chunks_mut(group * own).zip(dk.par_chunks_mut(own)).zip(dv.par_chunks_mut(own));
        outputs.enumerate().for_each(|(h, ((dq, dk), dv))| {
            let (shared, each) = (h * own..(h + 1) * own, h * group * own..(h + 1) * group * own);
            let (q, gradient) = (&qs[each.clone()], &gs[each]);
            let (k, v) = (&ks[shared.clone()], &vs[shared]);
            dispatch(isa, Back { op: *self, q, k, v, width, gradient, dq, dk, dv });
        });
        let tensor = |values: Vec<f32>, like: &Tensor| Tensor::from_vec(values, like.shape(), &Device::Cpu).map(Some);
        Ok((tensor(dq, q)?, tensor(dk, k)?, tensor(dv, v)?))
    }
}

fn floats<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [f32]> {
    match (storage, layout.contiguous_offsets()) {
        (CpuStorage::F32(values), Some((start, end))) => Ok(&values[start..end]),
        _ => Err(Error::Msg(format!("attention takes contiguous f32, got {:?}", layout.shape()))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Var;

    const TOKENS: usize = 11;
    const WIDTH: usize = 20;

    fn numbers(seed: usize, heads: usize) -> Var {
        let value = |i: usize| (((i * 37 + seed * 101) % 211) as f32 / 211.0 - 0.5) * 1.5;
        let values = (0..heads * TOKENS * WIDTH).map(value).collect();
        Var::from_vec(values, (heads, TOKENS, WIDTH), &Device::Cpu).unwrap()
    }

    /// More tokens than queries go at once, a width of no whole vector, two heads a key, and a part of the keys seen.
    #[test]
    fn gradients_are_slopes() {
        for (window, softcap) in [(None, None), (Some(4), None), (None, Some(0.7)), (Some(6), Some(0.5))] {
            let op = Attention { heads: 4, kv_heads: 2, scale: 0.6, softcap, window };
            let inputs = [numbers(1, 4), numbers(2, 2), numbers(3, 2)];
            let wanted = numbers(4, 4);
            let loss =
                |[q, k, v]: [&Tensor; 3]| (op.apply(q, k, v).unwrap() * wanted.as_tensor()).unwrap().sum_all().unwrap();
            let all = [inputs[0].as_tensor(), inputs[1].as_tensor(), inputs[2].as_tensor()];
            let gradients = loss(all).backward().unwrap();
            for which in 0..3 {
                let slopes = gradients.get(&inputs[which]).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
                let values = inputs[which].flatten_all().unwrap().to_vec1::<f32>().unwrap();
                for at in (0..values.len()).step_by(29) {
                    let moved = |by: f32| {
                        let mut values = values.clone();
                        values[at] += by;
                        let tensor = Tensor::from_vec(values, inputs[which].shape(), &Device::Cpu).unwrap();
                        let mut all = all;
                        all[which] = &tensor;
                        loss(all).to_scalar::<f32>().unwrap() as f64
                    };
                    let slope = (moved(0.02) - moved(-0.02)) / 0.04;
                    let off = (slope - f64::from(slopes[at])).abs();
                    assert!(off < 2e-3 + 0.01 * slope.abs(), "{op:?}, {which} at {at}: {} and {slope}", slopes[at]);
                }
                assert!(slopes.iter().any(|s| s.abs() > 0.01), "{op:?}: nothing to compare");
            }
        }
    }
}
