#!/usr/bin/env python3
"""Quantized models against their float model in onnxruntime, beside what onnxruntime's own quantizer makes.

    python scripts/oracles/vision_table.py FLOAT.onnx CALIB.npy EVAL.npy FOLDER [NAME=MODEL.onnx]...

CALIB.npy and EVAL.npy are samples of the model's input. onnxruntime's quantizer runs here, on the same calibration
samples, into FOLDER. Figures: SQNR of all outputs; top-1 agreement of the first one, or for outputs that aren't classes
the same nearest neighbour; milliseconds a sample (median over rounds in which every model runs once) with 1 and 2 threads.
"""
import collections
import os
import sys
import time

import numpy as np
import onnxruntime as ort
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantFormat, QuantType
from onnxruntime.quantization import quantize_dynamic, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process


def session(path, threads):
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


class Reader(CalibrationDataReader):
    def __init__(self, name, samples):
        self.left = iter([{name: s[None]} for s in samples])

    def get_next(self):
        return next(self.left, None)


def theirs(path, calib, folder):
    """What onnxruntime's quantizer makes, in the forms that it recommends and the best ones known for each kind."""
    name = session(path, 1).get_inputs()[0].name
    prepared = os.path.join(folder, "prepared.onnx")
    quant_pre_process(path, prepared, skip_symbolic_shape=True)
    linear = {"op_types_to_quantize": ["MatMul", "Gemm"]}
    runs = [
        ("ort minmax per-channel", CalibrationMethod.MinMax, {}),
        ("ort percentile per-channel", CalibrationMethod.Percentile, {}),
        ("ort minmax, linear only", CalibrationMethod.MinMax, linear),
    ]
    for label, method, more in runs:
        out = os.path.join(folder, label.replace(" ", "_").replace(",", "") + ".onnx")
        start = time.perf_counter()
        try:
            quantize_static(
                prepared, out, Reader(name, calib), quant_format=QuantFormat.QDQ, per_channel=True,
                activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8, calibrate_method=method, **more,
            )
        except Exception as error:  # its quantizer refuses some models
            print(f"{label}: {type(error).__name__}: {error}", file=sys.stderr)
            continue
        yield label, out, time.perf_counter() - start
    out = os.path.join(folder, "ort_dynamic.onnx")
    start = time.perf_counter()
    quantize_dynamic(prepared, out, per_channel=True, weight_type=QuantType.QInt8, op_types_to_quantize=["MatMul", "Gemm"])
    yield "ort dynamic, linear only", out, time.perf_counter() - start


def nearest(rows, queries):
    unit = lambda a: a / np.maximum(np.linalg.norm(a, axis=1, keepdims=True), 1e-30)
    close = unit(queries) @ unit(rows).T
    np.fill_diagonal(close, -2)
    return close.argmax(1)


def main():
    path, calib, evaluation, folder, *ours = sys.argv[1:]
    calib, evaluation = np.load(calib), np.load(evaluation)
    models = [("float", path, 0.0)]
    models += list(theirs(path, calib, folder))
    models += [(*arg.split("=", 1), float("nan")) for arg in ours]
    sessions = {t: {label: session(p, t) for label, p, _ in models} for t in (1, 2)}
    results = {}
    for label, s in sessions[2].items():
        name = s.get_inputs()[0].name
        results[label] = np.stack([s.run(None, {name: x[None]})[0].reshape(-1) for x in evaluation]).astype("f8")
    times = collections.defaultdict(list)
    for t in (1, 2):
        for _ in range(int(os.environ.get("ROUNDS", "40"))):
            for label, s in sessions[t].items():
                start = time.perf_counter()
                s.run(None, {s.get_inputs()[0].name: evaluation[0][None]})
                times[label, t].append(time.perf_counter() - start)
    base = results["float"]
    classes = base.shape[1] <= 1000 and base.shape[1] > 1
    print(f"| model | SQNR dB | {'top-1 agreement' if classes else 'nearest neighbour'} % | ms 1 thread | ms 2 threads | MB | s to make |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for label, file, seconds in models:
        out = results[label]
        noise = ((out - base) ** 2).sum()
        sqnr = "" if noise == 0 else f"{10 * np.log10((base ** 2).sum() / noise):.2f}"
        same = (out.argmax(1) == base.argmax(1)) if classes else (nearest(base, out) == nearest(base, base))
        ms = [f"{1e3 * np.median(times[label, t]):.2f}" for t in (1, 2)]
        made = "" if label == "float" or np.isnan(seconds) else f"{seconds:.1f}"
        print(f"| {label} | {sqnr} | {100 * same.mean():.1f} | {ms[0]} | {ms[1]} | {os.path.getsize(file) / 1e6:.1f} | {made} |")


if __name__ == "__main__":
    main()
