"""The small parts: linear maps without bias, RMSNorm, the gated feed-forward, rotary embedding.

Shapes: B sequences, T tokens, d model width, f feed-forward width, D head width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from freehold.kernels.grouped import WORDS, Weights
from freehold.kernels.packed import Packed
from freehold.model import lora, ops


class Linear(nn.Linear):
    """A linear map without bias; its weight is empty until `Afmoe.init_weights` or a checkpoint fills it."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)
        self.pack: Packed | None = None
        self.factors: lora.Factors | None = None

    def reset_parameters(self) -> None:
        """Leave the weight as it is: initialising here would cost seconds and be overwritten."""

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., inputs] to [..., outputs]."""
        if self.factors is not None:
            return lora.linear(x, self.factors, packed_weights(self.weight, self.pack))
        return ops.linear(x, self.weight, self.pack)


class Embedding(nn.Embedding):
    """The token table; filled later, like `Linear`."""

    def reset_parameters(self) -> None:
        """Leave the weight as it is."""


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * gain over the last dimension; inside in fp32, out in the dtype of x."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension."""
        return ops.rms_norm(x, self.weight, self.eps)


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)): the dense feed-forward and the shared expert."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = Linear(width, inner)
        # Two matrices, as Hugging Face stores them; the kernels read both in one pass.
        self.up_proj = Linear(width, inner)
        self.down_proj = Linear(inner, width)
        self.packs: ops.Packs | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., d] to [..., d]."""
        if any(part.factors is not None for part in (self.gate_proj, self.up_proj, self.down_proj)):
            # Apart, in the order of the fused kernel: factors of zeros give its bits.
            both = torch.cat([self.gate_proj(x), self.up_proj(x)], dim=-1).flatten(0, -2)  # [N, 2f]
            return self.down_proj(lora.gated(both)).view_as(x)
        return ops.feed_forward(x, self.gate_proj.weight, self.up_proj.weight, self.down_proj.weight, self.packs)


def packed_weights(weight: Tensor, pack: Packed | None) -> Weights:
    """Return a matrix or a stack for maps with factors, packed once where no gradient is wanted."""
    plain = Weights.of(weight.detach())
    if pack is None or torch.is_grad_enabled():
        return plain
    return Weights(pack.words(weight), plain.outs, plain.ins, WORDS)


def rotary(positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return cos and sin of the rotation angles, [B or 1, 1, T, D/2], for positions [T] or [B, T].

    In fp32, or in `dtype` where that is finer.
    """
    exact = torch.promote_types(dtype, torch.float32)
    # In fp32: at position 100,000 a bf16 angle is wrong by whole turns.
    exponents = torch.arange(0, head_dim, 2, dtype=exact, device=positions.device) / head_dim
    angles = positions[..., None].to(exact) * theta**-exponents  # [T, D/2] or [B, T, D/2]
    angles = angles[:, None] if positions.ndim == 2 else angles[None, None]
    return angles.cos(), angles.sin()
