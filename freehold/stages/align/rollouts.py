"""The rows of reinforcement learning: drawn from the weights that train, graded, written down, then learned from.

A rollout is a pure function of weights, task, member, run seed and environment version. What was written is read
again after a kill; what was not is drawn again, with the same bits.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from freehold.core.marks import IGNORE
from freehold.data.grading import figures, grade
from freehold.data.loader import WHOLE, Piece, generator
from freehold.data.rollouts import (
    NO_SPREAD,
    TRAINED,
    PolicyBatch,
    Rollout,
    RolloutLedger,
    batch_of,
    policy_batch,
    with_values,
)
from freehold.environments.audit import guarded
from freehold.environments.protocol import Environment, Split, Task, traced
from freehold.losses.targets import token_logprobs
from freehold.model.afmoe import Afmoe
from freehold.stages.align.episodes import EnginePolicy, Episode, Player, seed_of
from freehold.stages.align.rl_config import RlConfig
from freehold.tokenizer.bpe import Tokenizer
from freehold.trainer.errors import TrainingError
from freehold.trainer.loop import Trainer

TRUNCATED_WARN, TRUNCATED_STOP = 0.5, 0.95
"""Shares of cut answers in a batch at which the run warns and stops: their cap is too low, not their policy bad."""
RESCORE_ROWS = 32


@dataclass(frozen=True)
class Tasks:
    """The environments with their shares, and which task is the n-th of a phase."""

    environments: dict[str, Environment]
    weights: dict[str, float]
    seed: int

    def task(self, split: Split, number: int) -> tuple[Environment, Task]:
        """Return the environment and task of a number; the same for ever."""
        names = sorted(self.environments)
        shares = np.array([self.weights[name] for name in names])
        draw = generator(self.seed, "environment", split, number)
        environment = self.environments[names[int(draw.choice(len(names), p=shares / shares.sum()))]]
        return environment, guarded(environment.name, lambda: environment.task(split, number))

    def name_of(self, environment: Environment) -> str:
        """Return the name by which the recipe knows an environment."""
        return next(name for name, one in self.environments.items() if one is environment)


class RolloutOrder:
    """The order of a phase of kind rl; `attach` gives it the training loop before the first step."""

    def __init__(
        self, config: RlConfig, tasks: Tasks, tokenizer: Tokenizer, ledger: RolloutLedger, *,
        context_tokens: int, first_step: int, total_steps: int, reference: Afmoe | None, graded: bool = True,
        loss: Mapping[str, Any] | None = None, teacher: str = "",
    ) -> None:  # fmt: skip
        self.config, self.tasks, self.tokenizer, self.ledger = config, tasks, tokenizer, ledger
        self.first_step, self.total_steps, self.reference = first_step, total_steps, reference
        self.graded, self.teacher = graded, teacher
        self.sequences = config.prompts * config.group // config.updates
        self.player = Player(
            tokenizer,
            dialect=config.dialect,
            max_turns=config.max_turns,
            most_tokens=context_tokens,
            max_tokens=config.max_tokens,
        )
        self.most_tokens = context_tokens
        self.settings = {
            "advantage": config.advantage, "conciseness": config.conciseness, "truncated": config.truncated,
            "graded": graded, "seed": tasks.seed, "micro": config.micro_rollouts, "loss": dict(loss or {}),
            "environments": {
                name: [one.environment or name, one.settings] for name, one in sorted(config.environments.items())
            },
        }  # fmt: skip
        self.trainer: Trainer | None = None
        self._read: tuple[int, list[Rollout]] | None = None

    def attach(self, trainer: Trainer) -> None:
        """Take the training loop whose weights draw."""
        self.trainer = trainer
        config = self.config
        if self.reference is not None:
            self.reference.to(trainer.model.lm_head.weight.device)
        self.policy = EnginePolicy(
            trainer.model,
            self.tokenizer,
            most_tokens=self.most_tokens,
            max_tokens=config.max_tokens,
            temperature=config.temperature,
        )
        self.rescored = not self.policy.engine.exact or config.temperature != 1
        trainer.log.say(f"  rollouts: {self.policy.engine.describe()}")
        how = "behaviour scored again by the training forward pass" if self.rescored else "exact"
        trainer.log.say(f"  on-policy: {how}")

    # -- what the loop asks for ---------------------------------------------------------------------------------

    def batch(self, step: int, part: slice = WHOLE) -> PolicyBatch:
        """Return the rows of one step, one rollout each; as many as there are to learn from, at least one."""
        trained = [one for one in self.rollouts(step) if one.why == TRAINED]
        return policy_batch(trained[part], self.tokenizer.pad)

    def rollouts(self, step: int) -> list[Rollout]:
        """Return the rollouts that are for a step; drawn now, with as many ahead as the lag asks for."""
        first, updates = self._batch(step), self.config.updates
        last = min(first + self.config.lag * updates, self.total_steps - 1)
        for start in range(first, last + 1, updates):
            if not self.ledger.has(start):
                self._draw(start, drawn_at=step)
        if self._read is None or self._read[0] != first:
            found, _ = self.ledger.read(first)
            self._read = first, found
            self._report(first, found)
        return [one for one in self._read[1] if one.step == step]

    def documents(self, step: int) -> list[Piece]:
        """Return the tasks that a step learns from; before they are drawn, those that are planned."""
        known = batch_of(step, self.ledger.steps())
        if known is not None and known == self._batch(step):
            rollouts = [one for one in self.ledger.read(known)[0] if one.step == step and one.why == TRAINED]
            return [
                Piece(traced(one.document, one.task, one.licence), one.source or one.environment, one.drawn_tokens)
                for one in rollouts
            ]
        planned = (self.tasks.task("train", number) for number in self._numbers(self._batch(step), 0))
        return [Piece(task.traced, task.source or env.name, 0) for env, task in planned]

    # -- drawing ------------------------------------------------------------------------------------------------

    def _batch(self, step: int) -> int:
        return step - (step - self.first_step) % self.config.updates

    def _numbers(self, first: int, turn: int) -> range:
        """Return the tasks of one round of drawing of a batch: no round shares one with another."""
        at = (first - self.first_step) // self.config.updates * (1 + self.config.refill) + turn
        return range(at * self.config.prompts, (at + 1) * self.config.prompts)

    def _draw(self, first: int, drawn_at: int) -> None:
        """Draw, grade and write the batch that begins at a step."""
        assert self.trainer is not None, "attach comes first"
        self.policy.refresh()
        found: list[Rollout] = []
        for turn in range(1 + self.config.refill):
            drawn = self._play(first, turn, drawn_at)
            found += grade(drawn, self.settings) if self.graded else drawn
            kept = sorted({one.group for one in found if one.why != NO_SPREAD})
            if len(kept) >= self.config.prompts:
                break
        found = self._assigned(found, kept, first)
        if self.graded:
            self._check(first, found)
        self.ledger.write(first, found, self.settings)

    def _play(self, first: int, turn: int, drawn_at: int) -> list[Rollout]:
        episodes = []
        for number in self._numbers(first, turn):
            environment, task = self.tasks.task("train", number)
            for member in range(self.config.group):
                seed = seed_of(self.tasks.seed, first, environment.name, environment.version, task.id, number, member)
                episodes.append(self.player.begin(environment, task, number, member, seed))
        self.player.play(episodes, self.policy)
        rollouts = [self._rollout(one, drawn_at) for one in episodes]
        if self.rescored:
            rollouts = self._rescore(rollouts, self.policy.model, "behaviour")
        if self.reference is not None:
            rollouts = self._rescore(rollouts, self.reference, "reference")
        return rollouts

    def _rollout(self, one: Episode, drawn_at: int) -> Rollout:
        environment, task, config = one.environment, one.task, self.config
        return Rollout(
            step=0,
            drawn_at=drawn_at,
            policy=self.policy.version,
            tokenizer=self.tokenizer.sha256,
            environment=self.tasks.name_of(environment),
            version=environment.version,
            task=task.id,
            answer=_json(task.answer),
            group=one.group,
            member=one.member,
            seed=one.seed,
            sampling=_json({"temperature": config.temperature, "max_tokens": config.max_tokens}),
            ids=one.ids,
            sampled=one.sampled,
            behaviour=[float(np.float32(value)) for value in one.logprobs],
            prompt=_json(list(task.messages)),
            turns=_json(one.turns),
            results=_json(one.results),
            state=_json(one.state),
            truncated=one.truncated,
            calls=one.calls,
            invalid_calls=one.invalid_calls,
            parts=_json(one.parts() if self.graded else {"correct": 0.0}),
            why="" if self.graded else TRAINED,
            source=task.source,
            document=task.document,
            licence=task.licence,
            teacher=self.teacher,
        )

    def _assigned(self, rollouts: Sequence[Rollout], kept: Sequence[int], first: int) -> list[Rollout]:
        """Return rollouts with the step that learns from them: the groups that differ are shared out evenly."""
        updates = self.config.updates
        each = -(-len(kept) // updates) or 1
        step = {group: first + place // each for place, group in enumerate(kept)}
        return [with_values(one, step=step.get(one.group, first)) for one in rollouts]

    @torch.no_grad()
    def _rescore(self, rollouts: Sequence[Rollout], model: Afmoe, name: str) -> list[Rollout]:
        """Return rollouts with the log-probabilities that a model's training forward pass gives their tokens."""
        training, found, device = model.training, list[Rollout](), model.lm_head.weight.device
        model.train()
        for at in range(0, len(rollouts), RESCORE_ROWS):
            part = rollouts[at : at + RESCORE_ROWS]
            batch = policy_batch(part, self.tokenizer.pad)
            ids, documents, targets = (
                torch.from_numpy(array).to(device) for array in (batch.input_ids, batch.document_ids, batch.targets)
            )
            hidden = model.hidden(ids, document_ids=documents)
            kept = targets != IGNORE
            values = torch.zeros(targets.shape, device=device)
            values[kept] = token_logprobs(
                hidden[kept], model.lm_head.weight, targets[kept], temperature=self.config.temperature
            ).float()
            for one, row in zip(part, values.tolist(), strict=True):
                found.append(with_values(one, **{name: [0.0, *row[: len(one.ids) - 1]]}))
        model.train(training)
        return found

    # -- what is refused ----------------------------------------------------------------------------------------

    def _check(self, first: int, rollouts: Sequence[Rollout]) -> None:
        """Stop where there is nothing to sharpen, or where nearly every answer is cut."""
        seen = figures(rollouts)
        if first == self.first_step and seen["rl/correct"] < self.config.min_reward:
            raise TrainingError(
                f"the reward is {100 * seen['rl/correct']:.1f} %: reinforcement learning has nothing to sharpen",
                where=f"align step {first}",
                found=f"{seen['rl/correct']:.4f} right of {len(rollouts)} answers",
                expected=f"at least {self.config.min_reward:g}",
                todo="fine-tune on right answers to such tasks first, until at least 5 % are right, or ask easier ones",
            )
        if seen["rl/truncated"] >= TRUNCATED_STOP:
            raise TrainingError(
                "nearly every answer was cut before its end",
                where=f"align step {first}",
                found=f"{100 * seen['rl/truncated']:.0f} % cut at {self.config.max_tokens} tokens",
                expected=f"less than {100 * TRUNCATED_STOP:.0f} %",
                todo="raise align.phases.*.rl.max_tokens, or fine-tune until answers end",
            )

    def _report(self, first: int, rollouts: Sequence[Rollout]) -> None:
        if self.trainer is None or not self.graded:
            return
        seen = figures(rollouts)
        if seen["rl/truncated"] >= TRUNCATED_WARN:
            self.trainer.log.warn(
                f"step {first}: {100 * seen['rl/truncated']:.0f} % of the answers were cut at "
                f"{self.config.max_tokens} tokens; their reward is not known"
            )
        self.trainer.callbacks.log(first + 1, seen)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, sort_keys=True)
