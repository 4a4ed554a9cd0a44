#!/usr/bin/env python3
"""Writes tests/goldens/blocks.gguf: random blocks of every type nibble reads, with the values that llama.cpp's own
Python package decodes them to.

    pip install gguf==0.19.0 numpy && python scripts/goldens/gguf_blocks.py

Each type NAME has two tensors: `NAME` (random bytes; the scales are finite halves) and `NAME.f32` (the expected
values). The metadata holds one pair of every value type. Same versions, same bytes.
"""

import pathlib

import gguf
import numpy as np

ROWS = 3
# Byte offsets of the f16 scales in a block.
HALVES = {
    "Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2], "Q8_0": [0],
    "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208], "IQ4_NL": [0], "IQ4_XS": [0],
}


def main():
    rng = np.random.default_rng(20261124)
    out = pathlib.Path(__file__).resolve().parents[2] / "tests" / "goldens" / "blocks.gguf"
    writer = gguf.GGUFWriter(out, "golden")
    writer.add_uint8("t.u8", 200)
    writer.add_int8("t.i8", -100)
    writer.add_uint16("t.u16", 60000)
    writer.add_int16("t.i16", -30000)
    writer.add_uint32("t.u32", 4000000000)
    writer.add_int32("t.i32", -2000000000)
    writer.add_float32("t.f32", 0.1)
    writer.add_bool("t.true", True)
    writer.add_bool("t.false", False)
    writer.add_string("t.string", "naïve ☃")
    writer.add_uint64("t.u64", 1 << 63)
    writer.add_int64("t.i64", -(1 << 62))
    writer.add_float64("t.f64", 0.1)
    writer.add_array("t.strings", ["a", "", "ü"])
    writer.add_array("t.i32s", [1, -2, 3])
    writer.add_array("t.f32s", [0.5, -1.5])
    writer.add_array("t.bools", [True, False])
    writer.add_key_value("t.nested", [[1, 2], [3]], gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.ARRAY)
    for name, at in HALVES.items():
        kind = gguf.GGMLQuantizationType[name]
        values, size = gguf.GGML_QUANT_SIZES[kind]
        blocks = rng.integers(0, 256, (ROWS * (256 // values), size), dtype=np.uint8)
        for offset in at:
            scale = (rng.standard_normal(len(blocks)) * 0.01).astype(np.float16)
            blocks[:, offset : offset + 2] = scale.view(np.uint8).reshape(-1, 2)
        data = blocks.reshape(ROWS, -1)
        add(writer, name, data, kind)
    floats = rng.standard_normal((ROWS, 5)).astype(np.float32)
    floats[0, :4] = [np.inf, -0.0, 1e-40, 3e-5]
    add(writer, "F32", floats, gguf.GGMLQuantizationType.F32)
    add(writer, "F16", floats.astype(np.float16), gguf.GGMLQuantizationType.F16)
    bf16 = gguf.quantize(floats, gguf.GGMLQuantizationType.BF16)
    add(writer, "BF16", bf16, gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    print(out, out.stat().st_size, "bytes")


def add(writer, name, data, kind):
    expected = gguf.dequantize(data.view(np.uint8) if kind.name not in ("F32", "F16") else data, kind)
    writer.add_tensor(name, data, raw_dtype=kind)
    writer.add_tensor(name + ".f32", np.ascontiguousarray(expected, dtype=np.float32))


main()
