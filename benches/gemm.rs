//! Every row of `GEMMS` that this CPU has, on one thread: `row` is one activation row and a weight in memory,
//! `row_in_cache` a weight that stays in the cache (bytes of weight a second), `rows` and `many_rows` 128 and 512 rows of
//! a prompt (multiply-adds a second).

use divan::Bencher;
use divan::counter::{BytesCount, ItemsCount};
use nibble_benches::{activations, weight};
use nibble_kernels::gemm::{GEMMS, GemmKernel, Product};
use nibble_kernels::{Activations, Pool, limits};

fn main() {
    let pool = Pool::new(1);
    let (peak, read) = (limits::int8_peak(&pool) / 1e9, limits::read_bandwidth(&pool) / 1e9);
    println!("limits of one thread: {peak:.1} Gitem/s int8 multiply-adds, {read:.1} GB/s read");
    divan::main();
}

/// Rows of the table for this CPU by name, for one activation row or for many.
fn kernels(single: bool) -> impl Iterator<Item = &'static str> {
    let present = GEMMS.iter().filter(move |kernel| kernel.isa.is_present() && (kernel.rows == 1) == single);
    present.map(|kernel| kernel.name)
}

#[divan::bench(args = kernels(true), sample_size = 1, sample_count = 30)]
fn row(bencher: Bencher, name: &str) {
    // Several times a last-level cache.
    time(bencher, name, 1, 65536, 4096);
}

#[divan::bench(args = kernels(true), sample_size = 20, sample_count = 30)]
fn row_in_cache(bencher: Bencher, name: &str) {
    time(bencher, name, 1, 1024, 2048);
}

#[divan::bench(args = kernels(false), sample_size = 1, sample_count = 30)]
fn rows(bencher: Bencher, name: &str) {
    time(bencher, name, 128, 2048, 2048);
}

#[divan::bench(args = kernels(false), sample_size = 1, sample_count = 30)]
fn many_rows(bencher: Bencher, name: &str) {
    time(bencher, name, 512, 2048, 2048);
}

fn time(bencher: Bencher, name: &str, m: usize, n: usize, k: usize) {
    let kernel: &'static GemmKernel = GEMMS.iter().find(|kernel| kernel.name == name).expect("a row of GEMMS");
    let weight = weight(kernel.weight, n, k).expect("a well-formed weight");
    let pool = Pool::new(1);
    let mut x = Activations::with_capacity(m, k);
    x.fill(m, k, &activations(m, k)).expect("activations of the right length");
    let mut out = vec![0.0; m * n];
    let bencher = match m {
        1 => bencher.counter(BytesCount::new(weight.bytes())),
        _ => bencher.counter(ItemsCount::new(m * n * k)),
    };
    bencher.bench_local(|| {
        let product = Product { weight: &weight, bias: None, accumulate: false, out: &mut out };
        kernel.multiply(&pool, &mut x, product).expect("a kernel for this CPU");
    });
}
