//! The interpreter itself: each thing that it is there to find, in a kernel that does it.

use super::{numbers, random, rows_of};
use crate::ptx::Machine;
use nibble_kernels::cuda::{Cuda, MODULES};

/// A device whose module `module` was changed.
fn machine(module: &str, change: impl Fn(&str) -> String) -> Result<Machine, String> {
    let texts: Vec<(&str, String)> = MODULES
        .iter()
        .map(|ptx| (ptx.name, if ptx.name == module { change(ptx.text) } else { ptx.text.to_string() }))
        .collect();
    Machine::with_ptx(2, texts.iter().map(|(name, text)| (*name, text.as_str()))).map_err(|e| e.to_string())
}

/// The operations on it.
fn changed(module: &str, change: impl Fn(&str) -> String) -> Result<Cuda<Machine>, String> {
    Ok(Cuda::new(machine(module, change)?).unwrap())
}

/// The same where four warps multiply together.
fn changed_warpgroups(module: &str, change: impl Fn(&str) -> String) -> Cuda<Machine> {
    Cuda::new(machine(module, change).unwrap().with_warpgroups()).unwrap()
}

/// What a norm of three rows says.
fn norm(cuda: &Cuda<Machine>) -> Result<(), String> {
    let x = rows_of(cuda, &numbers(&mut random(1), 3 * 300), 300);
    let gain = cuda.vector(&[1.0; 300]).unwrap();
    let mut out = cuda.rows(3, 300).unwrap();
    cuda.rms_norm(&x, &gain, 1e-5, 3, &mut out).map_err(|e| e.to_string())?;
    cuda.read_rows(&out, 0..3).map(drop).map_err(|e| e.to_string())
}

/// What a product of `m` rows says.
fn product(cuda: &Cuda<Machine>, m: usize) -> Result<(), String> {
    product_with(cuda, nibble_kernels::Levels::Linear4, 8, m)
}

/// The same with a table.
fn table_product(cuda: &Cuda<Machine>, m: usize) -> Result<(), String> {
    let levels = std::array::from_fn(|i| (i * 3) as i8);
    product_with(cuda, nibble_kernels::Levels::Table4(levels), 0, m)
}

fn product_with(cuda: &Cuda<Machine>, levels: nibble_kernels::Levels, zero: i32, m: usize) -> Result<(), String> {
    let codes: Vec<u8> = (0..64 * 512).map(|i| (i % 16) as u8).collect();
    let scales = vec![0.5f32; 64 * 4];
    let source = nibble_kernels::WeightSource {
        n: 64,
        k: 512,
        group: 128,
        levels,
        codes: &codes,
        scales: nibble_kernels::Scales::F32(&scales),
        zeros: nibble_kernels::Zeros::Const(zero),
        outliers: None,
    };
    let weight = cuda.weight(&nibble_kernels::PackedWeight::pack(&source).unwrap()).unwrap();
    let x = rows_of(cuda, &numbers(&mut random(2), m * 512), 512);
    let mut out = cuda.rows(m, 64).unwrap();
    cuda.multiply(&x, m, &weight, None, false, &mut out).map_err(|e| e.to_string())
}

/// Replaces every `from` in the entries whose name begins with `entry`.
fn within(text: &str, entry: &str, from: &str, to: &str) -> String {
    let mut inside = false;
    let lines = text.lines().map(|line| {
        if let Some(name) = line.strip_prefix(".visible .entry ") {
            inside = name.starts_with(entry);
        }
        if inside { line.replace(from, to) } else { line.to_string() }
    });
    let changed = lines.collect::<Vec<_>>().join("\n");
    assert_ne!(changed.trim_end(), text.trim_end(), "{entry} has no `{from}`");
    changed
}

#[test]
fn what_ships_has_no_fault() {
    let cuda = changed("rows", str::to_string).unwrap();
    norm(&cuda).unwrap();
    product(&cuda, 1).unwrap();
    product(&cuda, 20).unwrap();
    product(&cuda, 70).unwrap();
    table_product(&cuda, 70).unwrap();
}

#[test]
fn a_missing_barrier_is_a_race() {
    let cuda = changed("rows", |text| within(text, "rms_norm", "bar.sync \t0;", "")).unwrap();
    let why = norm(&cuda).unwrap_err();
    assert!(why.contains("no barrier between") || why.contains("nobody wrote"), "{why}");
    for (module, entry, m) in [("few_w4", "few_any_w4", 1), ("gemv_w4", "gemv32_w4", 20)] {
        let cuda = changed(module, |text| within(text, entry, "bar.sync \t0;", "")).unwrap();
        let why = product(&cuda, m).unwrap_err();
        assert!(why.contains("no barrier between") || why.contains("nobody wrote"), "{entry}: {why}");
    }
    let cuda = changed("gemm", |text| within(text, "gemm64_w4", "bar.sync \t0;", "")).unwrap();
    let why = product(&cuda, 70).unwrap_err();
    assert!(why.contains("no barrier between") || why.contains("nobody wrote"), "{why}");
}

#[test]
fn a_wait_too_short_reads_what_is_in_flight() {
    let cuda = changed("gemm", |text| within(text, "gemm64_w4", "wait_group 0", "wait_group 1")).unwrap();
    let why = product(&cuda, 70).unwrap_err();
    assert!(why.contains("in flight"), "{why}");
    let cuda = changed("gemm", |text| within(text, "gemm64_w4_table", "wait_group 1", "wait_group 2")).unwrap();
    let why = table_product(&cuda, 70).unwrap_err();
    assert!(why.contains("in flight"), "{why}");
}

#[test]
fn products_of_warp_groups_need_fences_waits_and_barriers() {
    let faults = [
        ("fence.proxy.async.shared::cta;", "", "not shown"),
        ("wgmma.fence.sync.aligned;", "", "since the last wgmma.fence"),
        ("wgmma.wait_group.sync.aligned 0;", "wgmma.wait_group.sync.aligned 1;", "product that runs"),
        ("wgmma.commit_group.sync.aligned;", "", "product that runs"),
        ("bar.sync \t0;", "", "no barrier between"),
    ];
    for (entry, m) in [("wgmma64_any_w4", 40), ("wgmma128_any_w4", 70)] {
        product(&changed_warpgroups("wgmma_w4", str::to_string), m).unwrap();
        for (from, to, wanted) in faults {
            let why = product(&changed_warpgroups("wgmma_w4", |text| within(text, entry, from, to)), m).unwrap_err();
            assert!(why.contains(wanted), "{entry} without `{from}`: {why}");
        }
    }
}

#[test]
fn copies_must_have_arrived_at_the_end() {
    let entry = "gemm64_w4_table";
    let cuda = changed("gemm", |text| within(text, entry, "wait_group 0", "wait_group 9")).unwrap();
    // The last groups are empty, so the loop's own waits are enough, unless they are gone as well.
    assert!(table_product(&cuda, 70).is_ok());
    let gone = |text: &str| {
        within(&within(text, entry, "wait_group 0", "wait_group 9"), entry, "wait_group 1", "wait_group 9")
    };
    assert!(table_product(&changed("gemm", gone).unwrap(), 70).is_err());
}

#[test]
fn accesses_out_of_place_and_misaligned_are_refused() {
    let past = changed("rows", |text| within(text, "rms_norm", "st.global.f32 \t[%rd", "st.global.f32 \t[3600+%rd"));
    assert!(past.is_err(), "a form of address that isn't PTX");
    let cuda = changed("gemm", |text| within(text, "gemm64_w4", ".align 16 .b8", ".align 8 .b8")).unwrap();
    product(&cuda, 70).unwrap();
    // Another two bytes of shared memory before the tiles: 16-byte copies no longer lie on 16 bytes.
    let shift = |text: &str| {
        let mut inside = false;
        let lines = text.lines().flat_map(|line| {
            if let Some(name) = line.strip_prefix(".visible .entry ") {
                inside = name.starts_with("gemm64_w4");
            }
            let is_tile = inside && line.trim_start().starts_with(".shared .align 16");
            let before = is_tile.then(|| ".shared .align 2 .b8 shift[2];".to_string());
            before.into_iter().chain([if is_tile { line.replace(".align 16", ".align 2") } else { line.to_string() }])
        });
        lines.collect::<Vec<_>>().join("\n")
    };
    let why = product(&changed("gemm", shift).unwrap(), 70).unwrap_err();
    assert!(why.contains("not aligned"), "{why}");
}

#[test]
fn unwritten_memory_is_not_read() {
    let cuda = changed("rows", str::to_string).unwrap();
    let x = cuda.rows(3, 300).unwrap();
    let gain = cuda.vector(&[1.0; 300]).unwrap();
    let mut out = cuda.rows(3, 300).unwrap();
    let why = cuda.rms_norm(&x, &gain, 1e-5, 3, &mut out).unwrap_err().to_string();
    assert!(why.contains("nobody wrote"), "{why}");
    assert!(cuda.read_rows(&out, 0..1).is_err(), "nor by the host");
}

#[test]
fn blocks_must_not_depend_on_each_other() {
    // Every block of a norm writes the first row.
    let cuda = changed("rows", |text| within(text, "rms_norm", "%ctaid.x", "0")).unwrap();
    let why = norm(&cuda).unwrap_err();
    assert!(why.contains("another block"), "{why}");
}

#[test]
fn forms_that_are_not_known_are_refused() {
    for (from, to) in [("sqrt.rn.f32", "sqrt.approx.f32"), ("shfl.sync.bfly.b32", "shfl.sync.up.b32")] {
        let why = changed("rows", |text| text.replace(from, to)).map(drop).unwrap_err();
        assert!(why.contains("unknown instruction"), "{why}");
    }
}

#[test]
fn structs_have_the_size_that_kernels_take() {
    // A parameter of another size is refused at the launch, so each kernel must have been launched to know.
    let cuda =
        changed("rows", |text| within(text, "rms_norm", "rms_norm_pack_param_0[56]", "rms_norm_pack_param_0[64]"))
            .unwrap();
    let why = norm(&cuda).unwrap_err();
    assert!(why.contains("bytes of parameters"), "{why}");
}
