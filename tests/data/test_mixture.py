"""Mixtures: exact to the row, no token read oftener than its epochs say, limits kept by either rule."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from freehold.core.errors import DataError
from freehold.data.buffer import BufferOrder, text_order
from freehold.data.config import EpochLimit, TextBatchConfig
from freehold.data.loader import PhaseRows, Source, TextOrder, apportion

EOT = 1


def source(name: str, tokens: int, first: int) -> Source:
    """A source of documents of 7 tokens in which every token is another number."""
    ids = np.arange(first, first + tokens, dtype=np.uint32)
    starts = np.arange(0, tokens, 7)
    lengths = np.diff([*starts, tokens])
    return Source(name, ids, starts, lengths, [f"{name}{i}" for i in range(len(starts))])


SOURCES = {"a": source("a", 301, 1000), "b": source("b", 77, 3000), "c": source("c", 1000, 5000)}


def order(
    phases: list[PhaseRows], limit: EpochLimit | None = None, kind: type[TextOrder] = TextOrder, **more
) -> TextOrder:
    shape = {"context_tokens": 8, "sequences": 3, "seed": 5, "separator": EOT}
    if kind is BufferOrder:
        more = {"documents": 4, **more}
    return kind(SOURCES, phases, **shape, limit=limit, **more)


def read(one: TextOrder, steps: range) -> Counter[int]:
    """Count how often each token of the corpus was read: as input, or as target where the order says so."""
    field = "targets" if isinstance(one, BufferOrder) else "input_ids"
    return Counter(np.concatenate([getattr(one.batch(step), field).ravel() for step in steps]).tolist())


UNHURRIED = {"deadline": None, "derandomize": True, "suppress_health_check": [HealthCheck.too_slow]}
"""A busy machine is no failure."""


@settings(max_examples=60, **UNHURRIED)
@given(
    weights=st.lists(st.floats(0, 1e3, allow_subnormal=False) | st.integers(0, 50), min_size=1, max_size=8),
    total=st.integers(0, 10**9),
)
def test_shares_are_exact_to_the_row(weights, total):
    named = {f"s{i}": w for i, w in enumerate(weights)}
    exact = [Fraction(str(w)) for w in weights]
    if not any(exact):
        return
    counts = apportion(named, total)
    assert sum(counts.values()) == total
    for weight, count in zip(exact, counts.values(), strict=True):
        assert abs(count - weight / sum(exact) * total) < 1


def test_weights_are_what_is_written():
    """In floating point 0.1 + 0.2 is not 0.3, and a share of 3 rows may come out as 2.9999."""
    assert apportion({"a": 0.1, "b": 0.2, "c": 0.7}, 10**9) == {"a": 10**8, "b": 2 * 10**8, "c": 7 * 10**8}
    assert apportion({"a": 0.29, "b": 0.71}, 100) == {"a": 29, "b": 71}


@pytest.mark.parametrize("kind", [TextOrder, BufferOrder])
@settings(max_examples=15, **UNHURRIED)
@given(weights=st.tuples(*[st.integers(0, 9)] * 3), steps=st.tuples(st.integers(1, 30), st.integers(1, 30)))
def test_no_token_is_read_oftener_than_its_epochs_say(kind, weights, steps):
    if not any(weights):
        return
    phases = [PhaseRows("one", steps[0], {}), PhaseRows("two", steps[1], dict(zip("abc", weights, strict=True)))]
    made = order(phases, kind=kind)
    seen = read(made, range(sum(steps)))
    assert sum(seen.values()) == sum(steps) * 3 * 8
    for name, epochs in made.epochs().items():
        times = [seen[int(token)] for token in SOURCES[name].tokens]
        assert sum(times) == sum(s.tokens for s in made.shares if s.source == name)
        assert int(epochs) <= min(times)
        assert max(times) <= -(-sum(times) // len(times))


def test_a_limit_is_an_error_that_names_the_source():
    phases = [PhaseRows("stable", 10, {}), PhaseRows("anneal", 20, {"b": 1, "c": 1})]
    with pytest.raises(
        DataError, match=r"(?s)phases\.anneal.*b: 240 tokens asked for, 136 left of 2 epochs of 77.*over="
    ):
        order(phases, EpochLimit(most=2))
    assert order(phases, EpochLimit(most=4)).epochs()["b"] < 4
    with pytest.raises(DataError, match=r"(?s)names a source.*batch\.epochs\.sources\.missing.*a, b, c"):
        order(phases, EpochLimit(sources={"missing": 1}))


@pytest.mark.parametrize("kind", [TextOrder, BufferOrder])
def test_a_limit_gives_the_rest_to_the_others(kind):
    phases = [PhaseRows("stable", 10, {}), PhaseRows("anneal", 20, {"a": 1, "b": 2, "c": 1})]
    free = order(phases, kind=kind)
    made = order(phases, EpochLimit(most=9, sources={"b": 2}, over="redistribute"), kind=kind)
    assert free.epochs()["b"] > 3
    assert 2 - 8 / 77 < made.epochs()["b"] <= 2
    given = {s.source: s.rows for s in made.shares if s.phase == "anneal"}
    assert sum(given.values()) == 60
    assert abs(given["a"] - given["c"]) <= 1
    seen = read(made, range(30))
    assert max(seen[int(token)] for token in SOURCES["b"].tokens) == 2
    said = {line.partition(":")[0]: line for line in made.summary()}
    assert "its limit of 2 epochs takes 104 tokens from it in anneal" in said["b"]
    assert "56 tokens more in the place of limited sources in anneal" in said["a"]
    assert "upsampled x" in said["b"]


def test_error_when_no_source_can_give_the_rest():
    with pytest.raises(DataError, match=r"(?s)no source is left.*a: .*b: .*c: "):
        order([PhaseRows("long", 100, {})], EpochLimit(most=1, over="redistribute"))


def test_a_branch_counts_what_its_parent_read():
    limit = EpochLimit(most=2, over="redistribute")
    phases = [PhaseRows("stable", 10, {}), PhaseRows("anneal", 20, {"b": 1, "c": 1})]
    whole = order(phases, limit)
    branch = order(phases[1:], limit, first_step=10, consumed=whole.consumed_at(10))
    assert all(np.array_equal(whole.batch(s).input_ids, branch.batch(s).input_ids) for s in range(10, 30))
    assert branch.epochs() == whole.epochs()


def test_the_recipe_says_the_limit():
    batch = TextBatchConfig.model_validate({"context_tokens": 8, "sequences": 3, "epochs": {"most": 0.5}})
    with pytest.raises(DataError, match=r"left of 0\.5 epochs"):
        text_order(batch, SOURCES, [PhaseRows("p", 40, {})], seed=0, separator=EOT)
