"""nibble and llama.cpp side by side: the same weights, runs taken in turns, medians and ratios.

    python3 scripts/peers/compare.py --nibble BIN --peers "$(scripts/bench_peers.sh)" --rounds 5 \\
        --model 1B DIR GGUF --test pp512 --test tg64 --test tg32@d4096 --test tg32x4 --test load --threads 1,2

pp512: a prompt of 512 tokens. tg64: 64 tokens one after another; tg32@d4096: after 4096 others; tg32x4: of 4 sequences
together. load: a whole process from its start to its first token, files in the page cache, and its peak memory.

One round runs every test of every model once with nibble and once with llama.cpp, so that what else the machine does
meets both alike. Prints a Markdown table: medians over rounds, the ratio of medians, nibble's share of the limits that
it measured in the same run, and peak memory. nibble's benchmark holds 256 MiB while it measures bandwidth: only the
memory of `load` tells what a model takes.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import time


class Test:
    """A test by its name, and the flags it means."""

    def __init__(self, name):
        match = re.fullmatch(r"load|(pp|tg)(\d+)(?:@d(\d+))?(?:x(\d+))?", name)
        if not match or (match[4] and (match[1] == "pp" or match[3])):
            sys.exit(f"test {name}: wanted pp512, tg128, tg32@d4096, tg32x4 or load")
        self.name, (kind, count, depth, sequences) = name, match.groups()
        self.prompt, self.generate = (count, "0") if kind == "pp" else ("0", count)
        self.depth, self.sequences = depth, sequences


def run(command, env=None):
    """Standard output, seconds, peak memory in bytes."""
    started = time.monotonic()
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=env
    )
    out = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status != 0:
        sys.exit(f"{' '.join(command)}: status {status}")
    return out, time.monotonic() - started, usage.ru_maxrss * 1024


def nibble(options, model, test, threads):
    """Tokens a second, or the seconds of a load; share of the limit; peak memory."""
    if test.name == "load":
        _, seconds, memory = run([options.nibble, "generate", model, "-p", "Once", "-n", "1", "-t", threads, "--quiet"])
        return seconds, None, memory
    command = [options.nibble, "bench", model, "-p", test.prompt, "-n", test.generate, "-t", threads, "-r", "1", "--json"]
    command += ["-d", test.depth] if test.depth else []
    command += ["--parallel", test.sequences] if test.sequences else []
    out, _, memory = run(command)
    row = json.loads(out)
    row = row["rows"][0] if isinstance(row, dict) else row[0]
    return row["tokens_per_second"], row["int8_share" if test.prompt != "0" else "bandwidth_share"], memory


def llama(options, model, test, threads):
    """Tokens a second, or the seconds of a load; peak memory."""
    tool = lambda name: os.path.join(options.peers, name)
    env = dict(os.environ, OMP_WAIT_POLICY="active") if options.active else None
    if test.name == "load":
        flags = ["-no-cnv", "--no-warmup", "-p", "Once", "-n", "1", "-t", threads, "--no-display-prompt", "-c", "512"]
        _, seconds, memory = run([tool("llama-completion"), "-m", model, *flags], env)
        return seconds, memory
    if test.sequences:
        flags = ["-c", "8192", "-npp", "1", "-ntg", test.generate, "-npl", test.sequences, "-t", threads, "-tb", threads]
        out, _, memory = run([tool("llama-batched-bench"), "-m", model, *flags, "--output-format", "jsonl"], env)
        rows = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
        return rows[0]["speed_tg"], memory
    command = [tool("llama-bench"), "-m", model, "-p", test.prompt, "-n", test.generate, "-t", threads, "-r", "1"]
    out, _, memory = run(command + ["-o", "json"] + (["-d", test.depth] if test.depth else []), env)
    return json.loads(out)[0]["avg_ts"], memory


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--nibble", required=True)
    parser.add_argument("--peers", required=True, help="folder of llama-bench, llama-batched-bench, llama-completion")
    parser.add_argument("--active", action="store_true", help="run llama.cpp with OMP_WAIT_POLICY=active")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--test", action="append", required=True, type=Test)
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
            ours[case].append(nibble(options, directory, test, threads))
            theirs[case].append(llama(options, gguf, test, threads))
        print(f"round {done + 1} of {options.rounds}", file=sys.stderr)
    print("| model | test | threads | nibble | llama.cpp | ratio | nibble's share of the limit | MB, nibble / llama.cpp |")
    print("|---|---|---|---|---|---|---|---|")
    for case in cases:
        (name, _, _), test, threads = case
        mine = statistics.median(row[0] for row in ours[case])
        peer = statistics.median(row[0] for row in theirs[case])
        memory = f"{max(row[2] for row in ours[case]) / 1e6:.0f} / {max(row[1] for row in theirs[case]) / 1e6:.0f}"
        if test.name == "load":
            print(f"| {name} | load | {threads} | {mine:.2f} s | {peer:.2f} s | {peer / mine:.2f} | | {memory} |")
            continue
        share = statistics.median(row[1] for row in ours[case])
        limit = "int8 multiply-adds" if test.prompt != "0" else "read bandwidth"
        speeds = f"{mine:.1f} t/s | {peer:.1f} t/s | {mine / peer:.2f}"
        print(f"| {name} | {test.name} | {threads} | {speeds} | {share:.0%} of {limit} | {memory} |")


if __name__ == "__main__":
    main()
