"""Intervals and tests for shares and differences: what a figure of this size can show, and what it cannot.

Sources: Wilson 1927 (score interval), McNemar 1947 with the exact binomial, Miller 2411.00640 (paired and clustered
comparison of evaluations), Holm 1979.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Z95 = 1.959963984540054
RESAMPLES = 2000
POWER_80 = 2.8
"""Standard errors between no difference and one found four times in five, at 95 %."""


def wilson(correct: int, items: int) -> tuple[float, float]:
    """Return the 95 % Wilson score interval of a proportion (Wilson 1927); (0, 1) when there are no items."""
    if items == 0:
        return 0.0, 1.0
    share, z2 = correct / items, Z95 * Z95
    centre = (share + z2 / (2 * items)) / (1 + z2 / items)
    half = Z95 / (1 + z2 / items) * math.sqrt(share * (1 - share) / items + z2 / (4 * items * items))
    return max(0.0, centre - half), min(1.0, centre + half)


def mcnemar(only_first: int, only_second: int) -> float:
    """Return the two-sided exact p of a paired difference: items that only one of two models got right.

    >>> mcnemar(0, 0), mcnemar(0, 6)
    (1.0, 0.03125)
    """
    total, least = only_first + only_second, min(only_first, only_second)
    if total == 0:
        return 1.0
    return min(1.0, 2 * sum(math.comb(total, k) for k in range(least + 1)) / 2**total)


def smallest_difference(items: int, discordant: float) -> float:
    """Return the smallest difference of two accuracies that a paired set shows in four of five cases.

    `discordant` is the share of items that exactly one of the two got right.

    >>> round(smallest_difference(150, 0.2), 3)
    0.102
    """
    return 1.0 if items == 0 else POWER_80 * math.sqrt(max(discordant, 1 / items) / items)


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95 % interval."""

    value: float
    low: float
    high: float

    def to_dict(self) -> dict[str, float]:
        """Return the three numbers, rounded."""
        return {"value": round(self.value, 6), "low": round(self.low, 6), "high": round(self.high, 6)}


def share(correct: int, items: int) -> Estimate:
    """Return a share with its Wilson interval."""
    low, high = wilson(correct, items)
    return Estimate(correct / items if items else 0.0, low, high)


def bootstrap(values: Sequence[float], clusters: Sequence[object] | None = None, seed: int = 0) -> Estimate:
    """Return a mean with its percentile interval; whole clusters are drawn where items of one hang together."""
    found = np.asarray(values, float)
    if not len(found):
        return Estimate(0.0, -math.inf, math.inf)
    names = {name: n for n, name in enumerate(dict.fromkeys(clusters))} if clusters is not None else {}
    of = np.array([names[name] for name in clusters]) if clusters is not None else np.arange(len(found))
    sums, counts = np.bincount(of, found), np.bincount(of)
    drawn = np.random.default_rng(seed).integers(0, len(sums), (RESAMPLES, len(sums)))
    means = sums[drawn].sum(1) / counts[drawn].sum(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return Estimate(float(found.mean()), float(low), float(high))


def holm(p_values: Sequence[float], level: float = 0.05) -> list[bool]:
    """Return which of several hypotheses are rejected when all are asked at the same time (Holm 1979)."""
    order = np.argsort(p_values)
    rejected = [False] * len(p_values)
    for rank, index in enumerate(order):
        if p_values[index] > level / (len(p_values) - rank):
            break
        rejected[index] = True
    return rejected


def normal_p(z: float) -> float:
    """Return the two-sided p of a standard normal deviate."""
    return math.erfc(abs(z) / math.sqrt(2))


def separation(members: Sequence[float], others: Sequence[float], false_positives: float = 0.01) -> tuple[float, float]:
    """Return (area under the curve, true positives at a rate of false ones), larger scores meaning member."""
    inside, outside = np.asarray(members, float), np.sort(np.asarray(others, float))
    below = np.searchsorted(outside, inside, side="left") + np.searchsorted(outside, inside, side="right")
    threshold = outside[min(len(outside) - 1, math.ceil((1 - false_positives) * len(outside)) - 1)]
    return float(below.mean() / (2 * len(outside))), float((inside > threshold).mean())
