"""Chunks of rows on 2 and 4 processes give the loss, the gradients and the expert loads of one process."""

from __future__ import annotations

import pytest
import sharded_case as case
import torch
import torch.distributed as dist

from freehold.model import blockwise
from freehold.model.masks import count_positions
from freehold.parallel.context import ContextParallel

EXACT = 1e-13


class OneRowShort(ContextParallel):
    """A halo that lacks its first row."""

    def halo_tokens(self, window, chunk):
        return super().halo_tokens(window - 1, chunk)


class OwnDocumentsOnly(ContextParallel):
    """Masks that take every earlier chunk for the same document."""

    def masks(self, config, h, positions, document_ids):
        return super().masks(config, h, positions, None)


class Restarted(ContextParallel):
    """Rotary embedding that begins again with each chunk."""

    def positions(self, input_ids):
        return count_positions(input_ids)


def over_ranks(tensor):
    """Return the sum of the ranks' tensors."""
    total = tensor.detach().clone()
    dist.all_reduce(total)
    return total


def own(counts):
    """Take the chunk for the row, in the sequence loss."""
    return counts


def chunked(how=ContextParallel, row_sum=over_ranks, recompute=False, block_tokens=None, **changes):
    """Take the gradient of the batch in chunks; the first rank returns how far it is from that of one process."""
    shape, usual = case.config(**changes), blockwise.BLOCK_TOKENS
    model, whole = case.build(shape), case.batch()
    model.recompute = recompute
    context = how(dist.group.WORLD)
    context.apply(model)
    chunk = whole.part(columns=own_columns())
    try:
        blockwise.BLOCK_TOKENS = block_tokens or usual
        loads = {}
        loss = case.loss_of(model, chunk, whole, loads, row_sum=row_sum)
        loss.backward()
    finally:
        blockwise.BLOCK_TOKENS = usual
    found = case.Result(
        over_ranks(loss).item(),
        {name: over_ranks(gradient) for name, gradient in case.gradients(model).items()},
        {name: over_ranks(counts) for name, counts in loads.items()},
    )
    return case.difference(found, case.one_process(shape)) if dist.get_rank() == 0 else None


def own_columns():
    """Return this rank's part of a row."""
    each = case.TOKENS // dist.get_world_size()
    return slice(dist.get_rank() * each, (dist.get_rank() + 1) * each)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"recompute": True},
        {"block_tokens": 4},
        {"sliding_window": 6},
        {"sliding_window": 1},
        {"num_key_value_heads": 6, "mup_enabled": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("size", [2, 4])
def test_chunks_equal_one_process(ranks, size, settings):
    loss, worst, same_loads = ranks(size).run(call, settings)[0]
    assert loss < EXACT
    assert worst < EXACT
    assert same_loads


def call(settings):
    return chunked(**settings)


@pytest.mark.parametrize(
    "wrong",
    [{"how": Restarted}, {"how": OneRowShort}, {"how": OwnDocumentsOnly}, {"row_sum": own}],
    ids=["restarted", "a row short", "own documents only", "own row sum"],
)
def test_this_test_would_see(ranks, wrong):
    assert ranks(4).run(call, wrong)[0][1] > 1e-3


def refuse():
    model, chunk, reported = case.build(case.config(sliding_window=14)), case.batch().part(columns=own_columns()), []
    ContextParallel(dist.group.WORLD).apply(model)
    for positions in (None, torch.arange(12)):
        try:
            model.hidden(chunk.ids, document_ids=chunk.documents, positions=positions)
        except ValueError as error:
            reported.append(str(error))
    return reported


def test_what_a_chunk_cannot_do_is_refused(ranks):
    window, positions = ranks(2).run(refuse)[0]
    assert "reaches over more than one chunk of 12 tokens" in window
    assert "positions cannot be given" in positions
