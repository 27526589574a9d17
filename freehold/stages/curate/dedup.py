"""Duplicates: exact ones by hash, near ones by MinHash bands verified on the true Jaccard similarity."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from freehold.stages.curate.config import NearDuplicates
from freehold.stages.curate.filters import Why
from freehold.stages.curate.words import Words, shingles, text_hash


class ExactDuplicates:
    """Remembers every text seen, white space aside; the first one stays."""

    def __init__(self) -> None:
        self.seen: dict[int, str] = {}

    def __call__(self, identity: str, text: str) -> Why | None:
        """Return the reason to drop when the text was seen before under another id."""
        first = self.seen.setdefault(text_hash(text), identity)
        return None if first == identity else ("exact_duplicate", f"of {first}")


def near_duplicates(identities: Sequence[str], words: Sequence[Words], config: NearDuplicates) -> dict[str, Why]:
    """Return `{id: reason}` of each document too like an earlier one that stays.

    `words[i]` are the words of `identities[i]`; the order of the documents is the order
    of precedence. Documents share a candidate bucket when one band of their sketches is equal; a
    document is dropped only when its shingles' Jaccard similarity with a kept one reaches the threshold.
    """
    chosen = [i for i, one in enumerate(words) if len(one.hashes) >= max(config.min_words, config.shingle_words)]
    if len(chosen) < 2:
        return {}
    sets = [shingles(words[i], config.shingle_words) for i in chosen]
    buckets: dict[bytes, list[int]] = {}
    drops: dict[str, Why] = {}
    for place, bands in enumerate(_band_keys(sets, config)):
        compared: set[int] = set()
        for other in (other for key in bands for other in buckets.get(key, ())):
            if other in compared:
                continue
            compared.add(other)
            similarity = jaccard(sets[place], sets[other])
            if similarity >= config.threshold:
                detail = f"{similarity:.3f} like {identities[chosen[other]]}"
                drops[identities[chosen[place]]] = ("near_duplicate", detail)
                break
        else:
            for key in bands:
                buckets.setdefault(key, []).append(place)
    return drops


def _band_keys(sets: list[np.ndarray], config: NearDuplicates) -> list[list[bytes]]:
    """Return each document's band keys: its sketch cut into `bands` pieces, each with the band's number."""
    from rensa import RMinHash

    offsets = np.concatenate([[0], np.cumsum([len(s) for s in sets])]).astype(np.uint64)
    sketch = RMinHash.digest_matrix_from_flat_token_hashes(np.concatenate(sets), offsets, config.permutations, 1)
    rows = np.array(sketch.to_rows(), np.uint32).reshape(len(sets), config.bands, -1)
    numbers = [number.to_bytes(2, "little") for number in range(config.bands)]
    return [[n + band.tobytes() for n, band in zip(numbers, row, strict=True)] for row in rows]


def jaccard(left: np.ndarray, right: np.ndarray) -> float:
    """Return |intersection| / |union| of two sorted arrays without repetitions."""
    small, large = sorted((left, right), key=len)
    if not len(small):
        return 0.0
    place = np.minimum(np.searchsorted(large, small), len(large) - 1)
    shared = int((large[place] == small).sum())
    return shared / (len(left) + len(right) - shared)
