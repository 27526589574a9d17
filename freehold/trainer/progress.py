"""How far a run is, and what happened on the way; all is in `trainer.json`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from freehold.data.digest import DataSum
from freehold.data.packing import Batch
from freehold.parallel.mesh import World


@dataclass
class Progress:
    """Counters and records of one run, the same on every rank except for the data digest."""

    step: int
    """Optimizer steps done, skipped ones included; absolute, so a branch continues its parent's count."""
    tokens: int
    skipped: list[int] = field(default_factory=list)
    """Steps that changed no weight."""
    alarms: list[dict[str, Any]] = field(default_factory=list)
    """Alarms of routing collapse, each with what was done."""
    rollbacks: list[dict[str, Any]] = field(default_factory=list)
    """`rollbacks.json`: the steps [first_step, end_step) of each are skipped, in every run of this folder."""
    processes: list[list[int]] = field(default_factory=list)
    """[first step, processes that did it and those after it], one for each change."""
    digest: DataSum = field(default_factory=DataSum)
    """Digest of the rows this rank has read."""

    def rolled_back(self, step: int) -> bool:
        """Return whether a roll-back decided to skip this step."""
        return any(rollback["first_step"] <= step < rollback["end_step"] for rollback in self.rollbacks)

    def last_skipped(self, step: int) -> bool:
        """Return whether `step` is the last one that was skipped."""
        return self.skipped[-1:] == [step]

    def count(self, batch: Batch, world: World) -> None:
        """Count a step, of which `batch` is this rank's part."""
        # Every rank has as many rows and columns as the others; those of a pipeline read the same ones.
        readers = world.size // world.parallel.pipeline
        self.step += 1
        self.tokens += batch.input_ids.size * readers

    def count_processes(self, size: int, since: int) -> None:
        """Record that `size` processes do the steps from `since` on."""
        self.processes = [span for span in self.processes if span[0] < since]
        if not self.processes or self.processes[-1][1] != size:
            self.processes.append([since, size])
