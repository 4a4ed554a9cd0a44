#!/usr/bin/env bash
# llama.cpp's side of benches/QUALITY.md: the checkpoint that scripts/quality.sh scores, quantized by llama-quantize with
# an importance matrix of the same calibration text, scored by llama-perplexity on the same chunks of the same text.
#
#   scripts/quality_peers.sh FOLDER [CHUNKS [TYPE...]]
#
# FOLDER has `offgrid` from quality.sh. What is there already isn't made again. Prints one line of JSON a type. A TYPE
# that ends in -plain has no importance matrix. CALIB names another calibration text. The base of the divergences takes 50 MB a chunk.
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

[ $# -ge 1 ] || die "usage: quality_peers.sh FOLDER [CHUNKS [TYPE...]]"
FOLDER="$1" CHUNKS="${2:-10}"
shift $(($# < 2 ? $# : 2))
[ -d "$FOLDER/offgrid" ] || die "$FOLDER/offgrid isn't there" "scripts/quality.sh makes it"
[ $# -gt 0 ] || set -- IQ4_XS Q4_K_M Q3_K_M Q5_K_M Q6_K Q8_0
bash "$REPO/scripts/fetch_assets.sh" smollm2 texts
BIN="$(bash "$REPO/scripts/bench_peers.sh")"
[ -n "${NIBBLE_ORACLES:-}" ] || install_oracles
VOCABULARY="$CACHE/assets/smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
FLOAT="$FOLDER/offgrid.gguf" MARK="${CALIB:+.$(basename "$CALIB" .txt)}" BASE="$FOLDER/offgrid.$CHUNKS.kld"
LOG="$FOLDER/peers.log"
IMATRIX="$FOLDER/offgrid.imatrix$MARK.gguf"
[ -f "$FLOAT" ] || PYTHONPATH="$NIBBLE_ORACLES" python3 "$REPO/scripts/peers/to_gguf.py" "$FOLDER/offgrid" "$FLOAT" "$VOCABULARY" >&2
[ -f "$IMATRIX" ] || "$BIN/llama-imatrix" -m "$FLOAT" -f "${CALIB:-$CACHE/texts/calib.txt}" -c 512 \
    --chunks $((${TOKENS:-16384} / 512)) -o "$IMATRIX" >>"$LOG" 2>&1
# score BASE FLAG...
score() {
    local base="$1"
    shift
    "$BIN/llama-perplexity" -f "$CACHE/texts/eval.txt" -c 512 -b 512 --chunks "$CHUNKS" --kl-divergence-base "$base" "$@" 2>&1
}
# A base that was broken off mustn't be taken for a whole one.
[ -f "$BASE" ] || { score "$BASE.part" -m "$FLOAT" >>"$LOG" && mv "$BASE.part" "$BASE"; }

for type in "$@"; do
    file="$FOLDER/offgrid.$type$MARK.gguf"
    matrix=(--imatrix "$IMATRIX")
    [ "${type%-plain}" = "$type" ] || matrix=()
    [ -f "$file" ] || "$BIN/llama-quantize" "${matrix[@]}" "$FLOAT" "$file" "${type%-plain}" >>"$LOG" 2>&1
    score "$BASE" -m "$file" --kl-divergence >"$file.log"
    PYTHONPATH="$NIBBLE_ORACLES" python3 "$REPO/scripts/peers/kl.py" "$type" "$file" "$file.log"
done
