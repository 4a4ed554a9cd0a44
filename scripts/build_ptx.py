"""Compiles every kernels/cuda/*.cu to PTX with a pinned NVRTC, without CUDA headers and without a GPU.

    build_ptx.py NVRTC_FOLDER OUT_FOLDER

The PTX is for compute_80 and says version 7.4, so that drivers from CUDA 11.4 on take it, unless a source's first line
names another architecture and version; scripts/build_ptx.sh lets ptxas refuse it if it uses more than it says.
"""

import ctypes
import pathlib
import re
import sys

USUAL = ("compute_80", "7.4")
NAMED = re.compile(r"// ARCHITECTURE (\w+), PTX ([\d.]+)\n")


def compile_to_ptx(nvrtc, source, headers):
    named = NAMED.match(source.read_text())
    architecture, version = named.groups() if named else USUAL
    program = ctypes.c_void_p()

    def check(code, what):
        if code != 0:
            size = ctypes.c_size_t()
            nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
            log = ctypes.create_string_buffer(size.value)
            nvrtc.nvrtcGetProgramLog(program, log)
            sys.exit(f"{source.name}: {what}: {nvrtc.nvrtcGetErrorString(code).decode()}\n{log.value.decode()}")

    names = (ctypes.c_char_p * len(headers))(*[h.name.encode() for h in headers])
    texts = (ctypes.c_char_p * len(headers))(*[h.read_bytes() for h in headers])
    created = nvrtc.nvrtcCreateProgram(
        ctypes.byref(program), source.read_bytes(), source.name.encode(), len(headers), texts, names
    )
    check(created, "create")
    options = [f"--gpu-architecture={architecture}", "--std=c++17"]
    check(nvrtc.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*[o.encode() for o in options])), "compile")
    size = ctypes.c_size_t()
    check(nvrtc.nvrtcGetPTXSize(program, ctypes.byref(size)), "size")
    ptx = ctypes.create_string_buffer(size.value)
    check(nvrtc.nvrtcGetPTX(program, ptx), "PTX")
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    text = re.sub(r"^\.version .*$", f".version {version}", ptx.value.decode(), count=1, flags=re.MULTILINE)
    # Comments (the compiler's build number among them) and NVRTC's own unused globals say nothing about the code.
    text = re.sub(r"^\s*//.*\n|^\.global .*_INTERNAL_.*nv6target.*\n|^\s*\n", "", text, flags=re.MULTILINE)
    return text.strip("\n") + "\n"


def main():
    nvrtc_folder, out = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2])
    library = next(nvrtc_folder.glob("libnvrtc.so*"))
    for builtins in nvrtc_folder.glob("libnvrtc-builtins.so*"):
        ctypes.CDLL(str(builtins), mode=ctypes.RTLD_GLOBAL)
    nvrtc = ctypes.CDLL(str(library))
    nvrtc.nvrtcGetErrorString.restype = ctypes.c_char_p
    sources = pathlib.Path(__file__).resolve().parent.parent / "kernels" / "cuda"
    headers = sorted(sources.glob("*.cuh"))
    out.mkdir(parents=True, exist_ok=True)
    for source in sorted(sources.glob("*.cu")):
        (out / f"{source.stem}.ptx").write_text(compile_to_ptx(nvrtc, source, headers))


main()
