"""Documents' words as 64-bit hashes, a whole batch at once: counted, shingled and looked up with numpy, not strings."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

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
# Beyond ASCII what is no part of a word becomes a space; every other byte from 0x80 on is then part of one.
_OUTSIDE = re.compile(r"[^\w\x00-\x7f]")
_INSIDE = np.array([chr(b).isalnum() or b == ord("_") or b >= 0x80 for b in range(256)])
# Keeps the first n bytes of eight, as they lie in memory.
_FIRST = np.array([(1 << 8 * n) - 1 for n in range(9)], np.uint64)
_LONG_BYTES = 64
# One bit per low bits of a hash says "not among them" for almost every word without a search.
_TABLE_BITS = 20


@dataclass(frozen=True)
class Words:
    """What the filters need to know about a document's words."""

    hashes: np.ndarray
    """uint64 [words], in text order, of the lower-cased words."""
    chars: int
    """Characters of all words together: letters, digits, underscores."""
    stop_fraction: float
    cache: dict[int, np.ndarray] = field(default_factory=dict, repr=False)


def read_words(text: str) -> Words:
    """Split a text into lower-case runs of word characters and hash them."""
    return read_batch([text])[0]


def read_batch(texts: Sequence[str]) -> list[Words]:
    """Return the words of each text: the lower-cased matches of `\\w+`, hashed; all texts in one pass."""
    parts = []
    for text in texts:
        low = text.lower()
        parts.append((low if low.isascii() else _OUTSIDE.sub(" ", low)).encode())
    # Spaces around and between the texts, and eight behind for the last word's chunk.
    joined = b" " + b" ".join(parts) + b" " * 9
    raw = np.frombuffer(joined, np.uint8)
    inside = _INSIDE[raw]
    edges = np.flatnonzero(inside[1:] != inside[:-1]) + 1
    starts, sizes = edges[::2], edges[1::2] - edges[::2]
    hashes = _hash_words(joined, starts, sizes)
    ends = np.cumsum([len(part) + 1 for part in parts])
    borders = np.searchsorted(starts, np.concatenate([[0], ends]))
    chars = sizes
    if not joined.isascii():  # a character's bytes after the first begin with the bits 10
        tails = np.flatnonzero((raw & 0xC0) == 0x80)
        chars = sizes - np.bincount(np.searchsorted(starts, tails, "right") - 1, minlength=len(sizes))
    char_sums = np.concatenate([[0], np.cumsum(chars)])[borders].tolist()
    stop_sums = np.concatenate([[0], np.cumsum(stop_words().has(hashes))])[borders].tolist()
    places = borders.tolist()
    return [
        Words(
            hashes[start:end],
            char_sums[i + 1] - char_sums[i],
            (stop_sums[i + 1] - stop_sums[i]) / (end - start) if end > start else 0.0,
        )
        for i, (start, end) in enumerate(zip(places[:-1], places[1:], strict=True))
    ]


def _hash_words(joined: bytes, starts: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Return uint64 [words]: eight bytes at a time, mixed; up to eight bytes two words never share a hash."""
    chunks: np.ndarray = np.ndarray((len(joined) - 7,), "<u8", joined, strides=(1,))
    hashes = _mix(chunks[starts] & _FIRST[np.minimum(sizes, 8)])
    longer = np.flatnonzero(sizes > 8)
    done = 8
    while len(longer) and done < _LONG_BYTES:
        left = sizes[longer] - done
        chunk = chunks[starts[longer] + done] & _FIRST[np.minimum(left, 8)]
        hashes[longer] = _mix(hashes[longer] * _MULTIPLIER + chunk)
        longer, done = longer[left > 8], done + 8
    for i in longer.tolist():  # what is longer is no word of a language
        hashes[i] = xxhash.xxh64_intdigest(joined[starts[i] : starts[i] + sizes[i]])
    return hashes


def _mix(x: np.ndarray) -> np.ndarray:
    """Return the finalizer of SplitMix64: a bijection whose every output bit hangs on every input bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def word_spans(text: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the first character of each word of a text and the one after its last: the spans of WORD's matches."""
    points = np.frombuffer(text.encode("utf-32-le"), "<u4")
    inside = np.zeros(len(points) + 2, bool)
    inside[1:-1] = _INSIDE[np.minimum(points, 127)]  # the last of ASCII is no part of a word
    beyond = np.flatnonzero(points >= 128)
    letters, which = np.unique(points[beyond], return_inverse=True)
    inside[1 + beyond] = np.array([chr(point).isalnum() for point in letters.tolist()], bool)[which]
    edges = np.flatnonzero(inside[1:] != inside[:-1])
    return edges[::2], edges[1::2]


class Lookup:
    """A fixed set of hashes to look others up in: nearly all of those that are not in it cost one table access."""

    def __init__(self, hashes: np.ndarray) -> None:
        self.order = np.argsort(hashes, kind="stable")
        self.sorted = hashes[self.order]
        self.table = np.zeros(1 << _TABLE_BITS, bool)
        self.table[self._low(hashes)] = True

    def find(self, hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the positions in `hashes` of those in the set, and the place of each in the set as it was given."""
        if not len(self.sorted):
            return np.zeros(0, np.int64), np.zeros(0, np.int64)
        maybe = np.flatnonzero(self.table[self._low(hashes)])
        place = np.minimum(np.searchsorted(self.sorted, hashes[maybe]), len(self.sorted) - 1)
        sure = self.sorted[place] == hashes[maybe]
        return maybe[sure], self.order[place[sure]]

    def has(self, hashes: np.ndarray) -> np.ndarray:
        """Return bool [hashes]: whether each is in the set."""
        found = np.zeros(len(hashes), bool)
        found[self.find(hashes)[0]] = True
        return found

    @staticmethod
    def _low(hashes: np.ndarray) -> np.ndarray:
        return (hashes & np.uint64((1 << _TABLE_BITS) - 1)).astype(np.int64)


def word_hashes(words: Sequence[str]) -> np.ndarray:
    """Return uint64 [words], the hash of each single word; ValueError for what is not one word."""
    parts = [word.lower().encode() for word in words]
    for part, word in zip(parts, words, strict=True):
        if WORD.fullmatch(word) is None or len(part) > _LONG_BYTES:
            raise ValueError(f"not one word: {word!r}")
    joined = b" " + b" ".join(parts) + b" " * 9
    sizes = np.array([len(part) for part in parts], np.int64)
    starts = 1 + np.concatenate([[0], np.cumsum(sizes + 1)])[:-1].astype(np.int64)
    return _hash_words(joined, starts, sizes)


@lru_cache(maxsize=1)
def stop_words() -> Lookup:
    """Return the commonest English words as hashes."""
    return Lookup(word_hashes(sorted(STOP_WORDS)))


def shingles(words: Words, n: int) -> np.ndarray:
    """Return the different runs of `n` words, sorted; kept with the words, for it is asked for twice."""
    if n not in words.cache:
        words.cache[n] = distinct(ngrams(words.hashes, n))
    return words.cache[n]


def distinct(values: np.ndarray) -> np.ndarray:
    """Return the different values, sorted: what `np.unique` does, several times faster on hashes."""
    ordered = np.sort(values)
    new = np.ones(len(ordered), bool)
    new[1:] = ordered[1:] != ordered[:-1]
    return ordered[new]


def ngrams(hashes: np.ndarray, n: int) -> np.ndarray:
    """Return the hash of each run of `n` words, uint64 [words - n + 1]; order inside the run matters."""
    count = max(0, len(hashes) - n + 1)
    mixed = hashes[:count].copy()
    for i in range(1, n):
        mixed = _join(mixed, hashes[i : i + count])
    return mixed


def longer(mixed: np.ndarray, hashes: np.ndarray, n: int) -> np.ndarray:
    """Return the runs of `n` words, given those of `n - 1`."""
    count = max(0, len(hashes) - n + 1)
    return _join(mixed[:count], hashes[n - 1 : n - 1 + count])


def _join(mixed: np.ndarray, following: np.ndarray) -> np.ndarray:
    return (mixed * _MULTIPLIER) ^ (following + (mixed >> _HALF))


def text_hash(text: str) -> int:
    """Return the xxh3-128 of a text with every run of white space made one space."""
    return xxhash.xxh3_128_intdigest(" ".join(text.split()).encode())
