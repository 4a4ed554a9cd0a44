#!/usr/bin/env bash
# Sets up what the tests need and runs all of them: unit and law tests, doctests, and the kernel laws once more for each
# narrower instruction set (NIBBLE_ISA caps what a process may use) and for the wider ones that this CPU lacks, on an
# emulated one (scripts/avx512_rig). One cargo profile, so that dependencies compile once; the emulated laws have their own.
#
#   scripts/test.sh [nextest or cargo-test arguments for the main run]
#
# Without a network it says so and goes on; the tests that miss their model or oracle say so and are counted at the end.
# With CI=true or NIBBLE_STRICT=1 a missing model or oracle is a failure.
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
cd "$REPO"

TEST_ASSETS="smollm2 minilm texts"
# ONNX Runtime as a second engine for graphs; the oracles' wheel has its library.
FEATURES="nibble/ort,nibble-tests/ort"

need_cargo
export NIBBLE_MISSING="$CACHE/missing.log"
rm -f "$NIBBLE_MISSING"

say "models and texts"
# shellcheck disable=SC2086 # a list of words
"$REPO/scripts/fetch_assets.sh" $TEST_ASSETS || warn "some models are missing: the tests that need them will be counted, not run"

say "a browser to open reports in"
install_browser || warn "there is no Chromium: reports are read as text only"

say "oracles"
install_oracles || warn "the Python oracles are missing: the tests that need them will be counted, not run"

if cargo nextest --version >/dev/null 2>&1; then
    run() { cargo nextest run --workspace --features "$FEATURES" "$@"; }
    kernel_laws() { run -E 'package(nibble-kernels)'; }
else
    note "cargo-nextest is not installed: using cargo test (the same tests, one process a test file)"
    run() { cargo test --workspace --lib --bins --tests --no-fail-fast --features "$FEATURES" "$@"; }
    kernel_laws() { cargo test --package nibble-kernels --lib --tests --no-fail-fast; }
fi

say "GPU kernels: the PTX is what its sources compile to, and assembles within its budgets"
status=0
"$REPO/scripts/build_ptx.sh" --check || status=$?
case $status in
0) ;;
3) echo "PTX check: the pinned compilers could not be fetched" >>"$NIBBLE_MISSING" ;;
*) exit "$status" ;;
esac

say "doctests"
cargo test --workspace --doc --features "$FEATURES"

say "all tests, on the widest instruction set of this machine"
run "$@"

for isa in scalar avx2; do
    say "kernel laws with NIBBLE_ISA=$isa"
    NIBBLE_ISA="$isa" kernel_laws
done

say "kernel laws on AVX-512 and AVX-VNNI, emulated where this CPU lacks them, and on AMX where it is there"
"$REPO/scripts/avx512_rig/run.sh"

if [ -s "$NIBBLE_MISSING" ]; then
    count="$(sort -u "$NIBBLE_MISSING" | wc -l)"
    warn "$count tests did NOT run what they are for, since something could not be fetched:
$(sort -u "$NIBBLE_MISSING" | sed 's/^/    /')"
    [ "${CI:-}" != true ] && [ "${NIBBLE_STRICT:-}" != 1 ] || die "missing models or oracles count as failures here (CI or NIBBLE_STRICT)"
else
    say "every test had what it needs"
fi
