//! Linear layers: products of rows with a matrix.

use super::rows::{AddTo, sum_rows};
use super::values;
use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp2, CustomOp3, Error, Layout, Result, Shape, Tensor};
use nibble_kernels::Isa;
use nibble_kernels::simd::dispatch;

/// `x w (+ bias)`: rows (.., k) times (k, n). One operator: candle's product wants the rows in a matrix, and each change of
/// shape, as each sum, would have a gradient of its own.
///
/// # Errors
/// Shapes that don't fit.
pub fn linear(x: &Tensor, w: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    let (k, n) = w.dims2()?;
    if x.dims().last() != Some(&k) || bias.is_some_and(|bias| bias.elem_count() != n) {
        let bias = bias.map(Tensor::shape);
        return Err(Error::Msg(format!("{:?} can't be multiplied with {:?} and bias {bias:?}", x.shape(), w.shape())));
    }
    let (x, w) = (x.contiguous()?, w.contiguous()?);
    match bias {
        Some(bias) => x.apply_op3(&w, &bias.contiguous()?, Linear),
        None => x.apply_op2(&w, Linear),
    }
}

struct Linear;

impl Linear {
    fn run(s1: &CpuStorage, l1: &Layout, s2: &CpuStorage, l2: &Layout) -> Result<(CpuStorage, Shape)> {
        let (k, n) = l2.shape().dims2()?;
        let mut dims = l1.dims().to_vec();
        if let Some(last) = dims.last_mut() {
            *last = n;
        }
        let m = l1.shape().elem_count() / k.max(1);
        let rows = Layout::contiguous_with_offset((m, k), l1.start_offset());
        Ok((s1.matmul(s2, (1, m, n, k), &rows, l2)?, Shape::from(dims)))
    }

    /// Gradients of x and w.
    fn back(x: &Tensor, w: &Tensor, grad: &Tensor) -> Result<[Tensor; 2]> {
        let (k, n) = w.dims2()?;
        let rows = grad.contiguous()?.reshape(((), n))?;
        let of_x = rows.matmul(&w.t()?)?.reshape(x.shape())?;
        Ok([of_x, x.reshape(((), k))?.t()?.matmul(&rows)?])
    }
}

impl CustomOp2 for Linear {
    fn name(&self) -> &'static str {
        "linear"
    }

    fn cpu_fwd(&self, s1: &CpuStorage, l1: &Layout, s2: &CpuStorage, l2: &Layout) -> Result<(CpuStorage, Shape)> {
        Self::run(s1, l1, s2, l2)
    }

    fn bwd(&self, x: &Tensor, w: &Tensor, _: &Tensor, grad: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let [x, w] = Self::back(x, w, grad)?;
        Ok((Some(x), Some(w)))
    }
}

impl CustomOp3 for Linear {
    fn name(&self) -> &'static str {
        "linear with a bias"
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
        let y = values("linear", s3, l3)?;
        let (mut product, shape) = Self::run(s1, l1, s2, l2)?;
        if let CpuStorage::F32(rows) = &mut product {
            dispatch(Isa::best(), AddTo { rows, y });
        }
        Ok((product, shape))
    }

    fn bwd(
        &self,
        x: &Tensor,
        w: &Tensor,
        bias: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let [x, w] = Self::back(x, w, grad)?;
        Ok((Some(x), Some(w), Some(sum_rows(grad, bias)?)))
    }
}
