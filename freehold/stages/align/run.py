"""Alignment: phases of kinds, each run by the one training loop with its own rows and loss."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from freehold.checkpoint import dcp
from freehold.core.artifact import MANIFEST, Workspace, read_manifest
from freehold.core.document import write_table
from freehold.core.errors import CheckpointError
from freehold.core.machine import check_memory_fits
from freehold.data.exposure import ROW_BYTES
from freehold.data.loader import ConversationOrder, Order, PhaseRows, TextOrder
from freehold.data.mixed import MixedOrder
from freehold.data.pairs import PairOrder
from freehold.data.shards import ShardSet
from freehold.losses.distill import Distill
from freehold.losses.preference import Preference
from freehold.losses.protocol import Loss
from freehold.losses.reward import RewardLoss
from freehold.model.config import ModelConfig
from freehold.optim.schedule import Schedule
from freehold.parallel.config import validate_layout
from freehold.stages.align import forgetting, learn_rl
from freehold.stages.align.alarm import LikelihoodAlarm
from freehold.stages.align.config import AlignConfig
from freehold.stages.align.learn_teacher import OpenTeacher
from freehold.stages.align.reward_model import FACT, TOKEN
from freehold.stages.align.rows import reference_logprobs, render_answers, render_examples
from freehold.tokenizer.bpe import END_OF_TEXT, Tokenizer
from freehold.trainer.loop import Trainer
from freehold.trainer.stage import Stage, Start, train_stage

HEAD = "lm_head.weight"
PARTS = "phases"
"""Where phases work that are followed or preceded by another kind; their named checkpoints leave it at the end."""


@dataclass(frozen=True)
class Opened:
    """The checkpoint that a group of phases starts from."""

    folder: Path
    facts: dict[str, Any]
    model: ModelConfig
    start: Start

    @property
    def begins_with(self) -> list[int]:
        """Return the tokens that a text begins with, as the checkpoint was trained."""
        return list(self.facts.get("begins_with", [END_OF_TEXT]))


@dataclass(frozen=True)
class Rows:
    """What a group of phases reads and minimises, and what the manifest records."""

    order: Order
    loss: Loss | None
    counts: dict[str, Any]
    watch: learn_rl.Watch | None = None
    """Of phases that learn from their own answers."""
    ready: Callable[[Trainer], None] = lambda _: None
    start: Start | None = None
    """Where other weights than those of the checkpoint are the first."""
    facts: dict[str, Any] = field(default_factory=dict)
    """Further facts for trainer.json."""


def run(config: AlignConfig, work: Workspace) -> dict[str, Any]:
    """Train to the end of the last phase; resumable at any step. Returns steps, rows and what was forgotten."""
    rows = sum(phase.steps for phase in config.phases.values()) * config.batch.sequences
    check_memory_fits(rows * ROW_BYTES, "the order of the rows", "align.phases")
    tokenizer = Tokenizer.load(work.input("tokenize") / "tokenizer")
    first = open_start(work.input("pretrain") / config.checkpoint, tokenizer)
    config.batch.check_fits(first.model.max_position_embeddings, "align")
    validate_layout(
        config.parallel,
        first.model,
        context_tokens=config.batch.context_tokens,
        sequences=config.batch.sequences,
        micro_sequences=config.batch.micro_sequences,
        stage="align",
    )
    gated = config.max_forgetting is not None and work.leads
    before = forgetting.measure(first.folder, first.begins_with, config, work) if gated else None
    groups = config.groups()
    counts: dict[str, Any] = {}
    if len(groups) == 1:
        counts = train(config, work, tokenizer, first, 0)
    else:
        counts = train_groups(config, work, tokenizer, first)
    if before is not None and config.max_forgetting is not None and (last := _last(config, work)) is not None:
        after = forgetting.measure(last, first.begins_with, config, work)
        if after is not None:
            counts["forgetting"] = forgetting.judge(before, after, config.max_forgetting, work)
    return counts


def open_start(folder: Path, tokenizer: Tokenizer) -> Opened:
    """Open the checkpoint that training starts from; CheckpointError when it is damaged or another tokenizer's."""
    facts = dcp.check(folder)
    if facts["tokenizer_sha256"] != tokenizer.sha256:
        raise CheckpointError(
            "the checkpoint was trained with another tokenizer",
            where=folder,
            found=facts["tokenizer_sha256"][:16],
            expected=tokenizer.sha256[:16],
        )
    model, weights = dcp.read_model(folder, verify=False)  # verified by `check`
    parent = read_manifest(folder)["content_sha256"]
    return Opened(folder, facts, model, Start(parent=parent, tokens=facts["tokens"], weights=weights))


def train_groups(config: AlignConfig, work: Workspace, tokenizer: Tokenizer, first: Opened) -> dict[str, Any]:
    """Run phases of several kinds, each group from the checkpoint of the one before; skip groups that are finished."""
    opened, done, found, traces = first, 0, [], []
    for group in config.groups():
        name, phase = list(group.items())[-1]
        part = dataclasses.replace(work, folder=work.folder / PARTS / next(iter(group)))
        finished = work.folder / phase.checkpoint
        if not phase.checkpoint or not (finished / MANIFEST).exists():
            work.log.say(f"  {', '.join(group)}: {phase.kind}, from {opened.folder.name}")
            found.append(train(config.model_copy(update={"phases": group}), part, tokenizer, opened, done))
            for each in group.values():
                if each.checkpoint and work.leads:
                    (part.folder / each.checkpoint).rename(work.folder / each.checkpoint)
        traces.append(part.folder / "trace.parquet")
        done += sum(each.steps for each in group.values())
        if phase.checkpoint:
            opened = open_start(finished, tokenizer)
    if work.leads:
        tables = [pq.read_table(path) for path in traces]
        write_table(work.folder / "trace.parquet", pa.concat_tables(tables))
    named = {p.checkpoint: p.stage_type for p in config.phases.values() if p.checkpoint}
    skipped = [step for counts in found for step in counts["skipped_steps"]]
    rows = {key: value for counts in found for key, value in counts.items()}
    return {**rows, "steps": done, "checkpoints": named, "skipped_steps": skipped}


def train(
    config: AlignConfig, work: Workspace, tokenizer: Tokenizer, opened: Opened, first_step: int
) -> dict[str, Any]:
    """Run the phases of `config`, all of one kind, from an opened checkpoint; return the counts."""
    schedule = Schedule(dict(config.phases), first_step=first_step)
    kind = next(iter(config.phases.values())).kind
    if kind == "rl":
        config = learn_rl.with_rate(config)
    elif next(iter(config.phases.values())).distill.on_policy and kind == "distill":
        config = learn_rl.with_rows(config)
    rows = ROWS[kind](config, work, tokenizer, opened, first_step)
    watch = rows.watch
    stage = Stage(
        name="align",
        model=opened.model,
        order=rows.order,
        schedule=schedule,
        tokenizer=work.input("tokenize") / "tokenizer",
        facts={
            "tokenizer_sha256": tokenizer.sha256,
            "begins_with": opened.begins_with,
            **rows.facts,
        },
        start=rows.start or opened.start,
        loss=rows.loss,
        ready=rows.ready,
    )
    if watch is not None:
        measured = watch.held_out.validate if kind == "rl" and watch.order.config.held_out else None
        stage = dataclasses.replace(stage, ready=watch.ready, validate=lambda _: measured, traced_later=True)
    counts = train_stage(stage, config, work)  # type: ignore[arg-type]
    # Declared, because peers turn it on unasked: without a rule the routing that the start learnt is kept.
    balance = {"balance": "frozen" if config.balance.kind == "none" else config.balance.kind}
    return {"steps": counts["steps"], **rows.counts, **(watch.counts() if watch else {}), **balance, **counts}


def conversations(config: AlignConfig, work: Workspace, tokenizer: Tokenizer, opened: Opened, first_step: int) -> Rows:
    """Return the rows of fine-tuning: conversations, with replay also pre-training text."""
    steps = sum(phase.steps for phase in config.phases.values())
    replayed = round(config.replay * config.batch.sequences)
    phase = next(iter(config.phases.values()))
    practice = learn_rl.practice(phase.practice, work, tokenizer)
    examples, assistant_tokens = render_examples(work, tokenizer, practice, phase.sft)
    order = ConversationOrder(
        examples,
        context_tokens=config.batch.context_tokens,
        sequences=config.batch.sequences - replayed,
        steps=steps,
        seed=work.seed,
        pad=tokenizer.pad,
        first_step=first_step,
    )
    work.log.say(f"  {len(order.examples):,} conversations, {order.epochs} epochs at most, {order.too_long} too long")
    counts = {"conversations": len(order.examples), "too_long": order.too_long, "assistant_tokens": assistant_tokens}
    if not replayed:
        return Rows(order, None, counts)
    text = TextOrder(
        ShardSet.load(work.input("tokenize") / "tokens").sources("train"),
        [PhaseRows(name, phase.steps, phase.mixture) for name, phase in config.phases.items()],
        context_tokens=config.batch.context_tokens,
        sequences=replayed,
        seed=work.seed,
        separator=END_OF_TEXT,
        begin=(opened.begins_with or [END_OF_TEXT])[0],
        first_step=first_step,
    )
    work.log.say(f"  replay: {replayed} of {config.batch.sequences} rows a step are pre-training text")
    return Rows(MixedOrder(order, text), None, {**counts, "replayed_rows": replayed})


def pairs(config: AlignConfig, work: Workspace, tokenizer: Tokenizer, first_step: int, *, unpaired: bool) -> PairOrder:
    """Return the order of better and worse answers."""
    order = PairOrder(
        render_answers(work, tokenizer, unpaired=unpaired),
        context_tokens=config.batch.context_tokens,
        sequences=config.batch.sequences,
        steps=sum(phase.steps for phase in config.phases.values()),
        seed=work.seed,
        pad=tokenizer.pad,
        first_step=first_step,
    )
    work.log.say(f"  {len(order.answers):,} pairs or answers, {order.epochs} epochs at most, {order.too_long} too long")
    return order


def preferences(config: AlignConfig, work: Workspace, tokenizer: Tokenizer, opened: Opened, first_step: int) -> Rows:
    """Return the rows of preference learning; the checkpoint that it starts from is the reference."""
    settings = next(iter(config.phases.values())).preference
    order = pairs(config, work, tokenizer, first_step, unpaired=settings.loss == "kto")
    if settings.loss != "simpo":
        order.reference = reference_logprobs(forgetting.open_for_use(opened.folder, config.trainer.dtype), order)
    loss = Preference(
        settings.loss, settings.beta, settings.margin, settings.cross_entropy, config.trainer.loss_chunk_tokens
    )
    alarm = LikelihoodAlarm(settings.alarm_nats, work.log)
    counts = {"answers": len(order.answers), "answers_too_long": order.too_long}
    return Rows(order, loss, counts, ready=alarm.attach)


def reinforcement(config: AlignConfig, work: Workspace, tokenizer: Tokenizer, opened: Opened, first_step: int) -> Rows:
    """Return the rows of reinforcement learning: answers of the weights that train, drawn as they are needed."""
    order = learn_rl.order_of(config, work, tokenizer, opened.folder, first_step)
    loss = learn_rl.policy_loss(order.config, config.trainer.loss_chunk_tokens)
    return Rows(order, loss, {}, learn_rl.Watch(order, work))


def rewarding(config: AlignConfig, work: Workspace, tokenizer: Tokenizer, opened: Opened, first_step: int) -> Rows:
    """Return the rows of a reward model: better and worse answers; its head begins at 0."""
    order = pairs(config, work, tokenizer, first_step, unpaired=False)
    settings = next(iter(config.phases.values())).reward
    weights = dict(opened.start.weights or {})
    # A row of the head that no text ever trained: whatever it holds would be a score before anything is learned.
    weights[HEAD] = weights[HEAD].clone()
    weights[HEAD][TOKEN] = 0
    start = dataclasses.replace(opened.start, weights=weights)
    return Rows(
        order, RewardLoss(TOKEN, settings.centre), {"answers": len(order.answers)}, start=start, facts={FACT: TOKEN}
    )


def distilled(config: AlignConfig, work: Workspace, tokenizer: Tokenizer, opened: Opened, first_step: int) -> Rows:
    """Return the rows that are imitated: conversations, or answers that the student draws."""
    settings = next(iter(config.phases.values())).distill
    teacher = OpenTeacher(settings, config, work, tokenizer)
    loss = Distill(teacher, settings.on_policy, settings.temperature, config.trainer.loss_chunk_tokens)
    counts = {"teacher": teacher.name, "teacher_licence": teacher.licence}
    if not settings.on_policy:
        rows = conversations(config, work, tokenizer, opened, first_step)
        return dataclasses.replace(rows, loss=loss, counts=rows.counts | counts)
    order = learn_rl.order_of(config, work, tokenizer, opened.folder, first_step, graded=False, teacher=teacher.name)
    return Rows(order, loss, counts, learn_rl.Watch(order, work))


ROWS = {
    "sft": conversations,
    "preference": preferences,
    "rl": reinforcement,
    "reward": rewarding,
    "distill": distilled,
}


def _last(config: AlignConfig, work: Workspace) -> Path | None:
    """Return the checkpoint that the last phase made: its named one, else that of its last step."""
    name = list(config.phases.values())[-1].checkpoint
    if name:
        return work.folder / name
    groups = config.groups()
    part = work.folder if len(groups) == 1 else work.folder / PARTS / next(iter(groups[-1]))
    return dcp.last_good(part / "checkpoints", work.log.warn)
