"""Which documents are held out: by hash of the id, so that a new document never moves an old one."""

from __future__ import annotations

from collections.abc import Sequence

import xxhash

from freehold.stages.curate.config import Split
from freehold.stages.curate.rules import LARGE_BYTES, MIN_VALIDATION_DOCUMENTS


def place(identity: str) -> float:
    """Return a number in [0, 1) that depends on the id only."""
    return xxhash.xxh64_intdigest(identity.encode(), seed=20) / 2**64


def validation_documents(rows: Sequence[tuple[str, int]], config: Split) -> set[str]:
    """Return the ids held out of one source's documents, given as (id, UTF-8 bytes).

    Those whose place is below the fraction, at most `max_bytes` together; then, up to MIN_VALIDATION_DOCUMENTS
    (and half of the source), the next by place, large ones last and the smallest of them first.
    """
    order = sorted(rows, key=lambda row: (place(row[0]), row[0]))
    small = [row for row in order if row[1] <= LARGE_BYTES]
    large = sorted((row for row in order if row[1] > LARGE_BYTES), key=lambda row: row[1])
    chosen: set[str] = set()
    total = 0
    for identity, size in small:
        if place(identity) < config.validation_fraction and total + size <= config.max_bytes:
            chosen.add(identity)
            total += size
    least = min(MIN_VALIDATION_DOCUMENTS, len(rows) // 2) if config.validation_fraction > 0 else 0
    for most_bytes in (config.max_bytes, None):
        for identity, size in [*small, *large]:
            fits = most_bytes is None or total + size <= most_bytes
            if len(chosen) < least and identity not in chosen and fits:
                chosen.add(identity)
                total += size
    return chosen


def is_validation(identity: str, fraction: float) -> bool:
    """Return whether a conversation is held out."""
    return place(identity) < fraction
