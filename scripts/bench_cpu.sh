#!/usr/bin/env bash
# nibble beside llama.cpp on this CPU, one table: builds both, makes the same weights in both formats (SmolLM2-135M, and a 1B Llama
# shape of random weights), and runs every test in turns. Needs what quickstart.sh needs, a C++ compiler, 12 GB of disk, and
# about an hour, most of it for llama.cpp; best on a machine that does nothing else. Not a test.
#
#   scripts/bench_cpu.sh                      everything
#   ROUNDS=1 THREADS=2 scripts/bench_cpu.sh   quicker
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
cd "$REPO"

ROUNDS="${ROUNDS:-3}"
THREADS="${THREADS:-1,2}"
WORK="$CACHE/bench"
COMPARE="$REPO/scripts/peers/compare.py"

need_cargo
PEERS="$("$REPO/scripts/bench_peers.sh")"
say "building nibble"
cargo build --release --package nibble
NIBBLE="$(cargo metadata --format-version 1 --no-deps | python3 -c 'import json, sys; print(json.load(sys.stdin)["target_directory"])')/release/nibble"
install_oracles
export PYTHONPATH="$NIBBLE_ORACLES"
"$REPO/scripts/fetch_assets.sh" smollm2
GGUF="$CACHE/assets/smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
mkdir -p "$WORK"

# llama TYPE NAME: a GGUF file of this type from NAME's f16 one.
llama() {
    [ -f "$WORK/$2-$1.gguf" ] || "$PEERS/llama-quantize" "$WORK/$2-f16.gguf" "$WORK/$2-$1.gguf" "$1" >"$WORK/$2-$1.log" 2>&1
}

# both NAME: a float checkpoint in nibble's INT4 and INT8, and in Q4_0 and Q8_0. The random model is lent SmolLM2's vocabulary, so
# that a load up to the first token can be timed.
both() {
    say "$1 in all formats"
    [ -f "$WORK/$1-f16.gguf" ] || python3 "$REPO/scripts/peers/to_gguf.py" "$WORK/$1" "$WORK/$1-f16.gguf" "$GGUF" >&2
    llama Q4_0 "$1"
    llama Q8_0 "$1"
    [ -d "$WORK/$1-int4" ] || "$NIBBLE" quantize "$WORK/$1" -o "$WORK/$1-int4" >&2
    [ -d "$WORK/$1-int8" ] || "$NIBBLE" quantize "$WORK/$1" -o "$WORK/$1-int8" --scheme int8-g32 >&2
}

[ -d "$WORK/smollm2" ] || "$NIBBLE" import "$GGUF" -o "$WORK/smollm2" >&2
if [ ! -d "$WORK/1b" ]; then
    "$NIBBLE" synth --like llama-1b -o "$WORK/1b.new" >&2
    cp "$WORK"/smollm2/tokenizer*.json "$WORK/1b.new"
    mv "$WORK/1b.new" "$WORK/1b"
fi
both smollm2
both 1b

# compare WHAT FLAG...: one table.
compare() {
    say "$1"
    printf '\n%s\n\n' "$1"
    shift
    python3 "$COMPARE" --nibble "$NIBBLE" --peers "$PEERS" --rounds "$ROUNDS" "$@"
}
int4=(--model "SmolLM2 INT4" "$WORK/smollm2-int4" "$WORK/smollm2-Q4_0.gguf" --model "1B INT4" "$WORK/1b-int4" "$WORK/1b-Q4_0.gguf")
int8=(--model "SmolLM2 INT8" "$WORK/smollm2-int8" "$WORK/smollm2-Q8_0.gguf" --model "1B INT8" "$WORK/1b-int8" "$WORK/1b-Q8_0.gguf")
all="${THREADS##*,}"

compare "One sequence" "${int4[@]}" --test pp512 --test tg64 --test load --threads "$THREADS"
compare "INT8" "${int8[@]}" --test pp512 --test tg64 --threads "$THREADS"
compare "llama.cpp with OMP_WAIT_POLICY=active" --active "${int4[@]}" --test tg64 --threads "$all"
compare "Several sequences" "${int4[@]}" --test tg32x4 --test tg32x16 --threads "$all"
compare "Long contexts" "${int4[@]}" --test pp4096 --test tg32@d4096 --threads "$all"
if grep -qw amx_tile /proc/cpuinfo 2>/dev/null; then
    NIBBLE_ISA=avx512 compare "Without tile registers (NIBBLE_ISA=avx512), as llama.cpp" "${int4[@]}" --test pp512 --threads "$THREADS"
fi
