"""Scoring sequences: in which passes they are read, and what each position says about the token after it.

Shapes: n positions, d hidden width, V vocabulary, B rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from freehold.infer.pages import PagePool, Pages, blocks_of
from freehold.infer.requests import Top
from freehold.losses.logprob import log_partition, token_logprobs

HEAD_BYTES = 64 << 20
"""Size of one piece of float32 logits when sequences are scored."""


@dataclass(frozen=True)
class Scored:
    """The log-probability of each token given those before it; the first has none and counts 0."""

    logprobs: list[float]
    top_logprobs: list[Top]
    """The most probable tokens at each position; empty at the first."""


def pieces(
    pool: PagePool, sequences: Sequence[Sequence[int]], most_tokens: int
) -> Iterator[list[tuple[int, Pages, int, int]]]:
    """Yield what is read in each pass: (sequence, its pages, first position, tokens)."""
    step: list[tuple[int, Pages, int, int]] = []
    left, free = most_tokens, pool.free
    for row, ids in enumerate(sequences):
        pages, start = Pages(pool), 0
        while start < len(ids) - 1:  # the last token predicts nothing
            # A long sequence is read over several passes; keys and values in its pages join them.
            count = min(len(ids) - 1 - start, left)
            if step and (count == 0 or blocks_of(count + 64) * len(pool.windows) > free):
                yield step
                # Its pages are written, and given back where a sequence ended.
                step, left, free = [], most_tokens, pool.free
                continue
            step.append((row, pages, start, count))
            start, left = start + count, left - count
            free -= blocks_of(count + 64) * len(pool.windows)
    if step:
        yield step


def append(head: nn.Linear, hidden: Tensor, targets: Sequence[int], top: int, result: Scored) -> None:
    """Append what each position [n, d] says about its successor."""
    # Bounded by bytes: 2,048 rows of float32 logits of a large vocabulary would be 1.6 GB.
    rows = max(1, HEAD_BYTES // (4 * head.out_features))
    for first in range(0, len(targets), rows):
        ids = torch.tensor(targets[first : first + rows], device=hidden.device)
        chances, tops = logprobs(head(hidden[first : first + rows]), ids, top)
        result.logprobs.extend(chances)
        result.top_logprobs.extend(tops)


def logprobs(logits: Tensor, ids: Tensor, top: int, partition: Tensor | None = None) -> tuple[list[float], list[Top]]:
    """Return the log-probability of one id a row of logits [B, V], and the `top` best with theirs.

    partition [B]: their log(sum(exp)), where it is known.
    """
    # The same function as in training and in the losses, so the numbers are the same bits.
    total = log_partition(logits) if partition is None else partition  # [B]
    chosen = token_logprobs(logits, ids, total).tolist()
    if not top:
        return chosen, [[] for _ in chosen]
    values, best = logits.to(total.dtype).topk(min(top, logits.shape[1]), dim=-1)  # [B, top]
    values = values - total[:, None]
    return chosen, [list(zip(i, v, strict=True)) for i, v in zip(best.tolist(), values.tolist(), strict=True)]
