//! [`Gpu`] over the machine's NVIDIA driver, which is looked for when it is asked for: a program with this module in it
//! starts on machines without one.

mod foreign;
mod queue;

use super::gpu::{DeviceMemory, Gpu, Launch, MODULES, Ptx};
use crate::KernelError;
use cudarc::driver::sys::{CUdevice_attribute, CUevent_flags, CUfunction_attribute_enum, CUmodule};
use cudarc::driver::{CudaContext, CudaSlice, CudaStream, DevicePtr, DriverError, result, sys};
use queue::{Function, Queue};
use std::borrow::Cow;
use std::collections::HashMap;
use std::ffi::{CString, c_void};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// The oldest compute capability that the kernels run on.
const OLDEST: (i32, i32) = (8, 0);
/// The oldest one on which a kernel may start while the one before it still runs.
const PROGRAMMATIC: (i32, i32) = (9, 0);

/// The only one whose PTX (of version 8.0, drivers for CUDA 12 on) has products of four warps together.
const WARPGROUPS: (i32, i32) = (9, 0);
const WARPGROUPS_DRIVER: i32 = 12_000;

/// One GPU of this machine.
pub struct Driver {
    work: Arc<Work>,
    processors: u32,
    /// Bytes of shared memory that one block may have.
    shared: u32,
    capability: (i32, i32),
    has_warpgroups: bool,
    /// The module that each kernel is in.
    entries: HashMap<&'static str, Ptx>,
    loaded: Mutex<Loaded>,
}

/// What was asked for so far: the driver compiles a module when one of its kernels is launched for the first time.
#[derive(Default)]
struct Loaded {
    functions: HashMap<&'static str, Function>,
    modules: Vec<Module>,
}

/// The stream that everything happens in, and what waits to be put there.
struct Work {
    stream: Arc<CudaStream>,
    queue: Mutex<Queue>,
}

impl Work {
    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn flush(&self) -> Result<(), KernelError> {
        self.queue().flush(&self.stream)
    }

    /// The context of this GPU becomes the thread's.
    fn bind(&self) -> Result<(), KernelError> {
        self.stream.context().bind_to_thread().map_err(refusal("binding the context"))
    }
}

/// A loaded module's handle.
struct Module(CUmodule);

// SAFETY: as for functions.
unsafe impl Send for Module {}
// SAFETY: as for functions; a module is only loaded and unloaded.
unsafe impl Sync for Module {}

/// A piece of a GPU's memory; freed in the order of the work that was asked for.
pub struct DriverMemory {
    address: u64,
    bytes: usize,
    work: Arc<Work>,
    /// Owns the memory, unless someone else does.
    _slice: Option<CudaSlice<u8>>,
}

impl std::fmt::Debug for DriverMemory {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} bytes at {:#x}", self.bytes, self.address)
    }
}

impl Drop for DriverMemory {
    fn drop(&mut self) {
        // What waits may use it.
        self.work.queue().flush_quietly(&self.work.stream);
    }
}

impl DeviceMemory for DriverMemory {
    fn address(&self) -> u64 {
        self.address
    }

    fn bytes(&self) -> usize {
        self.bytes
    }
}

fn refusal(what: &str) -> impl FnOnce(DriverError) -> KernelError {
    let what = what.to_string();
    move |error| {
        let said = error.error_string().map(|text| text.to_string_lossy().into_owned());
        KernelError::Cuda { why: format!("{what}: {}", said.unwrap_or_else(|_| format!("error {:?}", error.0))) }
    }
}

impl Driver {
    /// Opens the GPU with this number.
    ///
    /// # Errors
    /// There is no driver or no such GPU, or it is too old; the error says which.
    pub fn open(ordinal: usize) -> Result<Driver, KernelError> {
        // SAFETY: only looks whether the driver's library can be opened.
        #[cfg(not(feature = "cuda-linked"))]
        if !unsafe { sys::is_culib_present() } {
            let why =
                "no NVIDIA driver: libcuda is not on this machine; run without `--device cuda`, or install the driver";
            return Err(KernelError::Cuda { why: why.to_string() });
        }
        let context = CudaContext::new(ordinal).map_err(refusal(&format!("GPU {ordinal}")))?;
        // One stream does everything, so nothing has to be ordered between streams.
        // SAFETY: no memory of this context was allocated before, and none is used by another stream.
        unsafe { context.disable_event_tracking() };
        Driver::with(context.new_stream().map_err(refusal("a stream"))?)
    }

    /// Works in this stream.
    fn with(stream: Arc<CudaStream>) -> Result<Driver, KernelError> {
        let context = stream.context();
        let capability = context.compute_capability().map_err(refusal("compute capability"))?;
        if capability < OLDEST {
            let ((major, minor), (a, b)) = (capability, OLDEST);
            let number = context.ordinal();
            let why = format!("GPU {number} has compute capability {major}.{minor}; the kernels need {a}.{b}");
            return Err(KernelError::Cuda { why });
        }
        let count = CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT;
        let processors = context.attribute(count).map_err(refusal("multiprocessors"))?;
        let optin = CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN;
        let shared = context.attribute(optin).map_err(refusal("shared memory of a block"))?;
        let entries = MODULES.iter().flat_map(|module| entries(module.text).map(|entry| (entry, *module)));
        Ok(Driver {
            work: Arc::new(Work { stream, queue: Mutex::default() }),
            processors: u32::try_from(processors).unwrap_or(1).max(1),
            shared: u32::try_from(shared).unwrap_or(0),
            capability,
            has_warpgroups: capability == WARPGROUPS && driver_version() >= WARPGROUPS_DRIVER,
            entries: entries.collect(),
            loaded: Mutex::default(),
        })
    }

    /// A kernel's handle.
    fn function(&self, kernel: &str) -> Result<Function, KernelError> {
        let mut loaded = self.loaded.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(function) = loaded.functions.get(kernel) {
            return Ok(*function);
        }
        let none = || KernelError::Cuda { why: format!("no kernel {kernel}") };
        let module = self.entries.get(kernel).ok_or_else(none)?;
        self.load(&mut loaded, module.name, module.text)?;
        loaded.functions.get(kernel).copied().ok_or_else(none)
    }

    /// The GPU's name.
    ///
    /// # Errors
    /// The driver doesn't say.
    pub fn name(&self) -> Result<String, KernelError> {
        self.work.stream.context().name().map_err(refusal("the GPU's name"))
    }

    /// Seconds that the launches of `work` take the GPU, one after another: each of `repetitions` runs of all of them as
    /// one graph, after two that don't count. `work` neither reads nor writes.
    ///
    /// # Errors
    /// `work` fails, or the GPU does.
    pub fn time(
        &self,
        repetitions: usize,
        work: impl FnOnce() -> Result<(), KernelError>,
    ) -> Result<Vec<f64>, KernelError> {
        self.work.flush()?;
        work()?;
        let graph = self.work.queue().take_graph(&self.work.stream)?;
        let context = self.work.stream.context();
        let event = || context.new_event(Some(CUevent_flags::CU_EVENT_DEFAULT)).map_err(refusal("an event"));
        let (start, end) = (event()?, event()?);
        let mut seconds = Vec::with_capacity(repetitions);
        for run in 0..repetitions + 2 {
            start.record(&self.work.stream).map_err(refusal("an event"))?;
            graph.launch()?;
            end.record(&self.work.stream).map_err(refusal("an event"))?;
            self.work.stream.synchronize().map_err(refusal("waiting for a graph"))?;
            if run >= 2 {
                seconds.push(f64::from(start.elapsed_ms(&end).map_err(refusal("an event's time"))?) / 1e3);
            }
        }
        Ok(seconds)
    }

    /// Bytes a second that copies inside of the GPU's memory reach, those read and those written: the median of ten of
    /// 1 GiB.
    ///
    /// # Errors
    /// There is no room for two pieces of that size, or the GPU fails.
    pub fn copy_bytes_per_second(&self) -> Result<f64, KernelError> {
        const BYTES: usize = 1 << 30;
        let (from, to) = (self.allocate(BYTES)?, self.allocate(BYTES)?);
        let stream = &self.work.stream;
        let mut seconds = Vec::new();
        let event = || stream.context().new_event(Some(CUevent_flags::CU_EVENT_DEFAULT)).map_err(refusal("an event"));
        let (start, end) = (event()?, event()?);
        for run in 0..12 {
            start.record(stream).map_err(refusal("an event"))?;
            // SAFETY: both pieces are of that size, and live until the stream has been waited for.
            unsafe { result::memcpy_dtod_async(to.address, from.address, BYTES, stream.cu_stream()) }
                .map_err(refusal("a copy"))?;
            end.record(stream).map_err(refusal("an event"))?;
            stream.synchronize().map_err(refusal("waiting for a copy"))?;
            if run >= 2 {
                seconds.push(f64::from(start.elapsed_ms(&end).map_err(refusal("an event's time"))?) / 1e3);
            }
        }
        seconds.sort_by(f64::total_cmp);
        Ok(2.0 * BYTES as f64 / seconds[seconds.len() / 2].max(1e-12))
    }

    fn load(&self, loaded: &mut Loaded, name: &str, text: &'static str) -> Result<(), KernelError> {
        self.work.bind()?;
        let is_programmatic = self.capability >= PROGRAMMATIC;
        let text_here: Cow<'static, str> = if is_programmatic { programmatic(text).into() } else { text.into() };
        let image = CString::new(&*text_here)
            .map_err(|_| KernelError::Cuda { why: format!("{name}: PTX with a zero byte") })?;
        // SAFETY: the image is a C string of PTX that outlives the call.
        let module = unsafe { result::module::load_data(image.as_ptr().cast::<c_void>()) }.map_err(refusal(name))?;
        loaded.modules.push(Module(module));
        let mut entries: Vec<(&'static str, bool)> = Vec::new();
        for line in text.lines() {
            if let Some(entry) = line.strip_prefix(".visible .entry ") {
                entries.push((entry.trim_end_matches('('), false));
            } else if let Some((_, waits)) = entries.last_mut() {
                *waits |= line.contains(WAIT);
            }
        }
        for (entry, waits) in entries {
            let wanted = CString::new(entry).map_err(|_| KernelError::Cuda { why: format!("{name}: {entry}") })?;
            // SAFETY: the module was loaded above and stays loaded as long as the driver.
            let handle = unsafe { result::module::get_function(module, wanted) }.map_err(refusal(entry))?;
            self.allow_shared(handle).map_err(refusal(entry))?;
            loaded.functions.insert(entry, Function { handle, is_programmatic: is_programmatic && waits });
        }
        Ok(())
    }

    /// Lets a kernel have as much shared memory as the GPU gives one block.
    fn allow_shared(&self, handle: sys::CUfunction) -> Result<(), DriverError> {
        let own = CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES;
        let dynamic = CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        // SAFETY: the function belongs to a module that is loaded.
        unsafe {
            let own = result::function::get_function_attribute(handle, own)?;
            result::function::set_function_attribute(handle, dynamic, self.shared as i32 - own)
        }
    }
}

/// The latest CUDA that the driver knows, 1000 times its major version and 10 times its minor one; 0 if it doesn't say.
fn driver_version() -> i32 {
    let mut version = 0;
    // SAFETY: writes the number that it is given the address of.
    let result = unsafe { sys::cuDriverGetVersion(&raw mut version) };
    if result == sys::CUresult::CUDA_SUCCESS { version } else { 0 }
}

/// Where a kernel waits for the one before it, as the PTX for older devices has it.
const WAIT: &str = ".pragma \"griddepcontrol.wait\";";
/// Where it lets the next one start.
const START: &str = ".pragma \"griddepcontrol.launch_dependents\";";

/// The kernels in a module's text.
fn entries(text: &str) -> impl Iterator<Item = &str> {
    text.lines().filter_map(|line| line.strip_prefix(".visible .entry ")).map(|entry| entry.trim_end_matches('('))
}

/// PTX whose pragmas became the instructions that they stand for.
fn programmatic(text: &str) -> String {
    let text = text.replacen(".version 7.4", ".version 7.8", 1).replacen(".target sm_80", ".target sm_90", 1);
    text.replace(WAIT, "griddepcontrol.wait;").replace(START, "griddepcontrol.launch_dependents;")
}

impl Drop for Driver {
    fn drop(&mut self) {
        self.work.queue().flush_quietly(&self.work.stream);
        if self.work.bind().is_err() || self.work.stream.synchronize().is_err() {
            return;
        }
        let loaded = self.loaded.get_mut().unwrap_or_else(PoisonError::into_inner);
        for module in loaded.modules.drain(..) {
            // SAFETY: nothing runs any more, and no function of the module is used after this. A refusal leaves nothing
            // to be done.
            unsafe { result::module::unload(module.0) }.ok();
        }
    }
}

impl Gpu for Driver {
    type Memory = DriverMemory;

    fn processors(&self) -> u32 {
        self.processors
    }

    fn shared(&self) -> u32 {
        self.shared
    }

    fn has_warpgroups(&self) -> bool {
        self.has_warpgroups
    }

    fn allocate(&self, bytes: usize) -> Result<DriverMemory, KernelError> {
        let stream = &self.work.stream;
        // The driver gives no empty pieces.
        // SAFETY: what the memory holds is anything, and every bit pattern is a u8.
        let slice = unsafe { stream.alloc::<u8>(bytes.max(1)) }
            .map_err(refusal(&format!("{bytes} bytes of the GPU's memory")))?;
        let address = slice.device_ptr(stream).0;
        Ok(DriverMemory { address, bytes, work: self.work.clone(), _slice: Some(slice) })
    }

    fn write(&self, memory: &DriverMemory, at: usize, bytes: &[u8]) -> Result<(), KernelError> {
        check_range(memory, at, bytes.len())?;
        if bytes.is_empty() {
            return Ok(());
        }
        self.work.flush()?;
        self.work.bind()?;
        // SAFETY: the range lies in the memory. The driver has read pageable bytes before it returns.
        unsafe { result::memcpy_htod_async(memory.address + at as u64, bytes, self.work.stream.cu_stream()) }
            .map_err(refusal("a copy to the GPU"))
    }

    fn read(&self, memory: &DriverMemory, at: usize, out: &mut [u8]) -> Result<(), KernelError> {
        check_range(memory, at, out.len())?;
        if out.is_empty() {
            return Ok(());
        }
        self.work.flush()?;
        self.work.bind()?;
        let stream = &self.work.stream;
        // SAFETY: the range lies in the memory, and `out` is borrowed until the stream has been waited for.
        let copied = unsafe { result::memcpy_dtoh_async(out, memory.address + at as u64, stream.cu_stream()) };
        // Also after a refusal: a kernel before it may be what failed, and nothing may write to `out` any more.
        let waited = stream.synchronize();
        copied.and(waited).map_err(refusal("a copy from the GPU"))
    }

    fn launch(&self, launch: &Launch<'_>) -> Result<(), KernelError> {
        if launch.grid().contains(&0) {
            return Ok(());
        }
        let function = self.function(launch.kernel())?;
        self.work.queue().push(&self.work.stream, launch, function)
    }
}

fn check_range(memory: &DriverMemory, at: usize, len: usize) -> Result<(), KernelError> {
    if at.checked_add(len).is_some_and(|end| end <= memory.bytes) {
        return Ok(());
    }
    Err(KernelError::Length { what: "the GPU's memory", found: memory.bytes, wanted: at.saturating_add(len) })
}
