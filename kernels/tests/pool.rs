//! Laws of the thread pool: every worker runs each region once, panics reach the caller, nothing deadlocks.

use nibble_kernels::Pool;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

/// One, as many as cores, and more than cores.
fn sizes() -> [usize; 5] {
    [1, 2, 3, 8, 33]
}

#[test]
fn a_region_runs_once_on_every_worker() {
    for threads in sizes() {
        let pool = Pool::new(threads);
        assert_eq!(pool.threads(), threads);
        let ran: Vec<AtomicUsize> = (0..threads).map(|_| AtomicUsize::new(0)).collect();
        pool.run(&|worker, workers| {
            assert_eq!(workers, threads);
            ran[worker].fetch_add(1, Ordering::Relaxed);
        });
        assert!(ran.iter().all(|r| r.load(Ordering::Relaxed) == 1), "{threads} threads");
    }
}

#[test]
fn zero_threads_are_the_caller_alone() {
    assert_eq!(Pool::new(0).threads(), 1);
}

#[test]
fn many_tiny_regions_all_run_and_each_ends_before_the_next() {
    for (threads, regions) in [(2, 5_000), (4, 1_000), (16, 100)] {
        let pool = Pool::new(threads);
        let total = AtomicUsize::new(0);
        for region in 0..regions {
            pool.run(&|_, _| {
                total.fetch_add(1, Ordering::Relaxed);
            });
            assert_eq!(total.load(Ordering::Relaxed), (region + 1) * threads);
        }
    }
}

#[test]
fn regions_that_come_after_the_workers_parked_run_too() {
    let pool = Pool::new(4);
    let total = AtomicUsize::new(0);
    for _ in 0..20 {
        std::thread::sleep(Duration::from_millis(2));
        pool.run(&|_, _| {
            total.fetch_add(1, Ordering::Relaxed);
        });
    }
    assert_eq!(total.into_inner(), 80);
}

#[test]
fn a_caller_that_parked_is_woken_by_the_last_worker() {
    let pool = Pool::new(3);
    let total = AtomicUsize::new(0);
    for late in 0..3 {
        pool.run(&|worker, _| {
            if worker == late {
                std::thread::sleep(Duration::from_millis(5));
            }
            total.fetch_add(1, Ordering::Relaxed);
        });
    }
    assert_eq!(total.into_inner(), 9);
}

#[test]
fn an_idle_pool_burns_no_cpu() {
    let ticks = || {
        let stat = std::fs::read_to_string("/proc/self/stat").ok()?;
        let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
        Some(fields[11].parse::<u64>().ok()? + fields[12].parse::<u64>().ok()?)
    };
    let pool = Pool::new(8);
    pool.run(&|_, _| {});
    std::thread::sleep(Duration::from_millis(100));
    let Some(before) = ticks() else { return };
    std::thread::sleep(Duration::from_millis(500));
    // A spinning worker would take 50 ticks of 10 ms. The process runs this test alone under nextest; beside other
    // tests of this file their work is counted too, so only a single-test process can judge.
    let alone = std::env::var_os("NEXTEST").is_some();
    let spent = ticks().unwrap_or(before) - before;
    assert!(!alone || spent < 10, "{spent} ticks while idle");
}

#[test]
fn a_panic_of_any_worker_reaches_the_caller_and_the_pool_stays_usable() {
    for threads in sizes() {
        let pool = Pool::new(threads);
        for bad in 0..threads {
            let finished = AtomicUsize::new(0);
            let panic = catch_unwind(AssertUnwindSafe(|| {
                pool.run(&|worker, _| {
                    if worker == bad {
                        std::panic::resume_unwind(Box::new(format!("worker {worker}")));
                    }
                    finished.fetch_add(1, Ordering::Relaxed);
                });
            }))
            .unwrap_err();
            assert_eq!(*panic.downcast::<String>().unwrap(), format!("worker {bad}"));
            assert_eq!(finished.into_inner(), threads - 1, "the others finish before the panic goes on");
        }
        // No panic is left behind, and nobody is still marked as inside a region.
        let workers = AtomicUsize::new(0);
        pool.run(&|_, _| {
            workers.fetch_add(1, Ordering::Relaxed);
        });
        assert_eq!(workers.into_inner(), threads);
    }
}

#[test]
fn panics_of_all_workers_at_once_are_one_panic() {
    let pool = Pool::new(6);
    for _ in 0..50 {
        let run = AssertUnwindSafe(|| pool.run(&|_, _| std::panic::resume_unwind(Box::new(7_u8))));
        assert_eq!(*catch_unwind(run).unwrap_err().downcast::<u8>().unwrap(), 7);
    }
    pool.run(&|_, _| {});
}

#[test]
fn a_nested_region_runs_inline_on_this_and_on_another_pool() {
    let (pool, other) = (Pool::new(4), Pool::new(3));
    let inner = AtomicUsize::new(0);
    pool.run(&|_, _| {
        for pool in [&pool, &other] {
            pool.run(&|worker, workers| {
                assert_eq!((worker, workers), (0, 1));
                inner.fetch_add(1, Ordering::Relaxed);
            });
        }
        pool.for_each(5, |_| {
            inner.fetch_add(1, Ordering::Relaxed);
        });
    });
    assert_eq!(inner.into_inner(), 4 * (2 + 5));
}

#[test]
fn threads_that_share_a_pool_take_turns() {
    let pool = Pool::new(3);
    let inside = AtomicUsize::new(0);
    let regions = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for _ in 0..50 {
                    pool.run(&|_, workers| {
                        assert!(inside.fetch_add(1, Ordering::SeqCst) < workers, "two regions at once");
                        inside.fetch_sub(1, Ordering::SeqCst);
                    });
                    regions.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
    });
    assert_eq!(regions.into_inner(), 200);
}

#[test]
fn each_item_is_taken_once() {
    for threads in sizes() {
        let pool = Pool::new(threads);
        for items in [0, 1, 2, 7, 100, 1000] {
            let taken: Vec<AtomicUsize> = (0..items).map(|_| AtomicUsize::new(0)).collect();
            pool.for_each_worker(items, |item, worker| {
                assert!(worker < threads);
                taken[item].fetch_add(1, Ordering::Relaxed);
            });
            pool.for_each(items, |item| {
                taken[item].fetch_add(1, Ordering::Relaxed);
            });
            assert!(taken.iter().all(|t| t.load(Ordering::Relaxed) == 2), "{threads} threads, {items} items");
        }
    }
}

#[test]
fn parts_cover_the_slice_and_the_last_may_be_short() {
    for threads in sizes() {
        let pool = Pool::new(threads);
        for (total, len) in [(0, 0), (0, 3), (1, 1), (10, 3), (9, 3), (2, 5), (1000, 7)] {
            let mut data = vec![usize::MAX; total];
            pool.for_each_part(&mut data, len, |index, part| {
                for (i, value) in part.iter_mut().enumerate() {
                    assert_eq!(std::mem::replace(value, index * len + i), usize::MAX);
                }
            });
            assert!(data.iter().enumerate().all(|(i, v)| i == *v), "{total} in parts of {len}");

            let mut twice = vec![[usize::MAX; 2]; total];
            pool.for_each_part_pair((&mut twice, len), (&mut data, len), |index, twice, data| {
                assert_eq!(data.first(), Some(&(index * len)), "parts of one index meet");
                for (twice, value) in twice.iter_mut().zip(data) {
                    *twice = [*value, *value];
                }
            });
            assert!(twice.iter().enumerate().all(|(i, v)| [i, i] == *v));

            let mut scratch = vec![0_usize; threads];
            pool.for_each_part_with(&mut data, len, &mut scratch, |_, part, count| {
                *count += part.len();
                part.fill(0);
            });
            assert_eq!(scratch.iter().sum::<usize>(), total, "each worker's count is its own");
            assert!(data.iter().all(|v| *v == 0));
        }
    }
}

#[test]
fn parts_of_no_values_and_missing_scratch_are_refused() {
    let pool = Pool::new(2);
    let zero = catch_unwind(AssertUnwindSafe(|| pool.for_each_part(&mut [1], 0, |_, _| ())));
    assert!(zero.is_err());
    let short = catch_unwind(AssertUnwindSafe(|| pool.for_each_part_with(&mut [1], 1, &mut [()], |_, _, ()| ())));
    assert!(short.is_err());
    let pair = AssertUnwindSafe(|| pool.for_each_part_pair((&mut [1; 4], 2), (&mut [1; 4], 1), |_, _, _| ()));
    assert!(catch_unwind(pair).is_err());
}

#[test]
fn dropping_joins_workers_whether_they_spin_or_sleep() {
    let alive = Mutex::new(0_i32);
    for pause in [0, 2] {
        for threads in sizes() {
            let pool = Pool::new(threads);
            pool.run(&|_, _| *alive.lock().unwrap() += 1);
            std::thread::sleep(Duration::from_millis(pause));
            drop(pool);
        }
        // A pool that never ran closes too.
        drop(Pool::new(4));
    }
    assert_eq!(*alive.lock().unwrap() as usize, 2 * sizes().iter().sum::<usize>());
}

#[test]
fn a_pinned_pool_computes_as_any_other() {
    for threads in [1, 2, 5] {
        let pool = Pool::pinned(threads);
        assert_eq!(pool.threads(), threads);
        let mut data = vec![0; 100];
        pool.for_each_part(&mut data, 1, |index, part| part[0] = index);
        assert!(data.into_iter().enumerate().all(|(i, v)| i == v));
    }
}

#[test]
fn the_default_is_at_least_one_and_at_most_what_the_system_offers() {
    let logical = std::thread::available_parallelism().map_or(1, usize::from);
    assert!((1..=logical).contains(&Pool::default_threads()));
}
