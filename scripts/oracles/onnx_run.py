#!/usr/bin/env python3
"""Checks and runs ONNX models in onnxruntime, for tests and benches that judge what nibble wrote.

    python scripts/oracles/onnx_run.py ops MODEL...              operators of the optimized graphs, as JSON
    python scripts/oracles/onnx_run.py run MODEL INPUT.npy OUT.npy   the first output for every sample, one at a time
    python scripts/oracles/onnx_run.py compare A B INPUT.npy     largest difference and SQNR of B's outputs from A's
"""
import collections
import json
import os
import sys
import tempfile

import numpy
import onnx
import onnxruntime


def session(path, threads=1, optimized=None):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    if optimized:
        options.optimized_model_filepath = optimized
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def outputs(path, samples):
    model = session(path)
    name = model.get_inputs()[0].name
    return [model.run(None, {name: sample[None]}) for sample in samples]


def operators(path):
    onnx.checker.check_model(path, full_check=False)
    with tempfile.TemporaryDirectory() as folder:
        optimized = os.path.join(folder, "optimized.onnx")
        session(path, optimized=optimized)
        nodes = onnx.load(optimized, load_external_data=False).graph.node
    return collections.Counter(n.op_type for n in nodes)


def compare(a, b, samples):
    signal = noise = 0.0
    worst = 0.0
    for left, right in zip(outputs(a, samples), outputs(b, samples)):
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
        numpy.save(paths[2], numpy.concatenate([o[0] for o in outputs(paths[0], numpy.load(paths[1]))]))
    elif what == "compare":
        print(json.dumps(compare(paths[0], paths[1], numpy.load(paths[2]))))
    else:
        sys.exit(__doc__)


if __name__ == "__main__":
    main()
