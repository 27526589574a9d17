"""Quantizers: the same bits as ggml, and how fast on one core. Writes the golden hashes with --golden.

    python benchmarks/quantize.py [--rounds 5] [--out benchmarks/results/quantize.json]

Each round quantizes the same weights with ggml and with ours, in turn, one thread each. ggml gets fewer rows where it
is slow; the figures are per byte of bfloat16.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from common import environment, interleaved, middle, write

from freehold.kernels import quantize
from freehold.kernels.quantize import TYPES

TESTS = Path(__file__).parents[1] / "tests" / "kernels"
sys.path.insert(0, str(TESTS))
import ggml  # noqa: E402

WIDTH, ROWS, SHARE = 2048, 1024, 4


def golden() -> dict[str, dict[str, str]]:
    """Return ggml's own hash of all weights of the tests, by type and kind of importance."""
    result: dict[str, dict[str, str]] = {}
    for kind in TYPES:
        for name in ggml.IMPORTANCE:
            hashed, weights = hashlib.sha256(), ggml.importance(name)
            for _, rows in ggml.distributions():
                hashed.update(ggml.quantize(kind, rows, weights).tobytes())
            result.setdefault(kind, {})[name] = hashed.hexdigest()
    return result


def compare(kind: str, importance: str, rounds: int) -> dict[str, Any]:
    """Time one type and kind of importance; the bits are compared first."""
    narrow = ggml.round_to_bf16(np.random.default_rng(0).standard_normal((ROWS, WIDTH)) * 0.02)
    few = np.ascontiguousarray(quantize.widen(narrow[: ROWS // SHARE]))
    weights = ggml.importance(importance, WIDTH)
    if not np.array_equal(quantize.quantize(kind, narrow[: len(few)], weights), ggml.quantize(kind, few, weights)):
        raise SystemExit(f"{kind} with importance {importance}: other bits than ggml")
    found = interleaved(
        {
            "ours": lambda: quantize.quantize(kind, narrow, weights),
            "ggml": lambda: ggml.quantize(kind, few, weights),
        },
        rounds,
    )
    pairs = zip(found["ours"], found["ggml"], strict=True)
    return {
        "ours_gb_s": middle(narrow.nbytes / t["seconds"] / 1e9 for t in found["ours"]),
        "ggml_gb_s": middle(narrow.nbytes / SHARE / t["seconds"] / 1e9 for t in found["ggml"]),
        "ratio": middle(theirs["seconds"] * SHARE / ours["seconds"] for ours, theirs in pairs),
        "foreign_cores": middle(t["foreign_cores"] for times in found.values() for t in times),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--golden", action="store_true", help="write ggml's hashes for the tests instead")
    args = parser.parse_args()
    if args.golden:
        (TESTS / "quantize_golden.json").write_text(json.dumps(golden(), indent=1) + "\n", encoding="utf-8")
        return
    result: dict[str, Any] = {**environment("xllamacpp"), "quantizer": quantize.describe(), "types": {}}
    for kind in TYPES:
        for importance in ("none", "real"):
            row = compare(kind, importance, args.rounds)
            result["types"].setdefault(kind, {})[importance] = row
            ratio = row["ratio"]
            print(
                f"{kind} {importance:5} ours {row['ours_gb_s']['median']:.3f} GB/s, ggml "
                f"{row['ggml_gb_s']['median']:.3f}: {ratio['median']:.2f}x ({ratio['least']:.2f}-{ratio['most']:.2f})",
                flush=True,
            )
    write(args.out, result)


if __name__ == "__main__":
    main()
