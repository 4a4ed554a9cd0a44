#!/usr/bin/env bash
# The table of benches/QUALITY.md: SmolLM2 moved off the grid that its file lies on, calibrated on one text, quantized in
# every way of the list, and scored on another text.
#
#   scripts/quality.sh NIBBLE FOLDER [CHUNKS [NAME...]]
#
# NIBBLE is the program, FOLDER takes the checkpoints (about 3 GB). What is there already isn't made again. Prints one
# line of JSON a way. NAMEs choose ways; all of them without. TOKENS of calibration (16384) and --activations
# (ACTIVATIONS, auto) come from the environment. scripts/quality_peers.sh scores llama.cpp's files of the same checkpoint.
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

[ $# -ge 2 ] || die "usage: quality.sh NIBBLE FOLDER [CHUNKS [NAME...]]"
NIBBLE="$1" FOLDER="$2" CHUNKS="${3:-10}"
shift $(($# < 3 ? $# : 3))
mkdir -p "$FOLDER"
bash "$REPO/scripts/fetch_assets.sh" smollm2 texts
GGUF="$CACHE/assets/smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
FLOAT="$FOLDER/offgrid" TOKENS="${TOKENS:-16384}" ACTIVATIONS="${ACTIVATIONS:-auto}"
[ -d "$FLOAT" ] || "$NIBBLE" transform "$GGUF" -o "$FLOAT" --rotate cayley --seed 0 --quiet

# stats NAME CHECKPOINT FLAG...: statistics of a checkpoint; prints their file.
stats() {
    local file="$FOLDER/$1.$TOKENS.stats" model="$2"
    shift 2
    [ -f "$file" ] || "$NIBBLE" calibrate "$model" --calib "$CACHE/texts/calib.txt" --calib-tokens "$TOKENS" -o "$file" --quiet "$@" >&2
    printf '%s\n' "$file"
}

# transformed NAME HOW: the checkpoint rewritten; prints its folder.
transformed() {
    local model="$FOLDER/float-$1"
    [ -d "$model" ] || "$NIBBLE" transform "$FLOAT" -o "$model" --rotate "$1" --stats "$(stats inputs "$FLOAT")" --quiet >&2
    printf '%s\n' "$model"
}

wanted() { [ "${#WANTED[@]}" -eq 0 ] || [[ " ${WANTED[*]} " == *" $1 "* ]]; }

# of MODEL NAME FLAG...: one conversion of a checkpoint and its score.
of() {
    local model="$1" name="$2" out="$FOLDER/$2.$TOKENS"
    shift 2
    [ -d "$out" ] || "$NIBBLE" quantize "$model" -o "$out" --no-eval --json "$@" >"$out.log"
    local bits
    bits="$(python3 -c 'import json, sys; print(json.load(open(sys.argv[1]))["bits_per_linear_weight"])' "$out.log")"
    printf '{"way": "%s", "bits": %.4f, "tokens": %s, "activations": "%s", "eval": %s}\n' "$name" "$bits" "$TOKENS" "$ACTIVATIONS" \
        "$("$NIBBLE" eval "$out" --reference "$FLOAT" --text "$CACHE/texts/eval.txt" --chunks "$CHUNKS" --activations "$ACTIVATIONS" --json | tr -d '\n')"
}

# way NAME FLAG...: without statistics; inputs NAME FLAG...: with those of inputs; both NAME FLAG...: of gradients too.
way() { wanted "$1" || return 0; of "$FLOAT" "$@"; }
inputs() { wanted "$1" || return 0; of "$FLOAT" "$@" --stats "$(stats inputs "$FLOAT")"; }
both() { wanted "$1" || return 0; of "$FLOAT" "$@" --effort max --stats "$(stats both "$FLOAT" --gradients)"; }
# turned NAME HOW FLAG...: the checkpoint rewritten, with statistics of its own.
turned() {
    wanted "$1" || return 0
    local name="$1" how="$2" model
    shift 2
    model="$(transformed "$how")"
    of "$model" "$name" "$@" --stats "$(stats "$how" "$model")"
}
linear() { printf '%s' "*.layers.*_proj.weight=int4-nl-g32-dq:$1"; }

WANTED=("$@")
# Ablation at 4.22 bits.
way rtn --rule "$(linear rtn)"
way hqq --scheme int4-g64-asym-dq --rule '*.layers.*_proj.weight=int4-g64-asym-dq:hqq'
way data-free
inputs search --rule "$(linear search)"
inputs gptq --fixed-levels
inputs descent --fixed-levels --rule "$(linear descent)"
inputs levels
inputs levels-descent --effort max
both yaqa
turned hadamard hadamard --effort max
turned awq awq --effort max
# Rows of the issue.
both at-4.30 --target-bpw 4.30
both at-5.5 --target-bpw 5.5
both at-6.0 --target-bpw 6.0
both at-3.5 --target-bpw 3.5
both at-4.127 --target-bpw 4.127
both int8 --scheme int8-g32-dq
way int8-data-free --scheme int8-g32-dq
way nf4 --scheme nf4-dq
