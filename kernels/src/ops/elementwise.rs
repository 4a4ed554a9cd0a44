//! One value in, one value out: gates, residual sums, scalings.

use super::math::{Function, softcap};
use super::{GRAIN, Ops};
use crate::simd::{LANES, Simd, SimdOp, dispatch};

impl Ops<'_> {
    /// `x = f(x)`, as GELU in an MLP without a gate.
    pub fn apply(&self, function: Function, x: &mut [f32]) {
        self.over_rows(x, 1, |_, x| function.apply(self.isa, x));
    }

    /// `gate = f(gate) * up`: SwiGLU with [`Function::Silu`], GeGLU with [`Function::GeluTanh`] or
    /// [`Function::Gelu`].
    ///
    /// # Panics
    /// If the lengths differ.
    pub fn gate(&self, function: Function, gate: &mut [f32], up: &[f32]) {
        assert_eq!(gate.len(), up.len(), "gate and up");
        self.over_rows(gate, 1, |start, gate| {
            let up = &up[start..start + gate.len()];
            dispatch(self.isa, Gate { function, gate, up });
        });
    }

    /// SwiGLU and GeGLU on a fused product: each row of `x` (rows, 2 n) holds the gate's n values, then up's;
    /// `out` (rows, n) = f(gate) * up.
    ///
    /// # Panics
    /// If `x` isn't twice as long as `out`, or `out` isn't rows of `n`.
    pub fn gate_fused(&self, function: Function, x: &[f32], n: usize, out: &mut [f32]) {
        super::rows_of("gate", out.len(), n);
        assert_eq!(x.len(), 2 * out.len(), "gate and up");
        self.over_rows(out, n, |first, out| {
            for (row, out) in (first..).zip(out.chunks_mut(n)) {
                let (gate, up) = x[2 * row * n..2 * (row + 1) * n].split_at(n);
                out.copy_from_slice(gate);
                dispatch(self.isa, Gate { function, gate: out, up });
            }
        });
    }

    /// `x += y`
    ///
    /// # Panics
    /// If the lengths differ.
    pub fn add(&self, x: &mut [f32], y: &[f32]) {
        self.add_scaled(x, y, 1.0);
    }

    /// `x += factor * y`, as Granite's residuals and an expert's share.
    ///
    /// # Panics
    /// If the lengths differ.
    pub fn add_scaled(&self, x: &mut [f32], y: &[f32], factor: f32) {
        assert_eq!(x.len(), y.len(), "summands");
        self.over_rows(x, 1, |start, x| {
            let y = &y[start..start + x.len()];
            dispatch(self.isa, AddScaled { x, y, factor });
        });
    }

    /// Adds `bias` (d) to each row of `x` (rows, d).
    ///
    /// # Panics
    /// If `x` isn't rows of d values.
    pub fn add_bias(&self, x: &mut [f32], bias: &[f32]) {
        super::rows_of("x", x.len(), bias.len());
        self.over_rows(x, bias.len(), |_, x| {
            for x in x.chunks_mut(bias.len()) {
                dispatch(self.isa, AddScaled { x, y: bias, factor: 1.0 });
            }
        });
    }

    /// `x *= factor`
    pub fn scale(&self, x: &mut [f32], factor: f32) {
        self.over_rows(x, 1, |_, x| dispatch(self.isa, Scale { x, factor }));
    }

    /// `x = cap * tanh(x / cap)`: Gemma's bound on logits.
    pub fn softcap(&self, x: &mut [f32], cap: f32) {
        self.over_rows(x, 1, |_, x| dispatch(self.isa, Softcap { x, cap }));
    }
}

// Parts are whole vectors, so that the tail of 16 lanes falls at the same place whether or not work is shared.
const _: () = assert!(GRAIN.is_multiple_of(LANES));

struct Gate<'a> {
    function: Function,
    gate: &'a mut [f32],
    up: &'a [f32],
}

impl SimdOp for Gate<'_> {
    type Output = ();

    #[inline(always)]
    fn eval<S: Simd>(self, s: S) {
        for (gate, up) in self.gate.chunks_mut(LANES).zip(self.up.chunks(LANES)) {
            let y = self.function.eval(s, s.load_partial(gate));
            s.store_partial(s.mul(y, s.load_partial(up)), gate);
        }
    }
}

struct AddScaled<'a> {
    x: &'a mut [f32],
    y: &'a [f32],
    factor: f32,
}

impl SimdOp for AddScaled<'_> {
    type Output = ();

    #[inline(always)]
    fn eval<S: Simd>(self, s: S) {
        let factor = s.splat(self.factor);
        for (x, y) in self.x.chunks_mut(LANES).zip(self.y.chunks(LANES)) {
            s.store_partial(s.fma(s.load_partial(y), factor, s.load_partial(x)), x);
        }
    }
}

struct Scale<'a> {
    x: &'a mut [f32],
    factor: f32,
}

impl SimdOp for Scale<'_> {
    type Output = ();

    #[inline(always)]
    fn eval<S: Simd>(self, s: S) {
        let factor = s.splat(self.factor);
        for x in self.x.chunks_mut(LANES) {
            s.store_partial(s.mul(s.load_partial(x), factor), x);
        }
    }
}

struct Softcap<'a> {
    x: &'a mut [f32],
    cap: f32,
}

impl SimdOp for Softcap<'_> {
    type Output = ();

    #[inline(always)]
    fn eval<S: Simd>(self, s: S) {
        for x in self.x.chunks_mut(LANES) {
            s.store_partial(softcap(s, s.load_partial(x), self.cap), x);
        }
    }
}
