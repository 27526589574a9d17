"""Supervised fine-tuning: conversations rendered by the one template, loss where the template says so."""

from __future__ import annotations

from typing import Any

from freehold.checkpoint import dcp
from freehold.core.artifact import PREVIEW, Workspace, read_manifest, write_atomic
from freehold.core.document import Conversation, read_rows
from freehold.core.errors import CheckpointError, DataError
from freehold.core.machine import check_memory_fits
from freehold.data.exposure import ROW_BYTES, trace_rows, write_trace
from freehold.data.loader import ConversationOrder
from freehold.data.packing import Example
from freehold.optim.schedule import Schedule
from freehold.parallel.config import validate_layout
from freehold.stages.align.config import AlignConfig
from freehold.tokenizer.bpe import Tokenizer
from freehold.tokenizer.chat import render_ids
from freehold.trainer.job import Job
from freehold.trainer.loop import Trainer


def run(config: AlignConfig, work: Workspace) -> dict[str, Any]:
    """Fine-tune to the end of the last phase; resumable at any step. Returns steps, conversations and epochs."""
    rows = sum(phase.steps for phase in config.phases.values()) * config.batch.sequences
    check_memory_fits(rows * ROW_BYTES, "the order of the rows", "align.phases")
    start = work.input("pretrain") / config.checkpoint
    facts = dcp.check(start)
    folder = work.input("tokenize") / "tokenizer"
    tokenizer = Tokenizer.load(folder)
    if facts["tokenizer_sha256"] != tokenizer.sha256:
        raise CheckpointError(
            "the checkpoint was trained with another tokenizer",
            where=start,
            found=facts["tokenizer_sha256"][:16],
            expected=tokenizer.sha256[:16],
        )
    model, weights = dcp.read_model(start, verify=False)  # verified by `check`
    config.batch.check_fits(model.max_position_embeddings, "align")
    validate_layout(
        config.parallel,
        model,
        context_tokens=config.batch.context_tokens,
        sequences=config.batch.sequences,
        micro_sequences=config.batch.micro_sequences,
        stage="align",
    )
    examples, assistant_tokens = [], 0
    for path in sorted((work.input("curate") / "conversations").glob("*.parquet")):
        for row in work.log.track(read_rows(path, Conversation), f"render {path.stem}"):
            if row.split == "train":
                ids, mask = render_ids(tokenizer, row.messages, tools=row.messages[0].get("tools"))
                examples.append(Example(row.id, row.source, ids, mask))
                assistant_tokens += sum(mask)
    if not examples:
        raise DataError(
            "there are no conversations to learn from",
            where=work.input("curate") / "conversations",
            todo="add a source that makes conversations (kind: generated) to gather.sources",
        )
    schedule = Schedule(config.phases)
    order = ConversationOrder(
        examples,
        context_tokens=config.batch.context_tokens,
        sequences=config.batch.sequences,
        steps=schedule.total_steps,
        seed=work.seed,
        pad=tokenizer.pad,
    )
    work.log.say(f"  {len(order.examples):,} conversations, {order.epochs} epochs at most, {order.too_long} too long")
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
        stage="align",
        parallel=config.parallel,
        parent=read_manifest(start)["content_sha256"],
        tokens_before=facts["tokens"],
        files=tuple(sorted(p for p in folder.iterdir() if p.is_file())),
        facts={
            "tokenizer_sha256": tokenizer.sha256,
            "seed": work.seed,
            "context_tokens": config.batch.context_tokens,
        },
    )
    steps = range(schedule.total_steps)
    preview = work.folder / PREVIEW
    if work.leads:
        write_trace(preview, trace_rows(order, steps, {s: schedule.at(s).phase for s in steps}))
    trainer = Trainer(job, work.log, seed=work.seed, weights=weights)
    trainer.run()
    if work.leads:
        write_atomic(work.folder / "trace.parquet", preview.read_bytes())
    return {
        "steps": schedule.total_steps,
        "conversations": len(order.examples),
        "too_long": order.too_long,
        "assistant_tokens": assistant_tokens,
        "checkpoints": {phase.checkpoint: phase.stage_type for phase in config.phases.values() if phase.checkpoint},
        "skipped_steps": trainer.progress.skipped,
    }
