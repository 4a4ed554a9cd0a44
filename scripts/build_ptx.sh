#!/usr/bin/env bash
# Compiles kernels/cuda/*.cu to the PTX that nibble carries, with a pinned NVRTC from PyPI: no GPU, no CUDA toolkit.
#
#   scripts/build_ptx.sh           writes kernels/cuda/ptx
#   scripts/build_ptx.sh --check   compares with what is there instead, and lets ptxas assemble it for every
#                                  architecture, within its budgets of registers and without spills
#
# Exits with 3 if the compilers can't be had here.
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
cd "$REPO"

NVRTC="nvidia-cuda-nvrtc-cu12 12.1.105 339b385f50c309763ca65456ec75e17bbefcbbf2893f462cb8b90584cd27a1c2"
NVCC="nvidia-cuda-nvcc-cu12 12.9.86 5d6a0d32fdc7ea39917c20065614ae93add6f577d840233237ff08e9a38f58f0"
ARCHITECTURES="80 86 89 90 100 120" # of PTX for sm_80; other PTX is assembled for its own
# Registers of a thread, by the beginning of a kernel's name: what keeps enough blocks on a processor at a time.
BUDGETS="attend_prompt64=168 attend_prompt128=255 few_f16=64 few_coded=64 few_any=128 gemv16=168 gemv32=208 gemv64=255 gemm64=255 wgmma64=128 wgmma128=255 attend=128 dense=64 embed=48 rms_norm=64"
# Bytes that a thread may put aside, the same way: on some architectures, before the loops begin.
SPILLS="few=88 attend_step=8 gemv=64 gemm64=72 wgmma64_any=32"
MOST_REGISTERS=64 # of the others

unavailable() {
    warn "$1"
    exit 3
}

[ "$(uname -sm)" = "Linux x86_64" ] || unavailable "the pinned wheels are for x86-64 Linux, this is $(uname -sm)"
need_pip
# shellcheck disable=SC2086 # lists of words
fetch_members "$CACHE/nvrtc" ${NVRTC} "--platform manylinux1_x86_64" nvidia/cuda_nvrtc/lib/ ||
    unavailable "the PTX can't be compiled without NVRTC"

if [ "${1:-}" != --check ]; then
    say "compiling kernels/cuda"
    python3 scripts/build_ptx.py "$CACHE/nvrtc" kernels/cuda/ptx
    exit
fi

fresh="$(mktemp -d)"
trap 'rm -rf "$fresh"' EXIT
say "the PTX is what its sources compile to"
python3 scripts/build_ptx.py "$CACHE/nvrtc" "$fresh"
diff -rq kernels/cuda/ptx "$fresh" >&2 || die "kernels/cuda/ptx is not what kernels/cuda compiles to" "run scripts/build_ptx.sh"

say "ptxas assembles it for sm_$(echo "$ARCHITECTURES" | sed 's/ /, sm_/g')"
# shellcheck disable=SC2086 # lists of words
fetch_members "$CACHE/ptxas" ${NVCC} "--platform manylinux2010_x86_64" nvidia/cuda_nvcc/bin/ptxas ||
    unavailable "the PTX can't be assembled without ptxas"
chmod +x "$CACHE/ptxas/ptxas"
for ptx in kernels/cuda/ptx/*.ptx; do
    own="$(sed -n 's/^\.target sm_//p' "$ptx")"
    if [ "$own" = 80 ]; then own="$ARCHITECTURES"; fi
    for architecture in $own; do
        "$CACHE/ptxas/ptxas" -v -arch="sm_$architecture" "$ptx" -o /dev/null 2>&1 | sed "s/^/sm_$architecture /"
    done
done >"$fresh/ptxas.log"
python3 - "$fresh/ptxas.log" "$BUDGETS" "$MOST_REGISTERS" "$SPILLS" <<'PY'
import re, sys

budgets, spills = (dict(pair.split("=") for pair in words.split()) for words in (sys.argv[2], sys.argv[4]))
faults, kernels, kernel, most = [], 0, None, {}
for line in open(sys.argv[1]):
    if found := re.search(r"^(sm_\d+a?) .*Compiling entry function '(\w+)'", line):
        kernel = found.groups()
        kernels += 1
    elif found := re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", line):
        allowed = int(next((n for start, n in spills.items() if kernel[1].startswith(start)), 0))
        if max(map(int, found.groups())) > allowed:
            faults.append(f"{kernel[1]} for {kernel[0]} spills: {line.strip()}")
    elif found := re.search(r"Used (\d+) registers", line):
        limit = int(next((n for start, n in budgets.items() if kernel[1].startswith(start)), sys.argv[3]))
        used = int(found.group(1))
        most[kernel[1]] = max(most.get(kernel[1], 0), used)
        if used > limit:
            faults.append(f"{kernel[1]} for {kernel[0]} uses {used} registers, its budget is {limit}")
    elif re.search(r"error|fatal|serializ", line):
        faults.append(line.strip())
print("    " + ", ".join(f"{name} {used}" for name, used in sorted(most.items())) + " registers at most", file=sys.stderr)
if faults or kernels == 0:
    sys.exit("\n".join(faults or ["ptxas assembled nothing"]))
PY
