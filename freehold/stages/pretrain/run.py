"""Pre-training: the order of the text, the checkpoint to branch off, and validation; the loop does the rest."""

from __future__ import annotations

import itertools
import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from freehold.checkpoint import dcp
from freehold.core.artifact import Workspace, atomic_folder, read_json, read_manifest
from freehold.core.config import difference
from freehold.core.errors import CheckpointError, ConfigError
from freehold.core.machine import check_memory_fits
from freehold.data.buffer import text_order
from freehold.data.exposure import ROW_BYTES, write_trace
from freehold.data.loader import PhaseRows, TextOrder, consumed_by
from freehold.data.shards import ShardSet
from freehold.model.config import ModelConfig
from freehold.optim.schedule import Schedule
from freehold.stages.pretrain import extend
from freehold.stages.pretrain.config import PretrainConfig
from freehold.tokenizer.bpe import BOS, END_OF_TEXT
from freehold.trainer.stage import Stage, Start, train_stage
from freehold.trainer.validate import HeldOut, held_out, validator


def run(config: PretrainConfig, work: Workspace) -> dict[str, Any]:
    """Train to the end of the last phase; resumable at any step. Returns steps, tokens and epochs per source."""
    # Verified: tokens are what a checkpoint will claim to have seen.
    shards = ShardSet.load(work.input("tokenize") / "tokens", verify=True)
    model = with_vocabulary(config.model, shards.vocab_size, padded=bool(config.parent))
    parent = read_parent(config, model, shards.tokenizer_sha256) if config.parent else None
    if parent is not None:
        config = extend.extended(config, parent.shape, parent.facts)
    # Nothing to train: the parent is the result.
    if parent is not None and not config.phases:
        return keep(parent.folder, parent.facts, work) if work.leads else {}
    begin = beginning(parent, work.folder)
    text = read_text(config, shards, parent, begin, work)
    stage = Stage(
        name="pretrain",
        model=config.model,
        order=text.order,
        schedule=text.schedule,
        tokenizer=work.input("tokenize") / "tokenizer",
        facts={"tokenizer_sha256": shards.tokenizer_sha256, **text.facts},
        start=parent.start(config) if parent is not None else Start(),
        validate=lambda world: validator(validation_rows(config, shards, begin), world),
    )
    counts = train_stage(stage, config, work)
    return {"steps": counts["steps"], **text.counts(config), **counts}


@dataclass(frozen=True)
class Text:
    """The rows that a run reads, step by step."""

    order: TextOrder
    schedule: Schedule
    facts: dict[str, Any]
    """What a checkpoint records of them."""

    def counts(self, config: PretrainConfig) -> dict[str, Any]:
        """Return what the manifest says of them."""
        return {
            "tokens": self.schedule.total_steps * config.batch.step_tokens,
            "epochs": {name: round(epochs, 4) for name, epochs in self.order.epochs().items()},
            "mixture": [asdict(share) for share in self.order.shares],
        }


def beginning(parent: Parent | None, folder: Path) -> int:
    """Return the id that a model reads before a text: BOS, or what earlier steps of this model began with.

    A checkpoint that does not say it is of the time when texts began with the end of the one before.
    """
    made = sorted([*folder.glob("checkpoints/step_*/trainer.json"), *folder.glob("*/trainer.json")])
    earlier = [read_json(made[-1])] if made else [parent.facts] if parent is not None else []
    if not earlier:
        return BOS
    # A model that was imported may begin with nothing; its documents then follow the end of the one before.
    return int((earlier[0].get("begins_with") or [END_OF_TEXT])[0])


def read_text(config: PretrainConfig, shards: ShardSet, parent: Parent | None, begin: int, work: Workspace) -> Text:
    """Return the order of the text, which continues where the parent stopped reading; prints its summary."""
    rows = sum(phase.steps for phase in config.phases.values()) * config.batch.sequences
    check_memory_fits(rows * ROW_BYTES, "the order of the rows", "pretrain.phases")
    without = quarantined(config.quarantine)
    data = shards.identity("train", without)
    if config.extended_tokens:
        data = extend.identity(data, config)
    consumed = parent.position(config, data, work) if parent is not None else None
    schedule = Schedule(dict(config.phases), first_step=parent.facts["step"] if parent is not None else 0)
    segments = [
        PhaseRows(name, steps, phase.mixture)
        for name, phase in config.phases.items()
        for steps in segment_steps(phase.steps, work.lengthened.get(name, []))
    ]
    shape: dict[str, Any] = {
        "seed": work.seed,
        "separator": END_OF_TEXT,
        "begin": begin,
        "first_step": schedule.first_step,
        "consumed": consumed,
    }
    sources = shards.sources("train", without)
    order: TextOrder
    if config.extended_tokens:
        encode = extend.encoder(work.input("tokenize") / "tokenizer")
        order = extend.long_order(config, encode, sources, segments, **shape)
    else:
        order = text_order(config.batch, sources, segments, **shape)
    for line in order.summary():
        work.log.say(f"  {line}")
    # A later run may branch off any phase's end. Only the parent knows where its own first phase began.
    ends = itertools.accumulate((segment.steps for segment in segments), initial=schedule.first_step)
    at_ends = {str(end): order.consumed_at(end) for end in itertools.islice(ends, 1, None)}
    first = {str(schedule.first_step): consumed} if consumed else {}
    facts = {
        "order": config.batch.order.model_dump(),
        "data": data,
        "consumed": first | at_ends,
        "begins_with": [begin],
    }
    more = {"lengthened": work.lengthened} if work.lengthened else {}
    more |= {"extended": config.extension.model_dump(mode="json")} if config.extended_tokens else {}
    return Text(order, schedule, facts | more)


def segment_steps(steps: int, lengthened: list[int]) -> list[int]:
    """Return a phase's steps as the segments it was made in: each was arranged when the phase ended with it.

    >>> segment_steps(900, [600, 700])
    [600, 100, 200]
    """
    ends = [0, *(end for end in lengthened if end < steps), steps]
    return [end - begin for begin, end in itertools.pairwise(ends)]


@dataclass(frozen=True)
class Parent:
    """The checkpoint that a recipe branches off."""

    folder: Path
    facts: dict[str, Any]
    shape: ModelConfig

    def start(self, config: PretrainConfig) -> Start:
        """Return what the first step starts from."""
        digest, gain = read_manifest(self.folder)["content_sha256"], config.extension.global_q_gain
        changed = 1.0 if not config.extended_tokens else gain
        if config.fresh_optimizer or dcp.is_imported(self.folder):
            # Weights alone: optimizer and balancing start from nothing.
            weights = dcp.read_model(self.folder, verify=False)[1]
            extend.sharpen(weights, self.shape, changed)
            return Start(parent=digest, tokens=self.facts["tokens"], weights=weights)
        return Start(
            parent=digest,
            tokens=self.facts["tokens"],
            checkpoint=self.folder,
            change=lambda state: extend.sharpen(state["model"], self.shape, changed),
        )

    def position(self, config: PretrainConfig, data: dict[str, str], work: Workspace) -> Any:
        """Return what the parent consumed of each source; None when its order was another. Warns of other text."""
        if dcp.is_imported(self.folder):
            return None
        if config.extended_tokens or self.facts.get("extended"):
            work.log.say("  longer rows are made of their own pool of text: reading starts at its beginning")
            return None
        consumed: dict[str, int] | None = consumed_by(self.facts)
        if self.facts.get("order", {"kind": "stream"}) != config.batch.order.model_dump():
            consumed = None
            work.log.warn("the parent read its text in another order: this one starts at its beginning")
        known = self.facts.get("data", {})
        if other := [name for name, digest in data.items() if known.get(name, digest) != digest]:
            work.log.warn(f"the parent read other text of {', '.join(other)}: rows there may come twice, or not at all")
        return consumed


def read_parent(config: PretrainConfig, model: ModelConfig, tokenizer_sha256: str) -> Parent:
    """Return the checkpoint to branch off; CheckpointError when its shape or tokenizer is another."""
    folder = Path(config.parent)
    facts = dcp.check(folder)
    shape = dcp.read_config(folder)
    if config.extended_tokens:
        # The one field that an extension changes; the parent may itself have been extended.
        model = model.model_copy(update={"max_position_embeddings": shape.max_position_embeddings})
    # Compared whole: another route_scale or window is another function with the same tensors.
    if shape != model:
        differs = difference(shape.model_dump(mode="json"), model.model_dump(mode="json"))
        raise CheckpointError(
            "the parent is a model of another shape",
            where=folder,
            found="; ".join(differs[:4]) + (f"; and {len(differs) - 4} more" if len(differs) > 4 else ""),
            expected="the shape of the parent (left) in pretrain.model (right)",
        )
    if facts["tokenizer_sha256"] != tokenizer_sha256:
        raise CheckpointError("the parent was trained with another tokenizer", where=folder)
    return Parent(folder, facts, shape)


def validation_rows(config: PretrainConfig, shards: ShardSet, begin: int) -> dict[str, HeldOut]:
    """Return the rows that validation reads, by source; sources without held-out text have none."""
    return {
        name: held_out(
            source,
            shards.document_bytes("validation", name),
            config.batch.context_tokens,
            config.trainer.validation_tokens,
            begin,
        )
        for name, source in shards.sources("validation").items()
        if source.total_tokens
    }


def quarantined(path: str) -> frozenset[str]:
    """Return the ids in a quarantine file: one a line, bare or as the `id` of a JSON object; none without a file.

    Raises ConfigError when the file is not there or a line is neither.
    """
    if not path:
        return frozenset()
    try:
        lines = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines()]
        return frozenset(json.loads(line)["id"] if line.startswith("{") else line for line in lines if line)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(
            "not a list of documents",
            where=f"pretrain.quarantine: {path}",
            found=error,
            expected="document ids, one a line, or the lines of a run's log/quarantine.jsonl",
        ) from error


def keep(parent: Path, facts: dict[str, Any], work: Workspace) -> dict[str, Any]:
    """Take the parent over as it is, with what is known of its steps: no phase is left to train."""
    with atomic_folder(work.folder / parent.name) as folder:
        shutil.copytree(parent, folder, copy_function=_linked, dirs_exist_ok=True)
    traced = parent.parent / "trace.parquet"
    if traced.exists():
        shutil.copyfile(traced, work.folder / traced.name)
    else:
        write_trace(work.folder / traced.name, [])
    work.log.say(f"  {parent} is kept as it is: {facts['step']:,} steps")
    return {
        "steps": facts["step"],
        "tokens": facts["tokens"],
        "epochs": {},
        "checkpoints": {parent.name: facts["stage_type"]},
        "skipped_steps": facts["skipped_steps"],
    }


def _linked(source: str, target: str) -> None:
    """Give a file a second name, or copy it where the file system cannot."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def with_vocabulary(model: ModelConfig, vocab_size: int, *, padded: bool = False) -> ModelConfig:
    """Return the shape, checked against the tokenizer's vocabulary.

    Raises ConfigError when the model has fewer rows than the tokenizer has ids; more are for published models alone,
    whose rows are padded to a multiple of 128.
    """
    if model.vocab_size < vocab_size or (model.vocab_size > vocab_size and not padded):
        raise ConfigError(
            "the model and the tokenizer disagree about the vocabulary",
            where="pretrain.model.vocab_size",
            found=model.vocab_size,
            expected=f"{vocab_size}, as the tokenizer has",
            todo=f"set pretrain.model.vocab_size={vocab_size} or change tokenize.vocab_size",
        )
    return model
