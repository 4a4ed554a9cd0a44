#!/usr/bin/env bash
# The checks that need a GPU, for a GPU machine that has no Rust.
#
#   scripts/gpu_check.sh build DIR               collects stripped binaries and this script in DIR (no GPU needed)
#   DIR/gpu_check.sh run DIR [CHECKPOINT]        runs them: the laws of tests/cuda on the device, compute-sanitizer where
#                                                it is installed, and a checkpoint's greedy text on CPU and GPU
set -euo pipefail
export LC_ALL=C.UTF-8

usage() {
    sed -n '2,6p' "$0" >&2
    exit 2
}
[ $# -ge 2 ] || usage
what="$1" folder="$2" checkpoint="${3:-}"

build() {
    local here binary
    here="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
    mkdir -p "$folder"
    folder="$(cd "$folder" && pwd)"
    cd "$here"
    cargo build --release --features cuda
    binary="$(cargo test --release --package nibble-tests --features cuda --lib --no-run --message-format=json |
        sed -n 's/.*"executable":"\([^"]*nibble_tests-[^"]*\)".*/\1/p' | tail -n 1)"
    cp "${CARGO_TARGET_DIR:-target}/release/nibble" "$folder/nibble"
    cp "$binary" "$folder/laws"
    strip "$folder/nibble" "$folder/laws"
    cp "$here/scripts/gpu_check.sh" "$folder/"
    ls -l "$folder"
}

row() { printf '%-34s %s\n' "$@"; }

run() {
    local name status device
    name="$(nvidia-smi --query-gpu=name,driver_version --format=csv,noheader 2>/dev/null | head -n 1)" || true
    row "card, driver" "${name:-none found}"
    status=0
    NIBBLE_STRICT_GPU=1 "$folder/laws" cuda::on_a_gpu --nocapture >"$folder/laws.log" 2>&1 || status=$?
    row "laws on the device" "$([ $status = 0 ] && echo hold || echo "BROKEN, see $folder/laws.log")"
    if command -v compute-sanitizer >/dev/null; then
        local sane=0
        NIBBLE_STRICT_GPU=1 compute-sanitizer --error-exitcode 9 "$folder/laws" cuda::on_a_gpu::norms \
            >"$folder/sanitizer.log" 2>&1 || sane=$?
        row "compute-sanitizer" "$([ $sane = 0 ] && echo clean || echo "FAULTS, see $folder/sanitizer.log")"
    else
        row "compute-sanitizer" "not installed"
    fi
    [ -n "$checkpoint" ] || return "$status"
    for device in cpu cuda; do
        "$folder/nibble" generate "$checkpoint" -p "The lighthouse keeper climbed the stairs" -n 64 --temperature 0 \
            --ignore-eos --device "$device" --json >"$folder/$device.json" || status=$?
        row "tokens a second, $device" "$(sed -n 's/.*"tokens_per_second": *\([0-9.]*\).*/\1/p' "$folder/$device.json" | tail -n 1)"
    done
    text() { sed -n 's/.*"text": *"\(.*\)",*$/\1/p' "$folder/$1.json"; }
    row "greedy text" "$([ "$(text cpu)" = "$(text cuda)" ] && echo "the same" || echo "DIFFERS: compare $folder/{cpu,cuda}.json")"
    return "$status"
}

case "$what" in
build) build ;;
run) run ;;
*) usage ;;
esac
