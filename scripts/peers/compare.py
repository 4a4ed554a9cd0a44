"""nibble and llama.cpp side by side: the same weights, runs taken in turns, medians and ratios.

    python3 scripts/peers/compare.py --nibble BIN --llama-bench BIN --rounds 5 \\
        --model 1B DIR GGUF --test pp512 --test tg64 --test tg32@d4096 --threads 1,2

One round runs every test of every model once with nibble and once with llama.cpp, so that what else the machine does
meets both alike. Prints a Markdown table: medians over rounds, the ratio of medians, nibble's share of the limits that
it measured in the same run, and peak memory.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys


def run(command):
    """Standard output, peak memory in bytes."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    out = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status != 0:
        sys.exit(f"{' '.join(command)}: status {status}")
    return out, usage.ru_maxrss * 1024


def parse(test):
    """pp512, tg128, tg32@d4096 -> prompt, generated, depth."""
    match = re.fullmatch(r"(pp|tg)(\d+)(?:@d(\d+))?", test)
    if not match:
        sys.exit(f"test {test}: wanted pp512, tg128 or tg32@d4096")
    kind, count, depth = match.groups()
    return (count, "0", depth) if kind == "pp" else ("0", count, depth)


def nibble(binary, model, test, threads):
    prompt, generated, depth = parse(test)
    command = [binary, "bench", model, "-p", prompt, "-n", generated, "-t", threads, "-r", "1", "--json"]
    out, memory = run(command + (["-d", depth] if depth else []))
    row = json.loads(out)
    row = row["rows"][0] if isinstance(row, dict) else row[0]
    share = row["int8_share"] if test.startswith("pp") else row["bandwidth_share"]
    return row["tokens_per_second"], share, memory


def llama(binary, model, test, threads):
    prompt, generated, depth = parse(test)
    command = [binary, "-m", model, "-p", prompt, "-n", generated, "-t", threads, "-r", "1", "-o", "json"]
    out, memory = run(command + (["-d", depth] if depth else []))
    return json.loads(out)[0]["avg_ts"], memory


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--nibble", required=True)
    parser.add_argument("--llama-bench", required=True)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--test", action="append", required=True)
    parser.add_argument("--model", action="append", nargs=3, metavar=("NAME", "DIR", "GGUF"), required=True)
    options = parser.parse_args()
    cases = [
        (model, test, threads)
        for model in map(tuple, options.model)
        for test in options.test
        for threads in options.threads.split(",")
    ]
    ours, theirs = {case: [] for case in cases}, {case: [] for case in cases}
    for done in range(options.rounds):
        for case in cases:
            (_, directory, gguf), test, threads = case
            ours[case].append(nibble(options.nibble, directory, test, threads))
            theirs[case].append(llama(options.llama_bench, gguf, test, threads))
        print(f"round {done + 1} of {options.rounds}", file=sys.stderr)
    print("| model | test | threads | nibble t/s | llama.cpp t/s | ratio | nibble's share of the limit | MB, nibble / llama.cpp |")
    print("|---|---|---|---|---|---|---|---|")
    for case in cases:
        (name, _, _), test, threads = case
        mine = statistics.median(row[0] for row in ours[case])
        peer = statistics.median(row[0] for row in theirs[case])
        share = statistics.median(row[1] for row in ours[case])
        memory = f"{max(row[2] for row in ours[case]) / 1e6:.0f} / {max(row[1] for row in theirs[case]) / 1e6:.0f}"
        limit = "int8 multiply-adds" if test.startswith("pp") else "read bandwidth"
        print(f"| {name} | {test} | {threads} | {mine:.1f} | {peer:.1f} | {mine / peer:.2f} | {share:.0%} of {limit} | {memory} |")


if __name__ == "__main__":
    main()
