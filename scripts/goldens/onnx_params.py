#!/usr/bin/env python3
"""Writes quant/tests/data/onnx_params.json: scale and zero point of ranges by ONNX Runtime's own quantizer
(onnxruntime.quantization.quant_utils, version in scripts/requirements.txt).

    pip install -r scripts/requirements.txt && python scripts/goldens/onnx_params.py
"""

import json
import pathlib

import numpy as np
from onnx import TensorProto
from onnxruntime.quantization.quant_utils import compute_scale_zp, get_qmin_qmax_for_qType

TYPES = {"u8": TensorProto.UINT8, "s8": TensorProto.INT8, "u16": TensorProto.UINT16, "s16": TensorProto.INT16}
RANGES = [(-1, 1), (0, 6), (-0.1, 6), (-6, 0), (2, 3), (-3, -2), (-1e-3, 1e3), (-17.3, 0.4), (-0.37, 0.91), (0, 1e-30)]

cases = []
for name, kind in TYPES.items():
    for symmetric in (True, False):
        qmin, qmax = get_qmin_qmax_for_qType(kind, symmetric=symmetric)
        for lo, hi in RANGES:
            lo, hi = np.float32(lo), np.float32(hi)
            zero, scale = compute_scale_zp(lo, hi, qmin, qmax, symmetric)
            cases.append([name, symmetric, float(lo), float(hi), float(np.float32(scale)), int(zero)])
with open(pathlib.Path(__file__).resolve().parents[2] / "quant/tests/data/onnx_params.json", "w") as out:
    out.write("[\n" + ",\n".join(json.dumps(case) for case in cases) + "\n]\n")
