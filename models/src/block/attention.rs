//! Causal attention as one operator: composed of candle's, every score would pass through memory a dozen times.
//!
//! ```text
//! s = cap(scale q k)   p = softmax(s) over the keys that a query sees   out = p v
//! dv = p^T dout   ds = p (dout v - sum of p dout v)   dq = ds cap' scale k   dk = ds cap' scale q
//! ```

use candle_core::{CpuStorage, CustomOp3, Device, Error, Layout, Result, Shape, Tensor};
use nibble_kernels::Isa;
use nibble_kernels::simd::{Simd, SimdOp, add_multiple, dispatch, dot};
use rayon::prelude::*;

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

    /// Scores of query `i` against the keys it sees, as shares; gives the first of these keys.
    #[inline(always)]
    fn shares<S: Simd>(&self, s: S, head: Head, i: usize, shares: &mut Vec<f32>) -> usize {
        let first = self.window.map_or(0, |window| (i + 1).saturating_sub(window));
        let q = head.row(head.q, i);
        shares.clear();
        shares.extend((first..=i).map(|j| {
            let score = self.scale * dot(s, q, head.row(head.k, j));
            self.softcap.map_or(score, |cap| cap * (score / cap).tanh())
        }));
        let most = shares.iter().fold(f32::NEG_INFINITY, |m, s| m.max(*s));
        let mut sum = 0.0;
        for share in shares.iter_mut() {
            *share = (*share - most).exp();
            sum += *share;
        }
        shares.iter_mut().for_each(|share| *share /= sum);
        first
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
        let mut shares = Vec::new();
        for (i, out) in self.out.chunks_exact_mut(self.head.width).enumerate() {
            let first = self.op.shares(s, self.head, i, &mut shares);
            for (j, share) in shares.iter().enumerate() {
                add_multiple(s, out, self.head.row(self.head.v, first + j), *share);
            }
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
        let mut shares = Vec::new();
        let mut by_share = Vec::new();
        let each = q.chunks_exact(k.len()).zip(gradient.chunks_exact(k.len())).zip(dq.chunks_exact_mut(k.len()));
        for ((q, gradient), dq) in each {
            let head = Head { width, q, k, v };
            for (i, (g, dq)) in gradient.chunks_exact(width).zip(dq.chunks_exact_mut(width)).enumerate() {
                let first = op.shares(s, head, i, &mut shares);
                by_share.clear();
                by_share.extend((0..shares.len()).map(|j| dot(s, g, head.row(v, first + j))));
                let mean: f32 = shares.iter().zip(&by_share).map(|(p, d)| p * d).sum();
                for (j, (p, d)) in shares.iter().zip(&by_share).enumerate() {
                    let at = (first + j) * width..(first + j + 1) * width;
                    add_multiple(s, &mut dv[at.clone()], g, *p);
                    let mut by = p * (d - mean) * op.scale;
                    if let Some(cap) = op.softcap {
                        by *= 1.0 - (op.scale * dot(s, head.row(q, i), &k[at.clone()]) / cap).tanh().powi(2);
                    }
                    add_multiple(s, dq, &k[at.clone()], by);
                    add_multiple(s, &mut dk[at], head.row(q, i), by);
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
