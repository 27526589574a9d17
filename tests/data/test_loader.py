import numpy as np
import pytest

from freehold.core.errors import DataError
from freehold.data.exposure import trace_rows
from freehold.data.loader import ConversationOrder, PhaseRows, Source, TextOrder, apportion
from freehold.data.packing import IGNORE, PADDING, Example, conversation_batch, pack

EOT = 1


def make_source(name: str, lengths: list[int], first: int) -> Source:
    tokens, starts = [], []
    for number, length in enumerate(lengths):
        starts.append(len(tokens))
        tokens += [first + number] * (length - 1) + [EOT]
    return Source(
        name,
        np.array(tokens, dtype=np.uint16),
        np.array(starts),
        np.array(lengths),
        [f"{name}{i}" for i in range(len(lengths))],
    )


def make_order(seed: int = 0, **kwargs) -> TextOrder:
    sources = {"a": make_source("a", [5, 9, 3, 17, 8], 100), "b": make_source("b", [30, 4, 6], 200)}
    phases = [PhaseRows("stable", 6, {}), PhaseRows("anneal", 3, {"a": 1.0, "b": 3.0})]
    return TextOrder(sources, phases, context_tokens=8, sequences=4, seed=seed, separator=EOT, **kwargs)


def test_order_is_a_function_of_seed_and_step():
    one, two = make_order(), make_order()
    for step in (8, 0, 5):
        assert np.array_equal(one.batch(step).input_ids, two.batch(step).input_ids)
    assert not np.array_equal(one.batch(0).input_ids, make_order(seed=1).batch(0).input_ids)


def test_mixture_is_exact():
    order = make_order()
    rows = [row for step in range(6, 9) for row in order.rows(step)]
    assert sum(name == "a" for name, _ in rows) == 3
    assert sum(name == "b" for name, _ in rows) == 9


def test_no_row_is_repeated_or_lost_within_a_source():
    order = make_order()
    rows = sorted(row for step in range(9) for row in order.rows(step))
    for name in ("a", "b"):
        numbers = [number for n, number in rows if n == name]
        assert numbers == list(range(len(numbers)))
        assert len(numbers) == order.consumed[name]


def test_rows_of_one_epoch_hold_every_token_once():
    source = make_source("a", [5, 9, 3, 17, 6], 100)
    order = TextOrder({"a": source}, [PhaseRows("p", 5, {})], context_tokens=8, sequences=1, seed=3, separator=EOT)
    seen = np.sort(np.concatenate([order.batch(step).input_ids.ravel() for step in range(5)]))
    assert np.array_equal(seen, np.sort(source.tokens))


def test_targets_are_next_tokens_from_each_separator():
    batch = make_order().batch(2)
    assert np.array_equal(batch.input_ids[:, 1:], batch.targets[:, :-1])
    starts = batch.input_ids == EOT
    assert np.array_equal(np.diff(batch.document_ids, axis=1) == 1, starts[:, 1:])


def test_branch_continues_where_its_parent_was():
    whole = make_order()
    consumed = whole.consumed_at(6)
    sources = whole.sources
    branch = TextOrder(
        sources, [PhaseRows("anneal", 3, {"a": 1.0, "b": 3.0})], context_tokens=8, sequences=4, seed=0, separator=EOT,
        first_step=6, consumed=consumed,
    )  # fmt: skip
    for step in range(6, 9):
        assert np.array_equal(whole.batch(step).input_ids, branch.batch(step).input_ids)


def test_trace_agrees_with_brute_force():
    order = make_order()
    rows = trace_rows(order, range(9), {s: "stable" if s < 6 else "anneal" for s in range(9)})
    by_token = {}
    for name, source in order.sources.items():
        for number, start in enumerate(source.starts):
            by_token[int(source.tokens[start])] = f"{name}{number}"
    expected: dict[str, set[int]] = {}
    for step in range(9):
        for token in np.unique(order.batch(step).input_ids):
            if token != EOT:
                expected.setdefault(by_token[int(token)], set()).add(step)
    found: dict[str, set[int]] = {}
    for row in rows:
        found.setdefault(row["document_id"], set()).update(row["steps"])
    for document, steps in expected.items():
        assert steps <= found[document]
    assert sum(row["tokens"] for row in rows) == 9 * 4 * 8


def test_unknown_source_in_a_mixture():
    with pytest.raises(DataError, match="mixture.c"):
        TextOrder(
            make_order().sources, [PhaseRows("p", 1, {"c": 1.0})], context_tokens=8, sequences=1, seed=0, separator=EOT
        )
    with pytest.raises(IndexError):
        make_order().rows(9)
    with pytest.raises(DataError, match="no text"):
        TextOrder({}, [], context_tokens=8, sequences=1, seed=0, separator=EOT)


def test_apportion_is_exact_and_refuses_nonsense():
    assert apportion({"a": 1, "b": 1, "c": 1}, 10) == {"a": 4, "b": 3, "c": 3}
    assert sum(apportion({"a": 0.3, "b": 0.7}, 7919).values()) == 7919
    for weights in ({"a": 0.0}, {"a": -1.0, "b": 2.0}):
        with pytest.raises(DataError, match="weights"):
            apportion(weights, 3)


def test_pack_puts_items_whole():
    rows = pack([5, 4, 3, 2, 6], 8)
    assert sorted(i for row in rows for i in row) == [0, 1, 2, 3, 4]
    assert all(sum([5, 4, 3, 2, 6][i] for i in row) <= 8 for row in rows)
    with pytest.raises(ValueError, match="9 tokens"):
        pack([9], 8)


def test_conversation_loss_is_only_where_the_mask_says():
    one = Example("x", "s", [0, 10, 11, 12], [False, False, True, True])
    two = Example("y", "s", [0, 20, 21], [False, False, True])
    batch = conversation_batch([[one, two]], 8, pad=12)
    assert batch.targets[0].tolist() == [IGNORE, 11, 12, IGNORE, 21, IGNORE, IGNORE, IGNORE]
    assert batch.document_ids[0].tolist() == [0, 0, 0, 1, 1, PADDING, PADDING, PADDING]
    assert batch.input_ids[0, :5].tolist() == [0, 10, 11, 0, 20]
    assert batch.target_tokens == 3


def test_conversation_order():
    examples = [Example(f"e{i}", "s", [0] * (3 + i % 4), [True] * (3 + i % 4)) for i in range(20)]
    examples.append(Example("long", "s", [0] * 99, [True] * 99))
    order = ConversationOrder(examples, context_tokens=12, sequences=2, steps=9, seed=0, pad=12)
    again = ConversationOrder(examples, context_tokens=12, sequences=2, steps=9, seed=0, pad=12)
    assert order.too_long == 1
    assert all(np.array_equal(order.batch(s).targets, again.batch(s).targets) for s in range(9))
    first_epoch = [p.document_id for s in range(9) for p in order.documents(s)]
    assert set(first_epoch) == {f"e{i}" for i in range(20)}
    with pytest.raises(DataError, match="fits"):
        ConversationOrder(examples[-1:], context_tokens=12, sequences=2, steps=1, seed=0, pad=12)
