#!/usr/bin/env bash
# The table of benches/QUALITY.md: SmolLM2 moved off the grid that its file lies on, calibrated on one text, quantized in
# every way of the list, and scored on another text.
#
#   scripts/quality.sh NIBBLE FOLDER [CHUNKS [NAME...]]
#
# NIBBLE is the program, FOLDER takes the checkpoints (about 1.5 GB). What is there already isn't made again. Prints one
# line of JSON a way. NAMEs choose ways; all of them without.
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

[ $# -ge 2 ] || die "usage: quality.sh NIBBLE FOLDER [CHUNKS [NAME...]]"
NIBBLE="$1" FOLDER="$2" CHUNKS="${3:-10}"
shift $(($# < 3 ? $# : 3))
mkdir -p "$FOLDER"
bash "$REPO/scripts/fetch_assets.sh" smollm2 texts
GGUF="$CACHE/assets/smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
FLOAT="$FOLDER/offgrid" STATS="$FOLDER/offgrid.stats"
[ -d "$FLOAT" ] || "$NIBBLE" transform "$GGUF" -o "$FLOAT" --rotate cayley --seed 0 --quiet
[ -f "$STATS" ] || "$NIBBLE" calibrate "$FLOAT" --calib "$CACHE/texts/calib.txt" --calib-tokens "${TOKENS:-8192}" -o "$STATS" --quiet

# way NAME FLAG...: one conversion and its score.
way() {
    local name="$1"
    shift
    [ "${#WANTED[@]}" -eq 0 ] || [[ " ${WANTED[*]} " == *" $name "* ]] || return 0
    local out="$FOLDER/$name"
    [ -d "$out" ] || "$NIBBLE" quantize "$FLOAT" -o "$out" --no-eval "$@" >"$out.log"
    printf '{"way": "%s", "eval": %s}\n' "$name" \
        "$("$NIBBLE" eval "$out" --reference "$FLOAT" --text "$CACHE/texts/eval.txt" --chunks "$CHUNKS" --json | tr -d '\n')"
}

WANTED=("$@")
S=(--stats "$STATS")
way data-free
way search "${S[@]}" --rule '*.layers.*_proj.weight=int4-nl-g32-dq:search'
way gptq "${S[@]}" --fixed-levels
way descent "${S[@]}" --fixed-levels --effort max
way levels "${S[@]}"
way levels-descent "${S[@]}" --effort max
way at-4.30 "${S[@]}" --effort max --target-bpw 4.30
way at-3.5 "${S[@]}" --effort max --target-bpw 3.5
way at-5.5 "${S[@]}" --effort max --target-bpw 5.5
way at-6.0 "${S[@]}" --effort max --target-bpw 6.0
way int8 "${S[@]}" --scheme int8-g32-dq
way nf4 --scheme nf4-dq
