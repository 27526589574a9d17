"""Grouped-query attention with per-head norms, an output gate, and RoPE on sliding layers only.

Shapes: B sequences, T queries, S keys, H query heads, K key-value heads, D head width.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from freehold.kernels import cpu
from freehold.model import blockwise, ops
from freehold.model.config import ModelConfig
from freehold.model.layers import Linear, RMSNorm
from freehold.model.masks import Mask


class Cache(Protocol):
    """What attention needs of a key-value cache; the cache knows whose tokens these are and what they may see."""

    def attend(self, layer_index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Keep k and v [B, T, K, D] (already rotated); return what the queries q [B, T, H, D] find, [B, T, H, D]."""
        ...


class Context(NamedTuple):
    """What all layers of one forward pass share."""

    cos: Tensor
    sin: Tensor
    masks: dict[str, Mask]
    cache: Cache | None
    token_mask: Tensor | None


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
    """Attend: q [B, H, T, D], k and v [B, K, S, D] -> [B, H, T, D]."""
    if mask.start is not None:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [B, T, H or K, D], as the kernel reads them
        return cpu.attention(q, k, v, mask.start)[0].transpose(1, 2)
    if mask.blocks is not None:
        return blockwise.blockwise_attention(q, k, v, mask.blocks)
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
        if context.cache is not None:
            out = context.cache.attend(self.layer_index, q, k, v)  # [B, T, H, D]
        else:
            q, k, v = (y.transpose(1, 2) for y in (q, k, v))  # [B, H or K, T, D]
            out = self.core(q, k, v, context.masks[self.kind]).transpose(1, 2)
        return self.o_proj(ops.gated(out.flatten(2), self.gate_proj(x)))
