"""Bits per byte of held-out text while training, as `evaluate` counts them: each document alone, cut into windows.

Shapes: B rows, T tokens a row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from freehold.data.loader import Source
from freehold.data.packing import Batch, Example, conversation_batch, cut, pack
from freehold.losses.cross_entropy import summed_nll
from freehold.model.afmoe import Afmoe
from freehold.parallel.config import ParallelConfig
from freehold.parallel.mesh import World


@dataclass(frozen=True)
class HeldOut:
    """A source's validation rows, and the UTF-8 bytes they stand for."""

    batch: Batch
    text_bytes: int


def held_out(source: Source, document_bytes: np.ndarray, context_tokens: int, limit_tokens: int, begin: int) -> HeldOut:
    """Arrange a source's first validation documents in rows, up to `limit_tokens` (0: all; at least one document).

    A document is coded after the token that begins it (given, not paid for) and up to the one that ends it (paid for).
    A window that is no full row shares a row with others, none of which it sees.
    """
    count = len(source.lengths)
    if limit_tokens:
        # At least one document: a source of long ones would else have no figure.
        count = max(1, int(np.searchsorted(np.cumsum(source.lengths), limit_tokens, side="right")))
    windows: list[Example] = []
    for start, length in zip(source.starts[:count], source.lengths[:count], strict=True):
        # What begins a document is context only: it is no part of the text.
        for ids in cut([begin, *source.tokens[start : start + length].tolist()], context_tokens):
            windows.append(Example("", source.name, ids, [True] * len(ids)))
    rows = pack([len(window.ids) - 1 for window in windows], context_tokens)
    batch = conversation_batch([[windows[i] for i in row] for row in rows], context_tokens, begin)
    return HeldOut(batch, int(document_bytes[:count].sum()))


def bits_per_byte(
    model: Afmoe, sources: Mapping[str, HeldOut], world: World | None = None, rows: int = 8
) -> dict[str, float]:
    """Return `val/bpb/<source>` and `val/bpb` over all; the model is left in the mode it was in.

    Processes take turns in passes of `rows`; one that has none left for a turn runs the first again, uncounted, since
    the others may need its experts.
    """
    world = world or World(ParallelConfig())
    training = model.training
    model.eval()
    values, all_bits, all_bytes = {}, 0.0, 0
    with torch.no_grad():
        for name, held in sources.items():
            bits, number = 0.0, len(held.batch.input_ids)
            for turn in range(0, number, rows * world.parallel.data):
                start = turn + rows * world.data_rank
                # Its result is dropped below; the others need its experts to answer.
                part = held.batch.rows(start, start + rows) if start < number else held.batch.rows(0, rows)
                part = part.columns(world.columns(part.input_ids.shape[1]))
                ids, documents, targets = (
                    torch.from_numpy(array).to(world.device)
                    for array in (part.input_ids, part.document_ids, part.targets)
                )
                hidden = _hidden(model, world, ids, documents)
                if hidden is not None and start < number:
                    bits += float(summed_nll(hidden, model.lm_head.weight, targets).sum())
            # Summed before dividing: bits per byte of the text, not a mean over ranks.
            bits = float(world.sum_all_(torch.tensor(bits, dtype=torch.float64, device=world.device))) / math.log(2)
            values[f"val/bpb/{name}"] = bits / held.text_bytes
            all_bits += bits
            all_bytes += held.text_bytes
    values["val/bpb"] = all_bits / max(all_bytes, 1)
    model.train(training)
    return values


def _hidden(model: Afmoe, world: World, ids: Tensor, documents: Tensor) -> Tensor | None:
    """Return what the head is applied to; None where another pipeline stage has the head."""
    if world.parallel.pipeline == 1:
        return model.hidden(ids, document_ids=documents)
    from freehold.parallel.pipeline import relay

    return relay(model, world, ids, documents)


def validator(sources: Mapping[str, HeldOut], world: World) -> Callable[[Afmoe], dict[str, float]] | None:
    """Return the function the training loop calls; None without sources."""
    return (lambda model: bits_per_byte(model, sources, world)) if sources else None
