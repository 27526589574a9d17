"""Sets up a phase of kind rl: its environments, rows, loss and watch."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from freehold.core.artifact import Workspace
from freehold.core.document import Conversation, read_rows
from freehold.data.packing import Example
from freehold.data.rollouts import FOLDER, RolloutLedger
from freehold.environments.audit import check, open_environment, transcript
from freehold.losses.policy import PolicyLoss
from freehold.stages.align import forgetting
from freehold.stages.align.config import AlignConfig
from freehold.stages.align.held_out import HeldOut
from freehold.stages.align.rl_config import MOST_RATE, PracticeConfig, RlConfig
from freehold.stages.align.rollouts import RolloutOrder, Tasks
from freehold.tokenizer.bpe import Tokenizer
from freehold.tokenizer.chat import render_ids
from freehold.trainer.loop import Trainer

if TYPE_CHECKING:
    from pathlib import Path


def open_tasks(config: RlConfig | PracticeConfig, work: Workspace) -> Tasks:
    """Open the environments of a phase; each must know right from wrong.

    Raises ConfigError for an unknown one, EnvironmentFault for one whose verifier is wrong.
    """

    def conversations(source: str) -> Iterator[Conversation]:
        for path in sorted((work.input("curate") / "conversations").glob("*.parquet")):
            yield from (row for row in read_rows(path, Conversation) if row.source == source and row.split == "train")

    opened = {}
    for name, one in config.environments.items():
        where = f"align.phases.*.rl.environments.{name}"
        environment = open_environment(one.environment or name, one.settings, work.seed, conversations, where)
        check(environment, tasks=1)
        opened[name] = environment
    return Tasks(opened, {name: one.weight for name, one in config.environments.items()}, work.seed)


def practice(config: PracticeConfig, work: Workspace, tokenizer: Tokenizer) -> list[Example]:
    """Return right answers to training tasks as ids with loss masks; none without environments."""
    if not config.environments:
        return []
    tasks, found = open_tasks(config, work), []
    for number in range(config.examples):
        environment, task = tasks.task("train", number)
        messages = [*task.messages, *transcript(environment, task, environment.gold(task)[0])]
        ids, mask = render_ids(tokenizer, messages, tools=task.tools)
        found.append(Example(task.traced, task.source or tasks.name_of(environment), ids, mask))
    return found


def with_rate(config: AlignConfig) -> AlignConfig:
    """Return the settings with the rates of reinforcement learning: a share of those of fine-tuning."""
    settings = next(iter(config.phases.values())).rl
    rate, every = settings.rate, settings.held_out_every_steps
    optim = config.optim.model_copy(update={"lr": config.optim.lr * rate, "muon_lr": config.optim.muon_lr * rate})
    trainer = config.trainer.model_copy(update={"validate_every_steps": every})
    return with_rows(config.model_copy(update={"optim": optim, "trainer": trainer}))


def with_rows(config: AlignConfig) -> AlignConfig:
    """Return the settings with the rows of a step: one for each rollout."""
    settings = next(iter(config.phases.values())).rl
    rows = {"sequences": settings.prompts * settings.group // settings.updates}
    batch = config.batch.model_copy(update={**rows, "micro_sequences": settings.micro_rollouts})
    return config.model_copy(update={"batch": batch})


def order_of(
    config: AlignConfig,
    work: Workspace,
    tokenizer: Tokenizer,
    start: Path,
    first_step: int,
    *,
    graded: bool = True,
    teacher: str = "",
) -> RolloutOrder:
    """Return the order of a phase that learns from its own answers; `start` is the checkpoint it starts from."""
    settings = next(iter(config.phases.values())).rl
    if settings.rate > MOST_RATE and graded:
        work.log.warn(f"rl.rate is {settings.rate:.3f}: above 1/30 of the rate of fine-tuning it tends to collapse")
    reference = forgetting.open_for_use(start, config.trainer.dtype) if settings.kl and graded else None
    return RolloutOrder(
        settings,
        open_tasks(settings, work),
        tokenizer,
        RolloutLedger(work.folder / FOLDER),
        context_tokens=config.batch.context_tokens,
        first_step=first_step,
        total_steps=first_step + sum(phase.steps for phase in config.phases.values()),
        reference=reference,
        graded=graded,
        loss=dataclasses.asdict(policy_loss(settings, config.trainer.loss_chunk_tokens)),
        teacher=teacher,
    )


def policy_loss(config: RlConfig, chunk_tokens: int) -> PolicyLoss:
    """Return the loss that the settings describe."""
    low, high = config.bounds
    return PolicyLoss(
        kind=config.loss,
        normalise=config.normalise,
        low=low,
        high=high,
        cap=config.cap,
        distance=config.distance,
        guard=config.guard,
        kl=config.kl,
        constant_tokens=config.max_tokens,
        temperature=config.temperature,
        chunk_tokens=chunk_tokens,
    )


class Watch:
    """Attaches order and held-out tasks to the loop, and counts what was drawn for the manifest."""

    def __init__(self, order: RolloutOrder, work: Workspace) -> None:
        self.order, self.held_out = order, HeldOut(order, work.folder, work.log)

    def ready(self, trainer: Trainer) -> None:
        """Give the weights to those who draw from them."""
        self.order.attach(trainer)
        if self.order.graded:
            self.held_out.attach(trainer)

    def counts(self) -> dict[str, Any]:
        """Return what the manifest records of the rollouts."""
        ledger = self.order.ledger
        why: dict[str, int] = {}
        for step in ledger.steps():
            for one in ledger.read(step)[0]:
                why[one.why] = why.get(one.why, 0) + 1
        versions = {name: one.version for name, one in sorted(self.order.tasks.environments.items())}
        return {"rollouts": why, "environments": versions, "held_out": self.held_out.known}
