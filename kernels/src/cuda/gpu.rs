//! What a device can do, and the PTX that it is given.

use crate::KernelError;

/// PTX of one file of `kernels/cuda`; `scripts/build_ptx.sh` makes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ptx {
    /// The file's name without its ending.
    pub name: &'static str,
    /// Its text.
    pub text: &'static str,
}

/// All of it.
pub static MODULES: &[Ptx] = &[
    Ptx { name: "attention", text: include_str!("../../cuda/ptx/attention.ptx") },
    Ptx { name: "attention_prompt", text: include_str!("../../cuda/ptx/attention_prompt.ptx") },
    Ptx { name: "attention_step", text: include_str!("../../cuda/ptx/attention_step.ptx") },
    Ptx { name: "choice", text: include_str!("../../cuda/ptx/choice.ptx") },
    Ptx { name: "embed", text: include_str!("../../cuda/ptx/embed.ptx") },
    Ptx { name: "few_w4", text: include_str!("../../cuda/ptx/few_w4.ptx") },
    Ptx { name: "few_w4_table", text: include_str!("../../cuda/ptx/few_w4_table.ptx") },
    Ptx { name: "few_w8", text: include_str!("../../cuda/ptx/few_w8.ptx") },
    Ptx { name: "gemm", text: include_str!("../../cuda/ptx/gemm.ptx") },
    Ptx { name: "gemv_w4", text: include_str!("../../cuda/ptx/gemv_w4.ptx") },
    Ptx { name: "gemv_w4_table", text: include_str!("../../cuda/ptx/gemv_w4_table.ptx") },
    Ptx { name: "gemv_w8", text: include_str!("../../cuda/ptx/gemv_w8.ptx") },
    Ptx { name: "rows", text: include_str!("../../cuda/ptx/rows.ptx") },
    Ptx { name: "wgmma_w4", text: include_str!("../../cuda/ptx/wgmma_w4.ptx") },
    Ptx { name: "wgmma_w4_table", text: include_str!("../../cuda/ptx/wgmma_w4_table.ptx") },
    Ptx { name: "wgmma_w8", text: include_str!("../../cuda/ptx/wgmma_w8.ptx") },
];

/// A piece of a device's memory.
pub trait DeviceMemory: Send + Sync {
    /// Where it begins, as kernels see it.
    fn address(&self) -> u64;
    /// Bytes of it.
    fn bytes(&self) -> usize;
}

/// One launch of a kernel. Only this crate makes one, after checking that the memory its arguments point to is there and
/// large enough: whoever executes it may rely on that.
#[derive(Debug)]
pub struct Launch<'a> {
    /// The entry's name in one of [`MODULES`].
    kernel: &'static str,
    grid: [u32; 3],
    threads: u32,
    shared: u32,
    arguments: &'a [u8],
}

impl<'a> Launch<'a> {
    pub(super) fn new(kernel: &'static str, grid: [u32; 3], threads: u32, arguments: &'a [u8]) -> Launch<'a> {
        Launch { kernel, grid, threads, shared: 0, arguments }
    }

    pub(super) fn with_shared(self, shared: u32) -> Launch<'a> {
        Launch { shared, ..self }
    }

    /// The entry's name.
    pub fn kernel(&self) -> &'static str {
        self.kernel
    }

    /// Blocks along x, y and z; one of them may be 0, then there is nothing to do.
    pub fn grid(&self) -> [u32; 3] {
        self.grid
    }

    /// Threads of a block, along x.
    pub fn threads(&self) -> u32 {
        self.threads
    }

    /// Bytes of shared memory beside what the kernel declares.
    pub fn shared(&self) -> u32 {
        self.shared
    }

    /// The kernel's only parameter, a struct, as bytes.
    pub fn arguments(&self) -> &'a [u8] {
        self.arguments
    }
}

/// A device. Everything that is asked for happens in the order in which it is asked for; only [`Gpu::read`] waits.
pub trait Gpu: Send + Sync {
    /// A piece of its memory.
    type Memory: DeviceMemory;

    /// Multiprocessors: how many blocks it takes to keep it busy.
    fn processors(&self) -> u32;
    /// Bytes of shared memory that one block may have.
    fn shared(&self) -> u32;
    /// Whether four warps multiply together: it runs PTX for compute capability 9.0a.
    fn has_warpgroups(&self) -> bool;
    /// Memory that holds nothing in particular.
    ///
    /// # Errors
    /// There isn't so much.
    fn allocate(&self, bytes: usize) -> Result<Self::Memory, KernelError>;
    /// Copies bytes to the device, from byte `at` on.
    ///
    /// # Errors
    /// They don't fit, or the device failed.
    fn write(&self, memory: &Self::Memory, at: usize, bytes: &[u8]) -> Result<(), KernelError>;
    /// Copies bytes from the device, from byte `at` on, when everything asked for before is done.
    ///
    /// # Errors
    /// There are not so many, or the device failed.
    fn read(&self, memory: &Self::Memory, at: usize, out: &mut [u8]) -> Result<(), KernelError>;
    /// Starts a kernel.
    ///
    /// # Errors
    /// The kernel is not known, or the device refuses.
    fn launch(&self, launch: &Launch<'_>) -> Result<(), KernelError>;

    /// Memory that holds these bytes.
    ///
    /// # Errors
    /// As [`Gpu::allocate`] and [`Gpu::write`].
    fn upload(&self, bytes: &[u8]) -> Result<Self::Memory, KernelError> {
        let memory = self.allocate(bytes.len())?;
        self.write(&memory, 0, bytes)?;
        Ok(memory)
    }
}
