"""Where metrics go: a callback gets (step, metrics). `metrics.jsonl` is always written; trackers are optional.

A recipe names trackers in `trainer.callbacks`. `tensorboard` and `wandb` are ours; any other name is looked for in the
entry point group `freehold.callbacks`, whose values are called with a `RunInfo` and return a `Callback`:

    [project.entry-points."freehold.callbacks"]      # in your package's pyproject.toml
    slack = "my_package.slack:Slack"                 # then: trainer.callbacks: [slack]
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from freehold.core.errors import ConfigError
from freehold.core.log import Log
from freehold.trainer.job import Job

GROUP = "freehold.callbacks"
# Our trackers, and the package (and extra of ours) that each one needs.
NEEDS = {"tensorboard": "tensorboard", "wandb": "wandb"}


def mfu_words(share: float) -> str:
    """Return `MFU 42%`, or that it is unknown: the matrix rate was measured while the machine was busy."""
    return f"MFU {share:.0%}" if share <= 1 else "MFU unknown on a busy machine"


@dataclass(frozen=True)
class RunInfo:
    """What a tracker may want to know of the run."""

    folder: Path
    """The stage's folder: runs/<name>/<stage>."""
    stage: str
    step: int
    """Steps done when this process started or resumed."""
    config: Mapping[str, Any]
    """Model, optim, balance, trainer and parallel settings, as plain values."""


class Callback:
    """Gets the metrics of one run on its main process. Override what you need; nothing may raise for lack of network.

    A callback runs between steps: work that takes long belongs into a thread of its own.
    """

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Take the metrics after `step` steps: numbers, strings or lists by slash name (`loss/mean`)."""

    def rewind(self, step: int) -> None:
        """Forget what came after `step` steps: a roll-back or a resume does those steps again."""

    def close(self) -> None:
        """End: the run is finished, interrupted, or has failed."""


class MetricsFile(Callback):
    """`metrics.jsonl` in the run's folder."""

    def __init__(self, log: Log) -> None:
        self._log = log

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Append a line."""
        self._log.metrics(step, dict(metrics))

    def rewind(self, step: int) -> None:
        """Drop the lines of later steps."""
        self._log.rewind(step)


class Console(Callback):
    """One line on the terminal for each log point, and every tenth one kept in the log."""

    def __init__(self, log: Log, total_steps: int, every_steps: int) -> None:
        self._log, self.total_steps, self.every_steps = log, total_steps, every_steps

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Say a line for metrics of training; a line of its own for a validation."""
        if "val/bpb" in metrics:
            self._log.say(f"step {step}: validation bits per byte {metrics['val/bpb']:.4f}")
        # Validations and alarms come alone.
        if "phase" not in metrics:
            return
        balance = f"MaxVio {metrics['moe/max_vio']:.2f}  " if "moe/max_vio" in metrics else ""
        loss = next(iter(metrics))  # the first figure is the loss, whatever a stage minimises
        line = (
            f"{metrics['phase']} {step}/{self.total_steps}  loss {metrics[loss]:.3f}  "
            f"norm {metrics['optim/grad_norm']:.2f}  lr x{metrics['optim/lr']:.2f}  "
            f"{metrics['perf/tokens_per_s']:,.0f} tok/s  {mfu_words(metrics['perf/mfu'])}  "
            f"{metrics['perf/memory_bytes'] / 1e9:.1f} GB  {balance}{metrics['perf/eta_s']:.0f} s left"
        )
        self._log.live(line)
        if step % (10 * self.every_steps) == 0:
            self._log.say(line)


class TensorBoard(Callback):
    """Scalars for `tensorboard --logdir runs/<name>/<stage>/tensorboard`."""

    def __init__(self, info: RunInfo) -> None:
        self._module = _import("torch.utils.tensorboard", "tensorboard")
        self._folder = str(info.folder / "tensorboard")
        self._open(info.step)

    def _open(self, step: int) -> None:
        # Steps that are done again hide what an earlier process wrote for them.
        self._writer = self._module.SummaryWriter(self._folder, purge_step=step)

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Write every number."""
        for name, value in numbers(metrics).items():
            self._writer.add_scalar(name, value, step)
        # A killed run should show its last log point.
        self._writer.flush()

    def rewind(self, step: int) -> None:
        """Start a file that hides later steps."""
        self._writer.close()
        self._open(step)

    def close(self) -> None:
        """Close the file."""
        self._writer.close()


class WandB(Callback):
    """A Weights & Biases run; `WANDB_MODE=offline` keeps it in the stage's folder until `wandb sync`."""

    def __init__(self, info: RunInfo) -> None:
        self._wandb = _import("wandb", "wandb")
        name = f"{info.folder.parent.name}-{info.stage}"
        # One id for the folder: a resumed run continues its curves.
        self._run = self._wandb.init(
            dir=str(info.folder), name=name, id=name, resume="allow", config=dict(info.config), job_type=info.stage
        )
        # W&B's own counter only rises; with an axis of ours a rolled-back step can be logged again.
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Log every number."""
        self._run.log({**numbers(metrics), "step": step})

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


class Callbacks(Callback):
    """All callbacks of a run, in order; on processes that do not write there are none."""

    def __init__(self, job: Job, log: Log, *, main: bool) -> None:
        self.job, self.main = job, main
        # Only the main process writes: the figures of all ranks are the same.
        console = Console(log, job.schedule.total_steps, job.trainer.log_every_steps)
        self.each: list[Callback] = [MetricsFile(log), console] if main else []

    def open(self, step: int) -> None:
        """Add the trackers that the recipe names: not before the run starts, so that a bare Trainer opens nothing.

        Raises ConfigError; see `build_callbacks`.
        """
        job = self.job
        if self.main:
            parts = {"model": job.model, "optim": job.optim, "balance": job.balance, "trainer": job.trainer}
            config = {name: part.model_dump(mode="json") for name, part in parts.items()}
            info = RunInfo(job.folder, job.stage, step, config)
            self.each += build_callbacks(job.trainer.callbacks, info, f"{job.stage}.trainer.callbacks")

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Hand metrics to each."""
        for callback in self.each:
            callback.log(step, metrics)

    def rewind(self, step: int) -> None:
        """Rewind each."""
        for callback in self.each:
            callback.rewind(step)

    def close(self) -> None:
        """Close each, whatever happened."""
        for callback in self.each:
            callback.close()


def numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Return the metrics that are single numbers, for trackers that draw curves."""
    return {name: value for name, value in metrics.items() if isinstance(value, int | float)}


def build_callbacks(names: Sequence[str], info: RunInfo, where: str) -> list[Callback]:
    """Return the trackers that a recipe names.

    Raises ConfigError for a name that neither we nor an installed package have, or whose package is missing.
    """
    ours: dict[str, Any] = {"tensorboard": TensorBoard, "wandb": WandB}
    # Looked up when named, not at import: entry points scan every installed package.
    theirs = {point.name: point for point in entry_points(group=GROUP)}
    found = []
    for name in names:
        # Ours first: a package cannot replace what the documentation describes.
        if name in ours:
            found.append(ours[name](info))
        elif name in theirs:
            found.append(theirs[name].load()(info))
        else:
            raise ConfigError(
                "unknown callback",
                where=where,
                found=name,
                expected=", ".join(sorted({*ours, *theirs})),
                todo=f"install the package that offers it in the entry point group {GROUP}",
            )
    return found


def _import(module: str, extra: str) -> Any:
    """Return a tracker's module; ConfigError with the pip line when its package is not installed."""
    try:
        # Imported when used: a tracker takes longer to import than a config to check.
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"the package of the callback {extra} is not installed",
            where="trainer.callbacks",
            found=error,
            expected=f"pip install 'freehold[{extra}]'",
        ) from error
