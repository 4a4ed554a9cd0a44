#!/usr/bin/env bash
# What rescues a model in integers, in tables: each tool of the box alone and together, one scale a weight, mixed precision
# beside exclusions made by hand, and what diagnosis takes. Judged in ONNX Runtime on other photographs (benches/RESCUE.md).
#
#   scripts/bench_rescue.sh [toolbox|tensor|mixed|diagnose]...
#
# NIBBLE, ROUNDS and QUICK as for scripts/bench_vision.sh. NIBBLE_ORT_LIBRARY is ONNX Runtime's shared library, for the
# rows whose time is measured while they are made; without it they are left out.
set -euo pipefail
SCRIPTS="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
. "$SCRIPTS/bench_vision.sh"
# No other quantizer's models in these tables.
export PEERS=""

# Tools alone and together: each row is the plainest model with these flags instead.
toolbox_vit() {
    local plain="--no-fine --headroom 1 --no-equalize --no-bias-correction"
    quantize "ranges alone" "$@" $plain
    quantize "with headroom 1.1" "$@" --no-fine --no-equalize --no-bias-correction
    quantize "with biases corrected" "$@" --no-fine --headroom 1 --no-equalize
    quantize "with channels equalized" "$@" --no-fine --headroom 1 --no-bias-correction
    quantize "with two terms after GELUs" "$@" --headroom 1 --no-equalize --no-bias-correction
    quantize "with GPTQ" "$@" $plain --algorithm gptq
    quantize "with learned rounding" "$@" $plain --algorithm adaround
    quantize "all but GPTQ (fast)" "$@"
    quantize "all, GPTQ (balanced)" "$@" --effort balanced
    quantize "all, two terms in MLPs, GPTQ" "$@" --fine mlp --algorithm gptq
    quantize "all, two terms in MLPs, learned rounding (max)" "$@" --effort max
}

toolbox_lite0() {
    local plain="--headroom 1 --no-equalize --no-bias-correction"
    quantize "ranges alone" "$@" $plain
    quantize "with headroom 1.1" "$@" --no-equalize --no-bias-correction
    quantize "with biases corrected" "$@" --headroom 1 --no-equalize
    quantize "with channels equalized" "$@" --headroom 1 --no-bias-correction
    quantize "with GPTQ" "$@" $plain --algorithm gptq
    quantize "with learned rounding" "$@" $plain --algorithm adaround
    quantize "all but GPTQ (fast)" "$@"
    quantize "all, GPTQ (balanced)" "$@" --effort balanced
    quantize "all, learned rounding (max)" "$@" --effort max
}

# One scale a weight.
tensor_lite0() {
    quantize "ranges alone" "$@" --per-tensor --headroom 1 --no-equalize --no-bias-correction
    quantize "layers equalized" "$@" --per-tensor --headroom 1 --no-bias-correction
    quantize "biases corrected" "$@" --per-tensor --headroom 1 --no-equalize
    quantize "GPTQ" "$@" --per-tensor --headroom 1 --no-equalize --no-bias-correction --algorithm gptq
    quantize "biases corrected, GPTQ" "$@" --per-tensor --no-equalize --algorithm gptq
    quantize "layers equalized, biases corrected" "$@" --per-tensor
    quantize "layers equalized, biases corrected, GPTQ (balanced)" "$@" --per-tensor --effort balanced
    quantize "layers equalized, biases corrected, learned rounding (max)" "$@" --per-tensor --effort max
    quantize "one scale a channel" "$@"
}

# Exclusions that a person may make, and what a goal finds.
mixed_vit() {
    quantize "by hand: none" "$@"
    quantize "by hand: first and last block" "$@" --exclude '*/layer.0/*/MatMul' --exclude '*/layer.11/*/MatMul'
    quantize "by hand: attention's last layers" "$@" --exclude '*/attention/output/dense/MatMul'
    quantize "by hand: second layers of MLPs" "$@" --exclude '*/fc2/MatMul'
    quantize "by hand: keys and queries" "$@" --exclude '*/key/MatMul' --exclude '*/query/MatMul'
    quantize "by hand: last three blocks" "$@" --exclude '*/layer.9/*/MatMul' --exclude '*/layer.10/*/MatMul' \
        --exclude '*/layer.11/*/MatMul'
    local db share judge="$WORK/vit-judge.npy"
    for db in 32 34 36; do quantize "goal: $db dB" "$@" --judge "$judge" --target-sqnr "$db"; done
    quantize "goal: 34 MB" "$@" --judge "$judge" --max-size 34
    [ -z "${NIBBLE_ORT_LIBRARY:-}" ] || for share in 0.55 0.65; do
        quantize "goal: $share of the folded float model's time" "$@" --judge "$judge" --max-latency "$share" --engine ort
    done
}

mixed_lite0() {
    quantize "by hand: none" "$@" --per-tensor
    quantize "by hand: first and last layer" "$@" --per-tensor --exclude '*conv_stem*' --exclude '*_fc*'
    quantize "by hand: depthwise of the first three blocks" "$@" --per-tensor --exclude '*blocks.0._depthwise*' \
        --exclude '*blocks.1._depthwise*' --exclude '*blocks.2._depthwise*'
    quantize "by hand: first layer and block" "$@" --per-tensor --exclude '*conv_stem*' --exclude '*blocks.0.*'
    quantize "by hand: all of the first three blocks" "$@" --per-tensor --exclude '*blocks.0.*' --exclude '*blocks.1.*' \
        --exclude '*blocks.2.*'
    quantize "by hand: worst weights (depthwise of 8, 10, 12)" "$@" --per-tensor --exclude '*blocks.8._depthwise*' \
        --exclude '*blocks.10._depthwise*' --exclude '*blocks.12._depthwise*'
    local db
    for db in 12 15 18; do quantize "goal: $db dB" "$@" --per-tensor --judge "$WORK/lite0-judge.npy" --target-sqnr "$db"; done
}

# judges MODEL PREPROCESS CROPS: what goals are measured on, other crops of the photographs of calibration.
judges() {
    "$NIBBLE" vision data "$WORK/$1.onnx" "$WORK/calib" --force -o "$WORK/$1-judge.npy" --preprocess "$2" --crops "$3" --seed 3 >&2
}

# judged TITLE TOOLS MODEL: the table of one model.
judged() {
    local title="$1" tools="$2" model="$3" calib="$WORK/$3-calib.npy" kind=encoder
    OURS=()
    [ -f "$WORK/$model.onnx" ] || float "$model"
    case "$model" in
    lite0) kind=cnn && pictures lite0 lite 8 "$(count 16 85)" && judges lite0 lite 4 ;;
    vit) pictures vit imagenet 2 "$(count 8 34)" && judges vit imagenet 1 ;;
    esac
    "${tools}_$model" "$WORK/$model.onnx" "$calib" --batch 1
    table "$title" "$kind" "$model" "$calib" "$WORK/$model-eval.npy"
}

# diagnosis MODEL PREPROCESS: what the diagnosis of 64 crops takes, and what it says.
diagnosis() {
    pictures "$1" "$2" "$([ "$1" = vit ] && echo 2 || echo 8)" 11
    local start="$SECONDS"
    "$NIBBLE" vision diagnose "$WORK/$1.onnx" --calib "$WORK/$1-calib.npy" --data "$WORK/$1-eval.npy" --samples 64 --batch 1 \
        --top 8 --force -o "$WORK/$1-diagnosis.json" --report "$WORK/$1-diagnosis.html"
    printf '\n%s: %s s with %s CPUs\n' "$1" "$((SECONDS - start))" "$(nproc)"
}

for part in ${*:-toolbox tensor mixed diagnose}; do
    say "$part"
    case "$part" in
    toolbox)
        judged "ViT-S/14, tools alone and together, 16 crops to calibrate" toolbox vit
        judged "EfficientNet-Lite0, tools alone and together, 64 crops to calibrate" toolbox lite0
        ;;
    tensor) judged "EfficientNet-Lite0, one scale a weight, 64 crops to calibrate" tensor lite0 ;;
    mixed)
        judged "ViT-S/14, exclusions by hand and goals" mixed vit
        judged "EfficientNet-Lite0, one scale a weight, exclusions by hand and goals" mixed lite0
        ;;
    diagnose)
        diagnosis vit imagenet
        diagnosis lite0 lite
        ;;
    *) die "no part \`$part\`" "known: toolbox tensor mixed diagnose" ;;
    esac
done
