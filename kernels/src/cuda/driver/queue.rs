//! Launches that were asked for and not yet given to the driver. A sequence that comes again becomes a graph: the driver
//! then takes it in one call, and the device goes from kernel to kernel without asking the host.
//!
//! A decoded token is such a sequence. It is compared in full, so that a graph is only ever replayed for exactly the
//! launches that it was made of.

use super::refusal;
use crate::KernelError;
use cudarc::driver::sys::{CUfunction, CUgraphInstantiate_flags, CUstreamCaptureMode};
use cudarc::driver::{CudaGraph, CudaStream, DriverError, sys};
use std::collections::VecDeque;
use std::ffi::c_void;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;

/// Fewer launches are not worth a graph.
const LEAST: usize = 4;
/// More are not kept back.
const MOST: usize = 4096;
/// Graphs that are kept.
const GRAPHS: usize = 16;
/// Sequences that are remembered to have come once.
const SEEN: usize = 64;

/// A kernel's handle.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Function {
    pub(super) handle: CUfunction,
    /// Whether it waits by itself for the kernel before it, so that it may start earlier.
    pub(super) is_programmatic: bool,
}

// SAFETY: the driver's handles may be used from any thread whose current context is theirs; every use binds it first.
unsafe impl Send for Function {}
// SAFETY: as above; launching does not change the handle.
unsafe impl Sync for Function {}

/// One launch; its arguments lie in the sequence.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Recorded {
    pub(super) function: Function,
    pub(super) name: &'static str,
    pub(super) grid: [u32; 3],
    pub(super) threads: u32,
    pub(super) shared: u32,
    /// Where its arguments begin.
    at: usize,
}

/// Launches in their order.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
struct Sequence {
    launches: Vec<Recorded>,
    /// Arguments, each launch's on 8 bytes.
    arguments: Vec<u64>,
}

/// A graph that can be launched.
pub(super) struct Graph(CudaGraph);

// SAFETY: as for functions; the queue's lock lets one thread at a time use it.
unsafe impl Send for Graph {}

impl Graph {
    /// Starts it.
    pub(super) fn launch(&self) -> Result<(), KernelError> {
        self.0.launch().map_err(refusal("a graph of launches"))
    }
}

/// What waits for the driver, and what it knows already.
#[derive(Default)]
pub(super) struct Queue {
    waiting: Sequence,
    graphs: VecDeque<(Sequence, Graph)>,
    seen: VecDeque<u64>,
    /// Why launches failed that nobody was there to be told about.
    failed: Option<KernelError>,
}

impl Queue {
    /// Takes a launch.
    pub(super) fn push(
        &mut self,
        stream: &Arc<CudaStream>,
        launch: &super::Launch<'_>,
        function: Function,
    ) -> Result<(), KernelError> {
        let at = self.waiting.arguments.len();
        let bytes = launch.arguments();
        self.waiting.arguments.extend(bytes.chunks(8).map(|chunk| {
            let mut word = [0; 8];
            word[..chunk.len()].copy_from_slice(chunk);
            u64::from_ne_bytes(word)
        }));
        self.waiting.launches.push(Recorded {
            function,
            name: launch.kernel(),
            grid: launch.grid(),
            threads: launch.threads(),
            shared: launch.shared(),
            at,
        });
        if self.waiting.launches.len() >= MOST { self.flush(stream) } else { Ok(()) }
    }

    /// Gives everything to the driver.
    pub(super) fn flush(&mut self, stream: &Arc<CudaStream>) -> Result<(), KernelError> {
        if let Some(failed) = self.failed.take() {
            self.waiting = Sequence::default();
            return Err(failed);
        }
        if self.waiting.launches.is_empty() {
            return Ok(());
        }
        let mut waiting = std::mem::take(&mut self.waiting);
        let result = self.start(stream, &waiting);
        // The room is kept for the next sequence.
        waiting.launches.clear();
        waiting.arguments.clear();
        self.waiting = waiting;
        result
    }

    /// The same where nobody can be told of a failure: the next flush tells.
    pub(super) fn flush_quietly(&mut self, stream: &Arc<CudaStream>) {
        if let Err(why) = self.flush(stream) {
            self.failed = Some(why);
        }
    }

    /// Everything that waits as a graph, which is not started.
    pub(super) fn take_graph(&mut self, stream: &Arc<CudaStream>) -> Result<Graph, KernelError> {
        let waiting = std::mem::take(&mut self.waiting);
        graph_of(stream, &waiting)
    }

    fn start(&mut self, stream: &Arc<CudaStream>, waiting: &Sequence) -> Result<(), KernelError> {
        if waiting.launches.len() < LEAST {
            return launch_all(stream, waiting);
        }
        if let Some((_, graph)) = self.graphs.iter().find(|(sequence, _)| sequence == waiting) {
            return graph.launch();
        }
        let mut hasher = DefaultHasher::new();
        waiting.hash(&mut hasher);
        let hash = hasher.finish();
        if !self.seen.contains(&hash) {
            if self.seen.len() == SEEN {
                self.seen.pop_front();
            }
            self.seen.push_back(hash);
            return launch_all(stream, waiting);
        }
        let graph = graph_of(stream, waiting)?;
        graph.launch()?;
        if self.graphs.len() == GRAPHS {
            // It may still be running.
            stream.synchronize().map_err(refusal("waiting for a graph"))?;
            self.graphs.pop_front();
        }
        self.graphs.push_back((waiting.clone(), graph));
        Ok(())
    }
}

fn graph_of(stream: &Arc<CudaStream>, sequence: &Sequence) -> Result<Graph, KernelError> {
    stream
        .begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL)
        .map_err(refusal("capturing launches"))?;
    let launched = launch_all(stream, sequence);
    // Ends the capture whatever happened in it.
    let graph = stream.end_capture(CUgraphInstantiate_flags(0));
    launched?;
    match graph.map_err(refusal("making a graph"))? {
        Some(graph) => Ok(Graph(graph)),
        None => Err(KernelError::Cuda { why: "the driver made no graph of the launches".to_string() }),
    }
}

fn launch_all(stream: &Arc<CudaStream>, sequence: &Sequence) -> Result<(), KernelError> {
    stream.context().bind_to_thread().map_err(refusal("binding the context"))?;
    sequence.launches.iter().try_for_each(|launch| {
        let arguments = &sequence.arguments[launch.at..];
        launch_one(stream, launch, arguments).map_err(refusal(launch.name))
    })
}

fn launch_one(stream: &CudaStream, launch: &Recorded, arguments: &[u64]) -> Result<(), DriverError> {
    let mut parameters = [arguments.as_ptr().cast_mut().cast::<c_void>()];
    let mut attribute = sys::CUlaunchAttribute {
        id: sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
        pad: [0; 4],
        value: sys::CUlaunchAttributeValue { programmaticStreamSerializationAllowed: 1 },
    };
    let config = sys::CUlaunchConfig {
        gridDimX: launch.grid[0],
        gridDimY: launch.grid[1],
        gridDimZ: launch.grid[2],
        blockDimX: launch.threads,
        blockDimY: 1,
        blockDimZ: 1,
        sharedMemBytes: launch.shared,
        hStream: stream.cu_stream(),
        attrs: &raw mut attribute,
        numAttrs: launch.function.is_programmatic.into(),
    };
    // SAFETY: the function belongs to a loaded module and takes one struct, whose layout the tests compare with the PTX;
    // the driver copies it before it returns. Whoever made the launch checked what its addresses point to, and memory is
    // freed in stream order, after what waited for the driver was given to it. A kernel with the attribute waits for the
    // one before it before it touches what that one may touch.
    unsafe {
        sys::cuLaunchKernelEx(&raw const config, launch.function.handle, parameters.as_mut_ptr(), std::ptr::null_mut())
    }
    .result()
}
