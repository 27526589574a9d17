"""Longer rows against brute force: each token of text has a number of its own, words of needles have others."""

import numpy as np
import pytest

from freehold.core.errors import DataError
from freehold.core.marks import IGNORE
from freehold.data.config import LongConfig
from freehold.data.loader import PhaseRows, Source
from freehold.data.long import LongOrder, keep_probability, pool_of
from freehold.data.needles import KEYS, VALUES, draw_facts, held_out_question, part_of, training_task

WORDS = 1_000_000
"""Ids from here on are words of needles."""


class Vocabulary(dict):
    """Gives each word an id when it is first seen."""

    def __missing__(self, word):
        self[word] = WORDS + len(self)
        return self[word]

    def encode(self, text):
        return [self[word.strip(".:?")] for word in text.split()]

    def words(self, ids):
        names = {number: word for word, number in self.items()}
        return [names.get(int(i), "") for i in ids]


def source(name, lengths, first):
    lengths = np.array(lengths)
    starts = np.cumsum([0, *lengths[:-1]])
    tokens = np.arange(first, first + lengths.sum(), dtype=np.uint32)
    return Source(name, tokens, starts, lengths, [f"{name}{i}" for i in range(len(lengths))])


def order(vocabulary, needles, **changes):
    sources = {"a": source("a", [20] * 60, 100), "b": source("b", [700, 30, 900, 12], 50_000)}
    settings = LongConfig(**{"keep_short": 0.6, "needles": needles, "keys": 3} | changes)
    return LongOrder(
        sources, [PhaseRows("long", 6, {})], settings=settings, encode=vocabulary.encode, context_tokens=256,
        sequences=4, seed=0, separator=1, begin=0, documents=3,
    )  # fmt: skip


def test_documents_are_kept_by_length_and_joined_within_a_source():
    settings = LongConfig(keep_short=0.1, keep_long=0.9)
    assert keep_probability(np.array([0, 50, 100, 400]), 100, settings).tolist() == pytest.approx([0.1, 0.5, 0.9, 0.9])
    long, short = (len(pool_of(source("a", [n] * 400, 0), 100, settings, 0).members) for n in (100, 10))
    assert long > 3 * short > 0
    pool = pool_of(source("a", [20] * 60, 0), 100, LongConfig(keep_short=1.0, keep_long=1.0), 0)
    assert pool.joined().lengths.tolist() == [100] * 12
    assert pool.read(2, 15, 30).tolist() == list(range(215, 245))
    assert pool.spans(2, 15, 30) == [(10, 15, 5), (11, 0, 20), (12, 0, 5)]
    apart = pool_of(source("a", [20] * 60, 0), 100, LongConfig(keep_short=1.0, keep_long=1.0, join=False), 0)
    assert apart.joined().lengths.tolist() == [20] * 60


@pytest.mark.parametrize("needles", [0.0, 0.5, 1.0])
def test_rows_hold_the_documents_they_name(needles):
    """Every token of text in a step belongs to a document that the step names, and they are as many as it says."""
    vocabulary = Vocabulary()
    made = order(vocabulary, needles)
    owners = {}
    for pool in made.pools.values():
        for start, length, name in zip(pool.source.starts, pool.source.lengths, pool.source.ids, strict=True):
            owners |= dict.fromkeys(pool.source.tokens[start : start + length].tolist(), name)
    for step in range(6):
        batch, named = made.batch(step), {}
        for piece in made.documents(step):
            named[piece.document_id] = named.get(piece.document_id, 0) + piece.tokens
        # A row of needles learns answers alone, so its text shows in its inputs.
        asks = (batch.targets == IGNORE).any(axis=1, keepdims=True)
        text = [int(i) for i in np.where(asks, batch.input_ids, batch.targets).flatten() if 1 < i < WORDS]
        assert {owners[i] for i in text} <= set(named)
        if needles == 0:
            assert len(text) == sum(named.values()) == 4 * 256
        halves = [made.batch(step, slice(0, 2)), made.batch(step, slice(2, 4))]
        assert (np.concatenate([half.targets for half in halves]) == batch.targets).all()
        again = order(vocabulary, needles).batch(step)
        assert all((getattr(again, f) == getattr(batch, f)).all() for f in ("input_ids", "targets", "document_ids"))


def test_needle_rows_learn_their_answers_alone():
    vocabulary = Vocabulary()
    batch = order(vocabulary, 1.0).batch(0)
    learned = batch.targets[batch.targets != IGNORE]
    assert set(vocabulary.words(learned)) <= set(VALUES)
    assert len(learned) >= 8
    for row in range(4):
        for number in np.unique(batch.document_ids[row]):
            mine = batch.document_ids[row] == number
            words = vocabulary.words(batch.input_ids[row, mine])
            for value in vocabulary.words([t for t in batch.targets[row, mine] if t != IGNORE]):
                # Stated once, and said again where it is the answer (there as a target; the next input shows it).
                assert words.count(value) >= 1


def test_tests_ask_for_pairs_that_training_never_states():
    rng, vocabulary, text = np.random.default_rng(0), Vocabulary(), np.arange(2000)
    for _ in range(200):
        assert all(part_of(fact.key, fact.value) == "train" for fact in draw_facts(rng, 8, "train"))
    share = np.mean([part_of(key, value) == "test" for key in KEYS for value in VALUES])
    assert 0.15 < share < 0.25
    asked = held_out_question(rng, vocabulary.encode, text, 400, 4, 1.0)
    assert len(asked.prompt) + len(asked.answer) == 400
    words = [word for word in vocabulary.words(asked.prompt) if word]
    key = next(word for word in reversed(words) if word in KEYS)
    assert part_of(key, *vocabulary.words(asked.answer)) == "test"
    assert vocabulary.words(asked.answer)[0] in words
    assert len(training_task(rng, vocabulary.encode, text, 333, 8).ids) == 333


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda v: order(v, 0.0, keep_short=0.0, keep_long=0.0), "keep_short"),
        (lambda v: training_task(np.random.default_rng(0), v.encode, np.arange(9), 20, 1), "too short"),
        (lambda v: held_out_question(np.random.default_rng(0), v.encode, np.arange(9), 400, 1, 0.5), "no text"),
    ],
)
def test_long_rows_mistakes(call, says):
    with pytest.raises(DataError, match=says):
        call(Vocabulary())
