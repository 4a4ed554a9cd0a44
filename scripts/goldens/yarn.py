#!/usr/bin/env python3
"""Writes tests/goldens/yarn_inv_freq.json: YaRN's frequencies by the formula of transformers 4.57
(_compute_yarn_parameters), in f32, for theta 10000, 32 columns, factor 4 and an original context of 8192.

    pip install numpy && python scripts/goldens/yarn.py
"""

import json
import math
import pathlib

import numpy as np

BASE, DIM, FACTOR, ORIGINAL = 10000.0, 32, 4.0, 8192
f = np.float32


def pair(turns):
    return (DIM * math.log(ORIGINAL / (turns * 2 * math.pi))) / (2 * math.log(BASE))


low, high = max(math.floor(pair(32)), 0), min(math.ceil(pair(1)), DIM - 1)
ramp = np.clip((np.arange(DIM // 2, dtype=f) - f(low)) / f(high - low), 0, 1)
freq = f(BASE) ** (np.arange(0, DIM, 2, dtype=f) / f(DIM))
keep = 1 - ramp
inv = (f(1) / (f(FACTOR) * freq)) * (1 - keep) + (f(1) / freq) * keep
with open(pathlib.Path(__file__).resolve().parents[2] / "tests" / "goldens" / "yarn_inv_freq.json", "w") as out:
    json.dump([float(x) for x in inv], out)
    out.write("\n")
