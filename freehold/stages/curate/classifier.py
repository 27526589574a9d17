"""A trained judgement of quality: logistic regression on hashed words and pairs of words.

The same idea as fastText's supervised mode (Joulin et al. 2016, "Bag of Tricks"), with one number a feature instead of
a vector. DataComp-LM (Li et al. 2024) found this kind of filter the strongest single step of curation. Training is
full-batch and ordered, so the same sources give the same weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xxhash

from freehold.core.errors import DataError
from freehold.stages.curate.config import Classifier
from freehold.stages.curate.rules import (
    BUCKETS_LOG2,
    CLASSIFIER_DECAY,
    CLASSIFIER_RATE,
    CLASSIFIER_STEPS,
    JUDGED_KINDS,
    MAX_SNIPPETS,
    SNIPPET_WORDS,
)
from freehold.text import Why
from freehold.text.words import Words, ngrams, read_words

# A mean of weights would have to be learned very large: this share is given.
_SCALE = 10.0
_HELD_OUT = 0.2
_PER_DOCUMENT = 40


@dataclass(frozen=True)
class Model:
    """The weights, float32 [2**buckets_log2 + 1]; the last one is the bias."""

    weights: np.ndarray

    def probability(self, hashes: np.ndarray) -> float:
        """Return the probability that a document with these words is like the good sources."""
        features = _features(hashes, len(self.weights) - 1)
        mean = float(self.weights[features].mean(dtype=np.float64)) if len(features) else 0.0
        return float(1 / (1 + np.exp(-(float(self.weights[-1]) + _SCALE * mean))))


def _features(hashes: np.ndarray, buckets: int) -> np.ndarray:
    """Return the bucket of each word and of each pair of neighbours, int64 [2 * words - 1]."""
    return (np.concatenate([hashes, ngrams(hashes, 2)]) & np.uint64(buckets - 1)).astype(np.int64)


def train(good: Iterable[tuple[str, str]], bad: Iterable[tuple[str, str]], config: Classifier) -> tuple[Model, Any]:
    """Train on (id, text) of both sides; returns the model and how well it separates held-out documents.

    A fifth of the documents, by hash of the id, is held out. DataError when a side has nothing to learn from.
    """
    sides: dict[bool, tuple[list[np.ndarray], list[np.ndarray]]] = {}
    for is_good, documents in ((True, good), (False, bad)):
        learn: list[np.ndarray] = []
        held: list[np.ndarray] = []
        for identity, text in sorted(documents, key=lambda row: _place(row[0])):
            side = held if _place(identity) / 2**64 > 1 - _HELD_OUT else learn
            hashes = read_words(text).hashes[: SNIPPET_WORDS * _PER_DOCUMENT]
            starts = range(0, max(1, len(hashes) - SNIPPET_WORDS // 2), SNIPPET_WORDS)
            pieces = [hashes[start : start + SNIPPET_WORDS] for start in starts]
            side += [piece for piece in pieces if len(piece)][: max(0, MAX_SNIPPETS - len(side))]
        if not learn:
            raise DataError(
                "nothing to train the classifier on",
                where="curate.classifier." + ("good" if is_good else "bad"),
                expected="documents with words",
                todo="name larger sources",
            )
        sides[is_good] = (learn, held)
    model = Model(_fit(sides[True][0], sides[False][0]))
    scores = {side: np.array([model.probability(piece) for piece in sides[side][1]]) for side in sides}
    facts: dict[str, Any] = {
        "snippets": {"good": len(sides[True][0]), "bad": len(sides[False][0])},
        "held_out": {"good": len(scores[True]), "bad": len(scores[False])},
    }
    if len(scores[True]) and len(scores[False]):
        above = (scores[True][:, None] > scores[False]).mean() + 0.5 * (scores[True][:, None] == scores[False]).mean()
        right = np.concatenate([scores[True] >= config.threshold, scores[False] < config.threshold])
        facts |= {"auc": round(float(above), 4), "accuracy": round(float(right.mean()), 4)}
    return model, facts


def _fit(good: list[np.ndarray], bad: list[np.ndarray]) -> np.ndarray:
    """Minimise the mean logistic loss, both sides weighing the same, with full-batch Adam (Kingma & Ba 2015)."""
    buckets = 1 << BUCKETS_LOG2
    rows = [_features(piece, buckets) for piece in [*good, *bad]]
    features = np.concatenate(rows)
    sizes = np.array([len(row) for row in rows])
    starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    target = np.concatenate([np.ones(len(good)), np.zeros(len(bad))])
    share = np.concatenate([np.full(len(good), 0.5 / len(good)), np.full(len(bad), 0.5 / len(bad))])
    weights = np.zeros(buckets + 1)
    first, second = np.zeros_like(weights), np.zeros_like(weights)
    for step in range(1, CLASSIFIER_STEPS + 1):
        logits = weights[-1] + _SCALE * np.add.reduceat(weights[features], starts) / sizes
        error = share * (1 / (1 + np.exp(-logits)) - target)
        gradient = np.empty_like(weights)
        gradient[:-1] = np.bincount(features, np.repeat(_SCALE * error / sizes, sizes), buckets)
        gradient[-1] = error.sum()
        gradient[:-1] += CLASSIFIER_DECAY * weights[:-1]
        first += 0.1 * (gradient - first)
        second += 0.001 * (gradient**2 - second)
        rate = CLASSIFIER_RATE * np.sqrt(1 - 0.999**step) / (1 - 0.9**step)
        weights -= rate * first / (np.sqrt(second) + 1e-8)
    return weights.astype(np.float32)


def _place(identity: str) -> int:
    return xxhash.xxh64_intdigest(identity.encode(), seed=21)


def check_quality(
    rows: Sequence[tuple[str, str]], words: Sequence[Words], model: Model, config: Classifier
) -> list[Why | None]:
    """Return the reason to drop each document, given as (source, kind).

    The sources it was trained on are not judged: the good ones stay, the bad ones go.
    """
    why: list[Why | None] = []
    for (source, kind), one in zip(rows, words, strict=True):
        why.append(None)
        if source in config.bad:
            why[-1] = ("low_quality", "of a source that is an example of low quality")
        elif source not in config.good and kind in JUDGED_KINDS:
            probability = model.probability(one.hashes)
            if probability < config.threshold:
                why[-1] = ("low_quality", f"probability {probability:.3f} of being good, at least {config.threshold}")
    return why
