#!/usr/bin/env bash
# QAT on the first 5000 digits of MNIST (4000 to train on, 1000 to judge by): trains a small CNN and a small ViT, rounds them,
# trains them again with the rounding, and judges the exported files in onnxruntime (benches/QAT.md).
#
#   scripts/bench_qat.sh [cnn|vit]...
#
# NIBBLE is the program (default: the release build), TORCH a Python with torch whose eager QAT runs beside (default: none),
# EPOCHS and QAT_EPOCHS how long to train (40 and 20).
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
cd "$REPO"

NIBBLE="${NIBBLE:-$REPO/target/release/nibble}"
[ -x "$NIBBLE" ] || die "no program at $NIBBLE" "cargo build --release, or set NIBBLE"
install_oracles || die "the Python oracles are needed (scripts/requirements.txt)"
"$REPO/scripts/fetch_assets.sh" mnist || die "the digits are needed"
WORK="$CACHE/qat"
TABLE="$REPO/scripts/oracles/qat_table.py"
mkdir -p "$WORK"
oracle() { PYTHONPATH="$NIBBLE_ORACLES" python3 "$@"; }
oracle "$TABLE" split "$CACHE/assets/mnist/mnist_5k.csv.gz" "$WORK/train.npz" "$WORK/valid.npz"
DATA=(--data "$WORK/train.npz" --valid "$WORK/valid.npz" --force --json)
# One thread, so that times say something about the work.
export RAYON_NUM_THREADS=1
QAT_EPOCHS="${QAT_EPOCHS:-20}"

# make NAME WORD...: nibble vision WORD..., whose answer becomes NAME.json; not again if the same program was given the same
# words before.
make() {
    local name="$1" words
    shift
    words="$(cksum <"$NIBBLE") $*"
    [ "$words" = "$(cat "$name.words" 2>/dev/null)" ] && [ -s "$name.json" ] && return 0
    rm -f "$name.words"
    "$NIBBLE" vision "$@" "${DATA[@]}" --threads 1 -o "$name.onnx" >"$name.json"
    printf '%s' "$words" >"$name.words"
}

# run LABEL OPTION...: one quantized model.
run() {
    local label="$1" name
    shift
    name="$WORK/$arch-$(printf '%s' "$*" | tr -cs 'A-Za-z0-9\n' -)"
    make "$name" qat "$WORK/$arch.onnx" "$@"
    RUNS+=("$label=$name.onnx=$name.json")
}

# runs: every quantized model of the table.
runs() {
    run "W8A8 PTQ" --epochs 0
    run "W8A8 QAT" --epochs "$QAT_EPOCHS" --shift 2
    for bits in 4 3; do
        for observer in minmax mse; do
            run "W${bits}A$bits PTQ $observer" --epochs 0 --lsq --observer "$observer" --weight-bits "$bits" --activation-bits "$bits"
        done
        run "W${bits}A$bits QAT" --epochs "$QAT_EPOCHS" --shift 2 --lsq --distill --weight-bits "$bits" --activation-bits "$bits"
    done
}

# digits ARCH: trains it, and prints the table.
digits() {
    local arch="$1"
    say "$arch"
    make "$WORK/$arch" train --arch "$arch" --epochs "${EPOCHS:-40}" --shift 2
    RUNS=("float=$WORK/$arch.onnx=$WORK/$arch.json")
    runs
    printf '\n%s:\n\n' "$arch"
    oracle "$TABLE" table "$WORK/valid.npz" "${RUNS[@]}"
    if [ -n "${TORCH:-}" ]; then
        printf '\n%s, seconds an epoch of INT8 QAT on one thread:\n\n' "$arch"
        oracle "$TABLE" epochs "$NIBBLE" "$TORCH" "$WORK/$arch.onnx" "$WORK/train.npz" "$WORK/valid.npz" "$WORK"
    fi
}

# Sourced by scripts/capstone.sh.
[ "${BASH_SOURCE[0]}" = "$0" ] || return 0
for arch in ${*:-cnn vit}; do digits "$arch"; done
