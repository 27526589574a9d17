"""The learning rate as a pure function of the step: computed, never saved, never restored."""

from __future__ import annotations

import math
from dataclasses import dataclass

from freehold.optim.config import PhaseConfig


@dataclass(frozen=True)
class Position:
    """Position of a step: its phase, its index within it, and the learning-rate factor."""

    phase: str
    index: int
    factor: float
    is_last: bool


@dataclass(frozen=True)
class Schedule:
    """Named phases one after another (WSD: a stable phase, then a decay branch).

    `first_step` is the number of steps the parent checkpoint has already seen, so that a decay
    branch continues its parent's count.
    """

    phases: dict[str, PhaseConfig]
    first_step: int = 0

    @property
    def total_steps(self) -> int:
        """Return the absolute number of the last step."""
        return self.first_step + sum(phase.steps for phase in self.phases.values())

    def at(self, step: int) -> Position:
        """Return the position of step `step` (0-based, absolute)."""
        # A branch counts on from its parent, so steps of data and schedule stay the same numbers.
        index = step - self.first_step
        for name, phase in self.phases.items():
            if index < phase.steps:
                return Position(name, index, _factor(phase, index), index == phase.steps - 1)
            index -= phase.steps
        raise IndexError(f"step {step} is past the last phase ({self.total_steps} steps)")

    def ends(self) -> dict[str, int]:
        """Return each phase's name and the absolute number of steps done when it ends."""
        # Absolute numbers: a checkpoint at such a step carries the phase's name, also in a branch.
        result, done = {}, self.first_step
        for name, phase in self.phases.items():
            done += phase.steps
            result[name] = done
        return result


def _factor(phase: PhaseConfig, index: int) -> float:
    if index < phase.warmup_steps:
        # The first step has a rate above 0, else it would be wasted.
        return phase.start * (index + 1) / phase.warmup_steps
    if phase.shape == "constant":
        return phase.start
    # The last step of a phase reaches its end value: an anneal to 0 ends at 0.
    progress = (index - phase.warmup_steps + 1) / (phase.steps - phase.warmup_steps)
    if phase.shape == "cosine":
        progress = (1 - math.cos(math.pi * progress)) / 2
    return phase.start + (phase.end - phase.start) * progress
