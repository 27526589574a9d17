"""Documents' words as 64-bit hashes, a batch together: counted, shingled and looked up with numpy, not strings."""

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
# Of the bytes of a text, those that are part of a word; from 0x80 on it hangs on the character.
_INSIDE = np.array([b >= 0x80 or chr(b).isalnum() or b == ord("_") for b in range(256)])
_INSIDE_TABLE = _INSIDE.tobytes()
ASCII = bytes(range(128))
# Keeps the first n bytes of eight, in the order of memory.
_FIRST = np.array([(1 << 8 * n) - 1 for n in range(9)], np.uint64)
_LONG_BYTES = 64
# A table by the low bits of a hash says "not among them" of almost every word without a search. It should be 32 times
# larger than the set, and a small one stays in the cache.
_LEAST_BITS, _MOST_BITS = 16, 20


@dataclass(frozen=True)
class Words:
    """What the filters need to know about a document's words."""

    hashes: np.ndarray
    """uint64 [words], in text order, of the lower-cased words."""
    chars: int
    """Characters of all words together: letters, digits, underscores."""
    stop_fraction: float
    cache: dict[int, np.ndarray] = field(default_factory=dict, repr=False)

    def ngrams(self, n: int) -> np.ndarray:
        """Return the hash of each run of `n` words; kept with the words, for it is asked for more than once."""
        if n not in self.cache:
            fewer = max((m for m in self.cache if m < n), default=1)
            self.cache[n] = ngrams(self.hashes, n, self.cache.get(fewer), fewer)
        return self.cache[n]


def read_words(text: str) -> Words:
    """Split a text into lower-case runs of word characters and hash them."""
    return read_batch([text])[0]


def split_words(text: str) -> list[str]:
    """Return the words of a text in lower case: what `read_words` hashes."""
    lower = text.lower()
    starts, ends = word_spans(lower)
    return [lower[start:end] for start, end in zip(starts.tolist(), ends.tolist(), strict=True)]


def beyond_ascii(text: str) -> str:
    """Return the characters of a text that are not ASCII, in order: few, so what asks for them alone is fast."""
    return "" if text.isascii() else text.encode().translate(None, ASCII).decode()


def _lower(text: str) -> bytes:
    """Return `text.lower()` in UTF-8: byte by byte when nothing beyond ASCII changes, which is much faster."""
    few = beyond_ascii(text)
    return text.encode().lower() if few == few.lower() else text.lower().encode()


def read_batch(texts: Sequence[str]) -> list[Words]:
    """Return the words of each text: the lower-cased matches of `\\w+`, hashed; all texts in one pass."""
    parts = [_lower(text) for text in texts]
    # Spaces around and between the texts, and eight behind for the last word's chunk.
    joined = b" " + b" ".join(parts) + b" " * 9
    inside: np.ndarray = np.frombuffer(bytearray(joined.translate(_INSIDE_TABLE)), bool)
    is_ascii = joined.isascii()
    if not is_ascii:
        _exclude_symbols(joined, inside)
    edges = np.flatnonzero(inside[1:] != inside[:-1])
    edges += 1
    starts = edges[::2].copy()
    sizes = edges[1::2] - starts
    hashes = _hash_words(joined, starts, sizes)
    ends = np.cumsum([len(part) + 1 for part in parts])
    borders = np.searchsorted(starts, np.concatenate([[0], ends]))
    char_sums = np.concatenate([[0], np.cumsum(sizes)])[borders]
    if not is_ascii:  # a character's bytes after the first begin with the bits 10
        raw = np.frombuffer(joined, np.uint8)
        tails = np.flatnonzero(((raw & 0xC0) == 0x80) & inside)
        char_sums -= np.searchsorted(tails, np.concatenate([[0], ends]))
    stops = np.searchsorted(stop_words().find(hashes)[0], borders).tolist()
    places, chars = borders.tolist(), char_sums.tolist()
    return [
        Words(
            hashes[start:end],
            chars[i + 1] - chars[i],
            (stops[i + 1] - stops[i]) / (end - start) if end > start else 0.0,
        )
        for i, (start, end) in enumerate(zip(places[:-1], places[1:], strict=True))
    ]


def _exclude_symbols(joined: bytes, inside: np.ndarray) -> None:
    """Set `inside` to false at the bytes of those characters beyond ASCII that are no part of a word."""
    raw = np.frombuffer(joined, np.uint8)
    leads = np.flatnonzero(raw >= 0xC0)
    points = np.frombuffer(joined.translate(None, ASCII).decode().encode("utf-32-le"), "<u4")
    which = np.flatnonzero(~_in_words(points))
    sizes = 1 + (points[which] >= 0x80) + (points[which] >= 0x800) + (points[which] >= 0x10000)
    for byte in range(4):
        inside[leads[which[sizes > byte]] + byte] = False


def _in_words(points: np.ndarray) -> np.ndarray:
    """Return bool [points]: whether each code point beyond ASCII is part of a word."""
    letters, which = np.unique(points, return_inverse=True)
    return np.array([chr(point).isalnum() for point in letters.tolist()], bool)[which]


def _hash_words(joined: bytes, starts: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Return uint64 [words]: eight bytes at a time, mixed; up to eight bytes two words never share a hash."""
    chunks: np.ndarray = np.ndarray((len(joined) - 7,), "<u8", joined, strides=(1,))
    hashes = chunks[starts]
    hashes &= _FIRST.take(sizes, mode="clip")
    _mix(hashes)
    longer = np.flatnonzero(sizes > 8)
    done = 8
    while len(longer) and done < _LONG_BYTES:
        left = sizes[longer] - done
        chunk = chunks[starts[longer] + done] & _FIRST.take(left, mode="clip")
        hashes[longer] = _mix(hashes[longer] * _MULTIPLIER + chunk)
        longer, done = longer[left > 8], done + 8
    for i in longer.tolist():  # what is longer is no word of a language
        hashes[i] = xxhash.xxh64_intdigest(joined[starts[i] : starts[i] + sizes[i]])
    return hashes


def _mix(x: np.ndarray) -> np.ndarray:
    """Return the finalizer of SplitMix64, in place: a bijection whose output bits all hang on every input bit."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x ^= x >> np.uint64(shift)
        x *= np.uint64(factor)
    x ^= x >> np.uint64(31)
    return x


def word_spans(text: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the first character of each word of a text and the one after its last: the spans of WORD's matches."""
    points = np.frombuffer(text.encode("utf-32-le"), "<u4")
    inside = np.zeros(len(points) + 2, bool)
    inside[1:-1] = _INSIDE[np.minimum(points, 127)]  # the last of ASCII is no part of a word
    beyond = np.flatnonzero(points >= 128)
    inside[1 + beyond] = _in_words(points[beyond])
    edges = np.flatnonzero(inside[1:] != inside[:-1])
    return edges[::2], edges[1::2]


class Lookup:
    """A fixed set of hashes to look others up in: nearly all of those that are not in it cost one table access."""

    def __init__(self, hashes: np.ndarray) -> None:
        self.order = np.argsort(hashes, kind="stable")
        self.sorted = hashes[self.order]
        bits = min(max(_LEAST_BITS, len(hashes).bit_length() + 5), _MOST_BITS)
        self.mask = np.uint64((1 << bits) - 1)
        self.table = np.zeros(1 << bits, bool)
        self.table[self._low(hashes)] = True

    def find(self, hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the positions in `hashes` of those in the set, and the place of each in the set as it was given."""
        if not len(self.sorted):
            return np.zeros(0, np.int64), np.zeros(0, np.int64)
        maybe = np.flatnonzero(self.table[self._low(hashes)])
        place = np.minimum(np.searchsorted(self.sorted, hashes[maybe]), len(self.sorted) - 1)
        sure = self.sorted[place] == hashes[maybe]
        return maybe[sure], self.order[place[sure]]

    def _low(self, hashes: np.ndarray) -> np.ndarray:
        return (hashes & self.mask).view(np.int64)


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


def repeats_at_most(values: np.ndarray, share: float) -> bool:
    """Return whether at most this share of the values repeat an earlier one; only doubtful cases are sorted."""
    if not len(values):
        return True
    # Different values may share a place in the table, never the other way round: there are no fewer than places taken.
    table = np.zeros(1 << (len(values).bit_length() + 2), bool)
    table[(values & np.uint64(len(table) - 1)).view(np.int64)] = True
    return bool(1 - np.count_nonzero(table) / len(values) <= share)


def distinct(values: np.ndarray) -> np.ndarray:
    """Return the different values, sorted: what `np.unique` does, several times faster on hashes."""
    ordered = np.sort(values)
    new = np.ones(len(ordered), bool)
    new[1:] = ordered[1:] != ordered[:-1]
    return ordered[new]


def ngrams(hashes: np.ndarray, n: int, given: np.ndarray | None = None, of: int = 1) -> np.ndarray:
    """Return the hash of each run of `n` words, uint64 [words - n + 1]; order inside the run matters.

    The runs of fewer words, if they are known, are `given`, with their number of words.
    """
    count = max(0, len(hashes) - n + 1)
    mixed = (hashes if given is None else given)[:count].copy()
    high = np.empty_like(mixed)
    for i in range(of, n):
        np.right_shift(mixed, _HALF, out=high)
        high += hashes[i : i + count]
        mixed *= _MULTIPLIER
        mixed ^= high
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
