"""Guards look at what a step measured and return a decision; the loop acts on it.

Three guards: a loss or gradient that is not finite, a loss that spikes (spike.py, docs/never-lose-a-step.md), routing
that collapses (collapse.py, docs/collapse.md). All figures are the same on every rank, so all ranks decide the same.

When they look: where reading the device is free (a CPU), or where a recipe configures an action, before and after each
update. Otherwise at log points only, one step after another in order: there only warnings, and the end of a run of
steps that are not finite, can result. Steps that are not finite change nothing in either case; see `step.py`.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from freehold.core.log import Log
from freehold.trainer import collapse
from freehold.trainer.collapse import Alarm, CollapseDetector
from freehold.trainer.errors import TrainingError
from freehold.trainer.job import Job
from freehold.trainer.progress import Progress
from freehold.trainer.spike import PATIENCE_STEPS, SpikeDetector

# A run ends after this many steps in a row without a finite loss: no single batch explains them.
MAX_SKIPPED_STEPS = 10
# A run ends when it would have to roll back once more: the data were skipped three times and were not to blame.
MAX_ROLLBACKS = 3
NOT_FINITE = "loss or gradient is not finite"


@dataclass(frozen=True)
class Continue:
    """Nothing to do."""


@dataclass(frozen=True)
class Skip:
    """The step must change nothing; `why` is logged with its documents."""

    why: str


@dataclass(frozen=True)
class RollBack:
    """Skip the steps since `first_step`, from the newest checkpoint before them; at most `limit` times a run."""

    first_step: int
    what: str
    limit: int
    layers: tuple[int, ...] = ()
    """The layers whose routing collapsed; none for a spike."""


@dataclass(frozen=True)
class Treat:
    """Record alarms of collapse; with the action `reinitialise` draw their experts' routing again."""

    alarms: tuple[Alarm, ...]
    action: str


@dataclass(frozen=True)
class Stop:
    """The step is skipped like any other of its kind, and the run ends with the error."""

    error: TrainingError
    why: str


class Guards:
    """The detectors of one run; their state belongs into the checkpoint."""

    def __init__(self, job: Job, layers: list[str], progress: Progress, log: Log) -> None:
        self.job, self.progress, self.log = job, progress, log
        first = job.schedule.first_step
        self.spikes = SpikeDetector(job.trainer.spike, first)
        experts, top_k = job.model.num_experts, job.model.num_experts_per_tok
        self.collapse = CollapseDetector(job.trainer.collapse, layers, experts, top_k, first)

    @property
    def acts(self) -> bool:
        """Return whether the recipe configures an action: then guards must look at each step."""
        return self.job.trainer.spike.action != "none" or self.job.trainer.collapse.action != "none"

    @property
    def rolls_back(self) -> bool:
        """Return whether an action needs a checkpoint from before the step that it blames."""
        return "roll_back" in (self.job.trainer.spike.action, self.job.trainer.collapse.action)

    def oldest_blamed_step(self, done: int) -> int:
        """Return the first step that the next decision could roll back to; `done` steps are done."""
        config = self.job.trainer
        return min(
            self.collapse.oldest_step if config.collapse.action == "roll_back" else done,
            self.spikes.blamed_step(done - 1) if config.spike.action == "roll_back" else done,
        )

    # -- before the update ------------------------------------------------------------------------------------

    def before_update(self, step: int, loss: float, norm: float) -> Continue | Skip | Stop:
        """Judge the mean loss (nats) and the gradient norm of a step."""
        # NaN compares as false, so it counts as not finite too.
        finite = norm < math.inf and loss < math.inf
        # Losses are compared within a phase: another mixture has another level.
        position = self.job.schedule.at(step)
        # Shown also when it is not finite, so that several in a row count as spikes for a roll-back.
        spike = self.spikes.stands_out(step, step - position.index, loss if finite else math.inf)
        # Before the spike: this step is skipped whatever the recipe configures.
        if not finite:
            return self._not_finite(step, loss, norm)
        if not spike:
            return Continue()
        what = f"loss spike: {loss:.2f} nats, usual are {self.spikes.median:.2f}"
        if self.job.trainer.spike.action != "none":
            return Skip(what)
        # Once for each series: a lasting level would warn at every step.
        if self.spikes.in_a_row == 1:
            self.log.warn(f"step {step}: {what}")
        return Continue()

    def _not_finite(self, step: int, loss: float, norm: float) -> Skip | Stop:
        last = MAX_SKIPPED_STEPS
        # Steps that a roll-back skips say nothing about the weights.
        bad = [*(s for s in self.progress.skipped if not self.progress.rolled_back(s)), step]
        if bad[-last:] != list(range(step - last + 1, step + 1)):
            return Skip(NOT_FINITE)
        error = TrainingError(
            f"{last} steps in a row had no finite loss or gradient",
            where=f"{self.job.stage} step {step}",
            found=f"loss {loss}, gradient norm {norm}",
            todo="lower optim.lr and optim.muon_lr, or look at the documents named above; "
            "the last good checkpoint is kept",
        )
        return Stop(error, NOT_FINITE)

    # -- after the update -------------------------------------------------------------------------------------

    def after_update(self, done: int, loads: np.ndarray | None) -> Continue | RollBack | Treat:
        """Judge the state after `done` steps; loads [layers, E] of the last one, None when it was skipped."""
        # Spikes first: after their roll-back the loads belong to steps that are undone.
        decision = self._spikes_in_a_row(done)
        if isinstance(decision, RollBack) or loads is None:
            return decision
        alarms = self.collapse.watch(done - 1, loads)
        return self.on_alarms(alarms, done) if alarms else decision

    def _spikes_in_a_row(self, done: int) -> Continue | RollBack:
        """Roll back when losses keep standing out, or accept their level as the usual one."""
        config = self.job.trainer.spike
        if self.spikes.in_a_row < PATIENCE_STEPS:
            return Continue()
        what = f"the loss has stood out for {self.spikes.in_a_row} steps"
        if config.action == "roll_back":
            return RollBack(self.spikes.blamed_step(done - 1), what, MAX_ROLLBACKS)
        # A window that is still filling has no usual level to replace.
        if not math.isnan(self.spikes.median):
            self.log.warn(f"{what}: its level is taken as the usual one")
            self.spikes.accept()
        return Continue()

    def on_alarms(self, alarms: list[Alarm], done: int) -> RollBack | Treat:
        """Decide what the recipe asks for when routing collapses."""
        config = self.job.trainer.collapse
        self.log.warn("\n  ".join([f"routing collapses after {done} steps", *map(str, alarms)]))
        # A dead expert is no reason to undo steps: its weights are as good as they were.
        blamed = [alarm for alarm in alarms if alarm.reason != "dead"]
        if config.action == "roll_back" and blamed:
            what = "routing collapsed: " + "; ".join(map(str, blamed))
            # Recorded with the decision: the replay shows the alarm at the step where it began.
            layers = tuple(alarm.number for alarm in blamed)
            return RollBack(min(alarm.first_step for alarm in blamed), what, MAX_ROLLBACKS, layers)
        if config.action == "raise_rate":
            for alarm in alarms:
                self.collapse.raise_rate(alarm.layer, done)
            self.log.say(f"  balance step x{collapse.RATE_FACTOR:g} in these layers for {collapse.RAISE_STEPS} steps")
        # Dead experts alone do not roll back, so nothing was done for them.
        return Treat(tuple(alarms), config.action if config.action != "roll_back" else "none")

    # -- checkpoints ------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """Return all that decides the next decision, by part of the checkpoint."""
        return {"collapse": self.collapse.state_dict(), "spike": self.spikes.state_dict()}

    def load_state_dict(self, state: dict[str, dict[str, Tensor]]) -> None:
        """Restore what `state_dict` returned; parts that an older checkpoint lacks stay as they are."""
        self.collapse.load_state_dict(state.get("collapse", {}))
        self.spikes.load_state_dict(state.get("spike", {}))


def as_record(alarm: Alarm, action: str) -> dict[str, Any]:
    """Return an alarm as trainer.json keeps it."""
    return {**dataclasses.asdict(alarm), "action": action}


def stacked_loads(layers: Any) -> Tensor | None:
    """Return the loads of layers as one tensor [layers, E] on their device; None without layers."""
    counts = [layer.load_counts for layer in layers]
    return torch.stack(counts) if counts else None
