"""Pre-training: hand the loop its order, its phases and its validation, then write down what it saw."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from freehold.checkpoint import dcp
from freehold.core.artifact import PREVIEW, Workspace, atomic_folder, read_manifest, write_atomic
from freehold.core.errors import CheckpointError, ConfigError
from freehold.core.machine import check_memory_fits
from freehold.data.buffer import text_order
from freehold.data.exposure import ROW_BYTES, trace_rows, write_trace
from freehold.data.loader import PhaseRows, consumed_by
from freehold.data.shards import ShardSet
from freehold.model.config import ModelConfig
from freehold.optim.schedule import Schedule
from freehold.stages.pretrain.config import PretrainConfig
from freehold.tokenizer.bpe import END_OF_TEXT
from freehold.trainer.job import Job
from freehold.trainer.loop import Trainer
from freehold.trainer.validate import held_out, validator


def run(config: PretrainConfig, work: Workspace) -> dict[str, Any]:
    """Train to the end of the last phase; resumable at any step. Returns steps, tokens and epochs per source."""
    rows = sum(phase.steps for phase in config.phases.values()) * config.batch.sequences
    check_memory_fits(rows * ROW_BYTES, "the order of the rows", "pretrain.phases")
    tokens = work.input("tokenize") / "tokens"
    tokenizer = work.input("tokenize") / "tokenizer"
    shards = ShardSet.load(tokens, verify=True)
    without = quarantined(config.quarantine)
    data = shards.identity("train", without)
    model = with_vocabulary(config.model, shards.vocab_size)
    parent_step, parent_tokens, parent_hash, consumed = 0, 0, "", None
    if config.parent:
        parent = Path(config.parent)
        facts = dcp.check(parent)
        parent_config = dcp.read_config(parent)
        if parent_config != model:
            raise CheckpointError(
                "the parent is a model of another shape", where=parent, found=parent_config, expected=model
            )
        if facts["tokenizer_sha256"] != shards.tokenizer_sha256:
            raise CheckpointError("the parent was trained with another tokenizer", where=parent)
        parent_step, parent_tokens, consumed = facts["step"], facts["tokens"], consumed_by(facts)
        parent_hash = read_manifest(parent)["content_sha256"]
        if not config.phases:
            return keep(parent, facts, work) if work.leads else {}
        if facts.get("order", {"kind": "stream"}) != config.batch.order.model_dump():
            consumed = None
            work.log.warn("the parent read its text in another order: this one starts at its beginning")
        known = facts.get("data", {})
        if other := [name for name, digest in data.items() if known.get(name, digest) != digest]:
            work.log.warn(f"the parent read other text of {', '.join(other)}: rows there may come twice, or not at all")
    schedule = Schedule(config.phases, first_step=parent_step)
    order = text_order(
        config.batch,
        shards.sources("train", without),
        [PhaseRows(name, phase.steps, phase.mixture) for name, phase in config.phases.items()],
        seed=work.seed,
        separator=END_OF_TEXT,
        first_step=parent_step,
        consumed=consumed,
    )
    job = Job(
        folder=work.folder,
        model=model,
        trainer=config.trainer,
        optim=config.optim,
        balance=config.balance,
        schedule=schedule,
        order=order,
        documents_of=work.documents_of_step,
        micro_sequences=config.batch.micro,
        stage="pretrain",
        parallel=config.parallel,
        parent=parent_hash,
        tokens_before=parent_tokens,
        files=tuple(sorted(p for p in tokenizer.iterdir() if p.is_file())),
        facts={
            "tokenizer_sha256": shards.tokenizer_sha256,
            "seed": work.seed,
            "context_tokens": config.batch.context_tokens,
            "order": config.batch.order.model_dump(),
            "data": data,
            # Where the first phase began is known from the parent alone.
            "consumed": ({str(parent_step): consumed} if consumed else {})
            | {str(end): order.consumed_at(end) for end in schedule.ends().values()},
        },
    )
    for line in order.told():
        work.log.say(f"  {line}")
    steps = range(parent_step, schedule.total_steps)
    preview = work.folder / PREVIEW
    if work.leads:  # before the first step, so that what goes wrong in one can be named
        write_trace(preview, trace_rows(order, steps, {step: schedule.at(step).phase for step in steps}))
    trainer = Trainer(job, work.log, seed=work.seed)
    if config.parent:
        trainer.checkpoints.adopt(trainer.state.read(Path(config.parent)), Path(config.parent))
    validation = {
        name: held_out(
            source,
            shards.document_bytes("validation", name),
            config.batch.context_tokens,
            config.trainer.validation_tokens,
            END_OF_TEXT,
        )
        for name, source in shards.sources("validation").items()
        if source.total_tokens
    }
    trainer.run(validator(validation, trainer.world) if validation else None)
    if work.leads:
        write_atomic(work.folder / "trace.parquet", preview.read_bytes())
    return {
        "steps": schedule.total_steps,
        "tokens": schedule.total_steps * config.batch.step_tokens,
        "epochs": {name: round(epochs, 4) for name, epochs in order.epochs().items()},
        "mixture": [asdict(share) for share in order.shares],
        "checkpoints": {phase.checkpoint: phase.stage_type for phase in config.phases.values() if phase.checkpoint},
        "skipped_steps": trainer.progress.skipped,
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
        shutil.copytree(parent, folder, dirs_exist_ok=True)
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


def with_vocabulary(model: ModelConfig, vocab_size: int) -> ModelConfig:
    """Return the shape, checked against the tokenizer's vocabulary.

    Raises ConfigError when the model has fewer or more rows than the tokenizer has ids.
    """
    if model.vocab_size != vocab_size:
        raise ConfigError(
            "the model and the tokenizer disagree about the vocabulary",
            where="pretrain.model.vocab_size",
            found=model.vocab_size,
            expected=f"{vocab_size}, as the tokenizer has",
            todo=f"set pretrain.model.vocab_size={vocab_size} or change tokenize.vocab_size",
        )
    return model
