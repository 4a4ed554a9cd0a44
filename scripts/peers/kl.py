"""What llama-perplexity says about divergences, and the bits that a GGUF's linear layers take, as one line of JSON.

    python3 scripts/peers/kl.py NAME FILE.gguf LOG
"""

import json
import re
import sys

from gguf import GGUFReader

LINEARS = re.compile(r"blk\.\d+\.(attn_(q|k|v|output)|ffn_(gate|up|down))\.weight")


def main(name, file, log):
    linears = [t for t in GGUFReader(file).tensors if LINEARS.fullmatch(t.name)]
    bits = 8 * sum(int(t.n_bytes) for t in linears) / sum(int(t.n_elements) for t in linears)
    text = open(log, encoding="utf-8", errors="replace").read()

    def number(name):
        found = re.search(rf"^{name}\s*:\s*(-?[\d.]+)", text, re.MULTILINE)
        return float(found[1]) if found else None

    same = number("Same top p")

    print(json.dumps({
        "peer": f"llama.cpp {name}",
        "bits_per_linear_weight": round(bits, 4),
        "ppl": number(r"Mean PPL\(Q\)"),
        "reference_ppl": number(r"Mean PPL\(base\)"),
        "ppl_ratio": number(r"Mean PPL\(Q\)/PPL\(base\)"),
        "kl": {"mean": number(r"Mean\s+KLD"), "p99": number(r"99\.0%\s+KLD")},
        "same_top1": same and round(same / 100, 5),
    }))


main(*sys.argv[1:])
