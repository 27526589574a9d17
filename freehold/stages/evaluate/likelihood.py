"""Exact log-likelihood of long token sequences through the engine: cut into windows, scored in batches."""

from __future__ import annotations

from collections.abc import Sequence

from freehold.core.log import Log
from freehold.infer.engine import PREFILL_TOKENS, Engine


def batches(lengths: Sequence[int], items: int) -> list[list[int]]:
    """Return batches of indices of similar length: little padding, at most `items` each, one forward pass each."""
    found: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if not found or len(found[-1]) == items or (len(found[-1]) + 1) * lengths[index] > PREFILL_TOKENS:
            found.append([])
        found[-1].append(index)
    return found


def score(
    engine: Engine, sequences: Sequence[Sequence[int]], *, batch_items: int, log: Log, what: str
) -> list[list[float]]:
    """Return for each sequence of n tokens its n - 1 natural log-probabilities, telling `log` how far it is."""
    found: list[list[float]] = [[] for _ in sequences]
    for batch in log.track(batches([len(ids) - 1 for ids in sequences], batch_items), what, unit="batches"):
        for i, values in zip(batch, engine.score([sequences[i] for i in batch]), strict=True):
            found[i] = values[1:]
    return found
