//! What is done to rows of activations on a device between products.

use super::data::{DeviceIndices, DeviceRope, DeviceRows, DeviceTable, DeviceVector, Order, Place, row_threads};
use super::gpu::{DeviceMemory, Gpu, Launch};
use super::wgmma::LEAST_ROWS;
use super::{Cuda, check_room, size};
use crate::KernelError;
use crate::ops::math::Function;
use bytemuck::{Pod, Zeroable, bytes_of, cast_slice, cast_slice_mut};
use std::cell::Cell;

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct Pack {
    x: u64,
    out: u64,
    factor: u64,
    width: u32,
    units: u32,
    by_steps: u32,
    unused: u32,
}

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct Norm {
    x: u64,
    gain: u64,
    out: u64,
    width: u32,
    eps: f32,
}

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct NormPack {
    x: u64,
    gain: u64,
    out: u64,
    halves: u64,
    factor: u64,
    width: u32,
    units: u32,
    eps: f32,
    by_steps: u32,
}

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct GatePack {
    x: u64,
    y: u64,
    halves: u64,
    factor: u64,
    width: u32,
    units: u32,
    by_steps: u32,
    unused: u32,
}

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct Rope {
    x: u64,
    cos: u64,
    sin: u64,
    rows: u64,
    heads: u32,
    head_dim: u32,
    half: u32,
    count: u32,
}

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct Elements {
    x: u64,
    y: u64,
    count: u64,
    factor: f32,
    unused: u32,
}

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct Select {
    x: u64,
    rows: u64,
    out: u64,
    width: u32,
    unused: u32,
}

impl<G: Gpu> Cuda<G> {
    /// Room for up to `capacity` rows of `width` values.
    ///
    /// # Errors
    /// The device has no memory for them.
    pub fn rows(&self, capacity: usize, width: usize) -> Result<DeviceRows<G::Memory>, KernelError> {
        self.rows_over(self.gpu.allocate(capacity * width * 4)?, capacity, width)
    }

    /// The same over memory that holds their values, (capacity, width) f32.
    ///
    /// # Errors
    /// The memory is too small; or as [`Cuda::rows`].
    pub fn rows_over(
        &self,
        values: G::Memory,
        capacity: usize,
        width: usize,
    ) -> Result<DeviceRows<G::Memory>, KernelError> {
        size(capacity * width.next_multiple_of(64))?;
        check_room("the GPU's memory", values.bytes(), capacity * width * 4)?;
        Ok(DeviceRows {
            width,
            capacity,
            values,
            halves: self.gpu.allocate(capacity * width.next_multiple_of(64) * 2)?,
            factors: self.gpu.allocate(capacity * 4)?,
            packed: Cell::new((0, Order::Lanes)),
        })
    }

    /// Puts rows (rows, width) there, from the first one on.
    ///
    /// # Errors
    /// They don't fit.
    pub fn write_rows(&self, x: &DeviceRows<G::Memory>, values: &[f32]) -> Result<(), KernelError> {
        check_room("rows", x.capacity * x.width, values.len())?;
        x.changes();
        self.gpu.write(&x.values, 0, cast_slice(values))
    }

    /// Rows `rows` as the host sees them.
    ///
    /// # Errors
    /// There are not so many.
    pub fn read_rows(&self, x: &DeviceRows<G::Memory>, rows: std::ops::Range<usize>) -> Result<Vec<f32>, KernelError> {
        check_room("rows", x.capacity, rows.end)?;
        let mut values = vec![0f32; rows.len() * x.width];
        self.gpu.read(&x.values, rows.start * x.width * 4, cast_slice_mut(&mut values))?;
        Ok(values)
    }

    /// Moves a vector to the device.
    ///
    /// # Errors
    /// The device has no memory for it.
    pub fn vector(&self, values: &[f32]) -> Result<DeviceVector<G::Memory>, KernelError> {
        Ok(DeviceVector { len: values.len(), values: self.gpu.upload(cast_slice(values))? })
    }

    /// Room for indices.
    ///
    /// # Errors
    /// The device has no memory for them.
    pub fn indices(&self, capacity: usize) -> Result<DeviceIndices<G::Memory>, KernelError> {
        Ok(DeviceIndices { capacity, indices: self.gpu.allocate(capacity * 4)?, known: Vec::with_capacity(capacity) })
    }

    /// Rotation tables for positions `0..positions`; see [`crate::ops::RopeTable`].
    ///
    /// # Errors
    /// The device has no memory for them.
    pub fn rope_table(&self, table: &crate::ops::RopeTable) -> Result<DeviceRope<G::Memory>, KernelError> {
        let (cos, sin) = table.values();
        Ok(DeviceRope {
            half: table.rotary_dim() / 2,
            positions: table.positions(),
            cos: self.gpu.upload(cast_slice(cos))?,
            sin: self.gpu.upload(cast_slice(sin))?,
        })
    }

    /// Room for the places of a batch's rows.
    ///
    /// # Errors
    /// The device has no memory for them.
    pub fn table(&self, capacity: usize) -> Result<DeviceTable<G::Memory>, KernelError> {
        let memory = self.gpu.allocate(capacity * size_of::<Place>())?;
        Ok(DeviceTable { places: Vec::with_capacity(capacity), memory, capacity })
    }

    /// Puts the places of a batch's rows there, unless they are there already.
    ///
    /// # Errors
    /// There are more than was planned for.
    pub fn set_table(
        &self,
        table: &mut DeviceTable<G::Memory>,
        places: impl Iterator<Item = Place> + Clone,
    ) -> Result<(), KernelError> {
        if table.places.iter().copied().eq(places.clone()) {
            return Ok(());
        }
        check_room("rows of a batch", table.capacity, places.clone().count())?;
        table.places.clear();
        table.places.extend(places);
        self.gpu.write(&table.memory, 0, cast_slice(&table.places))
    }

    /// The order in which products with so many rows read their halves.
    pub(super) fn order(&self, rows: usize) -> Order {
        if rows >= LEAST_ROWS && self.gpu.has_warpgroups() { Order::Steps } else { Order::Lanes }
    }

    /// Rows in half precision beside themselves, for products with so many.
    pub(super) fn pack(&self, x: &DeviceRows<G::Memory>, rows: usize) -> Result<(), KernelError> {
        let order = self.order(rows);
        let pack = Pack {
            x: x.values.address(),
            out: x.halves.address(),
            factor: x.factors.address(),
            width: size(x.width)?,
            units: size(x.width.div_ceil(64))?,
            by_steps: order.by_steps(),
            unused: 0,
        };
        self.gpu.launch(&Launch::new("pack_rows", [size(rows)?, 1, 1], 256, bytes_of(&pack)))?;
        x.packed.set((rows, order));
        Ok(())
    }

    /// `out = x / rms(x) * gain`, row by row; `out` is [prepared](Cuda::prepare) for products where its width allows it.
    ///
    /// # Errors
    /// Widths differ, or there are fewer rows.
    pub fn rms_norm(
        &self,
        x: &DeviceRows<G::Memory>,
        gain: &DeviceVector<G::Memory>,
        eps: f32,
        rows: usize,
        out: &mut DeviceRows<G::Memory>,
    ) -> Result<(), KernelError> {
        x.check("a norm's input", rows, gain.len)?;
        out.check("a norm's output", rows, gain.len)?;
        out.changes();
        if out.is_whole() {
            let order = self.order(rows);
            let norm = NormPack {
                x: x.values.address(),
                gain: gain.values.address(),
                out: out.values.address(),
                halves: out.halves.address(),
                factor: out.factors.address(),
                width: size(out.width)?,
                units: size(out.width.div_ceil(64))?,
                eps,
                by_steps: order.by_steps(),
            };
            let grid = [size(rows)?, 1, 1];
            self.gpu.launch(&Launch::new("rms_norm_pack", grid, out.whole_threads(), bytes_of(&norm)))?;
            out.packed.set((rows, order));
            return Ok(());
        }
        self.norm(x.values.address(), out.values.address(), gain, eps, rows)
    }

    /// The same over each `gain.len` values of `x`, in place.
    ///
    /// # Errors
    /// A row is not made of such parts, or there are fewer rows.
    pub fn head_norm(
        &self,
        x: &mut DeviceRows<G::Memory>,
        gain: &DeviceVector<G::Memory>,
        eps: f32,
        rows: usize,
    ) -> Result<(), KernelError> {
        let heads = x.width.checked_div(gain.len).unwrap_or(0);
        x.check("a head norm's input", rows, heads * gain.len)?;
        x.changes();
        self.norm(x.values.address(), x.values.address(), gain, eps, rows * heads)
    }

    fn norm(&self, x: u64, out: u64, gain: &DeviceVector<G::Memory>, eps: f32, rows: usize) -> Result<(), KernelError> {
        let norm = Norm { x, gain: gain.values.address(), out, width: size(gain.len)?, eps };
        let threads = row_threads(gain.len.div_ceil(4), 1024);
        self.gpu.launch(&Launch::new("rms_norm", [size(rows)?, 1, 1], threads, bytes_of(&norm)))
    }

    /// Turns each head of the table's rows of `x` by its position, NeoX halves, in place.
    ///
    /// # Errors
    /// Rows are not made of heads, more values would turn than a head has, or a position is outside of the table.
    pub fn rope(
        &self,
        x: &mut DeviceRows<G::Memory>,
        rope: &DeviceRope<G::Memory>,
        head_dim: usize,
        table: &DeviceTable<G::Memory>,
    ) -> Result<(), KernelError> {
        let rows = table.places.len();
        let heads = x.width.checked_div(head_dim).unwrap_or(0);
        x.check("rope's input", rows, heads * head_dim)?;
        rope.fits(head_dim, table)?;
        x.changes();
        let count = rows * heads * rope.half;
        let argument = Rope {
            x: x.values.address(),
            cos: rope.cos.address(),
            sin: rope.sin.address(),
            rows: table.memory.address(),
            heads: size(heads)?,
            head_dim: size(head_dim)?,
            half: size(rope.half)?,
            count: size(count)?,
        };
        self.gpu.launch(&Launch::new("rope", [size(count.div_ceil(256))?, 1, 1], 256, bytes_of(&argument)))
    }

    /// `gate = function(gate) * up`; `gate` is [prepared](Cuda::prepare) for products where its width allows it.
    ///
    /// # Errors
    /// Widths differ, there are fewer rows, or the function is no gate's.
    pub fn gate(
        &self,
        function: Function,
        gate: &mut DeviceRows<G::Memory>,
        up: &DeviceRows<G::Memory>,
        rows: usize,
    ) -> Result<(), KernelError> {
        let (kernel, whole) = match function {
            Function::Silu => ("gate_silu", "gate_pack_silu"),
            Function::GeluTanh => ("gate_gelu", "gate_pack_gelu"),
            other => return Err(KernelError::Cuda { why: format!("no gate by {other:?}; known: Silu, GeluTanh") }),
        };
        up.check("a gate's factor", rows, gate.width)?;
        if gate.is_whole() {
            gate.check("a gate", rows, gate.width)?;
            let order = self.order(rows);
            let argument = GatePack {
                x: gate.values.address(),
                y: up.values.address(),
                halves: gate.halves.address(),
                factor: gate.factors.address(),
                width: size(gate.width)?,
                units: size(gate.width.div_ceil(64))?,
                by_steps: order.by_steps(),
                unused: 0,
            };
            let launch = Launch::new(whole, [size(rows)?, 1, 1], gate.whole_threads(), bytes_of(&argument));
            self.gpu.launch(&launch)?;
            gate.packed.set((rows, order));
            return Ok(());
        }
        self.elements(kernel, gate, up.values.address(), 0.0, rows)
    }

    /// `x += y`
    ///
    /// # Errors
    /// Widths differ, or there are fewer rows.
    pub fn add(
        &self,
        x: &mut DeviceRows<G::Memory>,
        y: &DeviceRows<G::Memory>,
        rows: usize,
    ) -> Result<(), KernelError> {
        y.check("a summand", rows, x.width)?;
        self.elements("add", x, y.values.address(), 0.0, rows)
    }

    /// `x *= factor`
    ///
    /// # Errors
    /// There are fewer rows.
    pub fn scale(&self, x: &mut DeviceRows<G::Memory>, factor: f32, rows: usize) -> Result<(), KernelError> {
        self.elements("scale", x, 0, factor, rows)
    }

    /// `x = cap * tanh(x / cap)`
    ///
    /// # Errors
    /// There are fewer rows.
    pub fn softcap(&self, x: &mut DeviceRows<G::Memory>, cap: f32, rows: usize) -> Result<(), KernelError> {
        self.elements("softcap", x, 0, cap, rows)
    }

    fn elements(
        &self,
        kernel: &'static str,
        x: &mut DeviceRows<G::Memory>,
        y: u64,
        factor: f32,
        rows: usize,
    ) -> Result<(), KernelError> {
        check_room("rows", x.capacity, rows)?;
        x.changes();
        let count = rows * x.width;
        let argument = Elements { x: x.values.address(), y, count: count as u64, factor, unused: 0 };
        self.gpu.launch(&Launch::new(kernel, [size(count.div_ceil(256))?, 1, 1], 256, bytes_of(&argument)))
    }

    /// Puts indices on the device, each below `limit`, unless they are there already.
    pub(super) fn set_indices(
        &self,
        indices: &mut DeviceIndices<G::Memory>,
        values: &[u32],
        limit: usize,
    ) -> Result<u64, KernelError> {
        check_room("indices", indices.capacity, values.len())?;
        if let Some(found) = values.iter().map(|v| *v as usize).find(|v| *v >= limit) {
            return Err(KernelError::Row { found, n: limit });
        }
        if indices.known != values {
            indices.known.clear();
            self.gpu.write(&indices.indices, 0, cast_slice(values))?;
            indices.known.extend(values);
        }
        Ok(indices.indices.address())
    }

    /// `out[i] = x[rows[i]]`
    ///
    /// # Errors
    /// Widths differ, there is no room, or a row is not there.
    pub fn select_rows(
        &self,
        x: &DeviceRows<G::Memory>,
        rows: &[u32],
        indices: &mut DeviceIndices<G::Memory>,
        out: &mut DeviceRows<G::Memory>,
    ) -> Result<(), KernelError> {
        out.check("selected rows", rows.len(), x.width)?;
        out.changes();
        let select = Select {
            x: x.values.address(),
            rows: self.set_indices(indices, rows, x.capacity)?,
            out: out.values.address(),
            width: size(x.width)?,
            unused: 0,
        };
        self.gpu.launch(&Launch::new("select_rows", [size(rows.len())?, 1, 1], 256, bytes_of(&select)))
    }
}
