//! A GPU without a GPU: interprets the PTX that nibble ships, and is a [`Gpu`] that every launch can go to.
//!
//! It knows what a program needs to be right on any device: warps in lock step with divergence, shared memory, barriers,
//! asynchronous copies, shuffles and the tensor cores' product. What would be undefined on a device is an error here:
//! races, reads of memory that nobody wrote or that is still in flight, accesses out of place or misaligned, barriers
//! that part of a warp misses. It doesn't know time; it counts sectors and bank conflicts instead.

mod alu;
mod memory;
mod parse;
mod product;
mod run;

pub use run::Counters;

use memory::Memory;
use nibble_kernels::KernelError;
use nibble_kernels::cuda::{DeviceMemory, Gpu, Launch, MODULES};
use parse::{Kernel, Module};
use run::{ALLOCATION, Run};
use std::collections::{BTreeMap, HashMap};
use std::sync::{Mutex, PoisonError};

/// Bytes of shared memory that a block may have on the smallest device (compute capability 8.6), asked for at launch.
const LEAST_SHARED: u32 = 99 << 10;
/// The same on a device of many processors (9.0).
const MOST_SHARED: u32 = 227 << 10;
/// Processors from which on a device is like that.
const MANY_PROCESSORS: u32 = 100;

/// The interpreter.
pub struct Machine {
    kernels: HashMap<String, Kernel>,
    processors: u32,
    has_warpgroups: bool,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    memory: Vec<Memory>,
    launches: u64,
    counters: BTreeMap<&'static str, Counters>,
}

/// A piece of its memory. It is kept until the machine goes, so that a stale address is found out.
#[derive(Debug)]
pub struct Piece {
    index: usize,
    bytes: usize,
}

impl DeviceMemory for Piece {
    fn address(&self) -> u64 {
        (self.index as u64 + 1) << ALLOCATION
    }

    fn bytes(&self) -> usize {
        self.bytes
    }
}

fn cuda(why: impl Into<String>) -> KernelError {
    KernelError::Cuda { why: why.into() }
}

impl Machine {
    /// A device with this many processors (which decide how work is cut) and nibble's own kernels.
    pub fn new(processors: u32) -> Machine {
        Machine::with_ptx(processors, MODULES.iter().map(|module| (module.name, module.text)))
            .expect("the interpreter knows every form in the shipped PTX")
    }

    /// The same with other PTX.
    pub fn with_ptx<'a>(
        processors: u32,
        modules: impl Iterator<Item = (&'a str, &'a str)>,
    ) -> Result<Machine, KernelError> {
        let mut kernels = HashMap::new();
        for (name, text) in modules {
            let module = Module::parse(text).map_err(|why| cuda(format!("{name}: {why}")))?;
            kernels.extend(module.kernels);
        }
        Ok(Machine { kernels, processors, has_warpgroups: false, state: Mutex::default() })
    }

    /// The same device with products of warp groups and much shared memory (9.0a).
    pub fn with_warpgroups(self) -> Machine {
        Machine { has_warpgroups: true, ..self }
    }

    /// What the launches of each kernel have cost so far.
    pub fn counters(&self) -> BTreeMap<&'static str, Counters> {
        self.state().counters.clone()
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Gpu for Machine {
    type Memory = Piece;

    fn processors(&self) -> u32 {
        self.processors
    }

    fn shared(&self) -> u32 {
        if self.processors < MANY_PROCESSORS && !self.has_warpgroups { LEAST_SHARED } else { MOST_SHARED }
    }

    fn has_warpgroups(&self) -> bool {
        self.has_warpgroups
    }

    fn allocate(&self, bytes: usize) -> Result<Piece, KernelError> {
        let mut state = self.state();
        state.memory.push(Memory::new(bytes));
        Ok(Piece { index: state.memory.len() - 1, bytes })
    }

    fn write(&self, memory: &Piece, at: usize, bytes: &[u8]) -> Result<(), KernelError> {
        if at + bytes.len() > memory.bytes {
            return Err(cuda(format!("{} bytes to {at} of {}", bytes.len(), memory.bytes)));
        }
        self.state().memory[memory.index].host_write(at, bytes);
        Ok(())
    }

    fn read(&self, memory: &Piece, at: usize, out: &mut [u8]) -> Result<(), KernelError> {
        if at + out.len() > memory.bytes {
            return Err(cuda(format!("{} bytes from {at} of {}", out.len(), memory.bytes)));
        }
        self.state().memory[memory.index].host_read(at, out).map_err(cuda)
    }

    fn launch(&self, launch: &Launch<'_>) -> Result<(), KernelError> {
        let name = launch.kernel();
        let kernel = self.kernels.get(name).ok_or_else(|| cuda(format!("no kernel {name}")))?;
        if kernel.params != launch.arguments().len() {
            let (wanted, found) = (kernel.params, launch.arguments().len());
            return Err(cuda(format!("{name} takes {wanted} bytes of parameters, got {found}")));
        }
        if launch.threads() > kernel.max_threads || launch.threads() == 0 {
            return Err(cuda(format!("{name} takes up to {} threads, got {}", kernel.max_threads, launch.threads())));
        }
        let [_, y, z] = launch.grid();
        if y > 65535 || z > 65535 || kernel.shared + launch.shared() as usize > self.shared() as usize {
            return Err(cuda(format!("{name}: grid {:?} with {} bytes shared", launch.grid(), launch.shared())));
        }
        let mut state = self.state();
        state.launches += 1;
        let mut run = Run {
            kernel,
            grid: launch.grid(),
            threads: launch.threads(),
            shared: launch.shared(),
            params: launch.arguments(),
            launch: state.launches,
            memory: &mut state.memory,
            counters: Counters::default(),
        };
        run.run().map_err(cuda)?;
        let counters = run.counters;
        state.counters.entry(name).or_default().add(&counters);
        Ok(())
    }
}
