#!/usr/bin/env bash
# Quantizes the real vision models with nibble and with onnxruntime's quantizer, on the same calibration samples, and
# prints a table for each: accuracy against the float model on other photographs, latency in onnxruntime, size.
#
#   scripts/bench_vision.sh [lite0|vit]...
#
# NIBBLE is the program (default: the release build), ROUNDS the latency rounds (default 40).
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
cd "$REPO"

NIBBLE="${NIBBLE:-$REPO/target/release/nibble}"
[ -x "$NIBBLE" ] || die "no program at $NIBBLE" "cargo build --release, or set NIBBLE"
install_oracles || die "the Python oracles are needed (scripts/requirements.txt)"
export PYTHONPATH="$NIBBLE_ORACLES"
"$REPO/scripts/fetch_assets.sh" efficientnet vit photos || die "the models and photographs are needed"

WORK="$CACHE/vision"
PHOTOS="$CACHE/assets/photos"
mkdir -p "$WORK/calib" "$WORK/eval" "$WORK/peers"
# No photograph is in both.
for photo in astronaut.png coffee.png motorcycle_left.png flower.jpg hubble_deep_field.jpg brick.png coins.png gravel.png; do
    ln -sf "$PHOTOS/$photo" "$WORK/calib/$photo"
done
for photo in chelsea.png china.jpg rocket.jpg retina.jpg camera.png grass.png; do
    ln -sf "$PHOTOS/$photo" "$WORK/eval/$photo"
done

quantize() { # NAME MODEL CALIB OPTION...
    local out="$WORK/$1.onnx" model="$2" calib="$3"
    shift 3
    "$NIBBLE" vision quantize "$model" --force -o "$out" --calib "$calib" "$@" >&2
}

# table TITLE NAME MODEL PREPROCESS CALIBRATION-CROPS EVALUATION-CROPS: crops are of each photograph.
table() {
    local title="$1" name="$2" model="$3" pre="$4" calib="$WORK/$2-calib.npy" eval="$WORK/$2-eval.npy"
    say "$title"
    "$NIBBLE" vision data "$model" "$WORK/calib" --force -o "$calib" --preprocess "$pre" --crops "$5" --seed 1 >&2
    "$NIBBLE" vision data "$model" "$WORK/eval" --force -o "$eval" --preprocess "$pre" --crops "$6" --seed 2 >&2
    quantize "$name-minmax" "$model" "$calib" --batch 1
    quantize "$name-mse" "$model" "$calib" --batch 1 --observer mse
    quantize "$name-plain" "$model" "$calib" --batch 1 --no-equalize --no-bias-correction
    printf '\n%s\n\n' "$title"
    python3 "$REPO/scripts/oracles/vision_table.py" "$model" "$calib" "$eval" "$WORK/peers" \
        "nibble=$WORK/$name-minmax.onnx" "nibble, mse=$WORK/$name-mse.onnx" "nibble, ranges alone=$WORK/$name-plain.onnx"
}

wanted="${*:-lite0 vit}"
for model in $wanted; do
    case "$model" in
    lite0)
        "$NIBBLE" vision export "$CACHE/assets/efficientnet/efficientnet-lite0-57934424.pth" --force -o "$WORK/lite0.onnx" >&2
        table "EfficientNet-Lite0" lite0 "$WORK/lite0.onnx" lite 8 32
        ;;
    vit) table "ViT-S/14" vit "$CACHE/assets/vit/vit_s_focus.onnx" imagenet 2 16 ;;
    *) die "no model \`$model\`" "known: lite0 vit" ;;
    esac
done
