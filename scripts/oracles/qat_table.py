#!/usr/bin/env python3
"""What QAT came to, judged in onnxruntime.

    python scripts/oracles/qat_table.py split DIGITS.csv.gz TRAIN.npz VALID.npz     4000 and 1000 digits, drawn
    python scripts/oracles/qat_table.py table VALID.npz LABEL=MODEL.onnx=RUN.json...
    python scripts/oracles/qat_table.py epochs NIBBLE TORCH-PYTHON FLOAT.onnx TRAIN.npz VALID.npz FOLDER

RUN.json is what nibble printed: `trained` (or `valid`) is the accuracy of its own forward pass. `same` is the share of samples
on which the trained network itself (its classes in RUN.json) and onnxruntime decide alike.
"""
import collections
import json
import os
import subprocess
import sys
import tempfile
import time

import numpy as np


def split(source, train, valid):
    rows = np.loadtxt(source, delimiter=",", dtype="f4")
    order = np.random.default_rng(0).permutation(len(rows))
    for path, part in ((train, order[:4000]), (valid, order[4000:])):
        x = (rows[part, :-1] / 255).reshape(-1, 1, 28, 28).astype("f4")
        np.savez(path, x=x, y=rows[part, -1].astype("i8"))


def table(valid, *runs):
    import onnxruntime as ort

    data = np.load(valid)
    x, y = data["x"], data["y"]
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    sessions, results = {}, {}
    for run in runs:
        label, model, printed = run.split("=")
        sessions[label] = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        results[label] = (model, json.load(open(printed)))
    times = collections.defaultdict(list)
    for _ in range(int(os.environ.get("ROUNDS", "200"))):
        for label, s in sessions.items():
            start = time.perf_counter()
            s.run(None, {"image": x[:1]})
            times[label].append(1e6 * (time.perf_counter() - start))
    bytes_of_float = os.path.getsize(results["float"][0])
    print("| model | right of 1000, onnxruntime | right of 1000, nibble | decided alike | µs a picture | kB | smaller |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for label, s in sessions.items():
        model, printed = results[label]
        found = np.concatenate([s.run(None, {"image": x[i : i + 1]})[0] for i in range(len(x))]).argmax(1)
        own = printed["classes"]
        right = (np.array(own) == y).sum()
        same = (np.array(own) == found).mean()
        size = os.path.getsize(model)
        us = np.percentile(times[label], 25)
        print(f"| {label} | {(found == y).sum()} | {right} | {100 * same:.1f} % | {us:.0f} | {size / 1e3:.0f} | {bytes_of_float / size:.2f}x |")


def cpu_seconds(*words):
    """What a process printed, and the processor's time that it took: other work on the machine hardly changes that."""
    with tempfile.TemporaryFile() as out:
        child = subprocess.Popen(words, stdout=out, env={**os.environ, "OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1"})
        _, status, usage = os.wait4(child.pid, 0)
        if status:
            sys.exit(f"{words}: failed")
        out.seek(0)
        return json.load(out), usage.ru_utime + usage.ru_stime


def epochs(nibble, python, model, train, valid, folder):
    """Interleaved: processor time of 6 epochs less that of 1, over 5."""
    torch = os.path.join(os.path.dirname(__file__), "qat_torch.py")

    def ours(n):
        out = os.path.join(folder, "epochs.onnx")
        data = ["--data", train, "--valid", valid, "--threads", "1", "--force", "--json"]
        return cpu_seconds(nibble, "vision", "qat", model, *data, "-o", out, "--epochs", str(n))

    def theirs(n):
        return cpu_seconds(python, torch, model, train, valid, str(n), "1")

    took, accuracy, wall = collections.defaultdict(list), {}, collections.defaultdict(list)
    for _ in range(int(os.environ.get("REPEATS", "3"))):
        for label, run in (("nibble", ours), ("torch.ao, eager", theirs)):
            (_, one), (printed, six) = run(1), run(6)
            took[label].append((six - one) / 5)
            accuracy[label] = printed.get("trained", printed.get("qat"))
            wall[label] += [e["seconds"] for e in printed["epochs"]] if "epochs" in printed else printed["seconds"]
    print("| | CPU seconds an epoch, least | median | wall seconds an epoch, least | accuracy after 6 |")
    print("|---|---:|---:|---:|---:|")
    for label, seconds in took.items():
        cells = [f"{min(seconds):.2f}", f"{np.median(seconds):.2f}", f"{min(wall[label]):.2f}", f"{100 * accuracy[label]:.1f} %"]
        print(f"| {label} | " + " | ".join(cells) + " |")


def main():
    what, *rest = sys.argv[1:]
    {"split": split, "table": table, "epochs": epochs}[what](*rest)


if __name__ == "__main__":
    main()
