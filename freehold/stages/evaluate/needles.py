"""What a model finds in a long text: needles with known truth, and bits per byte by position; needs no network."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from freehold.core.errors import ConfigError
from freehold.core.log import Log
from freehold.core.statistics import wilson
from freehold.core.table import Table
from freehold.data.needles import Question, held_out_question
from freehold.stages.evaluate.config import NeedlesConfig
from freehold.stages.evaluate.text import HeldOut

if TYPE_CHECKING:
    from freehold.api import Loaded

Answer = Callable[[Sequence[Question]], list[list[int]]]
"""A runtime: the ids it continues each prompt with, greedily, as many as the answer has."""
DEPTHS = 5
"""Depths at which the fact stands in turn: from the start of the text to its end."""


def questions(
    encode: Any, text: np.ndarray, length: int, keys: int, items: int, seed: int, wordings: int = 4
) -> list[Question]:
    """Return the questions of one cell; each has another stretch of the text around it."""
    found = []
    for item in range(items):
        rng = np.random.default_rng([seed, length, keys, item])
        # Another beginning for each question, as long as the text allows it.
        start = int(rng.integers(max(1, len(text) - length)))
        depth = (item % DEPTHS) / (DEPTHS - 1)
        found.append(held_out_question(rng, encode, text[start:], length, keys, depth, wordings))
    return found


def accuracy(asked: Sequence[Question], answered: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Return how many values were found, with a 95 % Wilson interval, and the same by depth of the fact."""
    right = [list(answer[: len(q.answer)]) == q.answer for q, answer in zip(asked, answered, strict=True)]
    low, high = wilson(sum(right), len(right))
    depths = {}
    for depth in sorted({q.depth for q in asked}):
        mine = [ok for q, ok in zip(asked, right, strict=True) if q.depth == depth]
        depths[f"{depth:g}"] = round(sum(mine) / len(mine), 4)
    return {
        "items": len(right),
        "correct": sum(right),
        "accuracy": round(sum(right) / len(right), 6),
        "low": round(low, 6),
        "high": round(high, 6),
        "depths": depths,
    }


def find_needles(loaded: Loaded, texts: HeldOut, config: NeedlesConfig, log: Log, name: str) -> dict[str, Any]:
    """Return accuracy by length and number of keys, and bits per byte by position.

    Raises ConfigError for a length beyond the context that the model states.
    """
    from freehold.infer.sampler import Sampling  # reports read the tables here without torch

    limit, longest = loaded.config.max_position_embeddings, max(config.lengths)
    begin = list(loaded.begins_with)
    if longest + len(begin) > limit:
        raise ConfigError(
            "needles are asked beyond the model's context",
            where="evaluate.needles.lengths",
            found=longest,
            expected=f"at most {limit - len(begin)} of {name}",
        )
    text = _joined(loaded, texts)
    encode = loaded.tokenizer.encode

    def answer(asked: Sequence[Question]) -> list[list[int]]:
        prompts = [[*begin, *question.prompt] for question in asked]
        sampling = [Sampling(temperature=0.0, max_tokens=len(question.answer)) for question in asked]
        return [made.ids for made in loaded.engine.generate(prompts, sampling)]

    cells: dict[str, Any] = {}
    for length in config.lengths:
        for keys in config.keys:
            asked = questions(encode, text, length, keys, config.items, config.seed, config.wordings)
            cells.setdefault(str(length), {})[str(keys)] = cell = accuracy(asked, answer(asked))
            log.say(f"  {name}: {cell['correct']} of {cell['items']} needles at {length:,} tokens, {keys} keys")
    return {"needles": cells, "positions": bits_by_position(loaded, text, longest, config.position_rows)}


def bits_by_position(loaded: Loaded, text: np.ndarray, longest: int, rows: int) -> dict[str, float]:
    """Return bits per byte of plain held-out text by position, in octaves; it should not rise past the trained length.

    Rows are stretches of the joined text of `longest` tokens, as many as there are, at most `rows`.
    """
    begin, size = list(loaded.begins_with), longest
    found = [text[at : at + size].tolist() for at in range(0, len(text) - size + 1, size)][:rows]
    if not found:
        return {}
    widths = np.array([[len(loaded.tokenizer.token_bytes(i)) for i in row] for row in found])
    scores = loaded.engine.score([[*begin, *row] for row in found])
    bits = -np.array([values[len(begin) :] for values in scores]) / math.log(2)
    edges = [0, *(1 << n for n in range(6, size.bit_length()) if 1 << n < size), size]
    return {
        f"{low}-{high}": round(float(bits[:, low:high].sum() / widths[:, low:high].sum()), 4)
        for low, high in zip(edges, edges[1:], strict=False)
    }


def _joined(loaded: Loaded, texts: HeldOut) -> np.ndarray:
    """Return the held-out text of all sources as one run of ids."""
    encoded = loaded.tokenizer.encode_batch([text for rows in texts.values() for text, _ in rows])
    return np.array([i for ids in encoded for i in ids], np.int64)


def needle_tables(results: dict[str, Any]) -> list[Table]:
    """Return accuracy by length and keys, and bits per byte by position; none when nothing was asked for."""
    found = {name: r["long"] for name, r in results["checkpoints"].items() if "long" in r}
    if not found:
        return []
    first = next(iter(found.values()))
    cells = [(length, keys) for length, by_keys in first["needles"].items() for keys in by_keys]
    rows = [
        [f"{int(length):,} tokens, {keys} keys", str(first["needles"][length][keys]["items"])]
        + [_interval(r["needles"][length][keys]) for r in found.values()]
        for length, keys in sorted(cells, key=lambda cell: (int(cell[0]), int(cell[1])))
    ]
    shown = [
        Table("Needles", ["context", "items", *found], rows, "Values found, in percent, with 95 % Wilson intervals.")
    ]
    places = sorted(first["positions"], key=lambda place: int(place.partition("-")[0]))
    if places:
        rows = [[place, *(f"{r['positions'][place]:.3f}" for r in found.values())] for place in places]
        shown.append(Table("Bits per byte by position", ["tokens", *found], rows, "Held-out text, joined."))
    return shown


def _interval(cell: dict[str, Any]) -> str:
    return f"{100 * cell['accuracy']:.1f} [{100 * cell['low']:.1f}–{100 * cell['high']:.1f}]"
