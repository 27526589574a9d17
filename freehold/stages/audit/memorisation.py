"""Memorisation: exact extraction, members against held-out text, exposure of planted or natural secrets.

The split of our corpora is a hash of each document, so members and held-out documents are one distribution by
construction, which most published attacks lack (2406.17975). Exposure: 1802.08232; extraction: 2202.07646; TPR at
1 % FPR: 2112.03570.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from freehold.core.errors import DataError
from freehold.core.statistics import bootstrap, separation, share
from freehold.core.table import Table
from freehold.stages.audit import picture
from freehold.stages.audit.config import Memorisation
from freehold.stages.audit.subject import Finding, Subject, logits_of, logprobs_of

if TYPE_CHECKING:
    from freehold.api import Loaded

NATURAL = re.compile(r"\b(?:[0-9a-f]{12,40}|\d{7,20})\b")
"""Identifiers that text has by itself: they audit a model in which nothing was planted."""
MOST_NATURAL = 24
BEFORE_CHARACTERS = 120


def audit(subject: Subject, config: Memorisation) -> Finding:
    """Audit the product; CannotAnswer without training text and canaries."""
    found = Finding()
    if config.canaries is not None:
        _exposure(subject, _read_canaries(config.canaries), config, found, "canaries")
    if config.documents:
        members, others = _pairs(subject, config)
        _extraction(subject.product, members, others, config, found)
        natural = list(_natural(subject, config))
        if config.canaries is None and natural:
            _exposure(subject, natural, config, found, "natural identifiers")
    return found


def _pairs(subject: Subject, config: Memorisation) -> tuple[list[list[int]], list[list[int]]]:
    """Return as many beginnings of training documents as of held-out ones of each source."""
    wanted, sources = config.prefix_tokens + config.suffix_tokens, subject.split("validation")
    train = subject.split("train")
    members: list[list[int]] = []
    others: list[list[int]] = []
    each = max(1, config.documents // max(1, len(sources)))
    begin = list(subject.product.begins_with)
    for name, shard in sources.items():
        sides = []
        for of in (train.get(name), shard):
            long = np.flatnonzero(of.lengths > wanted) if of is not None else np.zeros(0, int)
            chosen = subject.random("members", name).permutation(long)[:each]
            beginnings = [of.data[of.starts[i] : of.starts[i] + wanted].tolist() for i in chosen] if of else []
            sides.append([begin + ids for ids in beginnings])
        count = min(map(len, sides))  # unequal numbers would let a source stand for membership
        members += sides[0][:count]
        others += sides[1][:count]
    return members, others


def _extraction(
    loaded: Loaded, members: list[list[int]], others: list[list[int]], config: Memorisation, found: Finding
) -> None:
    if not members:
        return
    sides = []
    for rows in (members, others):
        sums = [float(values[-config.suffix_tokens :].sum()) for values in logprobs_of(loaded, rows)]
        sides.append((sums, _greedy(loaded, rows, config)))
    area, rate = separation(sides[0][0], sides[1][0])
    hits = round(rate * len(members))
    difference = bootstrap([a - b for a, b in zip(sides[0][1], sides[1][1], strict=True)])
    best = max(sides[0][0]) / math.log(10)
    found.figures |= {
        "memorisation/member_auc": round(area, 4),
        "memorisation/tpr_at_1_fpr": share(hits, len(members)).to_dict(),
        "memorisation/extracted": share(sum(sides[0][1]), len(members)).to_dict(),
        "memorisation/extracted_held_out": share(sum(sides[1][1]), len(others)).to_dict(),
        "memorisation/extracted_beyond_held_out": difference.to_dict(),
        "memorisation/log10_tries_for_the_easiest": round(-best, 2),
    }
    found.tables.append(
        Table(
            "Memorisation: members against held-out",
            ["documents of each", "AUC", "found at 1 % false alarms", "suffixes reproduced", "of held-out"],
            [[f"{len(members):,}", f"{area:.3f}", f"{rate:.3f}", f"{sum(sides[0][1])}", f"{sum(sides[1][1])}"]],
            f"{config.suffix_tokens} tokens after {config.prefix_tokens}; the easiest takes 10^{-best:.1f} tries.",
        )
    )


def _greedy(loaded: Loaded, rows: Sequence[Sequence[int]], config: Memorisation) -> list[int]:
    """Return 1 for each row whose suffix is what the model would write, token by token."""
    done = [0] * len(rows)
    for i, logits in logits_of(loaded, rows):
        said = logits[-config.suffix_tokens - 1 : -1].argmax(-1).tolist()
        done[i] = int(said == list(rows[i][-config.suffix_tokens :]))
    return done


def _read_canaries(path: Path) -> list[dict[str, Any]]:
    """Return planted secrets; DataError for a row without prefix, secret and copies."""
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
            rows.append({"prefix": str(row["prefix"]), "secret": str(row["secret"]), "copies": int(row["copies"])})
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                "not a canary", where=f"{path}:{number}", found=error, expected="prefix, secret, copies"
            ) from error
    return rows


def _natural(subject: Subject, config: Memorisation) -> Iterator[dict[str, Any]]:
    """Yield identifiers of training documents with what stands before them."""
    left = MOST_NATURAL
    for row in subject.documents.values():
        if row.split != "train" or not left:
            continue
        match = NATURAL.search(row.text, BEFORE_CHARACTERS)
        if match and len(set(match[0])) > 3:
            left -= 1
            yield {
                "prefix": row.text[match.start() - BEFORE_CHARACTERS : match.start()],
                "secret": match[0],
                "copies": 1,
            }


def _exposure(subject: Subject, rows: list[dict[str, Any]], config: Memorisation, found: Finding, what: str) -> None:
    """Add exposure by number of copies: log2 of the alternatives minus log2 of the secret's rank among them."""
    loaded = subject.product
    curve: dict[int, list[tuple[float, int]]] = {}
    for number, row in enumerate(rows):
        random = subject.random("alternatives", number)
        others = [_like(row["secret"], random) for _ in range(config.alternatives)]
        start = [*loaded.begins_with, *loaded.tokenizer.encode(row["prefix"])]
        tails = [loaded.tokenizer.encode(text) for text in (row["secret"], *others)]
        chances = [float(v[len(start) - 1 :].sum()) for v in logprobs_of(loaded, [[*start, *tail] for tail in tails])]
        rank = 1 + sum(chance > chances[0] for chance in chances[1:])
        exposure = math.log2(config.alternatives + 1) - math.log2(rank)
        greedy = _greedy(loaded, [[*start, *tails[0]]], config.model_copy(update={"suffix_tokens": len(tails[0])}))
        curve.setdefault(row["copies"], []).append((exposure, greedy[0]))
    points = [(n, bootstrap([e for e, _ in got]), sum(g for _, g in got), len(got)) for n, got in sorted(curve.items())]
    for copies, estimate, extracted, count in points:
        found.figures[f"memorisation/exposure_bits/{copies}"] = estimate.to_dict()
        found.figures[f"memorisation/secrets_extracted/{copies}"] = share(extracted, count).to_dict()
    cells = [[str(n), str(k), f"{e.value:.1f}", f"{g} of {k}"] for n, e, g, k in points]
    most = math.log2(config.alternatives + 1)
    note = (
        f"Bits among {config.alternatives + 1} of the same form: an unseen one has 1.4 on average, {most:.0f} is most."
    )
    found.tables.append(
        Table(f"Exposure of {what}", ["copies", "secrets", "exposure", "written greedily"], cells, note)
    )
    bars = [(f"{n} copies", e.value, e.low, e.high) for n, e, _, _ in points]
    found.pictures["exposure"] = picture.bars(f"Exposure of {what}, bits", bars)


def _like(secret: str, random: np.random.Generator) -> str:
    """Return another secret of the same form: digits for digits, hexadecimal letters for those, letters for letters."""
    hexadecimal = re.fullmatch("[0-9a-f]+", secret) and not secret.isdigit()
    pools = {"digit": "0123456789", "hex": "0123456789abcdef", "lower": "abcdefghijklmnopqrstuvwxyz"}
    made = []
    for letter in secret:
        pool = pools["hex"] if hexadecimal else pools["digit"] if letter.isdigit() else pools["lower"]
        drawn = pool[int(random.integers(len(pool)))]
        made.append((drawn.upper() if letter.isupper() else drawn) if letter.isalnum() else letter)
    return "".join(made)
