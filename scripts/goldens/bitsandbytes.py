#!/usr/bin/env python3
"""Writes quant/tests/data/bitsandbytes.json: QLoRA's NF4 with double quantization by bitsandbytes 0.50.2.

    pip install numpy && pip download --no-deps bitsandbytes==0.50.2 && python scripts/goldens/bitsandbytes.py WHEEL

Both dequantizations are done by the wheel's CPU library through ctypes, so that torch isn't needed. Codes are made by
the few lines of numpy that stand for quantize_4bit and quantize_blockwise of `bitsandbytes/backends/default/ops.py`,
whose rule (the nearest level, by middles in f32) CUDA's kernels follow too. The CPU library's own quantize_blockwise
looks codes up in a coarse table and takes the level beside the nearest for about 1 scale in 100: it is no reference.
The mean that is taken off the scales is summed in f64: torch's sum in f32 depends on the machine.
"""

import ctypes
import hashlib
import json
import pathlib
import sys
import tempfile
import zipfile

import numpy as np

SHA256 = "55348a9a4a21bfd99cf8c7b32fe67b4030ae5c2a05738e03c1747f65fa6ec283"
ROWS, COLS, BLOCK = 70, 576, 64
f = np.float32
NF4 = np.array([-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
                -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
                0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
                0.7229568362236023, 1.0], dtype=f)


def weights():
    """Bell-shaped values with heavy tails that any language can make: sums of four 16-bit draws, some rows enlarged."""
    state, out = 1, np.empty(ROWS * COLS, dtype=f)
    for i in range(out.size):
        total = 0
        for _ in range(4):
            state = (state * 6364136223846793005 + 1442695040888963407) % 2**64
            total += state >> 48
        x = f(total - 131070) * f(2**-18)
        out[i] = x * x * x if i // COLS % 7 == 3 else x
    out[5 * BLOCK:6 * BLOCK] = 0
    out[6 * BLOCK:7 * BLOCK] = np.tile(((NF4[:-1] + NF4[1:]) / 2)[[0, 7, 14]], 22)[:BLOCK]
    out[7 * BLOCK] = -9
    return out


def dynamic_map():
    """functional.create_dynamic_map(signed=True, max_exponent_bits=7, total_bits=8), with torch's linspace."""
    values = [0.0, 1.0]
    for i in range(7):
        count = 2**i
        step = f(f(1) - f(0.1)) / f(count)
        # torch fills the first half from the start and the second from the end.
        bounds = [f(0.1) + step * f(j) if j < (count + 1) // 2 else f(1) - step * f(count - j) for j in range(count + 1)]
        means = [(a + b) / f(2) for a, b in zip(bounds[:-1], bounds[1:])]
        for mean in means:
            value = float(f(10.0 ** (-6 + i)) * mean)
            values += [value, -value]
    return np.array(sorted(values), dtype=f)


def pointer(array):
    return array.ctypes.data_as(ctypes.c_void_p)


def digest(array):
    return hashlib.sha256(array.astype("<f4").tobytes()).hexdigest()


wheel = pathlib.Path(sys.argv[1])
found = hashlib.sha256(wheel.read_bytes()).hexdigest()
assert found == SHA256, f"{wheel}: sha256 {found}, wanted {SHA256}"
with tempfile.TemporaryDirectory() as folder:
    lib = ctypes.CDLL(zipfile.ZipFile(wheel).extract("bitsandbytes/libbitsandbytes_cpu.so", folder))


def dequantize_blockwise(codes, absmax, code, block):
    out = np.empty(codes.size, dtype=f)
    lib.cdequantize_blockwise_cpu_fp32(pointer(code), pointer(codes), pointer(absmax), pointer(out),
                                       ctypes.c_longlong(block), ctypes.c_longlong(codes.size))
    return out


def dequantize_nf4(packed, absmax):
    out = np.empty(ROWS * COLS, dtype=f)
    lib.cdequantize_blockwise_cpu_nf4_fp32(pointer(packed), pointer(absmax), pointer(out), ctypes.c_longlong(BLOCK),
                                           ctypes.c_longlong(ROWS), ctypes.c_longlong(COLS))
    return out


x = weights()
blocks = x.reshape(-1, BLOCK)
absmax = np.abs(blocks).max(axis=1)
scaled = np.clip(blocks * (f(1) / np.maximum(absmax, f(1e-38)))[:, None], f(-1), f(1)).reshape(-1)
codes = np.searchsorted((NF4[:-1] + NF4[1:]) / f(2), scaled, side="left").astype(np.uint8)
packed = (codes[::2] << 4) | codes[1::2]

offset = f(absmax.astype(np.float64).mean())
centred, table = absmax - offset, dynamic_map()
spans = [centred[i : i + 256] for i in range(0, centred.size, 256)]
second = np.array([np.abs(span).max() for span in spans], dtype=f)
middles = (table[:-1] + table[1:]) / f(2)
nested = np.concatenate([np.searchsorted(middles, span * (f(1) / peak), side="left") for span, peak in zip(spans, second)])
nested = nested.astype(np.uint8)
restored = dequantize_blockwise(nested, second, table, 256) + offset

golden = {
    "shape": [ROWS, COLS],
    "weights": digest(x),
    "codes": packed.tobytes().hex(),
    "absmax": absmax.astype("<f4").tobytes().hex(),
    "nested_codes": nested.tobytes().hex(),
    "nested_absmax": second.astype("<f4").tobytes().hex(),
    "nested_map": digest(table),
    "offset": offset.astype("<f4").tobytes().hex(),
    "restored_absmax": digest(restored),
    "values": digest(dequantize_nf4(packed, absmax)),
    "values_nested": digest(dequantize_nf4(packed, restored)),
}
with open(pathlib.Path(__file__).resolve().parents[2] / "quant/tests/data/bitsandbytes.json", "w") as out:
    json.dump(golden, out, indent=1)
    out.write("\n")
