"""From the rewards of a group of answers to one prompt to how much better than the others each of them is.

Shapes: G answers of one group.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

Kind = Literal["mean", "rloo", "std", "max_rl"]


def advantages(rewards: np.ndarray, kind: Kind = "mean") -> np.ndarray:
    """Return the advantage of each answer [G], float64, from the rewards of its whole group [G].

    mean: R - mean (Dr. GRPO, arXiv 2503.20783: dividing by the deviation favours what is nearly solved or nearly
    impossible). rloo: against the mean of the others. std: GRPO's, over the sample deviation plus 1e-4. max_rl: over
    the mean (2602.02710). All of them sum to 0 over a group.
    """
    rewards = np.asarray(rewards, dtype=np.float64)
    mean, size = rewards.mean(), len(rewards)
    centred = rewards - mean
    if kind == "rloo":
        return centred * (size / max(size - 1, 1))
    if kind == "std":
        return np.asarray(centred / (rewards.std(ddof=1 if size > 1 else 0) + 1e-4))
    if kind == "max_rl":
        return np.asarray(centred / mean) if mean > 0 else centred
    return centred


def concise(correct: np.ndarray, tokens: np.ndarray, weight: float) -> np.ndarray:
    """Return the factor [G] by which the reward of each right answer shrinks with its length.

    1 - weight * pass rate * (tokens - fewest) / (most - fewest + 1) among the right ones (ALP, arXiv 2506.05256). A
    prompt that few answers solve may be answered at length, and a wrong answer gains nothing by being short.
    """
    right = np.asarray(correct) >= 1.0
    factor = np.ones(len(right), dtype=np.float64)
    if weight and right.any():
        lengths = np.asarray(tokens, dtype=np.float64)
        fewest, most = lengths[right].min(), lengths[right].max()
        factor[right] = 1 - weight * right.mean() * (lengths[right] - fewest) / (most - fewest + 1)
    return factor


def has_spread(rewards: np.ndarray) -> bool:
    """Return whether the answers of a group differ in reward: without, its gradient is 0."""
    return bool(np.ptp(np.asarray(rewards, dtype=np.float64)) > 0)
