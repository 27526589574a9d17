"""A loss that jumps: one bad batch is skipped before it changes anything; broken weights are rolled back.

The loss of a step is known before its update. So a step whose loss stands out can be skipped, and nothing has happened.
When the steps after it stand out too, the batch was not to blame: an update before them was, and only a checkpoint from
before it helps. Everything here follows from losses that are the same on every rank, so all ranks decide the same.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from freehold.trainer.config import SpikeConfig

# The median absolute deviation of a normal distribution times this is its standard deviation.
SIGMA = 1.4826


# After this many spikes in a row the weights are to blame, not the batch: one bad document is in one batch.
PATIENCE_STEPS = 4
# Steps before the first spike that a roll-back skips too: an update breaks weights before the loss shows it.
BLAME_STEPS = 8


class SpikeDetector:
    """Compares each step's loss with those of the last steps of the same phase; its state belongs into the checkpoint.

    A loss stands out when it is not finite, or is above the median of the window by `rise_nats` and by `sigmas`
    times the standard deviation of the window (from the median absolute deviation).
    """

    def __init__(self, config: SpikeConfig, first_step: int) -> None:
        self.config = config
        self.losses = np.full(config.window_steps, np.nan)
        self.first_step = self.phase_step = first_step
        self.in_a_row = 0

    def stands_out(self, step: int, phase_step: int, loss: float) -> bool:
        """Take the loss of a step, in nats, before its update; `phase_step` is the first step of its phase."""
        if phase_step != self.phase_step:  # other text, other losses
            self.losses[:], self.phase_step = np.nan, phase_step
        limit = math.inf
        # NaN marks what is not known yet.
        known = self.losses[~np.isnan(self.losses)]
        if step >= self.first_step + self.config.warmup_steps and 2 * len(known) >= len(self.losses):
            # Median and its deviation: the spikes in the window must not raise the limit.
            middle = float(np.median(known))
            deviation = SIGMA * float(np.median(np.abs(known - middle)))
            # Both must be exceeded: early losses are noisy, late ones so quiet that any bump is many sigmas.
            limit = middle + max(self.config.rise_nats, self.config.sigmas * deviation)
        if not loss < min(limit, math.inf):
            self.in_a_row += 1
            return True
        self.in_a_row = 0
        # A spike never enters the window it is compared with.
        self.losses = np.append(self.losses[1:], loss)
        return False

    def blamed_step(self, step: int) -> int:
        """Return the first step whose update may have broken the weights, when `step` is the last that stood out."""
        return max(self.first_step, step + 1 - self.in_a_row - BLAME_STEPS)

    def accept(self) -> None:
        """Take the level the loss has now as the usual one."""
        self.losses[:], self.in_a_row = np.nan, 0

    @property
    def median(self) -> float:
        """Return the loss that is usual now, in nats; not a number while too few are known."""
        return float(np.nanmedian(self.losses)) if not np.isnan(self.losses).all() else math.nan

    def state_dict(self) -> dict[str, Tensor]:
        """Return all that decides the next judgement."""
        return {
            "losses": torch.from_numpy(self.losses.copy()),
            "counts": torch.tensor([self.phase_step, self.in_a_row]),
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state_dict` returned; a checkpoint without it leaves the detector as it is."""
        if state and len(state["losses"]) == len(self.losses):
            self.losses = state["losses"].numpy().copy()
            self.phase_step, self.in_a_row = map(int, state["counts"].tolist())
