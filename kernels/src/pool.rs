//! Fork-join over threads that stay: a region costs about a microsecond, not a wake-up.
//!
//! A decoded token is some hundred regions of a few microseconds each, so workers don't sleep between them: after a
//! region they spin for the next one (a moment with `pause`, then giving way to other threads), and park only when
//! nothing comes. The thread that calls [`Pool::run`] is worker 0; the others wait on one counter.
//!
//! ```text
//! caller   pending = n-1, region = &job, epoch += 1 | job(0, n) | wait pending == 0
//! worker w          ... epoch changed ->            | job(w, n) | pending -= 1 -> wait for the next epoch
//! ```

mod topology;

use std::any::Any;
use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Pure spinning, long enough for the serial code between two regions of one layer.
const SPIN: Duration = Duration::from_micros(20);
/// Spinning that yields to other threads, long enough for sampling a token; then the thread parks.
const YIELD: Duration = Duration::from_micros(300);

/// A set of threads for fork-join regions; the thread that opens a region takes part in it.
///
/// Regions of one pool run one after the other: a second thread that calls [`Pool::run`] waits for the first.
/// Dropping the pool joins its threads.
pub struct Pool {
    shared: Arc<Shared>,
    handles: Vec<JoinHandle<()>>,
    /// Held by the thread whose region is running.
    region: Mutex<()>,
}

/// What a region's workers read; lives on the stack of the thread that called `run`.
struct Region<'a> {
    job: &'a (dyn Fn(usize, usize) + Sync),
    workers: usize,
}

/// Keeps a counter that many threads poll out of the cache lines of others.
#[repr(align(128))]
struct Line<T>(T);

struct Shared {
    /// Changes when a region opens or the pool closes.
    epoch: Line<AtomicUsize>,
    /// Workers that haven't finished the running region.
    pending: Line<AtomicUsize>,
    /// The running region; valid while `pending` counts a worker that may read it.
    region: AtomicPtr<Region<'static>>,
    stop: AtomicBool,
    /// Whether waiting threads have cores of their own to spin on.
    spins: bool,
    /// Workers parked on `opened`.
    sleepers: AtomicUsize,
    /// Whether the caller is parked on `closed`.
    caller_sleeps: AtomicBool,
    lock: Mutex<()>,
    opened: Condvar,
    closed: Condvar,
    /// The first panic of the running region.
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

thread_local! {
    /// Whether this thread is inside a region, of any pool.
    static INSIDE: Cell<bool> = const { Cell::new(false) };
}

impl Pool {
    /// A pool of `threads` workers: the calling thread and `threads - 1` new ones (0 counts as 1).
    ///
    /// If the system refuses to start that many threads, the pool has those that did start.
    pub fn new(threads: usize) -> Pool {
        Self::build(threads, &[])
    }

    /// A pool whose new threads are bound to one physical core each, as far as there are cores.
    ///
    /// The first core is left to the thread that calls [`Pool::run`], which isn't bound. Linux only; elsewhere and
    /// where the system refuses, threads stay unbound.
    pub fn pinned(threads: usize) -> Pool {
        Self::build(threads, &topology::cores())
    }

    fn build(threads: usize, cores: &[usize]) -> Pool {
        let shared = Arc::new(Shared {
            epoch: Line(AtomicUsize::new(0)),
            pending: Line(AtomicUsize::new(0)),
            region: AtomicPtr::new(std::ptr::null_mut()),
            stop: AtomicBool::new(false),
            spins: threads <= Self::default_threads(),
            sleepers: AtomicUsize::new(0),
            caller_sleeps: AtomicBool::new(false),
            lock: Mutex::new(()),
            opened: Condvar::new(),
            closed: Condvar::new(),
            panic: Mutex::new(None),
        });
        let mut handles = Vec::new();
        for worker in 1..threads {
            let shared = Arc::clone(&shared);
            let core = cores.get(worker).copied();
            let thread = std::thread::Builder::new().name(format!("nibble-{worker}"));
            match thread.spawn(move || {
                if let Some(core) = core {
                    topology::pin(core);
                }
                shared.work(worker);
            }) {
                Ok(handle) => handles.push(handle),
                Err(_) => break,
            }
        }
        Pool { shared, handles, region: Mutex::new(()) }
    }

    /// Workers of a region: the calling thread and the pool's own.
    pub fn threads(&self) -> usize {
        self.handles.len() + 1
    }

    /// How many threads compute best here: physical cores that this process may use (affinity mask, one a pair of
    /// SMT siblings), no more than its cgroup's CPU quota allows. At least 1.
    pub fn default_threads() -> usize {
        // The standard library's count is of logical CPUs, but it knows the quota.
        let logical = std::thread::available_parallelism().map_or(1, usize::from);
        let physical = topology::cores().len();
        if physical == 0 { logical } else { physical.min(logical) }
    }

    /// Runs `job(worker, workers)` once on each worker and returns when all are done.
    ///
    /// Inside a region (of this or another pool) the job runs at once as `job(0, 1)`, so a job must be right for any
    /// number of workers. A panic in any worker reaches the caller after all workers are done; the pool stays usable.
    pub fn run(&self, job: &(dyn Fn(usize, usize) + Sync)) {
        if self.handles.is_empty() || INSIDE.get() {
            return job(0, 1);
        }
        let turn = self.region.lock().unwrap_or_else(PoisonError::into_inner);
        let shared = &*self.shared;
        let region = Region { job, workers: self.threads() };
        shared.pending.0.store(self.handles.len(), Ordering::Relaxed);
        shared.region.store((&raw const region).cast::<Region<'static>>().cast_mut(), Ordering::Relaxed);
        shared.open();

        let own = inside(|| job(0, region.workers));
        shared.wait_until_closed();
        // `region` is read by nobody from here on.
        let theirs = shared.take_panic();
        drop(turn);
        if let Err(payload) = own {
            resume_unwind(payload);
        }
        if let Some(payload) = theirs {
            resume_unwind(payload);
        }
    }

    /// Calls `f(item)` once for each of `0..items`, each worker taking the next one when it is free.
    pub fn for_each(&self, items: usize, f: impl Fn(usize) + Sync) {
        self.for_each_worker(items, |item, _| f(item));
    }

    /// As [`Pool::for_each`], with the worker's index (below [`Pool::threads`]): `f(item, worker)`.
    pub fn for_each_worker(&self, items: usize, f: impl Fn(usize, usize) + Sync) {
        if items <= 1 {
            return (0..items).for_each(|item| f(item, 0));
        }
        let next = AtomicUsize::new(0);
        self.run(&|worker, _| {
            loop {
                let item = next.fetch_add(1, Ordering::Relaxed);
                if item >= items {
                    break;
                }
                f(item, worker);
            }
        });
    }

    /// Cuts `data` into parts of `len` values (the last may be shorter) and calls `f(index, part)` for each, in
    /// parallel.
    ///
    /// # Panics
    /// If `len` is 0 and `data` isn't empty.
    pub fn for_each_part<T: Send>(&self, data: &mut [T], len: usize, f: impl Fn(usize, &mut [T]) + Sync) {
        let total = data.len();
        if total == 0 {
            return;
        }
        let whole = Whole(data.as_mut_ptr());
        self.for_each(total.div_ceil(len), |index| {
            let start = index * len;
            // SAFETY: start < total since index < ceil(total / len), and the part ends at or before total; each index
            // is handed out once, so that parts don't overlap; `data` stays mutably borrowed until the region closes.
            let part = unsafe { std::slice::from_raw_parts_mut(whole.at(start), len.min(total - start)) };
            f(index, part);
        });
    }

    /// As [`Pool::for_each_part`] over two slices, part for part: `f(index, part of a, part of b)`.
    ///
    /// # Panics
    /// If the slices aren't cut into equally many parts, or if a length is 0 and its slice isn't empty.
    pub fn for_each_part_pair<A: Send, B: Send>(
        &self,
        (a, len_a): (&mut [A], usize),
        (b, len_b): (&mut [B], usize),
        f: impl Fn(usize, &mut [A], &mut [B]) + Sync,
    ) {
        let (total_a, total_b) = (a.len(), b.len());
        if total_a == 0 && total_b == 0 {
            return;
        }
        let parts = total_a.div_ceil(len_a);
        assert_eq!(parts, total_b.div_ceil(len_b), "parts of both slices");
        let (a, b) = (Whole(a.as_mut_ptr()), Whole(b.as_mut_ptr()));
        self.for_each(parts, |index| {
            let (start_a, start_b) = (index * len_a, index * len_b);
            // SAFETY: as in `for_each_part`; index < parts, which both slices have.
            let a = unsafe { std::slice::from_raw_parts_mut(a.at(start_a), len_a.min(total_a - start_a)) };
            // SAFETY: as above.
            let b = unsafe { std::slice::from_raw_parts_mut(b.at(start_b), len_b.min(total_b - start_b)) };
            f(index, a, b);
        });
    }

    /// As [`Pool::for_each_part`], each worker with a scratch value of its own: `f(index, part, scratch)`.
    ///
    /// Parts are taken last first, because in causal work the last are the largest.
    ///
    /// # Panics
    /// If there are fewer scratch values than [`Pool::threads`], or if `len` is 0 and `data` isn't empty.
    pub fn for_each_part_with<T: Send, S: Send>(
        &self,
        data: &mut [T],
        len: usize,
        scratch: &mut [S],
        f: impl Fn(usize, &mut [T], &mut S) + Sync,
    ) {
        assert!(scratch.len() >= self.threads(), "{} scratch values, {} workers", scratch.len(), self.threads());
        let total = data.len();
        if total == 0 {
            return;
        }
        let (whole, scratch) = (Whole(data.as_mut_ptr()), Whole(scratch.as_mut_ptr()));
        let parts = total.div_ceil(len);
        self.for_each_worker(parts, |item, worker| {
            let index = parts - 1 - item;
            let start = index * len;
            // SAFETY: as in `for_each_part`.
            let part = unsafe { std::slice::from_raw_parts_mut(whole.at(start), len.min(total - start)) };
            // SAFETY: worker < threads <= scratch.len(), and one thread at a time has this worker's index in a region.
            let own = unsafe { &mut *scratch.at(worker) };
            f(index, part, own);
        });
    }
}

/// The start of a slice that a region's workers take disjoint parts of.
struct Whole<T>(*mut T);

impl<T> Whole<T> {
    fn at(&self, offset: usize) -> *mut T {
        self.0.wrapping_add(offset)
    }
}

// SAFETY: workers only make references to disjoint parts, which amounts to sending each part to one of them.
unsafe impl<T: Send> Sync for Whole<T> {}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        self.shared.open();
        for handle in self.handles.drain(..) {
            // A worker catches its jobs' panics, so that there is no error to hand on.
            let _ = handle.join();
        }
    }
}

impl std::fmt::Debug for Pool {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pool").field("threads", &self.threads()).finish()
    }
}

/// Runs `f` as the inside of a region and hands back its panic, if any.
fn inside(f: impl FnOnce()) -> Result<(), Box<dyn Any + Send>> {
    INSIDE.set(true);
    let result = catch_unwind(AssertUnwindSafe(f));
    INSIDE.set(false);
    result
}

impl Shared {
    fn work(&self, worker: usize) {
        // The first region may have opened before this thread ran, so the epoch seen last is the initial one.
        let mut seen = 0;
        loop {
            self.wait_until_opened(seen);
            seen = seen.wrapping_add(1);
            if self.stop.load(Ordering::Relaxed) {
                return;
            }
            let region = self.region.load(Ordering::Relaxed);
            // SAFETY: `run` stored the pointer before the epoch changed, which `wait_until_opened` has acquired, and
            // keeps the region alive until `pending` is 0; this worker counts in it until `finish`.
            let region = unsafe { &*region };
            let (job, workers) = (region.job, region.workers);
            let result = inside(|| job(worker, workers));
            if let Err(payload) = result {
                self.panic.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(payload);
            }
            self.finish();
        }
    }

    /// Opens the region (or the end) that was prepared.
    fn open(&self) {
        self.epoch.0.fetch_add(1, Ordering::SeqCst);
        // Sequentially consistent on both sides: either a worker that is about to park sees the new epoch, or this
        // sees the worker.
        if self.sleepers.load(Ordering::SeqCst) > 0 {
            drop(self.guard());
            self.opened.notify_all();
        }
    }

    fn wait_until_opened(&self, seen: usize) {
        let opened = || self.epoch.0.load(Ordering::SeqCst) != seen;
        if self.spin(opened) {
            return;
        }
        let mut guard = self.guard();
        self.sleepers.fetch_add(1, Ordering::SeqCst);
        while !opened() {
            guard = self.opened.wait(guard).unwrap_or_else(PoisonError::into_inner);
        }
        self.sleepers.fetch_sub(1, Ordering::SeqCst);
    }

    /// A worker's last act in a region.
    fn finish(&self) {
        if self.pending.0.fetch_sub(1, Ordering::SeqCst) == 1 && self.caller_sleeps.load(Ordering::SeqCst) {
            drop(self.guard());
            self.closed.notify_all();
        }
    }

    fn wait_until_closed(&self) {
        let closed = || self.pending.0.load(Ordering::SeqCst) == 0;
        if self.spin(closed) {
            return;
        }
        let mut guard = self.guard();
        self.caller_sleeps.store(true, Ordering::SeqCst);
        while !closed() {
            guard = self.closed.wait(guard).unwrap_or_else(PoisonError::into_inner);
        }
        self.caller_sleeps.store(false, Ordering::SeqCst);
    }

    /// Waits a bounded time without parking; whether the condition came true.
    fn spin(&self, done: impl Fn() -> bool) -> bool {
        if done() {
            return true;
        }
        if !self.spins {
            // More threads than cores: whoever spins keeps a worker from its job.
            std::thread::yield_now();
            return done();
        }
        let start = Instant::now();
        loop {
            for _ in 0..32 {
                if done() {
                    return true;
                }
                std::hint::spin_loop();
            }
            let spent = start.elapsed();
            if spent > YIELD {
                return false;
            }
            if spent > SPIN {
                std::thread::yield_now();
            }
        }
    }

    fn guard(&self) -> MutexGuard<'_, ()> {
        self.lock.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take_panic(&self) -> Option<Box<dyn Any + Send>> {
        self.panic.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}
