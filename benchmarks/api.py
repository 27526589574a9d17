"""Decode speed through `freehold.load` next to the command line's, in processes that take turns.

    python benchmarks/api.py MODEL [--rounds 5] [--tokens 128]

Four ways to decode one stream of the same model:
  command   a process that `freehold chat` or `serve` would be: the environment is set before it starts
  load      python: import freehold; freehold.load(MODEL)
  torch     python: import torch first
  plain     python: import torch first, PyTorch's own number of threads (how a user's process was before)
Each round runs all of them, forwards and backwards in turn; the ratio is taken within a round.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

from freehold.core.environment import SETTINGS

FIRST = {
    "command": "",
    "load": "",
    "torch": "import torch",
    "plain": "import torch; options = {'threads': torch.get_num_threads()}",
}
CODE = """
import json, sys, time
options = {{}}
{first}
import freehold
model = freehold.load(sys.argv[1], device="cpu", **options)
from freehold.infer.sampler import Sampling
import torch
tokens = int(sys.argv[2])
def once():
    began = time.perf_counter()
    found = [t.id for t in model.engine.stream([0] * 16, Sampling(temperature=0, max_tokens=tokens))]
    return tokens / (time.perf_counter() - began), found
once()
runs = [once() for _ in range(3)]
print(json.dumps({{"rate": max(r for r, _ in runs), "threads": torch.get_num_threads(), "ids": runs[0][1]}}))
"""


def measure(way: str, model: Path, tokens: int) -> dict[str, object]:
    """Return tokens a second, threads and ids of one process."""
    environment = {k: v for k, v in os.environ.items() if k not in SETTINGS and k != "OMP_NUM_THREADS"}
    if way == "command":
        environment |= SETTINGS
    command = [sys.executable, "-c", CODE.format(first=FIRST[way]), str(model), str(tokens)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    found: dict[str, object] = json.loads(done.stdout)
    return found


def main() -> None:
    """Print the rates, and the ratios to the command line's with their spread."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=128)
    args = parser.parse_args()
    rates: dict[str, list[float]] = {way: [] for way in FIRST}
    ids, threads = set(), {}
    for number in range(args.rounds):
        for way in list(FIRST) if number % 2 == 0 else reversed(FIRST):
            found = measure(way, args.model, args.tokens)
            rates[way].append(float(str(found["rate"])))
            threads.setdefault(way, []).append(found["threads"])
            ids.add(str(found["ids"]))
    for way, values in rates.items():
        ratios = [a / b for a, b in zip(values, rates["command"], strict=True)]
        print(
            f"{way:8} {statistics.median(values):7.1f} tokens/s, ratio {statistics.median(ratios):.2f} "
            f"[{min(ratios):.2f}, {max(ratios):.2f}], threads {threads[way]}"
        )
    print(f"the same tokens in all: {len(ids) == 1}; load {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
