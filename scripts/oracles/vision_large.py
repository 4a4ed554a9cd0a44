#!/usr/bin/env python3
"""A model over protobuf's 2 GB with its weights beside it, to see that nibble reads, quantizes and writes such files.

    python scripts/oracles/vision_large.py make MODEL.onnx [LAYERS]   random linear layers of 4096 x 4096 (64 MiB each)
    python scripts/oracles/vision_large.py check A.onnx B.onnx        onnx's checker on B; SQNR of B from A in onnxruntime

40 layers, the default, are 2.7 GB. The batch is open, as a symbol.
"""
import sys

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper

SIDE = 4096


def make(path, layers):
    rng = np.random.default_rng(1)
    data = path.rsplit("/", 1)[-1] + ".weights"
    nodes, constants, x = [], [], "x"
    with open(path + ".weights", "wb") as out:
        for layer in range(layers):
            weight = rng.standard_normal((SIDE, SIDE), dtype="f4") / np.float32(SIDE**0.5) * np.float32(1.4)
            tensor = TensorProto(name=f"w{layer}", data_type=TensorProto.FLOAT, dims=weight.shape)
            tensor.data_location = TensorProto.EXTERNAL
            for key, value in {"location": data, "offset": out.tell(), "length": weight.nbytes}.items():
                tensor.external_data.add(key=key, value=str(value))
            out.write(weight.tobytes())
            constants.append(tensor)
            nodes.append(helper.make_node("MatMul", [x, f"w{layer}"], [f"p{layer}"], name=f"layer{layer}"))
            nodes.append(helper.make_node("Relu", [f"p{layer}"], [f"x{layer}"], name=f"relu{layer}"))
            x = f"x{layer}"
    shape = ["batch", 8, SIDE]
    value = lambda name: helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
    graph = helper.make_graph(nodes, "large", [value("x")], [value(x)], constants)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    np.save(path + ".npy", rng.standard_normal((4, 8, SIDE), dtype="f4"))


def run(path, samples):
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    model = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return [model.run(None, {"x": sample[None]})[0].astype("f8") for sample in samples]


def check(a, b):
    onnx.checker.check_model(b)
    samples = np.load(a + ".npy")[:2]
    exact, found = run(a, samples), run(b, samples)
    noise = sum(((x - y) ** 2).sum() for x, y in zip(exact, found))
    print(f"{10 * np.log10(sum((x**2).sum() for x in exact) / noise):.1f} dB")


def main():
    match sys.argv[1:]:
        case ["make", path, *layers]:
            make(path, int(layers[0]) if layers else 40)
        case ["check", a, b]:
            check(a, b)
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    main()
