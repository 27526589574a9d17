"""Low-rank factors on any matrix of a model: y = W x + s B A x (LoRA, Hu et al. 2021), on stacked experts too.

The base is frozen and may be in blocks of four bits; the factors are one more stretch of the same sum, so factors of
zeros change no bit. Several adapters may share a model: rows are then sorted by adapter.

Shapes: R rows, n inputs, m outputs, r rank, E experts, S adapters that share a map, N tokens, k experts per token.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from freehold.kernels import grouped
from freehold.kernels.grouped import Weights

RANK_MULTIPLE = 16
"""What the kernels take: smaller ranks are filled with zeros, which get no gradient and stay zeros."""


class Pair(NamedTuple):
    """The factors of one matrix, or of a stack: A [stacks, r, n], B [stacks, m, r], and alpha / r."""

    a: Tensor
    b: Tensor
    scale: float

    @property
    def rank(self) -> int:
        """Return r."""
        return int(self.a.shape[1])


class Rows:
    """Whose rows a forward pass holds where several adapters share a model; rows are sorted by adapter."""

    def __init__(self, adapters: int) -> None:
        self.adapters = adapters
        self.counts = torch.zeros(adapters, dtype=torch.int64)
        """int64 [S]: rows of each adapter; the first is the base alone"""

    def pairs(self, chosen: Tensor, experts: int) -> Tensor:
        """Return the rows of each (expert, adapter), expert by expert, int64 [E S], for the experts chosen [N, k]."""
        owner = torch.arange(self.adapters).repeat_interleave(self.counts)  # [N]
        pair = chosen * self.adapters + owner[:, None]  # [N, k]
        return torch.bincount(pair.flatten(), minlength=experts * self.adapters)


class Factors(nn.Module):
    """A [stacks, r, n] and B [stacks, m, r] of a map, or of a stack of maps; `scale` is alpha / rank."""

    def __init__(self, stacks: int, outs: int, ins: int, rank: int, alpha: float) -> None:
        super().__init__()
        self.rank, self.alpha = rank, alpha
        self.a = nn.Parameter(torch.zeros(stacks, rank, ins))
        self.b = nn.Parameter(torch.zeros(stacks, outs, rank))
        self.enabled = True
        self.rows: Rows | None = None

    @property
    def scale(self) -> float:
        """Return what B A is multiplied with."""
        return self.alpha / self.rank

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator) -> None:
        """Draw A uniformly as a linear map is drawn (Kaiming); B is zero, so the first step starts from the base."""
        bound = 1 / math.sqrt(self.a.shape[2])
        self.a.copy_(torch.empty(self.a.shape).uniform_(-bound, bound, generator=generator))
        self.b.zero_()

    def counts(self, rows: int) -> Tensor:
        """Return the rows of each adapter of a plain map."""
        return torch.tensor([rows]) if self.rows is None else self.rows.counts

    def apply_to(self, x: Tensor, counts: Tensor, weights: Weights) -> Tensor:
        """Return x W^T + s x A^T B^T for rows [R, n] sorted by group: [R, m]."""
        share = 1 if self.rows is None else self.rows.adapters
        if not self.enabled:
            return frozen(x, counts, weights.shared(share))
        result: Tensor = _Adapted.apply(x, self.a, self.b, counts, weights.shared(share), self.scale)
        return result


class _Adapted(torch.autograd.Function):
    """A frozen map with factors: never the gradient of the frozen weights."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, a: Tensor, b: Tensor, counts: Tensor, weights: Weights, scale: float
    ) -> Tensor:
        wide_a, wide_b = _filled(a, b)
        u = grouped.product(x, counts, Weights.of(wide_a)).mul_(scale)  # [R, r]
        ctx.save_for_backward(x, u, a, b, counts)
        ctx.weights, ctx.scale = weights, scale
        return grouped.product(x, counts, weights, u, wide_b)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, u, a, b, counts = ctx.saved_tensors
        wide_a, wide_b = _filled(a, b)
        du = grouped.input_gradient(dy, counts, Weights.of(wide_b)).mul_(ctx.scale)  # [R, r]
        db = grouped.weight_gradient(dy, u, counts)[:, :, : b.shape[2]]
        da = grouped.weight_gradient(du, x, counts)[:, : a.shape[1]]
        dx = grouped.input_gradient(dy, counts, ctx.weights, du, wide_a) if ctx.needs_input_grad[0] else None
        return dx, da.contiguous(), db.contiguous(), None, None, None


class _Frozen(torch.autograd.Function):
    """A frozen map in any form."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, counts: Tensor, weights: Weights) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(counts)
        ctx.weights = weights
        return grouped.product(x, counts, weights)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, None, None]:  # type: ignore[override]
        return grouped.input_gradient(dy, ctx.saved_tensors[0], ctx.weights), None, None


class _Gated(torch.autograd.Function):
    """silu(gate) * up, by the function that the fused experts use: the same bits."""

    @staticmethod
    def forward(ctx: Any, both: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(both)
        return grouped.silu(both)

    @staticmethod
    def backward(ctx: Any, dproduct: Tensor) -> Tensor:  # type: ignore[override]
        return grouped.silu_gradient(dproduct, ctx.saved_tensors[0])


def _filled(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return the factors with their rank filled up with zeros to what the kernels take."""
    more = -a.shape[1] % RANK_MULTIPLE
    return (F.pad(a, (0, 0, 0, more)), F.pad(b, (0, more))) if more else (a, b)


def frozen(x: Tensor, counts: Tensor, weights: Weights) -> Tensor:
    """Return x W^T for rows sorted by group, with the gradient of x alone."""
    result: Tensor = _Frozen.apply(x, counts, weights)
    return result


def gated(both: Tensor) -> Tensor:
    """Return silu(gate) * up for both = gate | up: [R, 2i] -> [R, i]."""
    result: Tensor = _Gated.apply(both)
    return result


def linear(x: Tensor, factors: Factors, weights: Weights) -> Tensor:
    """Map [..., n] to [..., m] by one matrix with factors."""
    flat = x.reshape(-1, x.shape[-1])
    return factors.apply_to(flat, factors.counts(len(flat)), weights).view(*x.shape[:-1], -1)


def experts(
    x: Tensor,
    counts: Tensor,
    gate_up: Weights,
    down: Weights,
    gate_up_factors: Factors | None,
    down_factors: Factors | None,
) -> Tensor:
    """Return each row's SwiGLU by its expert, with the factors that are there: [R, d] -> [R, d].

    counts [E], or [E S] of each expert and adapter where adapters share the model.
    """
    share = len(counts) // len(gate_up.data)

    def through(rows: Tensor, weights: Weights, factors: Factors | None) -> Tensor:
        if factors is None:
            return frozen(rows, counts, weights.shared(share))
        return factors.apply_to(rows, counts, weights)

    return through(gated(through(x, gate_up, gate_up_factors)), down, down_factors)
