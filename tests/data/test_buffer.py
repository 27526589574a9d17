"""The buffer against brute force: each token has a number of its own, so a target says where it comes from."""

import dataclasses
import json

import numpy as np
import pytest

from freehold.core.config import fill
from freehold.core.errors import ConfigError, DataError
from freehold.data import buffer as buffer_module
from freehold.data.buffer import BufferOrder, BufferState, DocumentBuffer, text_order
from freehold.data.config import BatchConfig, TextBatchConfig
from freehold.data.exposure import trace_rows
from freehold.data.loader import PhaseRows, Source, TextOrder, generator

SEPARATOR = 1


def make_source(name: str, lengths: list[int], first: int) -> Source:
    starts = np.cumsum([0, *lengths[:-1]])
    tokens = np.arange(first, first + sum(lengths), dtype=np.uint32)
    return Source(name, tokens, starts, np.array(lengths), [f"{name}{i}" for i in range(len(lengths))])


def random_source(name: str, seed: int, documents: int, longest: int, first: int = 100) -> Source:
    return make_source(name, np.random.default_rng(seed).integers(1, longest + 1, documents).tolist(), first)


def make_order(sources=None, phases=None, *, sequences=4, context_tokens=8, documents=3, **changes) -> BufferOrder:
    sources = sources or {"a": random_source("a", 0, 23, 40), "b": random_source("b", 1, 9, 90, 10_000)}
    phases = phases or [PhaseRows("stable", 12, {}), PhaseRows("anneal", 6, {"a": 1.0, "b": 3.0})]
    return BufferOrder(
        sources, phases, sequences=sequences, context_tokens=context_tokens, seed=0, separator=SEPARATOR,
        documents=documents, **changes,
    )  # fmt: skip


def play(lengths, seed=0, row_tokens=4, low=3, full=6) -> DocumentBuffer:
    return DocumentBuffer(
        np.array(lengths),
        lambda epoch: generator(seed, "order", epoch).permutation(len(lengths)),
        lambda *parts: generator(seed, *parts),
        row_tokens=row_tokens,
        low=low,
        full=full,
    )


def by_document(source: Source, tokens: np.ndarray) -> dict[int, list[int]]:
    """Return the places within each document of tokens in the order they were read."""
    found: dict[int, list[int]] = {}
    for token in tokens:
        place = int(token) - int(source.tokens[0])
        document = int(np.searchsorted(source.starts, place, side="right")) - 1
        found.setdefault(document, []).append(place - int(source.starts[document]))
    return found


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("workers", [1, 3])
def test_every_token_once_an_epoch_and_in_order(seed, workers):
    """Whatever the sizes: no token of an epoch is lost or repeated, and a document is read from front to back."""
    rng = np.random.default_rng(seed)
    source = random_source("a", seed, int(rng.integers(3, 40)), int(rng.integers(1, 60)))
    row_tokens, documents = int(rng.integers(1, 20)), int(rng.integers(1, 6)) * workers
    rows = 3 * (source.total_tokens // row_tokens + 1)
    order = make_order(
        {"a": source}, [PhaseRows("p", rows, {})], sequences=workers, context_tokens=row_tokens,
        documents=documents, refill=float(rng.uniform(1, 3)), workers=workers,
    )  # fmt: skip
    targets = np.stack([order.batch(step).targets for step in range(rows)])
    for worker in range(workers):
        stream, epoch = targets[:, worker].ravel(), 0
        while True:
            mine = order._epoch("a", epoch)[0][worker::workers]
            total = int(source.lengths[mine].sum())
            if total > len(stream):
                break
            read, stream = by_document(source, stream[:total]), stream[total:]
            assert read == {int(document): list(range(source.lengths[document])) for document in mine}
            epoch += 1
        assert epoch >= 2


def test_inputs_are_the_tokens_before_and_pieces_are_kept_apart():
    order = make_order()
    for step in range(18):
        batch = order.batch(step)
        for (name, _), row in zip(order.rows(step), range(4), strict=True):
            source = order.sources[name]
            inputs, targets, pieces = (a[row] for a in (batch.input_ids, batch.targets, batch.document_ids))
            documents = np.searchsorted(source.starts, targets - int(source.tokens[0]), side="right")
            begins = np.isin(targets - int(source.tokens[0]), source.starts)
            assert np.array_equal(inputs, np.where(begins, SEPARATOR, targets - 1))
            # A new number exactly where the next token does not continue the document of the one before.
            continues = (np.diff(documents) == 0) & ~begins[1:]
            assert np.array_equal(np.diff(pieces), (~continues).astype(int))
            assert pieces[0] == 0


def test_occupancy_stays_between_the_bounds():
    lengths = np.random.default_rng(0).integers(1, 30, 200)
    buffer = play(lengths, low=5, full=10)
    sizes, filled = [], 0
    for row in range(600):
        state = buffer.state(row)
        assert len({document for document, _, _ in state.queue}) == len(state.queue)
        assert all(left > 0 and head + left == lengths[document] for document, head, left in state.queue)
        if 0 < state.taken < 200:
            sizes.append(len(state.queue))
        filled += len(state.queue) == 10
    assert max(sizes) == 10
    assert min(sizes) == 5
    assert filled > 10


def test_documents_are_picked_evenly_and_independently():
    """A long document is picked no more often than a short one while both last, whatever was picked before."""
    buffer = play([10_000, 10_000, 10_000, 100_000], row_tokens=4, low=4, full=4)
    picked = np.array([buffer.row(row)[0][0] for row in range(4000)])
    pairs = np.bincount(4 * picked[:-1] + picked[1:], minlength=16)
    assert (abs(np.bincount(picked, minlength=4) - 1000) < 5 * np.sqrt(4000 * 1 / 4 * 3 / 4)).all()
    assert (abs(pairs - 250) < 5 * np.sqrt(4000 * 1 / 16 * 15 / 16)).all()


def test_one_document_at_a_time_is_plain_packing():
    lengths = [5, 9, 3, 17, 8]
    buffer = play(lengths, low=1, full=1)
    order = [*buffer.order(0), *buffer.order(1)]
    read = [(document, place) for document in order for place in range(lengths[document])]
    spans = [span for row in range(20) for span in buffer.row(row)]
    assert [(d, first + i) for d, first, n in spans for i in range(n)] == read[:80]


def test_rows_can_be_asked_for_in_any_order(monkeypatch):
    lengths = np.random.default_rng(3).integers(1, 25, 50)
    rows = 6 * buffer_module.ROWS_AT_ONCE
    straight = list(map(play(lengths).row, range(rows)))
    monkeypatch.setattr(buffer_module, "STATES_KEPT", 3)
    buffer = play(lengths)
    for row in np.random.default_rng(0).integers(0, rows, 40):
        assert buffer.row(int(row)) == straight[row]
        assert buffer.state(int(row)).row == row
        assert buffer._play(buffer.state(int(row)), 1)[0] == [straight[row]]
    assert len(buffer._states) <= 3


def test_state_is_stored_and_taken_up_bit_for_bit():
    lengths = np.random.default_rng(3).integers(1, 25, 50)
    whole, row = play(lengths), 5001
    stored = json.loads(json.dumps(dataclasses.asdict(whole.state(row))))
    state = BufferState(**{**stored, "queue": tuple(tuple(span) for span in stored["queue"])})
    assert state.epoch > 0
    resumed = play(lengths)
    order = resumed.order
    resumed.order = lambda epoch: pytest.fail("played from the start") if epoch < state.epoch else order(epoch)
    resumed.restore(state)
    assert [resumed.row(row + i) for i in range(300)] == [whole.row(row + i) for i in range(300)]
    resumed.order = order
    assert resumed.row(0) == whole.row(0)


def test_order_is_a_function_of_seed_and_step():
    one, two = make_order(), make_order()
    steps = list(range(18))
    straight = [one.batch(step) for step in steps]
    for step in np.random.default_rng(0).permutation(steps):
        again = two.batch(int(step))
        for name in ("input_ids", "targets", "document_ids"):
            assert np.array_equal(getattr(again, name), getattr(straight[step], name))


def test_mixture_is_exact_and_rows_of_a_source_come_in_order():
    order, stream = make_order(), make_order_of_stream()
    for steps in (range(12), range(12, 18)):
        found = [name for step in steps for name, _ in order.rows(step)]
        assert sorted(found) == sorted(name for step in steps for name, _ in stream.rows(step))
    for name in ("a", "b"):
        rows = [row for step in range(18) for n, row in order.rows(step) if n == name]
        assert rows == list(range(order.consumed[name]))
    assert order.consumed == stream.consumed
    assert order.epochs() == stream.epochs()


def make_order_of_stream() -> TextOrder:
    order = make_order()
    phases = [PhaseRows("stable", 12, {}), PhaseRows("anneal", 6, {"a": 1.0, "b": 3.0})]
    return TextOrder(order.sources, phases, context_tokens=8, sequences=4, seed=0, separator=SEPARATOR)


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_parts_of_any_number_of_processes_make_the_whole(processes):
    whole = make_order(documents=4, workers=4)
    counts = {}
    for rank in range(processes):
        order = make_order(documents=4, workers=4)
        rows = slice(rank * 4 // processes, (rank + 1) * 4 // processes)
        for step in range(18):
            assert np.array_equal(order.batch(step, rows).targets, whole.batch(step).targets[rows])
        counts[rank] = {lane.partition("/")[2] for lane in order._buffers}
    assert sorted(worker for workers in counts.values() for worker in workers) == ["0", "1", "2", "3"]
    for (lane, row), again in zip(whole.rows(5), make_order(documents=4, workers=4).rows(5), strict=True):
        assert (lane, row) == again
    read = {worker: set() for worker in range(4)}
    for step in range(18):
        for worker, (lane, row) in enumerate(whole.rows(step)):
            if lane.startswith("a/") and row < 5:  # in the first epoch
                read[worker] |= {document for document, _, _ in whole.spans(lane, row)}
    assert sum(map(len, read.values())) == len(set.union(*read.values())), "a document went to two workers"
    assert sum(whole.consumed.values()) == 18 * 4


def test_branch_continues_where_its_parent_was():
    for workers in (1, 2):
        whole = make_order(documents=4, workers=workers)
        branch = make_order(
            whole.sources, [PhaseRows("anneal", 6, {"a": 1.0, "b": 3.0})], documents=4, workers=workers,
            first_step=12, consumed=whole.consumed_at(12),
        )  # fmt: skip
        for step in range(12, 18):
            assert np.array_equal(whole.batch(step).targets, branch.batch(step).targets)


def test_trace_agrees_with_brute_force():
    order = make_order(documents=4, workers=2)
    rows = trace_rows(order, range(18), {s: "stable" if s < 12 else "anneal" for s in range(18)})
    expected: dict[str, dict[int, int]] = {}
    for step in range(18):
        for token in order.batch(step).targets.ravel():
            source = order.sources["b" if token >= 10_000 else "a"]
            place = int(token) - int(source.tokens[0])
            name = source.ids[int(np.searchsorted(source.starts, place, side="right")) - 1]
            seen = expected.setdefault(name, {})
            seen[step] = seen.get(step, 0) + 1
    found: dict[str, dict[int, int]] = {}
    for row in rows:
        found.setdefault(row["document_id"], {}).update(zip(row["steps"], row["step_tokens"], strict=True))
    assert found == expected


def test_a_recipe_chooses_the_order():
    sources = make_order().sources
    phases = [PhaseRows("p", 2, {})]
    batch = fill(TextBatchConfig, {"context_tokens": 8, "sequences": 4}, "batch")
    assert type(text_order(batch, sources, phases, seed=0, separator=SEPARATOR)) is TextOrder
    batch = fill(
        TextBatchConfig, {**batch.model_dump(), "order": {"kind": "buffer", "documents": 6, "workers": 2}}, "b"
    )
    order = text_order(batch, sources, phases, seed=0, separator=SEPARATOR)
    assert (type(order), order.low, order.full, order.workers) == (BufferOrder, 3, 6, 2)


@pytest.mark.parametrize(
    ("cls", "data", "says"),
    [
        (TextBatchConfig, {"order": {"kind": "buffer", "document": 3}}, "did you mean `documents`"),
        (TextBatchConfig, {"order": {"kind": "shuffled"}}, "stream"),
        (TextBatchConfig, {"order": {"kind": "stream", "documents": 3}}, "unknown key"),
        (TextBatchConfig, {"order": {"kind": "buffer", "refill": 0.5}}, "greater than or equal to 1"),
        (
            TextBatchConfig,
            {"sequences": 8, "order": {"kind": "buffer", "workers": 3}},
            r"sequences \(8\).*workers \(3\)",
        ),
        (TextBatchConfig, {"order": {"kind": "buffer", "documents": 9, "workers": 2}}, r"documents \(9\)"),
        (BatchConfig, {"order": {"kind": "buffer"}}, "unknown key"),
    ],
)
def test_mistakes_in_a_recipe_are_named(cls, data, says):
    with pytest.raises(ConfigError, match=says):
        fill(cls, data, "batch")


def test_more_workers_than_documents():
    with pytest.raises(DataError, match=r"(?s)fewer documents.*source b.*9 documents.*>= 10"):
        make_order(sequences=10, documents=10, workers=10)
