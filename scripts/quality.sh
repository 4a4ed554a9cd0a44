#!/usr/bin/env bash
# The table of benches/QUALITY.md: SmolLM2 moved off the grid that its file lies on, calibrated on one text, quantized in
# every way of the list, and scored on another text.
#
#   scripts/quality.sh NIBBLE FOLDER [CHUNKS [NAME...]]
#
# NIBBLE is the program, FOLDER takes the checkpoints (about 3 GB). What is there already isn't made again. Prints one
# line of JSON a way. NAMEs choose ways; all of them without. TOKENS of calibration (16384), those that gradients are of
# (GRADIENT_TOKENS, 5120), --activations (ACTIVATIONS, auto) and the text to calibrate on (CALIB: a file, or `self`) come
# from the environment. scripts/quality_peers.sh scores llama.cpp's files of the same checkpoint.
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

[ $# -ge 2 ] || die "usage: quality.sh NIBBLE FOLDER [CHUNKS [NAME...]]"
NIBBLE="$1" FOLDER="$2" CHUNKS="${3:-10}"
shift $(($# < 3 ? $# : 3))
mkdir -p "$FOLDER"
bash "$REPO/scripts/fetch_assets.sh" smollm2 texts
GGUF="$CACHE/assets/smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
FLOAT="$FOLDER/offgrid" TOKENS="${TOKENS:-16384}" ACTIVATIONS="${ACTIVATIONS:-auto}"
# What is made of another text has its name.
MARK="${CALIB:+.$(basename "$CALIB" .txt)}" CALIB="${CALIB:-$CACHE/texts/calib.txt}"
[ -d "$FLOAT" ] || "$NIBBLE" transform "$GGUF" -o "$FLOAT" --rotate cayley --seed 0 --quiet

# stats NAME CHECKPOINT FLAG...: statistics of a checkpoint; prints their file.
stats() {
    local file="$FOLDER/$1.$TOKENS$MARK.stats" model="$2"
    shift 2
    [ -f "$file" ] || "$NIBBLE" calibrate "$model" --calib "$CALIB" --calib-tokens "$TOKENS" -o "$file" --quiet "$@" >&2
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
    local model="$1" name="$2" out="$FOLDER/$2.$TOKENS$MARK"
    shift 2
    [ -d "$out" ] || "$NIBBLE" quantize "$model" -o "$out" --no-eval --json "$@" >"$out.log"
    local bits
    bits="$(python3 -c 'import json, sys; print(json.load(open(sys.argv[1]))["bits_per_linear_weight"])' "$out.log")"
    printf '{"way": "%s", "bits": %.4f, "tokens": %s, "calib": "%s", "activations": "%s", "eval": %s}\n' "$name" "$bits" "$TOKENS" "$(basename "$CALIB")" "$ACTIVATIONS" \
        "$("$NIBBLE" eval "$out" --reference "$FLOAT" --text "$CACHE/texts/eval.txt" --chunks "$CHUNKS" --activations "$ACTIVATIONS" --json | tr -d '\n')"
}

# way NAME FLAG...: without statistics; inputs NAME FLAG...: with those of inputs; both NAME FLAG...: of gradients too.
way() { wanted "$1" || return 0; of "$FLOAT" "$@"; }
inputs() { wanted "$1" || return 0; of "$FLOAT" "$@" --stats "$(stats inputs "$FLOAT")"; }
both() { wanted "$1" || return 0; of "$FLOAT" "$@" --stats "$(stats both "$FLOAT" --gradients)"; }
# turned NAME HOW FLAG...: the checkpoint rewritten, with statistics of its own.
turned() {
    wanted "$1" || return 0
    local name="$1" how="$2" model
    shift 2
    model="$(transformed "$how")"
    of "$model" "$name" "$@" --stats "$(stats "$how" "$model")"
}
# text NAME FLAG...: block by block over the calibration text.
text() { wanted "$1" || return 0; of "$FLOAT" "$@" --calib "$CALIB" --calib-tokens "$TOKENS"; }
# allocated NAME BITS HOW FLAG...: bits by gradients (of GRADIENT_TOKENS), everything else by statistics of inputs; of the
# checkpoint rewritten as HOW says, or `as-it-is`.
allocated() {
    wanted "$1" || return 0
    local name="$1" bits="$2" how="$3" model="$FLOAT" prefix="" recipe rules=() rule
    shift 3
    [ "$how" = as-it-is ] || model="$(transformed "$how")" prefix="$how-"
    recipe="$FOLDER/$prefix$bits$MARK.toml"
    [ -f "$recipe" ] || "$NIBBLE" quantize "$model" -o "$FOLDER/none" --dry-run --quiet --fixed-levels --target-bpw "$bits" \
        --stats "$(TOKENS="${GRADIENT_TOKENS:-5120}" stats "${prefix}both" "$model" --gradients)" --save-recipe "$recipe" >/dev/null
    while IFS= read -r rule; do rules+=(--rule "$rule"); done < <(python3 "$REPO/scripts/peers/rules.py" "$recipe")
    case " $* " in
    *" autoround "*) set -- --calib "$CALIB" --calib-tokens "$TOKENS" "$@" ;;
    *) set -- --stats "$(stats "${how/as-it-is/inputs}" "$model")" "$@" ;;
    esac
    of "$model" "$name" "${rules[@]}" "$@"
}

WANTED=("$@")
# Algorithms at 4.22 bits, the scheme's levels; then levels of each layer's own.
way rtn --algorithm rtn
way hqq --scheme int4-g64-asym-dq --algorithm hqq
way data-free
for algorithm in search gptq descent; do
    inputs "$algorithm" --fixed-levels --algorithm "$algorithm"
    inputs "levels-$algorithm" --algorithm "$algorithm"
done
text sequential --sequential --algorithm descent
text autoround --algorithm autoround
both yaqa --algorithm yaqa
# Transforms.
turned hadamard hadamard --algorithm descent
turned awq awq --algorithm descent
# Schemes, rounded plainly and as they are by default.
for scheme in int3-g32-dq int3-nl-g32-dq int4-g32-dq int5-g32-dq int6-g32-dq int8-g32-dq int4-g64-asym-dq nf4-dq; do
    way "$scheme-rtn" --scheme "$scheme" --algorithm rtn
    inputs "$scheme" --scheme "$scheme" --algorithm descent
done
# Rows of the issue.
for bits in 3.5 4.127 4.30 5.5 6.0; do
    allocated "at-$bits" "$bits" as-it-is --algorithm descent
    allocated "hadamard-at-$bits" "$bits" hadamard --algorithm descent
done
for bits in 3.5 4.30; do
    allocated "autoround-at-$bits" "$bits" as-it-is --algorithm autoround
    allocated "hadamard-autoround-at-$bits" "$bits" hadamard --algorithm autoround
done
way hadamard-int8-g32-dq --scheme int8-g32-dq --rotate hadamard
ACTIVATIONS=int8 way w8a8 --scheme int8-channel
ACTIVATIONS=int8 way hadamard-w8a8 --scheme int8-channel --rotate hadamard
