"""The checkpoints of one run: what is in them, when one may be written, which is restored, which are deleted."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from freehold.checkpoint import dcp
from freehold.checkpoint.background import Saver
from freehold.core.artifact import read_json, write_json
from freehold.core.errors import ArtifactError, CheckpointError
from freehold.core.log import Log
from freehold.optim.balance import BalanceRule
from freehold.parallel.mesh import World
from freehold.trainer.errors import TrainingError
from freehold.trainer.guards import Guards, RollBack
from freehold.trainer.job import Job
from freehold.trainer.progress import Progress
from freehold.trainer.state import TrainState

# The steps that roll-backs decided to skip. On disk before anything is undone, so a kill at any point changes
# nothing: what a run does is a function of its recipe and of this file.
ROLLBACKS = "rollbacks.json"
# Facts that say which tokens each step reads: a run continues only where they are the same.
READS = ("tokenizer_sha256", "seed", "context_tokens", "order", "data")


class Checkpoints:
    """Saves and restores one run. settings: what the device was set to, for the record."""

    def __init__(
        self,
        job: Job,
        world: World,
        log: Log,
        state: TrainState,
        guards: Guards,
        balance: BalanceRule,
        progress: Progress,
        settings: dict[str, Any],
    ) -> None:
        self.job, self.world, self.log, self.settings = job, world, log, settings
        self.state, self.guards, self.balance, self.progress = state, guards, balance, progress
        self.saver = Saver(background=job.trainer.background_save)

    @property
    def folder(self) -> Path:
        """Return the folder of the step checkpoints."""
        return self.job.folder / "checkpoints"

    # -- save --------------------------------------------------------------------------------------------------

    def tensors(self) -> dcp.State:
        """Return every tensor that decides what happens next; of a sharded run this process's parts (DTensor)."""
        # Of the CPU: the model draws nothing in training, but reinitialise does.
        rng = {"torch": torch.get_rng_state()}
        if self.world.device.type == "cuda":
            # On the device the same call draws from the generator of the device.
            rng["cuda"] = torch.cuda.get_rng_state(self.world.device)
        return {
            **self.state.tensors(),
            "balance": self.balance.state_dict(),
            **self.guards.state_dict(),
            "rng": rng,
        }

    def save(self, folder: Path, then: Callable[[], None] = lambda: None, **facts: Any) -> None:
        """Write a full checkpoint to `folder`, atomically, then call `then`; see `Saver` for when that is."""
        job, progress = self.job, self.progress
        record = {
            "stage": job.stage,
            "step": progress.step,
            "tokens": progress.tokens,
            "phase": job.schedule.at(progress.step - 1).phase,
            "parent": job.parent,
            "skipped_steps": progress.skipped,
            **self.settings,
            "processes": progress.processes,
            "data_sum": self.data_digest(),
            "alarms": progress.alarms,
            "rollbacks": [r for r in progress.rollbacks if r["first_step"] < progress.step],
            "optim": job.optim.model_dump(mode="json"),
            "balance": job.balance.model_dump(mode="json"),
            "phases": {n: p.model_dump(mode="json") for n, p in job.schedule.phases.items()},
            **job.facts,
            **facts,
        }
        self.saver.save(folder, self.tensors(), job.model, record, job.files, then)

    def save_step(self, phase: str | None = None, required: bool = False) -> None:
        """Save the step and, at the end of a phase, under the phase's name.

        A step that cannot be saved (a full disk) is a warning and the next one tries again, unless it is `required`.
        Weights that are not finite are never saved: they would take the place of good ones. TrainingError at the end
        of a phase; before it a warning, since a roll-back may still repair them.
        """
        self.settle()
        # Checked here and not at each step: a pass over all weights.
        broken = self.state.broken()
        # All ranks save or none: a checkpoint is a collective.
        if self.world.any(bool(broken)):
            error = self._broken(broken)
            if phase is not None:
                raise error
            self.log.warn(f"step {self.progress.step} was not saved\n{error}")
            return
        if phase is not None and self.job.schedule.phases[phase].checkpoint:
            declared = self.job.schedule.phases[phase]
            self.save(self.job.folder / declared.checkpoint, stage_type=declared.stage_type)
            self.log.say(f"saved {declared.stage_type or 'checkpoint'}: {self.job.folder / declared.checkpoint}")
        # A phase end cannot be tried again later: the next phase changes the weights.
        required = required or phase is not None
        try:
            self.save(dcp.step_folder(self.folder, self.progress.step), self.pruning(), stage_type="step")
            if required:
                self.saver.wait()
        except (ArtifactError, CheckpointError) as error:
            if required:
                raise
            self.log.warn(f"step {self.progress.step} was not saved, training continues\n{error}")

    def _broken(self, names: list[str]) -> TrainingError:
        return TrainingError(
            "weights are not finite",
            where=f"{self.job.stage} step {self.progress.step}",
            found=", ".join(names[:3]) or "those of another rank",
            todo="lower optim.lr and optim.muon_lr; the last good checkpoint is kept",
        )

    def settle(self) -> None:
        """Wait for a save that is still under way; its failure must not prevent the next one."""
        try:
            self.saver.wait()
        except (ArtifactError, CheckpointError) as error:
            self.log.warn(f"a step before {self.progress.step} was not saved, training continues\n{error}")

    def pruning(self) -> Callable[[], None]:
        """Return what deletes the checkpoints that are not needed once that of this step is written."""
        config, progress = self.job.trainer, self.progress
        # Nothing is rolled back after the last step, so its checkpoint need not be kept.
        finished = progress.step >= self.job.schedule.total_steps
        # What an earlier roll-back returned to stays: nothing before it is blamed again.
        needed = max([self.guards.oldest_blamed_step(progress.step), *(r["first_step"] for r in progress.rollbacks)])
        keep = functools.partial(
            dcp.prune,
            self.folder,
            keep_last=config.keep_last,
            keep_every_steps=config.keep_every_steps,
            every_steps=config.checkpoint_every_steps,
            needed_step=needed if self.guards.rolls_back and not finished else None,
        )
        return keep if self.world.is_main else lambda: None

    def data_digest(self) -> str:
        """Return the digest of all rows that all ranks have read; those that read the same rows count once."""
        # Context ranks read parts of the same rows, pipeline ranks the same rows.
        place = self.world.place
        mine = self.progress.digest.value if place.pipeline == place.context == 0 else 0
        halves = torch.tensor([mine >> 32, mine & 0xFFFFFFFF], device=self.world.device)  # so that no sum overflows
        high, low = map(int, self.world.sum_all_(halves).tolist())
        return f"{((high << 32) + low) % (1 << 64):016x}"

    # -- restore -----------------------------------------------------------------------------------------------

    def restore(self) -> bool:
        """Continue from the newest good checkpoint of this run; False when there is none.

        Checkpoints that a roll-back has left behind are deleted first.
        """
        self.settle()
        decided = self.job.folder / ROLLBACKS
        # As rank 0, which wrote them, sees them: another machine's view of a shared folder may be older.
        self.progress.rollbacks = dcp.together(lambda: read_json(decided)["rollbacks"] if decided.exists() else [])[0]
        if self.world.is_main:
            # One rank deletes, and the others wait: two would race for the same folder.
            dcp.remove_unless(self.folder, self._on_course)
        self.world.barrier()
        # Hashes every file; a damaged one is named and the one before it taken.
        folder = dcp.last_good(self.folder, self.log.warn)
        if folder is None:
            self.progress.processes = [[self.progress.step, self.world.size]]
            return False
        facts = read_json(folder / "trainer.json")
        # Before the weights are read: a refusal should take no time.
        check_same_data(facts, self.job.facts, folder)
        state = self.state.read(folder)
        self.adopt(state, folder)
        self.guards.load_state_dict(state)
        self._restore_progress(facts)
        self.log.say(f"resumed from {folder.name}")
        # Not refused: a run must survive another machine, but its bits will not be the same.
        if facts["operators"] != self.settings["operators"]:
            self.log.warn(
                f"steps so far ran on {facts['operators']}, the rest will on {self.settings['operators']}: "
                "the run is sound, but its bits are not those of a run on either alone"
            )
        return True

    def _restore_progress(self, facts: dict[str, Any]) -> None:
        progress = self.progress
        # The digest of all ranks is in the file: one rank continues it, the others start at nothing.
        progress.digest.value = int(facts.get("data_sum", "0"), 16) if self.world.is_main else 0
        progress.processes = facts.get("processes", [])
        progress.count_processes(self.world.size, facts["step"])
        progress.step, progress.tokens = facts["step"], facts["tokens"]
        progress.skipped[:] = facts["skipped_steps"]
        progress.alarms[:] = facts.get("alarms", [])

    def _on_course(self, folder: Path) -> bool:
        """Return whether a checkpoint was made in knowledge of every roll-back that concerns its steps."""
        try:
            facts = read_json(folder / "trainer.json")
        except (ArtifactError, OSError):
            return True  # damaged: skipped, and named, when the newest good one is looked for
        return all(
            facts["step"] <= rollback["first_step"] or rollback in facts.get("rollbacks", [])
            for rollback in self.progress.rollbacks
        )

    def adopt(self, state: dcp.State, folder: Path) -> None:
        """Take weights, optimizer, balancing and random state of a checkpoint.

        Raises CheckpointError when it is another model's.
        """
        self.state.load(state, folder)
        device = self.world.device
        self.balance.load_state_dict({n: t.to(device) for n, t in state.get("balance", {}).items()})
        torch.set_rng_state(state["rng"]["torch"])
        # Checkpoints of a CPU, and older ones, have no state of the device's generator.
        if device.type == "cuda" and "cuda" in state["rng"]:
            torch.cuda.set_rng_state(state["rng"]["cuda"], device)

    # -- roll back ---------------------------------------------------------------------------------------------

    def roll_back(self, decision: RollBack) -> None:
        """Record which steps to skip, then restore the newest checkpoint from before them.

        Raises TrainingError after `decision.limit` roll-backs, or when no such checkpoint is left.
        """
        progress = self.progress
        # Counted over the folder, not the process: a supervisor that restarts cannot roll back for ever.
        if len(progress.rollbacks) >= decision.limit:
            raise TrainingError(
                f"{decision.what.partition(':')[0]} again after {len(progress.rollbacks)} roll-backs",
                where=f"{self.job.stage} step {progress.step}",
                found=decision.what,
                todo="the batches are not to blame: lower optim.lr, raise balance.rate or choose another action in "
                f"{self.job.stage}.trainer; the last good checkpoint is kept",
            )
        # Not before an earlier roll-back's steps: what came before them was good then, and its checkpoint is kept.
        first = max([decision.first_step, *(r["first_step"] for r in progress.rollbacks)])
        record = {"first_step": first, "end_step": progress.step, "layers": list(decision.layers)}
        if self.world.is_main:
            # First the decision, then the deed: a kill in between finds it and does the rest.
            write_json(self.job.folder / ROLLBACKS, {"rollbacks": [*progress.rollbacks, record]})
        self.world.barrier()
        self.log.say(f"  rolling back to before step {first}; steps {first} to {progress.step - 1} will be skipped")
        if not self.restore():
            raise TrainingError(
                f"no checkpoint from before the {'collapse' if decision.layers else 'spike'} is left",
                where=self.folder,
                expected=f"one of at most {first} steps",
                todo="run again: training starts from scratch and skips the steps named above",
            )


def check_same_data(facts: dict[str, Any], mine: dict[str, Any], folder: Path) -> None:
    """Raise CheckpointError when the steps so far read other data, or the same in another order."""
    for key in READS:
        # Older checkpoints lack some facts: what is unknown cannot differ.
        before, now = facts.get(key), mine.get(key)
        if before is None or now is None or before == now:
            continue
        if isinstance(now, dict) and isinstance(before, dict):
            # Digests say nothing to a reader; the names of the sources do.
            names = [name for name in sorted({*before, *now}) if before.get(name) != now.get(name)]
            before, now = (f"other {', '.join(names)}", "the same, or a new run")
        raise CheckpointError(
            "this run's data are not those the checkpoint was trained on",
            where=f"{folder}: {key}",
            found=before,
            expected=now,
            todo="bring them back, or start from scratch with --clean or --fork NAME",
        )
