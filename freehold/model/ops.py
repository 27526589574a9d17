"""The expert operations and the one switch between their forms.

Shapes: N = tokens x top-k rows sorted by expert, E experts, d model width, i expert width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def grouped_swiglu(x: Tensor, counts: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Apply to each row the SwiGLU of its expert.

    x [N, d] sorted by expert, counts [E] rows of each, gate_up [E, 2i, d], down [E, d, i] -> [N, d].
    """
    return grouped_swiglu_reference(x, counts, gate_up, down)


def grouped_swiglu_reference(x: Tensor, counts: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """The plain form: one expert after another. Any device, any dtype, autograd through every step."""
    parts = []
    for expert, rows in enumerate(x.split(counts.tolist())):
        gate, up = F.linear(rows, gate_up[expert]).chunk(2, dim=-1)
        parts.append(F.linear(F.silu(gate) * up, down[expert]))
    return torch.cat(parts)


def gather(x: Tensor, order: Tensor, top_k: int) -> Tensor:
    """Return the row of each assignment, sorted by expert: x [N, d], order [N k] (a permutation) -> [N k, d]."""
    return x.repeat_interleave(top_k, dim=0)[order]


def combine(y: Tensor, order: Tensor, weights: Tensor) -> Tensor:
    """Return each token's weighted sum of its experts' results, in fp32: y [N k, d], weights [N, k] -> [N, d]."""
    inverse = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    return (y[inverse].view(*weights.shape, -1) * weights[..., None]).sum(1)
