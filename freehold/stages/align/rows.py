"""What the phases of alignment learn from: conversations, and better and worse answers, by the one template."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from freehold.core.artifact import Workspace
from freehold.core.document import Conversation, read_rows
from freehold.core.errors import DataError
from freehold.core.marks import IGNORE
from freehold.data.packing import Example, pack
from freehold.data.pairs import Answers, PairOrder
from freehold.losses.targets import token_logprobs
from freehold.model.afmoe import Afmoe
from freehold.stages.align.config import SftConfig
from freehold.stages.align.learned import examples_of
from freehold.tokenizer.bpe import Tokenizer
from freehold.tokenizer.chat import render_ids

REFERENCE_ROWS = 8
"""Rows whose reference is computed together."""


def render_examples(
    work: Workspace, tokenizer: Tokenizer, practice: Sequence[Example] = (), settings: SftConfig | None = None
) -> tuple[list[Example], int]:
    """Return the training conversations as ids with loss masks, and how many tokens carry loss; `practice` after them.

    Of the sources that `settings` names, without the reasoning when they say so. Raises DataError when there are none,
    or when it names one that has none.
    """
    settings = settings or SftConfig()
    examples: list[Example] = []
    for row in _rows(work, settings.sources):
        if answer_of(row) is None:
            examples += [_example(row, messages, tokenizer) for messages in examples_of(row.messages, settings)]
    examples += practice
    if not examples:
        raise DataError(
            "there are no conversations to learn from",
            where=work.input("curate") / "conversations",
            todo="add a source of conversations (kind: conversations, or generated) to gather.sources",
        )
    return examples, sum(sum(example.loss_mask) for example in examples)


def render_answers(work: Workspace, tokenizer: Tokenizer, *, unpaired: bool) -> list[Answers]:
    """Return the training pairs, with `unpaired` also the answers that are labelled good or bad.

    Raises DataError when there are none.
    """
    found = [
        answers
        for row in _rows(work)
        if (at := answer_of(row)) is not None
        and (unpaired or "rejected" in row.messages[at])
        and (answers := _answers(row, at, tokenizer)) is not None
    ]
    if not found:
        raise DataError(
            "there are no better and worse answers to learn from",
            where=work.input("curate") / "conversations",
            expected="rows with `chosen` and `rejected`" + (", or `completion` and `label`" if unpaired else ""),
            todo="add a source of kind conversations with such rows (docs/conversations.md)",
        )
    return found


def answer_of(row: Conversation) -> int | None:
    """Return where the answer begins that a row calls better, good or bad; None for a plain conversation."""
    return next((n for n, m in enumerate(row.messages) if "rejected" in m or "label" in m), None)


def _rows(work: Workspace, sources: Sequence[str] = ()) -> Iterator[Conversation]:
    paths = {path.stem: path for path in sorted((work.input("curate") / "conversations").glob("*.parquet"))}
    if unknown := sorted(set(sources) - set(paths)):
        raise DataError(
            "a phase of align names a source that has no conversations",
            where="sft.sources",
            found=unknown[0],
            expected=f"one of {', '.join(paths) or 'none: no source has any'}",
        )
    for name, path in paths.items():
        if sources and name not in sources:
            continue
        for row in work.log.track(read_rows(path, Conversation), f"render {name}"):
            if row.split == "train":
                yield row


def _example(row: Conversation, messages: Sequence[dict[str, Any]], tokenizer: Tokenizer) -> Example:
    ids, mask = render_ids(tokenizer, messages, tools=row.messages[0].get("tools"))
    return Example(row.id, row.source, ids, mask)


def _answers(row: Conversation, at: int, tokenizer: Tokenizer) -> Answers | None:
    """Return the answers of a row; None when one of them is the other, or has nothing to learn, as tokens."""
    answer = row.messages[at]
    texts, signs = [row.messages], [1]
    if "rejected" in answer:
        texts, signs = [row.messages, [*row.messages[:at], *answer["rejected"]]], [1, -1]
    elif not answer["label"]:
        signs = [-1]
    examples = tuple(_example(row, messages, tokenizer) for messages in texts)
    if not all(any(example.loss_mask[1:]) for example in examples) or len({tuple(e.ids) for e in examples}) < len(
        texts
    ):
        return None
    return Answers(row.id, row.source, examples, tuple(signs), float(answer.get("margin", 0.0)))


@torch.no_grad()
def reference_logprobs(model: Afmoe, order: PairOrder) -> dict[str, list[np.ndarray]]:
    """Return log p of each answer's targets under a model, by id: arrays over its positions, 0 where it has none."""
    model.eval()
    packed = pack([one.tokens for one in order.answers], order.context_tokens)
    found: dict[str, list[np.ndarray]] = {}
    for first in range(0, len(packed), REFERENCE_ROWS):
        rows = [[order.answers[i] for i in row] for row in packed[first : first + REFERENCE_ROWS]]
        batch = order.arrange(rows)
        targets = torch.from_numpy(batch.targets)
        hidden = model.hidden(torch.from_numpy(batch.input_ids), document_ids=torch.from_numpy(batch.document_ids))
        kept = targets != IGNORE
        values = torch.zeros(targets.shape, dtype=torch.float32)
        values[kept] = token_logprobs(hidden[kept], model.lm_head.weight, targets[kept]).float()
        for row, values_of in zip(rows, values.numpy(), strict=True):
            at = 0
            for one in row:
                lengths = [len(example.ids) - 1 for example in one.examples]
                ends = np.cumsum([at, *lengths])
                found[one.id] = [values_of[a:b].copy() for a, b in zip(ends[:-1], ends[1:], strict=True)]
                at = int(ends[-1])
    return found
