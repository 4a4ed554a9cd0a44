#!/usr/bin/env python3
"""Quantized models against their float model in onnxruntime, beside what onnxruntime's own quantizer makes.

    python scripts/oracles/vision_table.py cut IN.onnx TENSOR OUT.onnx       the part of a model that makes a tensor
    python scripts/oracles/vision_table.py table KIND FLOAT.onnx CALIB EVAL FOLDER NAME=MODEL.onnx[=SECONDS=BYTES]...
    python scripts/oracles/vision_table.py cost KIND FLOAT.onnx CALIB FOLDER    seconds and bytes that making one takes

KIND is `cnn` (classes out) or `encoder` (a vector a token out). CALIB and EVAL are an .npy of samples, or a .txt with a
text a line beside TOKENIZER (an environment variable: a tokenizer.json). onnxruntime's quantizer runs here, on the same
calibration samples, each configuration in a process of its own, into FOLDER (PEERS names them, if all that are usual for
the kind aren't wanted); SECONDS and BYTES are what nibble took.

Figures: SQNR of the first output over all samples. Of classes: same largest one, and the mean divergence of the
probabilities (KL, nats). Of tokens: the same nearest neighbour of the first token (of texts: of the mean). Milliseconds a
sample with 1 and 2 threads: lower decile and median over rounds in which every model runs once.
"""
import collections
import os
import subprocess
import sys
import time

import numpy as np
import onnx
import onnxruntime as ort


def session(path, threads):
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def feeds(path, model, limit=None):
    """A feed for each sample."""
    names = [i.name for i in session(model, 1).get_inputs()]
    if path.endswith(".npy"):
        return [{names[0]: x[None]} for x in np.load(path, mmap_mode="r")[:limit]]
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(os.environ["TOKENIZER"])
    tokenizer.no_truncation()
    tokenizer.no_padding()
    made = []
    for line in filter(None, map(str.strip, open(path))):
        ids = tokenizer.encode(line).ids
        ids = np.array([ids if len(ids) <= 128 else ids[:127] + ids[-1:]], "i8")
        values = {"mask": np.ones_like(ids), "type": np.zeros_like(ids)}
        made.append({n: next((v for part, v in values.items() if part in n), ids) for n in names})
    return made[:limit]


CNN = ["minmax", "percentile"]
ENCODER = ["linear", "dynamic"]
COST = {"cnn": ["minmax", "percentile"], "encoder": ["linear", "linear-percentile"]}
LABELS = {
    "minmax": "ort minmax, per channel",
    "percentile": "ort percentile 99.999, per channel",
    "linear": "ort minmax, linear layers only, no output Q",
    "linear-percentile": "ort percentile 99.999, linear layers only, no output Q",
    "dynamic": "ort dynamic, per channel",
    "naive": "ort minmax, per tensor, every operator",
}


def make(what, path, calib, out):
    """Runs onnxruntime's quantizer in one of the forms that are best for a kind of model."""
    from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantFormat, QuantType
    from onnxruntime.quantization import quantize_dynamic, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self):
            self.left = iter(feeds(calib, path))

        def get_next(self):
            return next(self.left, None)

    prepared = out + ".prepared"
    quant_pre_process(path, prepared, skip_symbolic_shape=True)
    types = {"op_types_to_quantize": ["MatMul", "Gemm"]}
    if what == "dynamic":
        quantize_dynamic(prepared, out, per_channel=True, weight_type=QuantType.QInt8, reduce_range=REDUCED, **types)
        return
    more = {}
    if what.startswith("linear"):
        graph = onnx.load(prepared).graph
        constants = {i.name for i in graph.initializer}
        products = [n for n in graph.node if n.op_type == "MatMul"]
        more = {
            **types,
            "nodes_to_exclude": [n.name for n in products if not constants & set(n.input)],
            "extra_options": {"OpTypesToExcludeOutputQuantization": ["MatMul", "Gemm", "Add"]},
        }
    method = CalibrationMethod.Percentile if "percentile" in what else CalibrationMethod.MinMax
    quantize_static(
        prepared, out, Reader(), quant_format=QuantFormat.QDQ, per_channel=what != "naive", activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8, calibrate_method=method, reduce_range=REDUCED and what != "naive", **more,
    )


# Whether its weights have 7 bits, for processors without VNNI.
REDUCED = bool(os.environ.get("REDUCED"))


def usual(kind):
    """Those that PEERS names, else all that are usual for a kind."""
    return os.environ["PEERS"].split() if "PEERS" in os.environ else CNN if kind == "cnn" else ENCODER


def theirs(configurations, path, calib, folder):
    for what in configurations:
        out = os.path.join(folder, f"ort-{what}.onnx")
        start = time.perf_counter()
        child = subprocess.Popen([sys.executable, __file__, "make", what, path, calib, out], stdout=2)
        _, status, usage = os.wait4(child.pid, 0)
        if status:
            print(f"{LABELS[what]}: its quantizer failed", file=sys.stderr)
            continue
        yield LABELS[what], out, time.perf_counter() - start, usage.ru_maxrss * 1024


def nearest(rows, queries):
    unit = lambda a: a / np.maximum(np.linalg.norm(a, axis=1, keepdims=True), 1e-30)
    close = unit(queries) @ unit(rows).T
    np.fill_diagonal(close, -2)
    return close.argmax(1)


def log_softmax(a):
    a = a - a.max(1, keepdims=True)
    return a - np.log(np.exp(a).sum(1, keepdims=True))


def score(kind, base, out, text):
    noise = sum(float(((a - b) ** 2).sum()) for a, b in zip(base, out))
    signal = sum(float((a**2).sum()) for a in base)
    sqnr = "" if noise == 0 else f"{10 * np.log10(signal / noise):.2f}"
    if kind == "cnn":
        a, b = (np.stack([x.reshape(-1) for x in xs]) for xs in (base, out))
        p, q = log_softmax(a), log_softmax(b)
        return sqnr, 100 * (a.argmax(1) == b.argmax(1)).mean(), f"{(np.exp(p) * (p - q)).sum(1).mean():.4f}"
    pool = lambda x: x[0].mean(0) if text else x[0][0]
    a, b = (np.stack([pool(x) for x in xs]) for xs in (base, out))
    return sqnr, 100 * (nearest(a, b) == nearest(a, a)).mean(), ""


def table(kind, path, calib, evaluation, folder, *ours):
    models = [("float", path, None, None), *theirs(usual(kind), path, calib, folder)]
    for arg in ours:
        name, model, *took = arg.split("=")
        seconds, peak = (float(t) for t in took) if took else (None, None)
        models.append((name, model, seconds, peak))
    samples = feeds(evaluation, path)
    results = {}
    for label, model, *_ in models:
        s = session(model, 2)
        results[label] = [s.run(None, x)[0].astype("f8") for x in samples]
    times = collections.defaultdict(list)
    for threads in (1, 2):
        sessions = {label: session(model, threads) for label, model, *_ in models}
        for _ in range(int(os.environ.get("ROUNDS", "60"))):
            for label, s in sessions.items():
                start = time.perf_counter()
                s.run(None, samples[0])
                times[label, threads].append(1e3 * (time.perf_counter() - start))
    agree = "top-1 agreement" if kind == "cnn" else "nearest neighbour"
    print(f"{len(samples)} samples to judge by\n")
    print(f"| model | SQNR dB | {agree} % | KL | ms, 1 thread | ms, 2 threads | speed-up | MB | s to make | peak MB |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|")
    for label, model, seconds, peak in models:
        sqnr, same, divergence = score(kind, results["float"], results[label], evaluation.endswith(".txt"))
        ms = ["{:.2f} ({:.2f})".format(*np.percentile(times[label, t], [10, 50])) for t in (1, 2)]
        made = ["" if v is None else f"{v:.1f}" for v in (seconds, None if peak is None else peak / 1e6)]
        faster = np.percentile(times["float", 1], 10) / np.percentile(times[label, 1], 10)
        size = f"{os.path.getsize(model) / 1e6:.1f}"
        print(f"| {label} | {sqnr} | {same:.1f} | {divergence} | {ms[0]} | {ms[1]} | {faster:.2f}x | {size} | {made[0]} | {made[1]} |")


def main():
    match sys.argv[1:]:
        case ["table", *rest]:
            table(*rest)
        case ["cost", kind, *rest]:
            for label, _, seconds, peak in theirs(COST[kind], *rest):
                print(f"| {label} | {seconds:.1f} | {peak / 1e6:.0f} |", flush=True)
        case ["make", what, path, calib, out]:
            make(what, path, calib, out)
        case ["cut", path, tensor, out]:
            inputs = [i.name for i in onnx.load(path, load_external_data=False).graph.input]
            onnx.utils.extract_model(path, out, inputs, [tensor], check_model=False)
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    main()
