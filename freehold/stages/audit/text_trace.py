"""Text trace: the longest spans of an answer that are in the token shards, with document, licence and steps.

All runs of tokens that an answer and a shard share are on diagonals (place in the shard minus place in the answer), so
hashing every 8 tokens and sorting the few places that match finds them all, without an index on disk. OLMoTrace
(2504.07096) does this with a suffix array over trillions of tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from freehold.stages.audit.subject import Subject
from freehold.text.words import Lookup, read_batch, read_words, split_words

RUN = 8
"""Tokens, or words, that must agree before a span is looked at."""
_FACTOR = np.uint64(0x9E3779B97F4A7C15)
MOST_PLACES = 3


@dataclass(frozen=True)
class Place:
    """One document that holds a span."""

    source: str
    document: str
    offset: int
    """Tokens, or words, from the document's beginning."""
    path: str = ""
    licence: str = ""
    steps: dict[str, list[int]] = field(default_factory=dict)
    """By training stage: first step, last step, number of steps that saw the document."""


@dataclass(frozen=True)
class Span:
    """A stretch of the answer that the training text holds."""

    start: int
    length: int
    text: str
    places: tuple[Place, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON-able data."""
        return asdict(self)


def trace(subject: Subject, ids: Sequence[int], least: int = RUN) -> list[Span]:
    """Return the maximal spans of at least `least` tokens, the longest first, none inside another."""
    found = []
    for source, shard in subject.split("train").items():
        for at, start, length in runs(np.asarray(shard.data), np.asarray(ids)):
            if length >= least:
                found.append((start, length, source, shard, at))
    spans = []
    for start, length, places in _maximal([(s, n, (source, shard, at)) for s, n, source, shard, at in found]):
        shown = []
        for source, shard, at in places[:MOST_PLACES]:
            number = shard.document_at(at)
            shown.append(_place(subject, source, shard.ids[number], at - int(shard.starts[number])))
        text = subject.product.tokenizer.decode(list(ids[start : start + length]))
        spans.append(Span(start, length, text, tuple(shown)))
    return spans


def trace_words(subject: Subject, text: str, least: int = RUN) -> list[Span]:
    """Return the same over words: line breaks, case and punctuation do not count."""
    words, asked = split_words(text), read_words(text).hashes
    found = []
    rows = [row for row in subject.documents.values() if row.split == "train"]
    for row, read in zip(rows, read_batch([row.text for row in rows]), strict=True):
        for at, start, length in runs(read.hashes, asked):
            if length >= least:
                found.append((start, length, (row.source, row.id, at)))
    return [
        Span(
            start,
            length,
            " ".join(words[start : start + length]),
            tuple(_place(subject, source, document, at) for source, document, at in places[:MOST_PLACES]),
        )
        for start, length, places in _maximal(found)
    ]


def runs(text: np.ndarray, query: np.ndarray) -> Iterator[tuple[int, int, int]]:
    """Yield (place in the text, place in the query, length) of each maximal run of RUN or more equal items."""
    if min(len(text), len(query)) < RUN:
        return
    asked = _hashes(query)
    order = np.argsort(asked, kind="stable")
    sorted_asked, unique = asked[order], np.unique(asked)
    hashes = _hashes(text)
    at, _ = Lookup(unique).find(hashes)
    if not len(at):
        return
    hashes = hashes[at]
    first, last = np.searchsorted(sorted_asked, hashes, "left"), np.searchsorted(sorted_asked, hashes, "right")
    counts = last - first
    place = np.repeat(at, counts)
    offset = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    asked_at = order[np.repeat(first, counts) + offset]
    diagonal = place - asked_at
    by = np.lexsort((asked_at, diagonal))
    diagonal, asked_at = diagonal[by], asked_at[by]
    breaks = np.flatnonzero((np.diff(diagonal) != 0) | (np.diff(asked_at) != 1)) + 1
    for start, end in zip([0, *breaks], [*breaks, len(diagonal)], strict=True):
        yield int(diagonal[start] + asked_at[start]), int(asked_at[start]), int(end - start) + RUN - 1


def _hashes(items: np.ndarray) -> np.ndarray:
    """Return a hash of each RUN items, by doubling: 1, 2, 4, 8."""
    mixed, width, factor = items.astype(np.uint64) + np.uint64(1), 1, _FACTOR
    with np.errstate(over="ignore"):
        while width < RUN:
            mixed = mixed[:-width] * factor + mixed[width:]
            mixed ^= mixed >> np.uint64(29)
            width, factor = width * 2, factor * _FACTOR
    return mixed


def _maximal(found: list[tuple[int, int, Any]]) -> list[tuple[int, int, list[Any]]]:
    """Return spans that are in no longer one, the longest first, each with its places in order of appearance."""
    by_span: dict[tuple[int, int], list[Any]] = {}
    for start, length, place in found:
        by_span.setdefault((start, length), []).append(place)
    kept: list[tuple[int, int, list[Any]]] = []
    for (start, length), places in sorted(by_span.items(), key=lambda item: (-item[0][1], item[0][0])):
        if not any(s <= start and start + length <= s + n for s, n, _ in kept):
            kept.append((start, length, places))
    return kept


def _place(subject: Subject, source: str, document: str, offset: int) -> Place:
    row = subject.documents.get(document)
    steps = {folder.name: seen for folder in subject.trained if (seen := _steps(folder / "trace.parquet", document))}
    return Place(source, document, offset, row.path if row else "", row.licence if row else "", steps)


def _steps(path: Path, document: str) -> list[int]:
    if not path.exists():
        return []
    table = pq.read_table(path, columns=["first_step", "last_step", "steps"], filters=[("document_id", "=", document)])
    if not len(table):
        return []
    counts = sum(len(steps) for steps in table["steps"].to_pylist())
    return [min(table["first_step"].to_pylist()), max(table["last_step"].to_pylist()), counts]
