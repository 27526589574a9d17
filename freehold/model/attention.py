"""Grouped-query attention with per-head norms, an output gate, and RoPE on sliding layers only.

Shapes: B sequences, T queries, S keys, H query heads, K key-value heads, D head width.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from freehold.kernels import cpu
from freehold.model import ops
from freehold.model.config import ModelConfig
from freehold.model.layers import Linear, RMSNorm

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

FLEX_BLOCK = 128
FLEX_TOKENS = 4096
"""From here on a CUDA device gets block masks: a dense one of 4,096 tokens holds 16 MiB a row, of 65,536 4 GiB."""


class Mask(NamedTuple):
    """Who sees whom: `allowed` (bool, broadcastable to [B, 1, T, S]), or None for plain causal order if `causal`.

    `start`, `blocks` or `flex` is the same in the form that the fast way of this device and dtype wants.
    """

    allowed: Tensor | None
    causal: bool
    window: int | None
    blocks: list[ops.Block] | None = None
    start: Tensor | None = None
    flex: BlockMask | None = None


class Cache(Protocol):
    """What attention needs of a key-value cache; the cache decides what to keep and who may see it."""

    def update(self, layer_index: int, k: Tensor, v: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Add k, v [B, K, T, D] (already rotated); return all keys, values [B, K, S, D], and who sees whom."""
        ...


class Context(NamedTuple):
    """What all layers of one forward pass share."""

    cos: Tensor
    sin: Tensor
    masks: dict[str, Mask]
    positions: Tensor
    cache: Cache | None
    token_mask: Tensor | None


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
    """Attend: q [B, H, T, D], k and v [B, K, S, D] -> [B, H, T, D]."""
    if mask.start is not None:
        return ops.interval_attention(q, k, v, mask.start)
    if mask.blocks is not None:
        return ops.blockwise_attention(q, k, v, mask.blocks)
    if mask.flex is not None:
        return _flex_attention(q.is_cuda)(q, k, v, block_mask=mask.flex, enable_gqa=q.shape[1] != k.shape[1])
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask.allowed, is_causal=mask.causal, enable_gqa=q.shape[1] != k.shape[1]
    )


@functools.cache
def _flex_attention(compiled: bool) -> Any:
    """Return PyTorch's flex attention; uncompiled it makes every score, which is for tests."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False) if compiled else flex_attention


def takes_flex(device: torch.device, tokens: int) -> bool:
    """Tell whether attention over so many tokens is to skip the blocks that nobody sees, rather than mask them."""
    return device.type == "cuda" and tokens >= FLEX_TOKENS


def flex_mask(start: Tensor) -> BlockMask:
    """Return flex attention's block mask where query t of a row sees the keys start[b, t] .. t, start int32 [B, T].

    Blocks follow from the bounds alone; PyTorch's own way to find them evaluates the mask for every pair.
    """
    from torch.nn.attention.flex_attention import BlockMask

    tokens = start.shape[1]
    count = -(-tokens // FLEX_BLOCK)
    padded = F.pad(start, (0, count * FLEX_BLOCK - tokens), value=tokens)
    first = padded.unflatten(1, (count, FLEX_BLOCK)).amin(2) // FLEX_BLOCK
    numbers = torch.arange(count, dtype=torch.int32, device=start.device)
    indices = (first[..., None] + numbers).clamp_max(count - 1)

    def sees(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (key >= start[row, query])

    return BlockMask.from_kv_blocks(
        (numbers - first + 1)[:, None], indices[:, None], BLOCK_SIZE=FLEX_BLOCK, mask_mod=sees,
        seq_lengths=(tokens, tokens),
    )  # fmt: skip


def count_positions(input_ids: Tensor) -> Tensor:
    """Return where the tokens [B, T] (or their stream [B, T, d]) stand in their rows: 0, 1, 2, ... [T]."""
    return torch.arange(input_ids.shape[1], device=input_ids.device)


def build_masks(
    config: ModelConfig, h: Tensor, positions: Tensor | None, document_ids: Tensor | None
) -> dict[str, Mask]:
    """Return the mask of each kind of layer for embedded tokens h [B, T, d] that see each other only.

    A token sees itself, and earlier ones of the same document within the window. `positions` None means
    0, 1, 2, ...; where causal order alone says it all, no matrix is built.
    """
    masks: dict[str, Mask] = {}
    rows, tokens, device = len(h), h.shape[1], h.device
    as_intervals = positions is None and tokens > 1 and cpu.available(h, config.head_dim)
    order = torch.arange(tokens, device=device) if positions is None else positions
    order = order.int().expand(1, -1) if order.ndim == 1 else order.int()
    blockwise = device.type == "cpu" and ops.BLOCK_TOKENS < tokens <= ops.BLOCKWISE_MAX_TOKENS
    earlier = None
    for kind in sorted(set(config.layer_types)):
        window = config.sliding_window if kind == "sliding_attention" else None
        narrow = window is not None and (positions is not None or window < tokens)
        start = ops.first_seen(tokens, window, document_ids, rows) if as_intervals else None
        if start is not None:
            masks[kind] = Mask(None, False, window, start=start)
            continue
        if positions is None and document_ids is None and not narrow and not blockwise:
            masks[kind] = Mask(None, True, window)
            continue
        if positions is None and takes_flex(device, tokens):
            start = ops.first_seen(tokens, window, document_ids, rows)
            if start is not None:
                masks[kind] = Mask(None, False, window, flex=flex_mask(start.to(device)))
                continue
        if earlier is None:
            earlier = order[:, :, None] >= order[:, None, :]
            if document_ids is not None:
                ids = document_ids.int()
                earlier = earlier & (ids[:, :, None] == ids[:, None, :])
        seen = earlier
        if window is not None and narrow:
            seen = seen & (order[:, :, None] - order[:, None, :] < window)
        allowed = seen[:, None]
        masks[kind] = Mask(allowed, False, window, ops.attention_blocks(allowed) if blockwise else None)
    return masks


class Attention(nn.Module):
    """One attention layer. `core` is the part that mixes tokens: the seam for context parallelism."""

    def __init__(self, config: ModelConfig, layer_index: int) -> None:
        super().__init__()
        self.layer_index = layer_index
        self.head_dim = config.head_dim
        self.kind = config.layer_types[layer_index]
        self.q_proj = Linear(config.hidden_size, config.query_width)
        self.k_proj = Linear(config.hidden_size, config.key_width)
        self.v_proj = Linear(config.hidden_size, config.key_width)
        self.gate_proj = Linear(config.hidden_size, config.query_width)
        self.o_proj = Linear(config.query_width, config.hidden_size)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
        self.core: Callable[[Tensor, Tensor, Tensor, Mask], Tensor] = attend

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """Map [B, T, d] to [B, T, d]."""
        heads = (*x.shape[:2], -1, self.head_dim)
        q, k, v = (project(x).view(heads) for project in (self.q_proj, self.k_proj, self.v_proj))
        if self.kind == "sliding_attention":  # full layers have no positional encoding at all
            q, k = (
                ops.norm_rotate(y, norm.weight, norm.eps, context.cos, context.sin)
                for y, norm in ((q, self.q_norm), (k, self.k_norm))
            )
        else:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))
        if context.cache is None:
            mask = context.masks[self.kind]
        else:
            k, v, allowed = context.cache.update(self.layer_index, k, v, context.positions)
            mask = Mask(allowed, False, None)
        out = self.core(q, k, v, mask).transpose(1, 2).flatten(2)
        return self.o_proj(ops.gated(out, self.gate_proj(x)))
