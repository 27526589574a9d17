"""Watches reinforcement learning by what counts: greedy answers to held-out tasks, and a stop when they collapse."""

from __future__ import annotations

import shutil
from pathlib import Path

from freehold.core.artifact import read_json, write_json
from freehold.core.log import Log
from freehold.model.afmoe import Afmoe
from freehold.stages.align.episodes import EnginePolicy
from freehold.stages.align.rollouts import RolloutOrder
from freehold.trainer.errors import TrainingError
from freehold.trainer.loop import Trainer

FILE = "held_out.json"


class HeldOut:
    """The accuracy at the start and after some steps, in `held_out.json`."""

    def __init__(self, order: RolloutOrder, folder: Path, log: Log) -> None:
        self.order, self.folder, self.log = order, folder, log
        self.known: dict[str, float] = {}
        if (folder / FILE).exists():
            self.known = {key: float(value) for key, value in read_json(folder / FILE).items()}

    def attach(self, trainer: Trainer) -> None:
        """Measure the start; the weights must be those of the first step, or the start must be known."""
        self.trainer = trainer
        config = self.order.config
        self.greedy = EnginePolicy(
            trainer.model,
            self.order.tokenizer,
            most_tokens=self.order.most_tokens,
            max_tokens=config.max_tokens,
            temperature=0.0,
        )
        if config.held_out and "start" not in self.known:
            self._record("start", self.accuracy())
            self.log.say(f"  held-out tasks: {100 * self.known['start']:.1f} % right at the start, greedily")

    def accuracy(self) -> float:
        """Return the share of held-out tasks that greedy answers get right."""
        order = self.order
        episodes = [
            order.player.begin(*order.tasks.task("held_out", number), number, 0, 0)
            for number in range(order.config.held_out)
        ]
        order.player.play(episodes, self.greedy)
        return sum(one.parts()["correct"] for one in episodes) / len(episodes)

    def validate(self, model: Afmoe) -> dict[str, float]:
        """Return the accuracy now; TrainingError, after going back to the last good checkpoint, when it collapsed."""
        now, step = self.accuracy(), self.trainer.step
        start = self.known["start"]
        if now < self.order.config.collapse * start:
            kept = self._roll_back()
            raise TrainingError(
                "reinforcement learning collapsed: held-out accuracy fell below "
                f"{self.order.config.collapse:g} of what it was",
                where=f"align step {step}",
                found=f"{100 * now:.1f} % right",
                expected=f"at least {100 * self.order.config.collapse * start:.1f} %; {100 * start:.1f} % at the start",
                todo=f"rolled back to {kept}; lower align.phases.*.rl.rate or raise warmup_steps, and run align "
                "again with --clean",
            )
        self._record(str(step), now)
        return {"rl/held_out": now}

    def _record(self, key: str, value: float) -> None:
        self.known[key] = value
        write_json(self.folder / FILE, self.known)

    def _roll_back(self) -> str:
        """Remove the checkpoints that are newer than the last good measurement; return what is left."""
        good = max((int(key) for key in self.known if key != "start"), default=self.order.first_step)
        left = "the checkpoint that the phase started from"
        for folder in sorted((self.folder / "checkpoints").glob("step_*")):
            if int(folder.name.removeprefix("step_")) > good:
                shutil.rmtree(folder)
            else:
                left = folder.name
        return left
