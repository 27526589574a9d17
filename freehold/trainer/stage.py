"""What every training stage does once it knows its model and its rows: record the trace, train, count."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from freehold.checkpoint.dcp import State
from freehold.core.artifact import PREVIEW, Workspace, write_atomic
from freehold.data.config import BatchConfig
from freehold.data.exposure import trace_rows, write_trace
from freehold.data.loader import Order
from freehold.losses.protocol import Loss
from freehold.model.afmoe import Afmoe
from freehold.model.config import ModelConfig
from freehold.optim.config import BalanceConfig, OptimConfig, PhaseConfig
from freehold.optim.schedule import Schedule
from freehold.parallel.config import ParallelConfig
from freehold.parallel.mesh import World
from freehold.trainer.config import TrainerConfig
from freehold.trainer.job import Job
from freehold.trainer.loop import Trainer


class StageConfig(Protocol):
    """The settings that every training stage declares."""

    @property
    def batch(self) -> BatchConfig: ...  # noqa: D102
    @property
    def optim(self) -> OptimConfig: ...  # noqa: D102
    @property
    def balance(self) -> BalanceConfig: ...  # noqa: D102
    @property
    def trainer(self) -> TrainerConfig: ...  # noqa: D102
    @property
    def parallel(self) -> ParallelConfig: ...  # noqa: D102
    @property
    def phases(self) -> Mapping[str, PhaseConfig]: ...  # noqa: D102


@dataclass(frozen=True)
class Start:
    """What the first step starts from; all empty: values drawn from the seed."""

    parent: str = ""
    """content_sha256 of the checkpoint, for lineage."""
    tokens: int = 0
    """Tokens it had seen."""
    weights: dict[str, Tensor] | None = None
    """Weights to start from, with a new optimizer."""
    checkpoint: Path | None = None
    """Checkpoint to branch from, with its optimizer, balancing and random state."""
    change: Callable[[State], None] = lambda _: None
    """What is changed in that checkpoint's tensors, in place, before they are taken."""


@dataclass(frozen=True)
class Stage:
    """One training stage: what it is called, reads and minimises."""

    name: str
    model: ModelConfig
    order: Order
    schedule: Schedule
    tokenizer: Path
    """Folder whose files go into each checkpoint."""
    facts: dict[str, Any]
    """What trainer.json says of the data; must have `tokenizer_sha256`."""
    start: Start = field(default_factory=Start)
    loss: Loss | None = None
    """None: cross-entropy."""
    validate: Callable[[World], Callable[[Afmoe], dict[str, float]] | None] = lambda _: None
    build: Callable[[], Afmoe] | None = None
    """See `Job.build`."""
    watch: Callable[[int, Mapping[str, Tensor], Mapping[str, Tensor]], None] | None = None
    """See `Job.watch`."""
    ready: Callable[[Trainer], None] = lambda _: None
    """Called with the loop once its weights are those of the step that it continues from."""
    traced_later: bool = False
    """Whether the order knows what a step read only once it was read: the trace is then written again at the end."""


def train_stage(stage: Stage, config: StageConfig, work: Workspace) -> dict[str, Any]:
    """Train to the end of the last phase, resumable at any step; return steps, checkpoints and skipped steps."""
    start, schedule = stage.start, stage.schedule
    preview, steps = work.folder / PREVIEW, range(schedule.first_step, schedule.total_steps)
    if work.leads:  # before the first step, so that the documents of a step that fails can be named
        phases = {step: schedule.at(step).phase for step in steps}
        write_trace(preview, trace_rows(stage.order, steps, phases))
    trainer = Trainer(job_of(stage, config, work), work.log, seed=work.seed, weights=start.weights)
    if start.checkpoint is not None:
        # Before `run` restores: a resumed branch replaces this by its own newest checkpoint.
        state = trainer.state.read(start.checkpoint)
        start.change(state)
        trainer.checkpoints.adopt(state, start.checkpoint)
    trainer.run(stage.validate(trainer.world), stage.ready)
    if work.leads and stage.traced_later:
        write_trace(preview, trace_rows(stage.order, steps, phases))
    if work.leads:
        # Only a finished stage has a trace: what was planned is what was read.
        write_atomic(work.folder / "trace.parquet", preview.read_bytes())
    named = {phase.checkpoint: phase.stage_type for phase in config.phases.values() if phase.checkpoint}
    return {"steps": schedule.total_steps, "checkpoints": named, "skipped_steps": trainer.progress.skipped}


def job_of(stage: Stage, config: StageConfig, work: Workspace) -> Job:
    """Return the job of a stage in a workspace."""
    return Job(
        folder=work.folder,
        model=stage.model,
        trainer=config.trainer,
        optim=config.optim,
        balance=config.balance,
        schedule=stage.schedule,
        order=stage.order,
        micro_sequences=config.batch.micro,
        stage=stage.name,
        parent=stage.start.parent,
        parallel=config.parallel,
        tokens_before=stage.start.tokens,
        files=tuple(sorted(path for path in stage.tokenizer.iterdir() if path.is_file())),
        # The facts that decide which tokens a step reads; a resume compares them.
        facts={"seed": work.seed, "context_tokens": config.batch.context_tokens, **stage.facts},
        documents_of=work.documents_of_step,
        loss=stage.loss,
        build=stage.build,
        watch=stage.watch,
    )
