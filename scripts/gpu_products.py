"""The products of benches/cuda.rs beside half-precision ones of PyTorch (cuBLAS) on the same GPU, as one table.

    gpu_products.py PRODUCTS.json
"""

import json
import statistics
import sys

import torch

REPLAYS = 15


def microseconds(n, k, m):
    """Median of a product's time over graphs of products with different weights, 150 MB of them at least."""
    weights = [torch.randn(n, k, device="cuda", dtype=torch.half) * 0.02 for _ in range(150_000_000 // (n * k * 2) + 1)]
    x = torch.randn(m, k, device="cuda", dtype=torch.half)
    out = torch.empty(m, n, device="cuda", dtype=torch.half)
    torch.mm(x, weights[0].t(), out=out)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for weight in weights:
            torch.mm(x, weight.t(), out=out)
    times = []
    for replay in range(REPLAYS + 2):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        if replay >= 2:
            times.append(start.elapsed_time(end) * 1e3 / len(weights))
    return statistics.median(times)


def main():
    found = json.load(open(sys.argv[1]))
    half = {}
    table = {}
    for row in found["products"]:
        key = (row["n"], row["k"], row["rows"])
        if key not in half:
            half[key] = microseconds(*key)
        table.setdefault((row["weight"], row["n"], row["k"]), []).append((row, half[key]))
    print(f"{torch.cuda.get_device_name(0)}, PyTorch {torch.__version__}, copies {found['copy'] / 1e12:.3f} TB/s")
    print("microseconds (share of the copy's bandwidth, times as fast as f16)")
    rows = sorted({row["rows"] for row in found["products"]})
    print("| weight | outputs x K | " + " | ".join(f"M = {m}" for m in rows) + " |")
    print("|---" * (len(rows) + 2) + "|")
    for (n, k) in dict.fromkeys((n, k) for n, k, _ in half):
        print(f"| f16, cuBLAS | {n} x {k} | " + " | ".join(f"{half[n, k, m]:.1f}" for m in rows) + " |")
    for (weight, n, k), cells in table.items():
        texts = []
        for row, other in cells:
            share = row["bytes"] / (row["microseconds"] * 1e-6) / found["copy"]
            texts.append(f"{row['microseconds']:.1f} ({share * 100:.0f} %, {other / row['microseconds']:.2f}x)")
        print(f"| {weight} | {n} x {k} | " + " | ".join(texts) + " |")


main()
