"""From the parts of rewards to advantages: pure functions of a batch of rollouts, so that a replay recomputes them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

import numpy as np

from freehold.data.rollouts import CUT, NO_SPREAD, TRAINED, Rollout, with_values
from freehold.losses.advantage import advantages, concise, has_spread


def grade(rollouts: Sequence[Rollout], settings: Mapping[str, Any]) -> list[Rollout]:
    """Return rollouts with reward, advantage and why they are trained or not; groups stay whole.

    settings: `advantage` (kind), `conciseness` (weight), `truncated` (mask or zero). A truncated answer counts in the
    mean of its group, as what it earned; its own tokens are masked, as its reward is unknown rather than 0.
    """
    graded: list[Rollout] = []
    for _, group in groupby(rollouts, key=lambda one: one.group):
        graded += _grade_group(list(group), settings)
    return graded


def _grade_group(group: list[Rollout], settings: Mapping[str, Any]) -> list[Rollout]:
    parts = [json.loads(one.parts) for one in group]
    correct = np.array([part["correct"] for part in parts], dtype=np.float64)
    earned = np.array([sum(part[name] for name in sorted(part)) for part in parts], dtype=np.float64)
    if settings["truncated"] == "zero":
        cut = np.array([one.truncated for one in group])
        correct, earned = np.where(cut, 0.0, correct), np.where(cut, 0.0, earned)
    factor = concise(correct, np.array([one.drawn_tokens for one in group]), settings["conciseness"])
    rewards = earned * factor
    found = advantages(rewards, settings["advantage"])
    spread = has_spread(rewards)

    def why(one: Rollout) -> str:
        # A group is kept or dropped whole: a baseline over one half would be another.
        return NO_SPREAD if not spread else CUT if one.truncated and settings["truncated"] == "mask" else TRAINED

    return [
        with_values(
            one,
            length_factor=float(factor[n]),
            reward=float(rewards[n]),
            group_mean=float(rewards.mean()),
            advantage=float(found[n]),
            why=why(one),
        )
        for n, one in enumerate(group)
    ]


def figures(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """Return what a batch shows of the policy: rewards, lengths of right and wrong answers, and what is not trained."""
    tokens = np.array([one.drawn_tokens for one in rollouts], dtype=np.float64)
    right = np.array([one.correct >= 1 for one in rollouts])
    groups = {one.group for one in rollouts}
    spread = {one.group for one in rollouts if one.why != NO_SPREAD}
    calls = sum(one.calls for one in rollouts)
    beginnings = {(one.task, tuple(_answer(one)[:8])) for one in rollouts}
    return {
        "rl/reward": float(np.mean([one.reward for one in rollouts])),
        "rl/correct": float(np.mean([one.correct for one in rollouts])),
        "rl/truncated": float(np.mean([one.truncated for one in rollouts])),
        "rl/no_spread": 1 - len(spread) / len(groups),
        "rl/tokens": float(tokens.mean()),
        "rl/tokens_right": float(tokens[right].mean()) if right.any() else 0.0,
        "rl/tokens_wrong": float(tokens[~right].mean()) if not right.all() else 0.0,
        # Answers that all begin the same way are those of a policy that no longer reads its prompt.
        "rl/distinct": len(beginnings) / len(rollouts),
        "rl/invalid_calls": sum(one.invalid_calls for one in rollouts) / calls if calls else 0.0,
        "rl/lag": float(np.mean([one.step - one.drawn_at for one in rollouts])),
    }


def _answer(one: Rollout) -> list[int]:
    return [token for token, mine in zip(one.ids, one.sampled, strict=True) if mine]
