"""The plain form of each operation: any device, any dtype, autograd through every step.

The fast forms are tested against these. Shapes as in ops.py.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from freehold.model.rows import Route


def feed_forward(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """The plain form."""
    return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)


def rms_norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """The plain form; fused by PyTorch on CUDA and where it compiles, a dozen passes over memory on CPUs otherwise."""
    exact = torch.promote_types(x.dtype, torch.float32)
    return F.rms_norm(x.to(exact), gain.shape, gain.to(exact), eps).to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The plain form."""
    first, second = x.to(cos.dtype).chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def grouped_swiglu(x: Tensor, counts: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """The plain form: one expert after another."""
    parts = []
    for expert, rows in enumerate(x.split(counts.tolist())):
        gate, up = F.linear(rows, gate_up[expert]).chunk(2, dim=-1)
        parts.append(F.linear(F.silu(gate) * up, down[expert]))
    return torch.cat(parts)


def gather(x: Tensor, path: Route) -> Tensor:
    """The plain form."""
    return x[path.token]


def combine(y: Tensor, path: Route, weights: Tensor, base: Tensor) -> Tensor:
    """The plain form."""
    own = y[path.inverse].view(*weights.shape, -1) * weights[..., None]
    return (base + own.sum(1)).to(base.dtype)


def choose(logits: Tensor, bias: Tensor, k: int, scale: float) -> tuple[Tensor, Tensor]:
    """See `ops.choose`; in a tie the device decides."""
    scores = logits.sigmoid()  # [N, E]
    chosen = (scores.detach() + bias).topk(k, dim=-1).indices  # [N, k]
    weights = scores.gather(1, chosen)
    return weights * (scale / (weights.sum(-1, keepdim=True) + 1e-20)), chosen
