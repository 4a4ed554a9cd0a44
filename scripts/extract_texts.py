"""Writes calib.txt and eval.txt from the unpacked works: extract_texts.py WORKS OUT. Same input, same bytes."""

import glob
import hashlib
import os
import re
import sys

EXPECTED = {"eval.txt": "ab3235d706252b5936acf2065253f5f378cffffdd599a5e2265700a7267dccdb", "calib.txt": "c96bd82654ee9a826b10ec89b655353ba666da4377804f6adc7deec58dd16ee1"}


def news(folder):
    """One story a line, in the file's order."""
    with open(os.path.join(folder, "lee_background.cor"), encoding="utf-8") as f:
        stories = [" ".join(line.split()) for line in f]
    return "\n\n".join(s for s in stories if s) + "\n"


def help_texts(folder):
    """The prose paragraphs of every help text, files in alphabetical order."""
    kept = []
    for path in sorted(glob.glob(os.path.join(folder, "**", "*.txt"), recursive=True)):
        with open(path, encoding="utf-8") as f:
            text = f.read()
        for paragraph in re.split(r"\n\s*\n", text):
            lines = [line.strip() for line in paragraph.splitlines()]
            if any(re.fullmatch(r"[-=~^+#*\"'. |]{3,}", line) for line in lines):
                continue  # a heading or a table
            joined = re.sub(r":\w+:`([^`]*)`", r"\1", " ".join(lines)).replace("``", "")
            joined = " ".join(joined.split())
            plain = sum(c.isalpha() or c in " ,.;'()" for c in joined)
            if len(joined.split()) >= 12 and plain >= 0.93 * len(joined) and joined[-1] in ".:":
                kept.append(joined)
    return "\n\n".join(kept) + "\n"


def main():
    works, out = sys.argv[1], sys.argv[2]
    os.makedirs(out, exist_ok=True)
    for name, text in [
        ("eval.txt", news(os.path.join(works, "lee"))),
        ("calib.txt", help_texts(os.path.join(works, "mercurial"))),
    ]:
        data = text.encode()
        found = hashlib.sha256(data).hexdigest()
        if found != EXPECTED[name]:
            sys.exit(f"{name}: sha256 {found}, expected {EXPECTED[name]}: the extraction changed")
        path = os.path.join(out, name)
        with open(path + ".part", "wb") as f:
            f.write(data)
        os.replace(path + ".part", path)
        print(f"    {path}: {len(data)} bytes", file=sys.stderr)


main()
