#!/usr/bin/env bash
# Quantizes real models with nibble and with onnxruntime's quantizer, on the same calibration samples, and prints a table
# for each: accuracy against the float model on other photographs or texts, latency in onnxruntime, size, and what making
# it took (benches/VISION.md).
#
#   scripts/bench_vision.sh [lite0|vit|minilm]...
#   scripts/bench_vision.sh cost        what making one takes, with few samples and with many
#
# NIBBLE is the program (default: the release build), ROUNDS the latency rounds (default 60), QUICK=1 takes fewer samples
# to judge by and leaves out all variants but GPTQ and scales found at run time.
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
cd "$REPO"

NIBBLE="${NIBBLE:-$REPO/target/release/nibble}"
[ -x "$NIBBLE" ] || die "no program at $NIBBLE" "cargo build --release, or set NIBBLE"
install_oracles || die "the Python oracles are needed (scripts/requirements.txt)"
export PYTHONPATH="$NIBBLE_ORACLES"
"$REPO/scripts/fetch_assets.sh" efficientnet vit minilm photos texts || die "the models, photographs and texts are needed"

WORK="$CACHE/vision"
PHOTOS="$CACHE/assets/photos"
MINILM="$CACHE/assets/minilm"
TABLE="$REPO/scripts/oracles/vision_table.py"
mkdir -p "$WORK/calib" "$WORK/eval"
# No photograph is in both.
for photo in astronaut.png coffee.png motorcycle_left.png flower.jpg hubble_deep_field.jpg brick.png coins.png gravel.png; do
    ln -sf "$PHOTOS/$photo" "$WORK/calib/$photo"
done
for photo in chelsea.png china.jpg rocket.jpg retina.jpg camera.png grass.png; do
    ln -sf "$PHOTOS/$photo" "$WORK/eval/$photo"
done

# Without VNNI sums of two products saturate in ONNX Runtime, unless weights are limited for that.
RANGE=()
if grep -q '^flags' /proc/cpuinfo 2>/dev/null && ! grep -qwE 'avx512_vnni|avx_vnni' /proc/cpuinfo; then
    note "this processor has no VNNI: models are made with --reduce-range, peers (but naive ones) with reduce_range"
    RANGE=(--reduce-range)
    export REDUCED=1
fi

# quantize LABEL MODEL CALIB OPTION...: an argument for the table, in OURS.
quantize() {
    local label="$1" model="$2" calib="$3" out
    shift 3
    out="${model%.onnx}-$(printf '%s' "$label" | tr -cs 'a-z0-9' -).onnx"
    if ! "$NIBBLE" vision quantize "$model" --force -o "$out" --calib "$calib" --json "${RANGE[@]}" "$@" >"$out.json"; then
        # A goal may be out of reach.
        warn "$label: not made"
        return 0
    fi
    OURS+=("$label=$out$(python3 -c 'import json, sys; r = json.load(open(sys.argv[1])); print("={}={}".format(r["seconds"], r["peak_rss_bytes"]))' "$out.json")")
}

# pictures NAME PREPROCESS CALIBRATION-CROPS EVALUATION-CROPS: samples of each photograph.
pictures() {
    "$NIBBLE" vision data "$WORK/$1.onnx" "$WORK/calib" --force -o "$WORK/$1-calib.npy" --preprocess "$2" --crops "$3" --seed 1 >&2
    "$NIBBLE" vision data "$WORK/$1.onnx" "$WORK/eval" --force -o "$WORK/$1-eval.npy" --preprocess "$2" --crops "$4" --seed 2 >&2
}

# table TITLE KIND NAME CALIB EVAL
table() {
    mkdir -p "$WORK/peers-$3"
    printf '\n%s: ' "$1"
    python3 "$TABLE" table "$2" "$WORK/$3.onnx" "$4" "$5" "$WORK/peers-$3" "${OURS[@]}"
}

# count FEW MANY: how many samples.
count() { [ -n "${QUICK:-}" ] && printf %s "$1" || printf %s "$2"; }

# variants KIND MODEL CALIB [FLAG...]: what nibble makes of a model, by itself and with parts of it changed.
variants() {
    local kind="$1"
    shift
    quantize "nibble" "$@"
    quantize "nibble, gptq" "$@" --algorithm gptq
    [ "$kind" = cnn ] || quantize "nibble, dynamic" "$@" --mode dynamic
    [ "$kind" = cnn ] || quantize "nibble, two terms in both layers of MLPs, gptq" "$@" --fine mlp --algorithm gptq
    [ -z "${QUICK:-}" ] || return 0
    [ "$kind" = encoder ] || quantize "nibble, percentile 99.999" "$@" --observer percentile:99.999
    [ "$kind" = cnn ] || quantize "nibble, one term, no headroom" "$@" --no-fine --headroom 1
    quantize "nibble, ranges alone" "$@" --no-fine --headroom 1 --no-equalize --no-bias-correction
}

# float NAME: the float model of that name.
float() {
    case "$1" in
    lite0) "$NIBBLE" vision export "$CACHE/assets/efficientnet/efficientnet-lite0-57934424.pth" --force -o "$WORK/lite0.onnx" >&2 ;;
    # The encoder without the decoder that this file has behind it.
    vit) python3 "$TABLE" cut "$CACHE/assets/vit/vit_s_focus.onnx" /backbone/layernorm/Add_1_output_0 "$WORK/vit.onnx" ;;
    esac
}

# cost NAME KIND PREPROCESS CROPS: seconds and megabytes of each way to quantize a model with samples of 8 photographs, as
# they are and four times and sixteen times as many.
cost() {
    local times samples
    float "$1"
    for times in 1 4 16; do
        pictures "$1" "$3" "$(($4 * times))" 1
        samples="$((8 * $4 * times))"
        printf '\n%s, %s samples\n\n| model | s to make | peak MB |\n|---|---:|---:|\n' "$1" "$samples"
        for observer in minmax percentile:99.999; do
            "$NIBBLE" vision quantize "$WORK/$1.onnx" --force -o "$WORK/$1-cost.onnx" --calib "$WORK/$1-calib.npy" --batch 1 --json \
                --observer "$observer" | python3 -c 'import json, sys
r = json.load(sys.stdin)
print("| nibble, {} | {:.1f} | {:.0f} |".format(sys.argv[1], r["seconds"], r["peak_rss_bytes"] / 1e6))' "$observer"
        done
        # Theirs grows by the sample, past what a machine has.
        [ "$times" -gt 1 ] || python3 "$TABLE" cost "$2" "$WORK/$1.onnx" "$WORK/$1-calib.npy" "$WORK/peers-$1"
    done
}

# bench MODEL: its samples, what nibble makes of it (variants), and the table.
bench() {
    local model="$1" calib
    say "$model"
    OURS=()
    calib="$WORK/$model-calib.npy"
    case "$model" in
    lite0)
        float lite0
        pictures lite0 lite 8 "$(count 16 85)"
        variants cnn "$WORK/lite0.onnx" "$calib" --batch 1
        table "EfficientNet-Lite0, 64 crops of 8 photographs to calibrate" cnn lite0 "$calib" "$WORK/lite0-eval.npy"
        ;;
    vit)
        float vit
        pictures vit imagenet 2 "$(count 8 34)"
        variants encoder "$WORK/vit.onnx" "$calib" --batch 1
        table "ViT-S/14, 16 crops of 8 photographs to calibrate" encoder vit "$calib" "$WORK/vit-eval.npy"
        ;;
    minilm)
        "$NIBBLE" vision export "$MINILM" --force -o "$WORK/minilm.onnx" >&2
        export TOKENIZER="$MINILM/tokenizer.json"
        awk 'length > 200' "$CACHE/texts/calib.txt" | sed -n 1,64p >"$WORK/minilm-calib.txt"
        awk 'length > 200' "$CACHE/texts/eval.txt" | sed -n "1,$(count 40 200)p" >"$WORK/minilm-eval.txt"
        calib="$WORK/minilm-calib.txt"
        variants encoder "$WORK/minilm.onnx" "$calib" --tokenizer "$TOKENIZER"
        table "MiniLM, 64 paragraphs to calibrate" encoder minilm "$calib" "$WORK/minilm-eval.txt"
        ;;
    cost)
        mkdir -p "$WORK/peers-lite0" "$WORK/peers-vit"
        cost lite0 cnn lite 8
        cost vit encoder imagenet 2
        ;;
    *) die "no model \`$model\`" "known: lite0 vit minilm cost" ;;
    esac
}

# Sourced by scripts/capstone.sh.
[ "${BASH_SOURCE[0]}" = "$0" ] || return 0
for model in ${*:-lite0 vit minilm}; do bench "$model"; done
