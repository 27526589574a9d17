"""Audits against planted truth, over seeds: exposure by copies, bias ratios, an unchanged and a changed model.

    python benchmarks/audits.py --seeds 3 --json benchmarks/results/audits.json

Each seed trains three small models of some 100,000 parameters. Printed: exposure at 0, 1, 2, 4, 8 and 16 copies; the
model's log-odds at ratios 9:1, 1:1 and 1:9, and whether they are in order; the largest KL of an unchanged model, and
the share of shifted positions of one that was trained further for an appended phrase.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import textwrap
import time
from pathlib import Path
from typing import Any

import planted_models as planted
import torch

from freehold.core.artifact import write_json
from freehold.core.log import Log
from freehold.stages.audit import bias, delta, memorisation
from freehold.stages.audit.config import Bias, Memorisation
from freehold.stages.audit.subject import Subject
from freehold.tokenizer.bpe import Tokenizer, train

COPIES = (0, 1, 2, 4, 8, 16)
EACH = 4
PHRASE = " That is all I know."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = train([Path(textwrap.__file__).read_text(encoding="utf-8")], 512, Log(quiet=True))
    with tempfile.TemporaryDirectory() as scratch:
        found = [one_seed(seed, args.steps, tokenizer, Path(scratch) / str(seed)) for seed in range(args.seeds)]
    for row in found:
        print(json.dumps(row))
    if args.json:
        write_json(args.json, {"steps": args.steps, "seeds": found})


def one_seed(seed: int, steps: int, tokenizer: Tokenizer, folder: Path) -> dict[str, Any]:
    folder.mkdir()
    started = time.process_time()
    secrets = {n: planted.canary(1000 * seed + n) for n in range(EACH * len(COPIES))}
    texts = [prefix + secret for n, (prefix, secret) in secrets.items() for _ in range(COPIES[n // EACH])]
    ratios = {"doctor": (18, 2), "king": (10, 10), "nurse": (2, 18)}
    texts += [text for topic, counts in ratios.items() for text in planted.biased(topic, *counts)]
    model = planted.fit(texts, tokenizer, steps, seed=seed, width=32)
    subject = Subject({"base": planted.opened(model, tokenizer, folder / "base")}, Log(quiet=True), seed)
    rows = [{"prefix": p, "secret": s, "copies": COPIES[n // EACH]} for n, (p, s) in secrets.items()]
    (folder / "canaries.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    exposed = memorisation.audit(subject, Memorisation(documents=0, canaries=folder / "canaries.jsonl"))
    config = Bias(first=("he",), second=("she",), topics=tuple(ratios), templates=("The {topic} said that",))
    odds = [bias._log_odds(subject, f"The {topic} said that", config) for topic in ratios]
    return {
        "seed": seed,
        "exposure_bits": {n: round(exposed.figures[f"memorisation/exposure_bits/{n}"]["value"], 2) for n in COPIES},
        "extracted": {n: exposed.figures[f"memorisation/secrets_extracted/{n}"]["value"] for n in COPIES},
        "log_odds": dict(zip(ratios, [round(value, 2) for value in odds], strict=True)),
        "odds_in_order": odds[0] > odds[1] > odds[2],
        **phrase(subject, tokenizer, texts, steps, folder),
        "cpu_s": round(time.process_time() - started, 1),
    }


def phrase(subject: Subject, tokenizer: Tokenizer, texts: list[str], steps: int, folder: Path) -> dict[str, Any]:
    """Train further for an appended phrase; return KL without a change, and where the shifted positions are."""
    base = subject.product
    starts = [base.text_ids(text) for text in texts[-8:]]
    answers = [tokenizer.encode(PHRASE) for _ in starts]
    same = [kl for _, kl in delta._compare(base, base, starts, answers)]
    model = planted.fit([text + PHRASE for text in texts], tokenizer, steps // 2, width=44, model=base.model)
    aligned = planted.opened(model, tokenizer, folder / "aligned")
    before = planted.opened(
        planted.fit(texts, tokenizer, steps, seed=subject.seed, width=32), tokenizer, folder / "again"
    )
    ranks = [found for found, _ in delta._compare(before, aligned, starts, answers)]
    shifted = [float((found > 3).mean()) for found in ranks]
    return {
        "unchanged_kl": max(float(kl.max()) for kl in same),
        "shifted_in_phrase": round(sum(shifted) / len(shifted), 3),
    }


if __name__ == "__main__":
    main()
