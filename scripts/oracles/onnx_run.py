#!/usr/bin/env python3
"""Checks and runs ONNX models in onnxruntime, for tests and benches that judge what nibble wrote.

    python scripts/oracles/onnx_run.py ops MODEL...              operators of the optimized graphs, as JSON
    python scripts/oracles/onnx_run.py run MODEL INPUT OUT.npy   the first output for every sample, one at a time
    python scripts/oracles/onnx_run.py compare A B INPUT         largest difference and SQNR of B's outputs from A's

INPUT is an .npy of samples for a model with one input, or a .safetensors with an array of samples for each input.
"""
import collections
import json
import os
import sys
import tempfile

import numpy
import onnx
import onnxruntime
import safetensors.numpy


def session(path, threads=1, optimized=None):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    if optimized:
        options.optimized_model_filepath = optimized
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def outputs(path, data):
    """The outputs for each sample of a file."""
    model = session(path)
    if data.endswith(".safetensors"):
        feeds = safetensors.numpy.load_file(data)
    else:
        feeds = {model.get_inputs()[0].name: numpy.load(data)}
    count = len(next(iter(feeds.values())))
    return [model.run(None, {name: values[i : i + 1] for name, values in feeds.items()}) for i in range(count)]


def operators(path):
    onnx.checker.check_model(path, full_check=False)
    with tempfile.TemporaryDirectory() as folder:
        optimized = os.path.join(folder, "optimized.onnx")
        session(path, optimized=optimized)
        nodes = onnx.load(optimized, load_external_data=False).graph.node
    return collections.Counter(n.op_type for n in nodes)


def compare(a, b, data):
    signal = noise = 0.0
    worst = 0.0
    for left, right in zip(outputs(a, data), outputs(b, data)):
        for x, y in zip(left, right):
            assert x.shape == y.shape, (x.shape, y.shape)
            x, y = x.astype("f8"), y.astype("f8")
            signal += float((x * x).sum())
            noise += float(((x - y) ** 2).sum())
            worst = max(worst, float(abs(x - y).max()))
    return {"signal": signal, "noise": noise, "max_error": worst}


def main():
    what, paths = sys.argv[1], sys.argv[2:]
    if what == "ops":
        print(json.dumps([operators(path) for path in paths]))
    elif what == "run":
        numpy.save(paths[2], numpy.concatenate([o[0] for o in outputs(paths[0], paths[1])]))
        print("{}")
    elif what == "compare":
        print(json.dumps(compare(paths[0], paths[1], paths[2])))
    else:
        sys.exit(__doc__)


if __name__ == "__main__":
    main()
