"""Duplicates: exact, near, contained in others, repeated passages and repeated lines; each confirmed on the words.

Documents are numbers here: rows of the corpus. `order` holds the numbers of those that take part, those that are kept
first in front. What is compared is read from arrays on disk; in memory are a few numbers a document, and of what is
sorted as much as `memory_bytes` allows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache

import numpy as np
import xxhash

from freehold.stages.curate.config import NearDuplicates, Overlap, RepeatedLines
from freehold.stages.curate.rules import CONTAINED_SHARE, LINE_CHARS, MATCH_WORDS, NGRAM_WORDS, SHINGLE_WORDS
from freehold.text.words import Words, distinct, ngrams, read_words, text_hash, word_spans

Reader = Callable[[int], np.ndarray]
"""Returns the word hashes of a document."""
Span = tuple[int, int]
"""First word and the word after the last."""
# Bytes that sorting one hash takes: itself, the document, the place, and the order.
_SORT_BYTES = 48
_NO_SHINGLE = np.uint32(0xFFFFFFFF)


def words_key(words: Words) -> int:
    """Return a hash that texts have in common if they are equal, white space aside: that of their words."""
    return xxhash.xxh3_64_intdigest(words.hashes.data)


def exact_duplicates(order: np.ndarray, keys: np.ndarray, text: Callable[[int], str]) -> dict[int, int]:
    """Return `{document: the one it repeats, white space aside}`; `keys` is uint64 [documents], of `words_key`.

    Only texts of which another one has the same words are read.
    """
    by_key = np.argsort(keys[order], kind="stable")
    _, group, sizes = _runs(keys[order][by_key])
    seen: dict[int, int] = {}
    found: dict[int, int] = {}
    for document in order[np.sort(by_key[sizes[group] > 1])].tolist():
        first = seen.setdefault(text_hash(text(document)), document)
        if first != document:
            found[document] = first
    return found


def sketches(words: Sequence[Words], config: NearDuplicates) -> np.ndarray:
    """Return uint32 [documents, permutations], the MinHash sketch of each document's shingles (Broder 1997).

    Without shingles the sketch has the largest number throughout: the least of none.
    """
    from rensa import RMinHash

    runs = [one.ngrams(SHINGLE_WORDS) for one in words]
    if not sum(map(len, runs)):
        return np.full((len(words), config.permutations), _NO_SHINGLE, np.uint32)
    offsets = np.concatenate([[0], np.cumsum([len(run) for run in runs])]).astype(np.uint64)
    rows = RMinHash.digest_matrix_from_flat_token_hashes(np.concatenate(runs), offsets, config.permutations, 1)
    return np.array(rows.to_rows(), np.uint32)


def near_duplicates(
    order: np.ndarray, sketch: Sequence[np.ndarray], words: Reader, config: NearDuplicates
) -> dict[int, tuple[int, float]]:
    """Return `{document: (the one it is like, Jaccard similarity)}` of each too like an earlier one that stays.

    `sketch` holds the rows of all documents, in pieces. Documents are compared when one band of their sketches is
    equal; a document is dropped only when its shingles' similarity with a kept one reaches the threshold. Those
    without shingles, whose sketches are all equal, are compared with none.
    """
    order = order[np.concatenate([(piece != _NO_SHINGLE).any(axis=1) for piece in sketch])[order]]
    members, groups, count = [], [], 0
    rows = config.permutations // config.bands
    for band in range(config.bands):
        keys = np.concatenate([_fold(piece[:, band * rows : (band + 1) * rows]) for piece in sketch])[order]
        by_key = np.argsort(keys, kind="stable")
        _, group, sizes = _runs(keys[by_key])
        several = sizes[group] > 1
        members.append(by_key[several])
        groups.append(group[several] + count)
        count += len(sizes)
    member, group = np.concatenate(members), np.concatenate(groups)
    by_member = np.argsort(member, kind="stable")
    member, group = member[by_member], group[by_member]
    buckets: dict[int, list[int]] = {}
    drops: dict[int, tuple[int, float]] = {}

    @lru_cache(maxsize=256)
    def shingles_of(document: int) -> np.ndarray:
        return distinct(ngrams(words(document), SHINGLE_WORDS))

    for start, end in _slices(member):
        document = int(order[member[start]])
        mine = shingles_of(document)
        bands = group[start:end].tolist()
        compared: set[int] = set()
        for other in (other for key in bands for other in buckets.get(key, ())):
            if other in compared:
                continue
            compared.add(other)
            similarity = jaccard(mine, shingles_of(other))
            if similarity >= config.threshold:
                drops[document] = (other, similarity)
                break
        else:
            for key in bands:
                buckets.setdefault(key, []).append(document)
    return drops


def _fold(rows: np.ndarray) -> np.ndarray:
    """Return uint64 [documents], a hash of each row of uint32 numbers."""
    width = rows.shape[1]
    return ngrams(np.ascontiguousarray(rows).astype(np.uint64).reshape(-1), width)[::width]


def _runs(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return of sorted values where each run of equal ones starts, the run of each value, and the runs' sizes."""
    new = np.ones(len(values), bool)
    new[1:] = values[1:] != values[:-1]
    starts = np.flatnonzero(new)
    return starts, np.cumsum(new) - 1, np.diff(np.append(starts, len(values)))


def _slices(values: np.ndarray) -> Iterator[Span]:
    starts, _, sizes = _runs(values)
    yield from zip(starts.tolist(), (starts + sizes).tolist(), strict=True)


def jaccard(left: np.ndarray, right: np.ndarray) -> float:
    """Return |intersection| / |union| of two sorted arrays without repetitions."""
    small, large = sorted((left, right), key=len)
    if not len(small):
        return 0.0
    shared = int(contained(small, large).sum())
    return shared / (len(left) + len(right) - shared)


def contained(values: np.ndarray, among: np.ndarray) -> np.ndarray:
    """Return bool [values]: whether each is in the sorted array `among`."""
    place = np.minimum(np.searchsorted(among, values), len(among) - 1)
    return np.asarray(among[place] == values) if len(among) else np.zeros(len(values), bool)


def winnow(
    words: Sequence[Words], ngram_words: int = NGRAM_WORDS, match_words: int = MATCH_WORDS
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return hash uint64 and place int32 of the runs that are kept, and int64 [documents], how many of each document.

    Of each `match_words - ngram_words + 1` neighbouring runs the one with the least hash is kept, so two texts that
    share `match_words` words share a kept run there. Shorter documents have none.
    """
    window = match_words - ngram_words + 1
    hashes, places, counts = [], [], []
    for one in words:
        runs = one.ngrams(ngram_words)
        kept = np.zeros(0, np.int64)
        if len(runs) >= window:
            # What decides is mixed once more: the hash's own order would prefer some words to others.
            mixed = runs * np.uint64(0xD6E8FEB86659FD93)
            least = _slide(mixed, window, np.minimum)
            reach = np.zeros(len(runs) + window - 1, np.uint64)
            reach[window - 1 : len(runs)] = least
            most = _slide(reach, window, np.maximum)
            kept = np.flatnonzero(most == mixed)
        hashes.append(runs[kept])
        places.append(kept.astype(np.int32))
        counts.append(len(kept))
    empty = [np.zeros(0, np.uint64)], [np.zeros(0, np.int32)]
    return np.concatenate(hashes or empty[0]), np.concatenate(places or empty[1]), np.array(counts, np.int64)


def _slide(values: np.ndarray, window: int, least: np.ufunc) -> np.ndarray:
    """Return the least (or largest) of each `window` neighbours, [values - window + 1]: of 2, of 4, ... of all."""
    width = 1
    while width < window:
        step = min(width, window - width)
        values = least(values[:-step], values[step:])
        width += step
    return values


def repeated(
    pieces: Callable[[], Iterable[tuple[np.ndarray, np.ndarray, np.ndarray]]], least: int, memory_bytes: int | None
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yield (document, place, group) of the hashes that at least `least` documents have, sorted by hash.

    `pieces()` yields (hash, document, place) of the corpus part by part, as often as asked: of more than fits into
    `memory_bytes`, only the hashes of one class modulo the number of passes are sorted at a time.
    """
    total = sum(len(hashes) for hashes, _, _ in pieces())
    passes = np.uint64(-(-total * _SORT_BYTES // memory_bytes) if memory_bytes and total else 1)
    count = 0
    for number in range(int(passes)):
        parts = []
        for hashes, documents, places in pieces():
            mine = (hashes >> np.uint64(32)) % passes == number if passes > 1 else slice(None)
            parts.append((hashes[mine], documents[mine], places[mine]))
        if not parts:
            return
        hashes, documents, places = (np.concatenate(column) for column in zip(*parts, strict=True))
        by_hash = np.lexsort((places, documents, hashes))
        documents, places = documents[by_hash], places[by_hash]
        starts, group, _ = _runs(hashes[by_hash])
        if not len(starts):
            continue
        new = np.ones(len(documents), bool)
        new[1:] = documents[1:] != documents[:-1]
        new[starts] = True
        enough = np.add.reduceat(new.astype(np.int64), starts) >= least
        mine = enough[group]
        renumbered = np.cumsum(enough) - 1 + count
        yield documents[mine], places[mine], renumbered[group[mine]]
        count += int(enough.sum())


class Overlaps:
    """What `find_overlaps` finds: documents that others hold, and passages of those that stay."""

    def __init__(self) -> None:
        self.contained: dict[int, tuple[int, float]] = {}
        """{document: (the one that holds the largest part, share of its runs in documents that stay)}"""
        self.passages: dict[int, list[Span]] = {}
        """{document: spans of words that stand in documents before it}"""


def find_overlaps(
    order: np.ndarray,
    counts: np.ndarray,
    pieces: Callable[[], Iterable[tuple[np.ndarray, np.ndarray, np.ndarray]]],
    words: Reader,
    config: Overlap,
    memory_bytes: int | None = None,
    contained_share: float = CONTAINED_SHARE,
) -> Overlaps:
    """Return the documents to drop and the passages to cut; `counts` are the kept runs of each document.

    One document after the other, in `order`: when the kept runs say that most of one has been seen in those that stay,
    its full set of runs is compared with those documents' before it is dropped. Several documents together may hold
    another one, as the chapters hold the book. Of a document that stays, shared runs are extended word by word.
    """
    rank = np.full(len(counts), -1, np.int64)
    rank[order] = np.arange(len(order))

    def taking_part() -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        for hashes, documents, places in pieces():
            mine = rank[documents] >= 0
            yield hashes[mine], documents[mine], places[mine]

    parts = list(repeated(taking_part, 2, memory_bytes))
    result = Overlaps()
    if not parts:
        return result
    document, place, group = (np.concatenate(column) for column in zip(*parts, strict=True))
    by_rank = np.lexsort((place, rank[document]))
    document, place, group = document[by_rank], place[by_rank], group[by_rank]
    owner = np.full(int(group.max(initial=-1)) + 1, -1, np.int64)
    owner_place = np.zeros(len(owner), np.int64)

    @lru_cache(maxsize=64)
    def runs_of(one: int) -> np.ndarray:
        return distinct(ngrams(words(one), NGRAM_WORDS))

    for start, end in _slices(document):
        here = int(document[start])
        groups, places = group[start:end], place[start:end]
        shared = owner[groups] >= 0
        if config.contained != "off" and shared.sum() >= contained_share * counts[here]:
            holders, weight = np.unique(owner[groups[shared]], return_counts=True)
            ranked = holders[np.lexsort((rank[holders], -weight))].tolist()
            share = covered_share(runs_of(here), (runs_of(one) for one in ranked), contained_share)
            if share >= contained_share:
                result.contained[here] = (ranked[0], share)
                if config.contained == "drop":
                    continue
        if config.passages != "off" and shared.any():
            theirs = owner[groups[shared]].tolist(), owner_place[groups[shared]].tolist()
            matches = zip(places[shared].tolist(), *theirs, strict=True)
            if spans := passages(words(here), matches, words, MATCH_WORDS):
                result.passages[here] = spans
        first = np.flatnonzero(~shared)
        fresh, at = np.unique(groups[first], return_index=True)
        owner[fresh] = here
        owner_place[fresh] = places[first[at]]
    return result


def covered_share(runs: np.ndarray, others: Iterable[np.ndarray], enough: float) -> float:
    """Return the share of sorted `runs` that stand in any of `others`; stops once `enough` are found."""
    left, total = runs, len(runs)
    for other in others:
        left = left[~contained(left, other)]
        if total - len(left) >= enough * total:
            break
    return 1 - len(left) / total if total else 0.0


def passages(mine: np.ndarray, matches: Iterable[tuple[int, int, int]], words: Reader, least: int) -> list[Span]:
    """Return the spans of at least `least` words around the `matches` (place, other document, its place), disjoint."""
    spans: list[Span] = []
    end = 0
    for place, other, there in matches:
        if place < end:
            continue
        theirs = words(other)
        before = _equal(mine[max(0, place - there) : place][::-1], theirs[max(0, there - place) : there][::-1])
        after = _equal(mine[place:], theirs[there:])
        start = max(end, place - before)
        if place + after - start >= least:
            spans.append((start, place + after))
            end = place + after
    return spans


def _equal(left: np.ndarray, right: np.ndarray) -> int:
    """Return how many of the first elements are equal."""
    size, done = min(len(left), len(right)), 0
    step = 64
    while done < size:
        differ = left[done : min(size, done + step)] != right[done : min(size, done + step)]
        if differ.any():
            return done + int(differ.argmax())
        done, step = done + step, 2 * step
    return size


def line_key(line: str) -> int:
    """Return the hash of a line without the space around it."""
    return xxhash.xxh3_64_intdigest(line.encode())


def line_hashes(text: str, min_chars: int = LINE_CHARS) -> np.ndarray:
    """Return uint64, the hashes of a text's different lines of at least `min_chars` characters, sorted."""
    lines = {line for raw in text.split("\n") if len(line := raw.strip()) >= min_chars}
    return np.sort(np.fromiter(map(line_key, lines), np.uint64, len(lines)))


def repeated_lines(
    rank: np.ndarray,
    pieces: Callable[[], Iterable[tuple[np.ndarray, np.ndarray]]],
    config: RepeatedLines,
    memory_bytes: int | None = None,
) -> dict[int, set[int]]:
    """Return `{document: hashes of its lines}` that many documents have, without the first of those documents.

    `pieces()` yields (hash, document); `rank` is the place of each document in the order, -1 for those not there.
    """

    def numbered() -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        for hashes, documents in pieces():
            mine = rank[documents] >= 0
            # The place in the corpus is not needed; the hash is, and travels as it.
            yield hashes[mine], documents[mine], hashes[mine].view(np.int64)

    result: dict[int, set[int]] = {}
    for documents, hashes, group in repeated(numbered, config.min_documents, memory_bytes):
        by_rank = np.lexsort((rank[documents], group))
        starts, _, _ = _runs(group[by_rank])
        later = np.ones(len(documents), bool)
        later[by_rank[starts]] = False
        for document, key in zip(documents[later].tolist(), hashes[later].view(np.uint64).tolist(), strict=True):
            result.setdefault(document, set()).add(key)
    return result


def cut_lines(text: str, hashes: set[int], min_chars: int = LINE_CHARS) -> str:
    """Return the text without the lines of these hashes."""
    kept = []
    for raw in text.split("\n"):
        line = raw.strip()
        if len(line) < min_chars or line_key(line) not in hashes:
            kept.append(raw)
    return "\n".join(kept)


def cut_words(text: str, spans: Sequence[Span]) -> str:
    """Return the text without these spans of words; a line break stands in the place of each."""
    starts, ends = word_spans(text)
    if not text.isascii() and len(starts) != len(read_words(text).hashes):
        return text  # some letter becomes two characters in lower case, and words cannot be counted
    pieces, done = [], 0
    for start, end in spans:
        piece = text[done : int(starts[start])].rstrip()
        pieces.append(piece.lstrip() if done else piece)
        done = int(ends[end - 1])
        # What closed the passage goes with it.
        while done < len(text) and not text[done].isspace() and not text[done].isalnum():
            done += 1
    pieces.append(text[done:].lstrip())
    return "\n".join(piece for piece in pieces if piece)
