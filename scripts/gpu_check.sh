#!/usr/bin/env bash
# The checks that need a GPU, for a GPU machine that has no Rust; a few minutes.
#
#   scripts/gpu_check.sh build DIR               collects stripped binaries and this script in DIR (no GPU needed)
#   DIR/gpu_check.sh run DIR [CHECKPOINT]        runs them and prints a table: the laws of tests/cuda on the device, the same
#                                                under compute-sanitizer, a checkpoint's greedy text on CPU and GPU, products
#                                                beside half-precision ones of PyTorch where it is, and tokens a second
#
# Every part is run even if one before it failed; details are in DIR/out. OUT=FOLDER puts them elsewhere.
set -uo pipefail
export LC_ALL=C.UTF-8

usage() {
    sed -n '2,9p' "$0" >&2
    exit 2
}
[ $# -ge 2 ] || usage
what="$1" folder="$2" checkpoint="${3:-}"

build() {
    set -e
    local here laws speed
    here="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
    mkdir -p "$folder"
    folder="$(cd "$folder" && pwd)"
    cd "$here"
    executable() { sed -n "s/.*\"executable\":\"\([^\"]*$1-[^\"]*\)\".*/\1/p" | tail -n 1; }
    cargo build --release --features cuda
    speed="$(cargo bench --package nibble-benches --features cuda --bench cuda --no-run --message-format=json | executable cuda)"
    # The interpreter isn't needed, but the laws are beside it; checked arithmetic does them no harm.
    laws="$(cargo test --package nibble-tests --features cuda --lib --no-run --message-format=json | executable nibble_tests)"
    cp "${CARGO_TARGET_DIR:-target}/release/nibble" "$folder/nibble"
    cp "$laws" "$folder/laws"
    cp "$speed" "$folder/speed"
    strip "$folder/nibble" "$folder/laws" "$folder/speed"
    cp "$here/scripts/gpu_check.sh" "$here/scripts/gpu_products.py" "$folder/"
    ls -l "$folder"
}

row() { printf '%-34s %s\n' "$@"; }

# part NAME LOG COMMAND...: runs it, says how it ended and shows the end of its log if badly.
part() {
    local name="$1" log="$out/$2" status=0 start=$SECONDS
    shift 2
    "$@" >"$log" 2>&1 || status=$?
    if [ $status = 0 ]; then
        row "$name" "holds, $((SECONDS - start)) s"
    else
        row "$name" "FAILED with $status after $((SECONDS - start)) s, see $log:"
        grep -E "panicked|FAILED|error|Error|Invalid|hazard|wanted|CUDA" "$log" | tail -n 25 | cut -c1-300
        failed=1
    fi
}

laws() { NIBBLE_STRICT_GPU=1 "$folder/laws" cuda::on_a_gpu; }

sanitized() {
    local tool="$1"
    shift
    NIBBLE_STRICT_GPU=1 timeout 100 compute-sanitizer --tool "$tool" --error-exitcode 9 "$folder/laws" --test-threads 1 "$@"
}

# The same greedy tokens; if not, how far the two agree.
same_text() {
    python3 - "$out/cpu.json" "$out/cuda.json" <<'PY'
import json, sys
a, b = (json.load(open(f))["tokens"] for f in sys.argv[1:3])
same = next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
print(f"the same first {same} of {len(a)} tokens")
sys.exit(a != b)
PY
}

run() {
    failed=0
    out="${OUT:-$folder/out}"
    mkdir -p "$out"
    row "card, driver" "$(nvidia-smi --query-gpu=name,driver_version --format=csv,noheader 2>/dev/null | head -n 1)"
    part "laws on the device" laws.log laws
    if command -v compute-sanitizer >/dev/null; then
        part "memcheck" memcheck.log sanitized memcheck on_a_gpu::products on_a_gpu::attention on_a_gpu::norms \
            on_a_gpu::gates_after on_a_gpu::a_decoded on_a_gpu::a_tiny_model
        part "racecheck" racecheck.log sanitized racecheck on_a_gpu::norms on_a_gpu::gates_after on_a_gpu::a_decoded on_a_gpu::attention
    else
        row "compute-sanitizer" "not installed"
    fi
    if [ -n "$checkpoint" ]; then
        for device in cpu cuda; do
            part "greedy text, $device" "$device.log" sh -c "'$folder/nibble' generate '$checkpoint' --chat \
                -p 'Tell me about the lighthouse keeper.' -n 96 --temperature 0 --ignore-eos --activations f32 \
                --device $device --json >'$out/$device.json'"
        done
        part "the same text" text.log same_text
        tail -n 1 "$out/text.log"
        part "checkpoint's speed" small.log "$folder/nibble" bench "$checkpoint" --device cuda -p 512 -n 128 -r 3
        tail -n 4 "$out/small.log"
    fi
    local random="${TMPDIR:-/tmp}/nibble-1b"
    part "a random model of 1B" synth.log sh -c "[ -d $random-int4 ] || { '$folder/nibble' synth -o $random --like llama-1b \
        && '$folder/nibble' quantize $random -o $random-int4 --scheme int4 --effort fast; }"
    part "its speed" bench.log "$folder/nibble" bench "$random-int4" --device cuda -p 512 -n 128 -r 3 --parallel 1,8
    cat "$out/bench.log" | grep -v "^$" | tail -n 7
    part "products" products.log "$folder/speed" "$out/products.json"
    part "products beside PyTorch's" torch.log python3 "$folder/gpu_products.py" "$out/products.json"
    if [ -s "$out/torch.log" ] && ! grep -q Traceback "$out/torch.log"; then cat "$out/torch.log"; else cat "$out/products.log"; fi
    return $failed
}

case "$what" in
build) build ;;
run) run ;;
*) usage ;;
esac
