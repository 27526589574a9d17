"""Warns when preference learning makes its better answers less likely: the loss falls, and so does the model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from freehold.core.log import Log
from freehold.trainer.callbacks import Callback
from freehold.trainer.loop import Trainer


class LikelihoodAlarm(Callback):
    """Reads the metrics of a phase of kind preference; warns once."""

    def __init__(self, nats: float, log: Log) -> None:
        self.nats, self._log, self.raised = nats, log, False

    def attach(self, trainer: Trainer) -> None:
        """Listen to a training loop."""
        trainer.callbacks.each.append(self)

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Look at how far the better answers are from where they were."""
        gain = metrics.get("preference/better_gain")
        if gain is None or gain >= -self.nats or self.raised:
            return
        self.raised = True
        self._log.warn(
            f"step {step}: better answers are {-gain:.1f} nats less likely than at the start, worse ones "
            f"{-metrics['preference/worse_gain']:.1f}: raise preference.cross_entropy, or lower optim.lr"
        )
