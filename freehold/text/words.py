"""Documents' words as 64-bit hashes, a batch in one pass: counted, shingled and looked up with numpy, not strings.

A word is a run of letters, digits, underscores and the marks that belong to them. A script that writes no spaces
between words (Chinese, Japanese, Thai, Lao, Khmer, Burmese and others) has no such runs: there each letter with its
marks is a word of its own. So duplicates, runs of words and lengths mean in every script what they mean in English.
Every step that counts words gets them here.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import xxhash

# Letters of scripts that write no spaces between words (Unicode 15 blocks, as UAX 29 leaves them to dictionaries).
_UNSPACED = np.array(
    [
        (0x0E00, 0x0EFF),  # Thai, Lao
        (0x1000, 0x109F),  # Burmese
        (0x1780, 0x17FF),  # Khmer
        (0x1950, 0x19DF),  # Tai Le, New Tai Lue
        (0x1A20, 0x1AAF),  # Tai Tham
        (0x1B00, 0x1B7F),  # Balinese
        (0x3005, 0x3007),  # marks that repeat a Han character, and zero
        (0x3040, 0x30FF),  # Hiragana, Katakana
        (0x31F0, 0x31FF),
        (0x3400, 0x4DBF),  # Han
        (0x4E00, 0x9FFF),
        (0xA000, 0xA48F),  # Yi
        (0xA980, 0xA9FF),  # Javanese, Burmese
        (0xAA60, 0xAADF),  # Burmese, Tai Viet
        (0xF900, 0xFAFF),
        (0xFF66, 0xFF9F),  # half-width Katakana
        (0x1B000, 0x1B16F),
        (0x20000, 0x323AF),
    ],
    np.uint32,
)
_NONE, _PART, _MARK, _ALONE = range(4)
"""What a character beyond ASCII is: no part of a word, a part, a mark on the letter before it, a word of its own."""
# The commonest English words: every page of English has many of them, a list of codes has none.
_COMMON = (
    "the be to of and that have with a in is it for as on was by are this or from an not at which his he they we you i"
    " thou my me will shall"
)
STOP_WORDS = frozenset(_COMMON.split(" "))
# The same for other languages, by ISO 639-1; of scripts without spaces the commonest letters.
_COMMON_OF = {
    "de": "der die und in den von zu das mit sich des auf für ist im dem nicht ein eine als auch es an er hat aus sie",
    "es": "de la que el en y a los se del las un por con no una su para es al lo como más o pero sus le ha me si",
    "fr": "de la le et les des en un du une que est pour qui dans a par plus pas au sur ne se ce il sont avec son aux",
    "it": "di e il la che in a per un è del non una i si con le da della dei come al sono più nel alla o gli lo ha",
    "ja": "の に は を た が で て と し れ さ る い も す な こ",
    "nl": "de van het een en in is dat op te zijn met die voor niet aan er om ook als dan maar bij of uit nog naar",
    "pt": "de a o que e do da em um para é com não uma os no se na por mais as dos como mas foi ao ele das tem à seu",
    "ru": "и в не на я что он с как это по но они к у его за из от так же бы о до для мы все был вы",
    "zh": "的 一 是 不 了 在 人 有 我 他 这 中 大 来 上 国 和 地 到 以 這 來 國",
}
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
    """Share of the commonest English words among all."""
    alone: int = 0
    """How many words are single letters, because their script has no spaces."""
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
    """Return the words of each text, in lower case and hashed; all texts in one pass."""
    parts = [_lower(text) for text in texts]
    # Spaces around and between the texts, and eight behind for the last word's chunk.
    joined = b" " + b" ".join(parts) + b" " * 9
    inside: np.ndarray = np.frombuffer(bytearray(joined.translate(_INSIDE_TABLE)), bool)
    is_ascii = joined.isascii()
    breaks = alone = np.zeros(0, np.int64)
    if not is_ascii:
        breaks, alone = _beyond_ascii_words(joined, inside)
    edges = np.flatnonzero(inside[1:] != inside[:-1])
    edges += 1
    starts, stops_at = _split_at(edges[::2].copy(), edges[1::2], breaks)
    sizes = stops_at - starts
    hashes = _hash_words(joined, starts, sizes)
    ends = np.cumsum([len(part) + 1 for part in parts])
    borders = np.searchsorted(starts, np.concatenate([[0], ends]))
    char_sums = np.concatenate([[0], np.cumsum(sizes)])[borders]
    if not is_ascii:  # a character's bytes after the first begin with the bits 10
        raw = np.frombuffer(joined, np.uint8)
        tails = np.flatnonzero(((raw & 0xC0) == 0x80) & inside)
        char_sums -= np.searchsorted(tails, np.concatenate([[0], ends]))
    english = stop_words()
    assert english is not None
    stops = np.searchsorted(english.find(hashes)[0], borders).tolist()
    places, chars = borders.tolist(), char_sums.tolist()
    letters = np.searchsorted(alone, np.concatenate([[0], ends])).tolist()
    return [
        Words(
            hashes[start:end],
            chars[i + 1] - chars[i],
            (stops[i + 1] - stops[i]) / (end - start) if end > start else 0.0,
            letters[i + 1] - letters[i],
        )
        for i, (start, end) in enumerate(zip(places[:-1], places[1:], strict=True))
    ]


def _beyond_ascii_words(joined: bytes, inside: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Set `inside` to false at the bytes of characters beyond ASCII that are no part of a word.

    Returns where a word begins inside a run of `inside`, and the first byte of each letter that is a word of its own.
    """
    raw = np.frombuffer(joined, np.uint8)
    leads = np.flatnonzero(raw >= 0xC0)
    points = np.frombuffer(joined.translate(None, ASCII).decode().encode("utf-32-le"), "<u4")
    kinds = _kinds(points)
    sizes = 1 + (points >= 0x80) + (points >= 0x800) + (points >= 0x10000)
    which = np.flatnonzero(kinds == _NONE)
    for byte in range(4):
        inside[leads[which[sizes[which] > byte]] + byte] = False
    breaks = _breaks(leads, leads + sizes, kinds)
    return breaks[inside[breaks] & inside[breaks - 1]], leads[kinds == _ALONE]


def _breaks(starts: np.ndarray, ends: np.ndarray, kinds: np.ndarray) -> np.ndarray:
    """Return, sorted, the places before and after each letter that is a word of its own, its marks included.

    All arrays have one entry a character beyond ASCII: where it starts and ends, and what it is.
    """
    if not (kinds == _ALONE).any():
        return np.zeros(0, np.int64)
    # A mark belongs to the letter before it, through any marks between them.
    joined = np.concatenate([[False], (kinds[1:] == _MARK) & (starts[1:] == ends[:-1])])
    letter = np.maximum.accumulate(np.where(joined, 0, np.arange(len(kinds))))
    last = np.concatenate([~joined[1:], [True]])
    return np.unique(np.concatenate([starts[kinds == _ALONE], ends[(kinds[letter] == _ALONE) & last]]))


def _split_at(starts: np.ndarray, ends: np.ndarray, breaks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return runs cut in two at each of the breaks, which are inside them."""
    if not len(breaks):
        return starts, ends
    return np.sort(np.concatenate([starts, breaks])), np.sort(np.concatenate([ends, breaks]))


def _kinds(points: np.ndarray) -> np.ndarray:
    """Return int64 [points]: what each code point beyond ASCII is."""
    letters, which = np.unique(points, return_inverse=True)
    return np.array([_kind(point) for point in letters.tolist()], np.int64)[which]


@lru_cache(maxsize=1 << 16)
def _kind(point: int) -> int:
    category = unicodedata.category(chr(point))
    if category[0] == "M":
        return _MARK
    # Digits of these scripts make numbers, as others do.
    if category != "Nd" and chr(point).isalnum() and ((_UNSPACED[:, 0] <= point) & (point <= _UNSPACED[:, 1])).any():
        return _ALONE
    return _PART if chr(point).isalnum() else _NONE


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
    """Return the first character of each word of a text and the one after its last."""
    points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")
    inside = np.zeros(len(points) + 2, bool)
    inside[1:-1] = _INSIDE[np.minimum(points, 127)]  # the last of ASCII is no part of a word
    beyond = np.flatnonzero(points >= 128)
    kinds = _kinds(points[beyond])
    inside[1 + beyond] = kinds != _NONE
    edges = np.flatnonzero(inside[1:] != inside[:-1])
    breaks = _breaks(beyond, beyond + 1, kinds)
    return _split_at(edges[::2], edges[1::2], breaks[inside[1 + breaks] & inside[breaks]])


def spaced(text: str) -> str:
    """Return a text with a space before and after each letter that is a word of its own."""
    if text.isascii():
        return text
    points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")
    beyond = np.flatnonzero(points >= 128)
    places = _breaks(beyond, beyond + 1, _kinds(points[beyond])).tolist()
    return " ".join(text[start:end] for start, end in zip([0, *places], [*places, len(text)], strict=True))


def is_word_part(character: str) -> bool:
    """Return whether a character is part of a word: a letter, a digit, an underscore, or a mark on one."""
    return character == "_" or character.isalnum() or unicodedata.category(character)[0] == "M"


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
    lower = [word.lower() for word in words]
    parts = [word.encode() for word in lower]
    if split_words(" ".join(lower)) != lower or max(map(len, parts), default=0) > _LONG_BYTES:
        wrong = [word for word in lower if split_words(word) != [word] or len(word.encode()) > _LONG_BYTES]
        raise ValueError(f"not one word: {wrong[0]!r}")
    joined = b" " + b" ".join(parts) + b" " * 9
    sizes = np.array([len(part) for part in parts], np.int64)
    starts = 1 + np.concatenate([[0], np.cumsum(sizes + 1)])[:-1].astype(np.int64)
    return _hash_words(joined, starts, sizes)


@lru_cache(maxsize=16)
def stop_words(language: str = "en") -> Lookup | None:
    """Return the commonest words of a language (ISO 639-1) as hashes; None for one whose words are not known here."""
    known = STOP_WORDS if language == "en" else _COMMON_OF.get(language, "").split()
    return Lookup(word_hashes(sorted(set(known)))) if known else None


def stop_share(words: Words, language: str) -> float | None:
    """Return the share of the commonest words of a language among all; None when they are not known here."""
    lookup = stop_words(language)
    if lookup is None:
        return None
    return len(lookup.find(words.hashes)[0]) / max(1, len(words.hashes))


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
