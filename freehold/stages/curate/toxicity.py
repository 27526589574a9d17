"""Toxic passages by the linear model inside alt-profanity-check (MIT), evaluated on word hashes.

The package's own `predict_prob` takes text through scikit-learn at about 0.5 MB/s. The model is a sum over words
(TF-IDF, five calibrated linear classifiers), so the same number comes from the hashes that curation has already made;
a test holds the two together.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from freehold.core.errors import ConfigError
from freehold.stages.curate.rules import JUDGED_KINDS, MAX_TOXIC_SHARE, PASSAGE_WORDS, TOXIC
from freehold.text import Why
from freehold.text.words import Lookup, Words, split_words, word_hashes


class Scorer:
    """The package's vocabulary as hashes, its weights as arrays."""

    def __init__(self) -> None:
        try:
            package = importlib.import_module("profanity_check.profanity_check")
        except ImportError as error:
            raise ConfigError(
                "toxicity needs a package that is not installed",
                where="curate.toxicity.act",
                found=error,
                todo="pip install 'freehold[toxicity]' -c constraints.txt, or set curate.toxicity.act=off",
            ) from error
        vectorizer, parts = package.vectorizer, package.model.calibrated_classifiers_
        names = list(vectorizer.get_feature_names_out())
        # A few of its words are several of ours: their letters have no spaces between them.
        ours = [i for i, name in enumerate(names) if name.isascii() or split_words(name) == [name]]
        self.lookup = Lookup(word_hashes([names[i] for i in ours]))
        self.idf = vectorizer.idf_[ours]
        self.weights = np.stack([part.estimator.coef_[0][ours] for part in parts])
        self.intercepts = np.array([part.estimator.intercept_[0] for part in parts])
        self.slopes = np.array([part.calibrators[0].a_ for part in parts])
        self.shifts = np.array([part.calibrators[0].b_ for part in parts])

    def passages(self, hashes: np.ndarray, passage_words: int) -> np.ndarray:
        """Return float64 [passages]: the probability that each run of `passage_words` words is toxic.

        The last passage takes the words that are too few for one of their own.
        """
        count = max(1, len(hashes) // passage_words)
        positions, terms = self.lookup.find(hashes)
        passage = np.minimum(positions // passage_words, count - 1)
        keys, times = np.unique(passage * len(self.idf) + terms, return_counts=True)
        passage, terms = np.divmod(keys, len(self.idf))
        values = times * self.idf[terms]
        norm = np.sqrt(np.bincount(passage, values**2, count))
        norm[norm == 0] = 1.0
        total = np.zeros(count)
        for weights, intercept, slope, shift in zip(
            self.weights, self.intercepts, self.slopes, self.shifts, strict=True
        ):
            decision = np.bincount(passage, values * weights[terms], count) / norm + intercept
            total += 1 / (1 + np.exp(slope * decision + shift))
        return np.asarray(total / len(self.weights))


@lru_cache(maxsize=1)
def scorer() -> Scorer:
    """Return the model, loaded once; ConfigError when the package is not installed."""
    return Scorer()


def check_toxicity(kinds: Sequence[str], words: Sequence[Words]) -> list[Why | None]:
    """Return the reason to drop each document: too many of its passages are toxic."""
    why: list[Why | None] = []
    for kind, one in zip(kinds, words, strict=True):
        why.append(None)
        if kind in JUDGED_KINDS and len(one.hashes):
            toxic = scorer().passages(one.hashes, PASSAGE_WORDS) >= TOXIC
            if toxic.mean() > MAX_TOXIC_SHARE:
                why[-1] = ("toxic", f"{int(toxic.sum())} of {len(toxic)} passages, at most {MAX_TOXIC_SHARE:.0%}")
    return why
