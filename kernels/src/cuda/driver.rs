//! [`Gpu`] over the machine's NVIDIA driver, which is looked for when it is asked for: a program with this module in it
//! starts on machines without one.

use super::gpu::{DeviceMemory, Gpu, Launch, MODULES};
use crate::KernelError;
use cudarc::driver::sys::{CUdevice_attribute, CUfunction, CUmodule};
use cudarc::driver::{CudaContext, CudaSlice, CudaStream, DevicePtr, DriverError, result, sys};
use std::collections::HashMap;
use std::ffi::{CString, c_void};
use std::sync::Arc;

/// The oldest compute capability that the kernels run on.
const OLDEST: (i32, i32) = (8, 0);

/// One GPU of this machine.
pub struct Driver {
    stream: Arc<CudaStream>,
    processors: u32,
    functions: HashMap<&'static str, Function>,
    modules: Vec<Module>,
}

/// A kernel's handle.
struct Function(CUfunction);

/// A loaded module's handle.
struct Module(CUmodule);

// SAFETY: the driver's handles may be used from any thread whose current context is theirs; every use binds it first.
unsafe impl Send for Function {}
// SAFETY: as above; launching does not change the handle.
unsafe impl Sync for Function {}
// SAFETY: as for functions.
unsafe impl Send for Module {}
// SAFETY: as for functions; a module is only loaded and unloaded.
unsafe impl Sync for Module {}

/// A piece of a GPU's memory; freed in the order of the work that was asked for.
#[derive(Debug)]
pub struct DriverMemory {
    address: u64,
    bytes: usize,
    /// Owns the memory.
    _slice: CudaSlice<u8>,
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
    /// Opens the GPU with this number and loads the kernels.
    ///
    /// # Errors
    /// There is no driver or no such GPU, it is too old, or it refuses the kernels; the error says which.
    pub fn open(ordinal: usize) -> Result<Driver, KernelError> {
        // SAFETY: only looks whether the driver's library can be opened.
        if !unsafe { sys::is_culib_present() } {
            let why =
                "no NVIDIA driver: libcuda is not on this machine; run without `--device cuda`, or install the driver";
            return Err(KernelError::Cuda { why: why.to_string() });
        }
        let context = CudaContext::new(ordinal).map_err(refusal(&format!("GPU {ordinal}")))?;
        let capability = context.compute_capability().map_err(refusal("compute capability"))?;
        if capability < OLDEST {
            let ((major, minor), (a, b)) = (capability, OLDEST);
            let why = format!("GPU {ordinal} has compute capability {major}.{minor}; the kernels need {a}.{b}");
            return Err(KernelError::Cuda { why });
        }
        let count = CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT;
        let processors = context.attribute(count).map_err(refusal("multiprocessors"))?;
        let stream = context.new_stream().map_err(refusal("a stream"))?;
        let mut driver = Driver {
            stream,
            processors: u32::try_from(processors).unwrap_or(1).max(1),
            functions: HashMap::new(),
            modules: Vec::new(),
        };
        for module in MODULES {
            driver.load(module.name, module.text)?;
        }
        Ok(driver)
    }

    /// The GPU's name.
    ///
    /// # Errors
    /// The driver doesn't say.
    pub fn name(&self) -> Result<String, KernelError> {
        self.stream.context().name().map_err(refusal("the GPU's name"))
    }

    /// The context of this GPU becomes the thread's.
    fn bind(&self) -> Result<(), KernelError> {
        self.stream.context().bind_to_thread().map_err(refusal("binding the context"))
    }

    fn load(&mut self, name: &str, text: &'static str) -> Result<(), KernelError> {
        self.bind()?;
        let image =
            CString::new(text).map_err(|_| KernelError::Cuda { why: format!("{name}: PTX with a zero byte") })?;
        // SAFETY: the image is a C string of PTX that outlives the call.
        let module = unsafe { result::module::load_data(image.as_ptr().cast::<c_void>()) }.map_err(refusal(name))?;
        self.modules.push(Module(module));
        for entry in text.lines().filter_map(|line| line.strip_prefix(".visible .entry ")) {
            let entry = entry.trim_end_matches('(');
            let wanted = CString::new(entry).map_err(|_| KernelError::Cuda { why: format!("{name}: {entry}") })?;
            // SAFETY: the module was loaded above and stays loaded as long as the driver.
            let function = unsafe { result::module::get_function(module, wanted) }.map_err(refusal(entry))?;
            self.functions.insert(entry, Function(function));
        }
        Ok(())
    }
}

impl Drop for Driver {
    fn drop(&mut self) {
        if self.bind().is_err() || self.stream.synchronize().is_err() {
            return;
        }
        for module in self.modules.drain(..) {
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

    fn allocate(&self, bytes: usize) -> Result<DriverMemory, KernelError> {
        // The driver gives no empty pieces.
        // SAFETY: what the memory holds is anything, and every bit pattern is a u8.
        let slice = unsafe { self.stream.alloc::<u8>(bytes.max(1)) }
            .map_err(refusal(&format!("{bytes} bytes of the GPU's memory")))?;
        let address = slice.device_ptr(&self.stream).0;
        Ok(DriverMemory { address, bytes, _slice: slice })
    }

    fn write(&self, memory: &DriverMemory, at: usize, bytes: &[u8]) -> Result<(), KernelError> {
        check_range(memory, at, bytes.len())?;
        if bytes.is_empty() {
            return Ok(());
        }
        self.bind()?;
        // SAFETY: the range lies in the memory. The driver has read pageable bytes before it returns.
        unsafe { result::memcpy_htod_async(memory.address + at as u64, bytes, self.stream.cu_stream()) }
            .map_err(refusal("a copy to the GPU"))
    }

    fn read(&self, memory: &DriverMemory, at: usize, out: &mut [u8]) -> Result<(), KernelError> {
        check_range(memory, at, out.len())?;
        if out.is_empty() {
            return Ok(());
        }
        self.bind()?;
        // SAFETY: the range lies in the memory, and `out` is borrowed until the stream has been waited for.
        let copied = unsafe { result::memcpy_dtoh_async(out, memory.address + at as u64, self.stream.cu_stream()) };
        // Also after a refusal: a kernel before it may be what failed, and nothing may write to `out` any more.
        let waited = self.stream.synchronize();
        copied.and(waited).map_err(refusal("a copy from the GPU"))
    }

    fn launch(&self, launch: &Launch<'_>) -> Result<(), KernelError> {
        let ([x, y, z], name) = (launch.grid(), launch.kernel());
        if x == 0 || y == 0 || z == 0 {
            return Ok(());
        }
        let function =
            self.functions.get(name).ok_or_else(|| KernelError::Cuda { why: format!("no kernel {name}") })?;
        self.bind()?;
        let mut parameters = [launch.arguments().as_ptr().cast_mut().cast::<c_void>()];
        // SAFETY: the function belongs to a loaded module and takes one struct, whose layout the tests compare with the
        // PTX; the driver copies it before it returns. Whoever made the launch checked what its addresses point to, and
        // memory is freed in stream order, after this.
        unsafe {
            result::launch_kernel(
                function.0,
                (x, y, z),
                (launch.threads(), 1, 1),
                launch.shared(),
                self.stream.cu_stream(),
                &mut parameters,
            )
        }
        .map_err(refusal(name))
    }
}

fn check_range(memory: &DriverMemory, at: usize, len: usize) -> Result<(), KernelError> {
    if at.checked_add(len).is_some_and(|end| end <= memory.bytes) {
        return Ok(());
    }
    Err(KernelError::Length { what: "the GPU's memory", found: memory.bytes, wanted: at.saturating_add(len) })
}
