#!/usr/bin/env python3
"""QAT of the same small models in torch.ao's eager mode, for benches/QAT.md.

    python scripts/oracles/qat_torch.py FLOAT.onnx TRAIN.npz VALID.npz EPOCHS THREADS

FLOAT.onnx is what `nibble vision train` wrote (cnn or vit): its weights start here too. INT8, per-channel weights, batch 64,
AdamW, a cosine; Conv, BatchNorm and Relu fused as torch.ao does. Prints one JSON object: accuracies and seconds an epoch.
"""
import json
import math
import sys
import time
import warnings

import numpy
import onnx
import torch
from onnx import numpy_helper
from torch import nn
from torch.ao import quantization as tq
from torch.nn import functional as F

warnings.filterwarnings("ignore")
BATCH, RATE, DECAY, HEADS = 64, 5e-4, 0.01, 3


class ConvNorm(nn.Sequential):
    def __init__(self, w, name, stride, padding, groups):
        weight = w[f"{name}.w"]
        conv = nn.Conv2d(weight.shape[1] * groups, weight.shape[0], weight.shape[2], stride, padding, groups=groups, bias=False)
        conv.weight.data = weight
        norm = nn.BatchNorm2d(weight.shape[0])
        norm.weight.data, norm.bias.data = w[f"{name}.gain"], w[f"{name}.offset"]
        norm.running_mean.data, norm.running_var.data = w[f"{name}.mean"], w[f"{name}.var"]
        super().__init__(conv, norm, nn.ReLU())


def linear(weight, bias):
    layer = nn.Linear(weight.shape[1], weight.shape[0])
    layer.weight.data, layer.bias.data = weight.contiguous(), bias
    return layer


class Cnn(nn.Module):
    def __init__(self, w, attributes):
        super().__init__()
        for name, (stride, padding, groups) in attributes.items():
            setattr(self, name, ConvNorm(w, name, stride, padding, groups))
        self.classifier = linear(w["classifier.w"], w["classifier.b"])
        self.quant, self.dequant, self.sum = tq.QuantStub(), tq.DeQuantStub(), nn.quantized.FloatFunctional()
        self.names = list(attributes)

    def forward(self, x):
        x = self.quant(x)
        for name in self.names[:-2]:
            x = getattr(self, name)(x)
        y = x
        for name in self.names[-2:]:
            y = getattr(self, name)(y)
        x = self.sum.add(x, y).mean((2, 3))
        return self.dequant(self.classifier(x))

    def fuse(self):
        tq.fuse_modules_qat(self, [[f"{n}.0", f"{n}.1", f"{n}.2"] for n in self.names], inplace=True)


class Block(nn.Module):
    def __init__(self, w, name):
        super().__init__()
        for part in ["q", "k", "v", "out", "up", "down"]:
            setattr(self, part, linear(w[f"{name}.{part}.w"].T, w[f"{name}.{part}.b"]))
        for part in ["n1", "n2"]:
            norm = nn.LayerNorm(w[f"{name}.{part}.gain"].shape[0], 1e-5)
            norm.weight.data, norm.bias.data = w[f"{name}.{part}.gain"], w[f"{name}.{part}.offset"]
            setattr(self, part, norm)
        self.gelu, self.inputs = nn.GELU(), nn.ModuleList([tq.QuantStub() for _ in range(4)])

    def forward(self, x):
        b, t, d = x.shape
        y = self.inputs[0](self.n1(x))
        q, k, v = (layer(y).view(b, t, HEADS, d // HEADS).transpose(1, 2) for layer in (self.q, self.k, self.v))
        y = torch.softmax(q @ k.transpose(2, 3) / math.sqrt(d // HEADS), -1) @ v
        x = x + self.out(self.inputs[1](y.transpose(1, 2).reshape(b, t, d)))
        y = self.gelu(self.up(self.inputs[2](self.n2(x))))
        return x + self.down(self.inputs[3](y))


class Vit(nn.Module):
    def __init__(self, w):
        super().__init__()
        self.embed, self.classifier = linear(w["embed.w"].T, w["embed.b"]), linear(w["classifier.w"], w["classifier.b"])
        self.positions = nn.Parameter(w["positions"])
        self.blocks = nn.ModuleList([Block(w, f"b{i}") for i in range(2)])
        self.norm = nn.LayerNorm(w["norm.gain"].shape[0], 1e-5)
        self.norm.weight.data, self.norm.bias.data = w["norm.gain"], w["norm.offset"]
        self.inputs = nn.ModuleList([tq.QuantStub() for _ in range(2)])

    def forward(self, x):
        b, c, h, w = x.shape
        x = x.reshape(b, c, 4, h // 4, 4, w // 4).permute(0, 2, 4, 1, 3, 5).reshape(b, 16, -1)
        x = self.embed(self.inputs[0](x)) + self.positions
        for block in self.blocks:
            x = block(x)
        return self.classifier(self.inputs[1](self.norm(x.mean(1))))

    def fuse(self):
        # Only what enters a linear layer is quantized, as nibble does it: outputs and what lies between stay float.
        weights = self.qconfig.weight
        for module in self.modules():
            module.qconfig = self.qconfig if isinstance(module, tq.QuantStub) else None
            if isinstance(module, nn.Linear):
                module.qconfig = tq.QConfig(activation=nn.Identity, weight=weights)


def load(path):
    graph = onnx.load(path).graph
    w = {t.name: torch.from_numpy(numpy_helper.to_array(t).copy()) for t in graph.initializer}
    if graph.name == "vit":
        return Vit(w)
    attributes = {}
    for node in graph.node:
        if node.op_type == "Conv":
            a = {x.name: onnx.helper.get_attribute_value(x) for x in node.attribute}
            attributes[node.output[0]] = (a["strides"][0], a["pads"][0], a["group"])
    return Cnn(w, attributes)


def accuracy(model, x, y):
    model.eval()
    with torch.no_grad():
        found = torch.cat([model(part).argmax(1) for part in x.split(250)])
    return float((found == y).float().mean())


def main():
    path, train, valid, epochs, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    torch.manual_seed(0)
    torch.backends.quantized.engine = "fbgemm"
    read = lambda p: (torch.from_numpy(numpy.load(p)["x"]), torch.from_numpy(numpy.load(p)["y"]).long())
    (x, y), (vx, vy) = read(train), read(valid)
    model = load(path)
    float_accuracy = accuracy(model, vx, vy)
    model.train()
    model.qconfig = tq.get_default_qat_qconfig("fbgemm")
    model.fuse()
    tq.prepare_qat(model, inplace=True)
    epochs = int(epochs)
    steps = epochs * math.ceil(len(x) / BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=DECAY)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min((s + 1) / (steps / 20), 0.5 + 0.5 * math.cos(math.pi * s / steps))
    )
    seconds = []
    for epoch in range(epochs):
        model.train()
        if epoch == 2:
            model.apply(tq.disable_observer)
            model.apply(nn.intrinsic.qat.freeze_bn_stats)
        start = time.perf_counter()
        for part in torch.randperm(len(x)).split(BATCH):
            loss = F.cross_entropy(model(x[part]), y[part])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        seconds.append(time.perf_counter() - start)
    print(json.dumps({"torch": torch.__version__, "float": float_accuracy, "qat": accuracy(model, vx, vy), "seconds": seconds}))


if __name__ == "__main__":
    main()
