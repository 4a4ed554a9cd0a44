#!/usr/bin/env bash
# The whole story on real models, one table each: float, naive integers (one scale a tensor, smallest to largest value,
# every operator), what nibble makes by itself, mixed precision for a goal, and QAT. Figures are ONNX Runtime's
# (benches/VISION.md, benches/QAT.md).
#
#   scripts/capstone.sh [vit|lite0|digits]...
#
# NIBBLE, ROUNDS and QUICK as for scripts/bench_vision.sh; EPOCHS and QAT_EPOCHS as for scripts/bench_qat.sh. DISTILL says
# for how many epochs the two large models learn from themselves in floats (default 2, a second a picture of the ViT; 0: none).
set -euo pipefail
SCRIPTS="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"

# Photographs: the naive model is ONNX Runtime's own.
photographs() (
    . "$SCRIPTS/bench_vision.sh"
    export PEERS=naive
    variants() {
        local kind="$1" model="$2" calib="$3"
        shift
        quantize "advanced PTQ" "$@"
        if [ "$kind" = cnn ]; then
            quantize "advanced PTQ, per tensor" "$@" --per-tensor --effort balanced
            quantize "mixed, 26 dB" "$@" --target-sqnr 26
        else
            quantize "mixed, 34 dB" "$@" --target-sqnr 34
        fi
        local epochs="${DISTILL:-2}" terms=()
        [ "$epochs" -gt 0 ] || return 0
        # As `vision quantize` takes them.
        [ "$kind" = cnn ] || terms=(--fine gelu)
        [ "${#RANGE[@]}" -eq 0 ] || terms+=(--weight-bits 7)
        local out="${model%.onnx}-qat.onnx"
        "$NIBBLE" vision qat "$model" --data "$calib" --distill 1 --distill-loss mse --epochs "$epochs" --following 0 --batch-size 8 \
            --batch 1 "${terms[@]}" --force -o "$out" >&2
        OURS+=("QAT, $epochs epochs, distilled=$out")
    }
    bench "$1"
)

# Digits, with real labels.
digits_of() (
    . "$SCRIPTS/bench_qat.sh"
    runs() {
        run "naive PTQ, W8A8 minmax" --epochs 0 --observer minmax --algorithm rtn
        run "naive PTQ, W4A4 minmax" --epochs 0 --lsq --observer minmax --algorithm rtn --weight-bits 4 --activation-bits 4
        run "advanced PTQ, W8A8" --epochs 0
        run "advanced PTQ, W4A4" --epochs 0 --lsq --weight-bits 4 --activation-bits 4
        run "mixed PTQ, W4A4 but the first and last layer" --epochs 0 --lsq --weight-bits 4 --activation-bits 4 \
            --exclude "$(first_layer)" --exclude op:Gemm
        run "QAT, W8A8" --epochs "$QAT_EPOCHS" --shift 2
        run "QAT, W4A4" --epochs "$QAT_EPOCHS" --shift 2 --lsq --distill --weight-bits 4 --activation-bits 4
    }
    # The first layer of the model that was trained.
    first_layer() {
        oracle -c 'import onnx, sys; print(next(n.name for n in onnx.load(sys.argv[1]).graph.node if n.op_type in ("Conv", "MatMul", "Gemm")))' "$WORK/$arch.onnx"
    }
    for arch in cnn vit; do digits "$arch"; done
)

for part in ${*:-vit lite0 digits}; do
    case "$part" in
    digits) digits_of ;;
    *) photographs "$part" ;;
    esac
done
