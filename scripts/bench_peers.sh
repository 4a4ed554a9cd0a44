#!/usr/bin/env bash
# Builds llama.cpp for this machine, to measure it beside nibble in the same run: from the source package of
# llama-cpp-python on PyPI, with cmake and ninja from PyPI, all inside the cache. Takes 10 to 40 minutes once. Not a test.
#
#   scripts/bench_peers.sh [JOBS]
#
# Prints the folder of its programs.
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

VERSION=0.3.36
SHA256=832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e
PEERS="$CACHE/peers"
SOURCE="$PEERS/llama_cpp_python-$VERSION"
BUILD="$PEERS/build-llama"
TOOLS="llama-bench llama-batched-bench llama-completion llama-quantize llama-perplexity llama-imatrix"
JOBS="${1:-$(nproc)}"

need_pip
need c++ "Debian: apt-get install g++"
mkdir -p "$PEERS"

complete=yes
for tool in $TOOLS; do [ -x "$BUILD/bin/$tool" ] || complete=no; done
if [ $complete = no ]; then
    say "build tools (cmake, ninja, and what pip needs to open the source package)"
    python3 -m pip --disable-pip-version-check install --quiet --upgrade --no-warn-script-location --target "$PEERS/python" \
        cmake==4.4.5 ninja==1.13.2 scikit-build-core==1.1.2 >&2
    export PYTHONPATH="$PEERS/python" PATH="$PEERS/python/bin:$PATH"

    say "llama-cpp-python $VERSION, source"
    if [ ! -d "$SOURCE" ]; then
        printf 'llama-cpp-python==%s --hash=sha256:%s\n' "$VERSION" "$SHA256" >"$PEERS/pin.txt"
        python3 -m pip --disable-pip-version-check download --quiet --no-deps --no-binary :all: --no-build-isolation \
            --require-hashes --dest "$PEERS" --requirement "$PEERS/pin.txt" >&2
        tar -C "$PEERS" -xzf "$PEERS/llama_cpp_python-$VERSION.tar.gz"
    fi

    say "building $TOOLS with $JOBS jobs"
    cmake -S "$SOURCE/vendor/llama.cpp" -B "$BUILD" -G Ninja -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON \
        -DBUILD_SHARED_LIBS=OFF -DLLAMA_BUILD_TOOLS=ON -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_TESTS=OFF \
        -DLLAMA_BUILD_SERVER=OFF -DLLAMA_BUILD_APP=OFF -DLLAMA_OPENSSL=OFF -DLLAMA_USE_PREBUILT_UI=OFF -DGGML_CCACHE=OFF \
        >"$PEERS/configure.log"
    if grep -qw amx_tile /proc/cpuinfo 2>/dev/null; then
        note "without AMX: what GCC 12 makes of its AMX path stopped at its first tile (SIGILL) where this was tried"
        sed -i 's/-march=native/& -mno-amx-tile -mno-amx-int8 -mno-amx-bf16/' "$BUILD/build.ninja"
    fi
    started=$SECONDS
    # shellcheck disable=SC2086 # a list of words
    nice -n 10 ninja -C "$BUILD" -j "$JOBS" $TOOLS >"$PEERS/build.log" || die "the build failed" "see $PEERS/build.log"
    note "built in $((SECONDS - started)) s"
fi
printf '%s\n' "$BUILD/bin"
