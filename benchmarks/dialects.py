"""Cut answers with tool calls in many ways and compare the events; the test does some thousands, this as many as asked.

    python benchmarks/dialects.py [--cuts 100000] [--seed 0]

Each dialect gets that number of cuts: bytes, pieces of 2 to 7 bytes, one or two cuts, random cuts; all of them against
the answer that comes at a time, which is what a request without streaming gets.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "tokenizer"))

from answers import TEXTS, TOOLS, cuts, joined, parse, parse_tokens


def main() -> None:
    """Print how many cuts of each dialect gave other events; exit 1 if one did."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cuts", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    wrong = 0
    for dialect, texts in TEXTS.items():
        began, draws = time.monotonic(), random.Random(args.seed)
        jobs = [
            (cuts(text, draws), joined(parse([text], **options)), options)
            for text in texts
            for policy in (True, False)
            for options in [{"dialect": dialect, "tools": TOOLS, "calls_in_reasoning": policy}]
        ]
        differ = 0
        for number in range(args.cuts):
            ways, expected, options = jobs[number % len(jobs)]
            differ += joined(parse_tokens(next(ways), **options)) != expected
        print(f"{dialect}: {args.cuts:,} cuts of {len(texts)} texts, {differ} differ, {time.monotonic() - began:.0f} s")
        wrong += differ
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
