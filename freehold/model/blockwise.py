"""Attention for CPUs without the kernels, over blocks that skip what no query sees.

Shapes: B sequences, T queries, S keys, H query heads, K key-value heads, D head width.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

BLOCK_TOKENS = 128
# Beyond this a matrix of who sees whom is too large to hold, and PyTorch's own kernel is used.
BLOCKWISE_MAX_TOKENS = 4096


class Block(NamedTuple):
    """Queries [start, end) of some sequences, the span of keys any of them sees, and 0 or -inf for each pair."""

    sequences: slice
    queries: slice
    keys: slice
    bias: Tensor


def attention_blocks(allowed: Tensor) -> list[Block]:
    """Cut the pairs that `allowed` ([B, 1, T, S] bool, or [1, 1, T, S] for all) into blocks without the empty part."""
    rows, _, tokens, width = allowed.shape
    # 128 queries: a block of scores stays in the second-level cache, and a window of 128 wastes at most half.
    starts = range(0, tokens, BLOCK_TOKENS)
    seen = torch.stack([allowed[:, 0, start : start + BLOCK_TOKENS].any(1) for start in starts], 1).to(torch.uint8)
    # argmax of a 0/1 row is its first 1; of the reversed row, its last.
    first, beyond = seen.argmax(-1).tolist(), (width - seen.flip(-1).argmax(-1)).tolist()
    blocks = []
    for row in range(rows):
        for number, start in enumerate(starts):
            queries, keys = slice(start, start + BLOCK_TOKENS), slice(first[row][number], beyond[row][number])
            part = allowed[row, 0, queries, keys]
            # Added to the scores: cheaper than masked_fill on each head, and exact since exp(-inf) is 0.
            bias = torch.zeros(part.shape, device=part.device).masked_fill_(~part, -torch.inf)
            blocks.append(Block(slice(row, row + 1) if rows > 1 else slice(None), queries, keys, bias))
    return blocks


def blockwise_attention(q: Tensor, k: Tensor, v: Tensor, blocks: list[Block]) -> Tensor:
    """Attend, q [B, H, T, D], k and v [B, K, T, D] -> [B, H, T, D], touching only what is seen.

    For CPUs, where PyTorch's kernel computes every pair and masks afterwards. Scores and softmax in fp32 or finer.
    """
    return _BlockwiseAttention.apply(q, k, v, blocks)


class _BlockwiseAttention(torch.autograd.Function):
    """Keeps nothing but its inputs: probabilities are computed again, block by block, for the gradient."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, blocks: list[Block]) -> Tensor:
        # Probabilities are T x S for each head; computing them again costs one product and keeps memory linear.
        ctx.save_for_backward(q, k, v)
        ctx.blocks = blocks
        out = _like_tokens_first(q)
        for block in blocks:
            qs, ks, vs = _part(q, block.sequences, block.queries, k), _keys(k, block), _keys(v, block)
            part = torch.bmm(_probabilities(qs, ks, block.bias, q.shape[-1]).to(q.dtype), vs)
            target = out[block.sequences, :, block.queries]
            target.copy_(part.view(target.shape))
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:  # type: ignore[override]
        q, k, v = ctx.saved_tensors
        exact = torch.promote_types(q.dtype, torch.float32)
        # Keys are seen by many blocks: their gradients add up in fp32 and are rounded once at the end.
        dq, dk, dv = _like_tokens_first(q), torch.zeros_like(k, dtype=exact), torch.zeros_like(v, dtype=exact)
        for block in ctx.blocks:
            qs, ks, vs = _part(q, block.sequences, block.queries, k), _keys(k, block), _keys(v, block)
            dpart = _part(dout, block.sequences, block.queries, k)
            p = _probabilities(qs, ks, block.bias, q.shape[-1])
            dp = torch.bmm(dpart, vs.transpose(1, 2)).to(exact)
            # PyTorch's own fused form of p * (dp - sum(p * dp)).
            ds = torch.ops.aten._softmax_backward_data(dp, p, -1, exact).mul_(q.shape[-1] ** -0.5).to(q.dtype)
            target = dq[block.sequences, :, block.queries]
            target.copy_(torch.bmm(ds, ks).view(target.shape))
            for total, product in (
                (dk, torch.bmm(ds.transpose(1, 2), qs)),
                (dv, torch.bmm(p.to(q.dtype).transpose(1, 2), dpart)),
            ):
                seen = total[block.sequences, :, block.keys]
                seen += product.view(seen.shape)
        return dq, dk.to(k.dtype), dv.to(v.dtype), None


def _probabilities(qs: Tensor, ks: Tensor, bias: Tensor, head_dim: int) -> Tensor:
    """Return softmax(q k / sqrt(D) + bias) for qs [n K, H/K t, D], ks [n K, s, D], bias [t, s]."""
    exact = torch.promote_types(qs.dtype, torch.float32)
    scores = torch.bmm(qs.to(exact), ks.to(exact).transpose(1, 2)).mul_(head_dim**-0.5)
    scores.view(-1, *bias.shape).add_(bias)
    return scores.softmax(-1)


def _part(x: Tensor, sequences: slice, tokens: slice, k: Tensor) -> Tensor:
    """Return the queries of a block, those of one key head together: [n K, H/K t, D]."""
    part = x[sequences, :, tokens]
    # The query heads of one key head are stacked along T: grouped-query attention becomes a plain batched product.
    return part.reshape(part.shape[0] * k.shape[1], -1, x.shape[-1])


def _keys(x: Tensor, block: Block) -> Tensor:
    """Return the keys or values a block sees: [n K, s, D]."""
    return x[block.sequences, :, block.keys].flatten(0, 1)


def _like_tokens_first(q: Tensor) -> Tensor:
    """Return an empty [B, H, T, D] stored as [B, T, H, D], which is how the next matrix product reads it."""
    batch, heads, tokens, width = q.shape
    return q.new_empty(batch, tokens, heads, width).transpose(1, 2)
