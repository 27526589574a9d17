"""A document's words as 64-bit hashes: counted, shingled and looked up with numpy instead of strings."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import numpy as np
import xxhash

WORD = re.compile(r"\w+")
# The commonest English words: every page of English has many of them, a list of codes has none.
_COMMON = (
    "the be to of and that have with a in is it for as on was by are this or from an not at which his he they we you i"
    " thou my me will shall"
)
STOP_WORDS = frozenset(_COMMON.split(" "))
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
_HALF = np.uint64(32)


class WordHashes(dict[str, int]):
    """The xxh64 of each word, computed once: a corpus has few different words."""

    def __missing__(self, word: str) -> int:
        """Hash a word met for the first time."""
        value = self[word] = xxhash.xxh64_intdigest(word.encode())
        return value


@dataclass(frozen=True)
class Words:
    """What the filters need to know about a document's words."""

    hashes: np.ndarray
    """uint64 [words], in text order, of the lower-cased words."""
    chars: int
    """Characters of all words together: letters, digits, underscores."""
    stop_fraction: float
    cache: dict[int, np.ndarray] = field(default_factory=dict, repr=False)


def read_words(text: str, table: WordHashes) -> Words:
    """Split a text into lower-case runs of word characters and hash them."""
    words = WORD.findall(text.lower())
    count = len(words)
    hashes = np.fromiter(map(table.__getitem__, words), np.uint64, count)
    if not count:
        return Words(hashes, 0, 0.0)
    return Words(hashes, len("".join(words)), sum(map(STOP_WORDS.__contains__, words)) / count)


def shingles(words: Words, n: int) -> np.ndarray:
    """Return the different runs of `n` words, sorted; kept with the words, for it is asked for twice."""
    if n not in words.cache:
        words.cache[n] = np.unique(ngrams(words.hashes, n))
    return words.cache[n]


def ngrams(hashes: np.ndarray, n: int) -> np.ndarray:
    """Return the hash of each run of `n` words, uint64 [words - n + 1]; order inside the run matters."""
    count = max(0, len(hashes) - n + 1)
    mixed = hashes[:count].copy()
    for i in range(1, n):
        mixed = (mixed * _MULTIPLIER) ^ (hashes[i : i + count] + (mixed >> _HALF))
    return mixed


def text_hash(text: str) -> int:
    """Return the xxh3-128 of a text with every run of white space made one space."""
    return xxhash.xxh3_128_intdigest(" ".join(text.split()).encode())
