#!/usr/bin/env bash
# Runs the kernel laws with AVX-512 and AVX-VNNI on any x86-64 Linux, whatever its CPU has, and with AMX where the CPU has it.
#
#   scripts/avx512_rig/run.sh [amx|avx512|avxvnni]...
#
# Where the CPU has the instructions, all laws run on it. Elsewhere the quick laws (NIBBLE_LAWS: fewer cases of each) run
# in emulate.py beside this file, on the CPU of Bochs, which a wheel of PyPI carries. The laws are those of the test files
# `gemm` and `ops`; `pool` and the unit tests, whose subject is threads, have no instructions of their own and stay out.
#
# A run must be for the instruction set it says (NIBBLE_REQUIRE_ISA), and each begins with a check that this bites: on a
# CPU that lacks the instructions the law about them has to fail.
#
# Exit status: 0 if all laws passed. 1 if one failed. If the emulator can't be had or used here, it says so, notes it in
# the file NIBBLE_MISSING and gives 0, but 1 with CI=true or NIBBLE_STRICT=1.
. "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
cd "$REPO"

RIG="$REPO/scripts/avx512_rig"
TARGET=x86_64-unknown-linux-gnu
EMULATOR="$CACHE/emulator"
# One pinned wheel for every Python: only C functions of its extension module are used.
LINUX_311="--python-version 3.11 --implementation cp --abi cp311 --platform manylinux_2_28_x86_64"
MODULE=_bochscpu.cpython-311-x86_64-linux-gnu.so
ISA_LAW=simd::the_widest_instruction_set_is_the_one_that_the_run_is_for

# The instructions as /proc/cpuinfo calls them, and a CPU to emulate: one that has AVX-VNNI beside AVX-512, so that its
# kernels are compared with all others, and one that has AVX-VNNI alone.
flags() {
    case "$1" in
    avx512) echo "avx2 fma f16c avx512f avx512bw avx512dq avx512vl avx512_vnni" ;;
    amx) echo "$(flags avx512) amx_tile amx_int8 amx_bf16" ;;
    avxvnni) echo "avx2 fma f16c avx_vnni" ;;
    esac
}
cpu() {
    case "$1" in
    avx512) echo sapphire_rapids ;;
    avxvnni) echo arrow_lake ;;
    esac
}

has() {
    local flag
    for flag in $(flags "$1"); do
        grep -m1 '^flags' /proc/cpuinfo 2>/dev/null | grep -qw "$flag" || return 1
    done
}

# without REASON: no CPU can be emulated here; what this one has goes on.
without() {
    warn "the kernel laws did NOT run with$emulated: $1"
    [ -z "${NIBBLE_MISSING:-}" ] || printf 'kernel laws with%s: %s\n' "$emulated" "$1" >>"$NIBBLE_MISSING"
    [ "${CI:-}" != true ] && [ "${NIBBLE_STRICT:-}" != 1 ] ||
        die "kernel laws that don't run count as failures here (CI or NIBBLE_STRICT)"
    isas="$native" emulated=""
    [ -n "$isas" ] || exit 0
}

emulate() { python3 "$RIG/emulate.py" --emulator "$EMULATOR/$MODULE" "$@"; }

# build: the test programs, statically linked and optimized as in a release; their paths, one a line.
build() {
    RUSTFLAGS="-C target-feature=+crt-static" cargo test --package nibble-kernels --test gemm --test ops --no-run --locked \
        --target "$TARGET" --config profile.dev.opt-level=3 --message-format json-render-diagnostics |
        python3 -c '
import json, sys
for line in sys.stdin:
    path = json.loads(line).get("executable")
    if path:
        print(path)' | sort
}

# law ISA PROGRAM NAME: one law on an emulated CPU.
law() {
    local isa="$1" program="$2" name="$3" started=$SECONDS log
    log="$WORK/$isa.$(basename "$program").${name//:/_}"
    if emulate --cpu "$(cpu "$isa")" --env NIBBLE_ISA="$isa" --env NIBBLE_REQUIRE_ISA="$isa" --env NIBBLE_LAWS=quick \
        "$program" --test-threads=1 --exact "$name" >"$log" 2>&1 &&
        grep -q '^test result: ok. 1 passed; 0 failed; 0 ignored' "$log"; then
        echo "$name" >>"$WORK/$isa.passed"
        note "ok      $name ($((SECONDS - started)) s)"
    else
        note "FAILED  $name"
        tail -n 40 "$log" >&2
    fi
}

if [ "${1:-}" = --law ]; then
    shift
    WORK="$1"
    shift
    law "$@"
    exit 0
fi

WORK="$(mktemp -d)"
trap 'rm -rf "$WORK"' EXIT
if has amx; then amx=amx; else amx="" && note "no AMX here, and the emulator has none: its kernels are not run"; fi
isas="${*:-$amx avx512 avxvnni}"
native="" emulated=""
for isa in $isas; do
    case "$isa" in amx | avx512 | avxvnni) ;; *) die "no instruction set \`$isa\`" "known: amx avx512 avxvnni" ;; esac
    [ "$isa" != amx ] || has amx || die "this CPU has no AMX, and the emulator has none"
    if has "$isa"; then native="$native $isa"; else emulated="$emulated $isa"; fi
done

need_cargo
need_python
[ "$(uname -sm)" = "Linux x86_64" ] || without "this is no x86-64 Linux"
if [ -n "$emulated" ]; then
    fetch_members "$EMULATOR" bochscpu-python 0.4.0 08297de4c657fcda712c66745388cf81cd056e01083473c44868b96f6ea020ad \
        "$LINUX_311" bochscpu/$MODULE || without "the emulator (bochscpu-python) could not be fetched"
fi
say "building the kernel laws"
programs="$(build)"

if [ -n "$emulated" ]; then
    gemm="$(grep /gemm- <<<"$programs")"
    status=0
    emulate "$gemm" --list >"$WORK/list" 2>&1 || status=$?
    [ "$status" != 125 ] || without "$(tail -n 1 "$WORK/list")"
    [ "$status" = 0 ] || die "the emulator does not run the tests: $(tail -n 1 "$WORK/list")"
fi

failed=""
for isa in $isas; do
    total="$(for program in $programs; do "$program" --list; done | grep -c ': test$')"
    if has "$isa"; then
        say "$total kernel laws with $isa, on this CPU"
        for program in $programs; do
            NIBBLE_ISA="$isa" NIBBLE_REQUIRE_ISA="$isa" "$program" || failed="$failed $isa"
        done
        continue
    fi
    say "$total kernel laws with $isa, on an emulated CPU ($(cpu "$isa"))"
    if emulate --cpu haswell --env NIBBLE_ISA="$isa" --env NIBBLE_REQUIRE_ISA="$isa" \
        "$gemm" --test-threads=1 --exact "$ISA_LAW" >"$WORK/control" 2>&1 ||
        ! grep -q "right: \"$isa\"" "$WORK/control"; then
        cat "$WORK/control" >&2
        die "the law about the instruction set passes on a CPU without $isa: whatever follows would mean nothing"
    fi
    for program in $programs; do
        "$program" --list | sed -n 's/: test$//p' | sed "s|^|$program |"
    done | xargs -P "$(nproc)" -L 1 bash "$RIG/run.sh" --law "$WORK" "$isa"
    passed="$(sort -u "$WORK/$isa.passed" 2>/dev/null | wc -l)"
    note "$passed of $total laws passed with $isa (emulated)"
    [ "$passed" = "$total" ] || failed="$failed $isa"
done
[ -z "$failed" ] || die "kernel laws failed with$failed"
