"""The order of the data must never change: a run that resumes under a newer version reads on where it stopped."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pytest

from freehold.data import loader
from freehold.data.buffer import text_order
from freehold.data.config import TextBatchConfig
from freehold.data.loader import ConversationOrder, PhaseRows, Source, TextOrder
from freehold.data.packing import Example

STEPS = 14
PHASES = [PhaseRows("stable", 9, {}), PhaseRows("anneal", 5, {"a": 1, "b": 3, "c": 0.5})]
GOLDEN = {
    "stream": "18d06b6f079aa84c",
    "stream, limited": "329cb0c880dbd89d",
    "stream, branch": "a66eb250819a0422",
    "buffer": "b2f98ac6fdaed9e0",
    "buffer, limited": "50248952ab6a1aea",
    "buffer, 2 workers": "7866f78019b66b35",
    "conversations": "9c11efb2deb7d3f0",
}
SETTINGS: dict[str, dict[str, Any]] = {
    "stream": {},
    "stream, limited": {"epochs": {"most": 4, "sources": {"b": 1.5}, "over": "redistribute"}},
    "stream, branch": {},
    "buffer": {"order": {"kind": "buffer", "documents": 4}},
    "buffer, limited": {
        "order": {"kind": "buffer", "documents": 3, "refill": 1.5},
        "epochs": {"sources": {"b": 1.5}, "over": "redistribute"},
    },
    "buffer, 2 workers": {"order": {"kind": "buffer", "documents": 4, "workers": 2}},
}


def source(name: str, seed: int) -> Source:
    """Return 11 documents whose lengths and tokens follow from the seed by plain arithmetic."""
    lengths = np.array([1 + (seed + 7 * number) % 23 for number in range(11)])
    tokens = (seed + 31 * np.arange(lengths.sum())) % 500 + 2
    return Source(
        name, tokens.astype(np.uint16), np.cumsum(lengths) - lengths, lengths, [f"{name}{i}" for i in range(11)]
    )


def made(name: str) -> Any:
    if name == "conversations":
        examples = [Example(f"e{i}", "s", list(range(i, i + 3 + i % 9)), [True] * (3 + i % 9)) for i in range(25)]
        return ConversationOrder(examples, context_tokens=16, sequences=4, steps=STEPS, seed=11, pad=0)
    batch = TextBatchConfig.model_validate({"context_tokens": 16, "sequences": 4, **SETTINGS[name]})
    more: dict[str, Any] = {"first_step": 0, "consumed": {"a": 3, "b": 20}} if name == "stream, branch" else {}
    sources = {n: source(n, seed) for n, seed in (("a", 3), ("b", 17), ("c", 41))}
    return text_order(batch, sources, PHASES, seed=11, separator=1, **more)


@pytest.mark.parametrize("name", GOLDEN)
def test_order_keeps_its_bits(name: str) -> None:
    order, digest = made(name), hashlib.sha256()
    for step in range(STEPS):
        batch = order.batch(step)
        for array in (batch.input_ids, batch.targets, batch.document_ids):
            digest.update(array.astype("<i8").tobytes())
        digest.update(repr([(p.document_id, p.source, int(p.tokens)) for p in order.documents(step)]).encode())
    digest.update(repr([order.consumed_at(9), order.epochs()] if name != "conversations" else order.epochs).encode())
    assert digest.hexdigest()[:16] == GOLDEN[name]


def test_worked_example_of_the_module_docstring():
    a = Source("a", np.arange(10, 17), np.array([0, 3]), np.array([3, 4]), ["a0", "a1"])
    b = Source("b", np.arange(20, 25), np.array([0]), np.array([5]), ["b0"])
    phases = [PhaseRows("stable", 4, {"a": 1, "b": 1})]
    order = TextOrder({"a": a, "b": b}, phases, context_tokens=3, sequences=2, seed=0, separator=0)
    rows = [order.rows(step) for step in range(4)]
    assert rows == [[("a", 2), ("b", 0)], [("b", 3), ("b", 1)], [("a", 0), ("b", 2)], [("a", 3), ("a", 1)]]
    lanes = {row: " ".join(map(str, order.batch(s).input_ids[n])) for s in range(4) for n, row in enumerate(rows[s])}
    text = " ".join(loader.__doc__.split())
    for lane in "ab":
        assert " | ".join(lanes[lane, number] for number in range(4)) in text
