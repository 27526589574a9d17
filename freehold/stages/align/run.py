"""Supervised fine-tuning: conversations rendered by the one template, loss where the template says so."""

from __future__ import annotations

from typing import Any

from freehold.checkpoint import dcp
from freehold.core.artifact import Workspace, read_manifest
from freehold.core.document import Conversation, read_rows
from freehold.core.errors import CheckpointError, DataError
from freehold.core.machine import check_memory_fits
from freehold.data.exposure import ROW_BYTES
from freehold.data.loader import ConversationOrder
from freehold.data.packing import Example
from freehold.optim.schedule import Schedule
from freehold.parallel.config import validate_layout
from freehold.stages.align.config import AlignConfig
from freehold.tokenizer.bpe import Tokenizer
from freehold.tokenizer.chat import render_ids
from freehold.trainer.stage import Stage, Start, train_stage


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
    examples, assistant_tokens = render_examples(work, tokenizer)
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
    stage = Stage(
        name="align",
        model=model,
        order=order,
        schedule=schedule,
        tokenizer=folder,
        facts={
            "tokenizer_sha256": tokenizer.sha256,
            "begins_with": facts.get("begins_with", [tokenizer.end_of_text]),
        },
        start=Start(parent=read_manifest(start)["content_sha256"], tokens=facts["tokens"], weights=weights),
    )
    counts = train_stage(stage, config, work)
    return {
        "steps": counts["steps"],
        "conversations": len(order.examples),
        "too_long": order.too_long,
        "assistant_tokens": assistant_tokens,
        **counts,
    }


def is_preference(row: Conversation) -> bool:
    """Return whether a row says which answer is better, rather than what to say."""
    return any("rejected" in message or "label" in message for message in row.messages)


def render_examples(work: Workspace, tokenizer: Tokenizer) -> tuple[list[Example], int]:
    """Return the training conversations as ids with loss masks, and how many tokens carry loss.

    Raises DataError when there are none.
    """
    examples, assistant_tokens = [], 0
    for path in sorted((work.input("curate") / "conversations").glob("*.parquet")):
        for row in work.log.track(read_rows(path, Conversation), f"render {path.stem}"):
            if row.split == "train" and not is_preference(row):
                ids, mask = render_ids(tokenizer, row.messages, tools=row.messages[0].get("tools"))
                examples.append(Example(row.id, row.source, ids, mask))
                assistant_tokens += sum(mask)
    if not examples:
        raise DataError(
            "there are no conversations to learn from",
            where=work.input("curate") / "conversations",
            todo="add a source of conversations (kind: conversations, or generated) to gather.sources",
        )
    return examples, assistant_tokens
