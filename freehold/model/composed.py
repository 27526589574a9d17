"""The operations put together from PyTorch's own with care: few passes over memory, gradients written by hand.

For CPUs without the kernels. Shapes as in ops.py.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from freehold.model.rows import Route


def rms_norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """See `ops.rms_norm`."""
    return _RMSNorm.apply(x, gain, eps)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """See `ops.rotate`."""
    return _Rotate.apply(x, cos, sin)


# The sizes of its products depend on values, which no compiler can trace.
@torch.compiler.disable
def grouped_swiglu(x: Tensor, counts: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """See `ops.grouped_swiglu`; on CPUs, where reading the counts costs nothing."""
    return _GroupedSwiGLU.apply(x, counts.tolist(), gate_up, down)


def gather(x: Tensor, path: Route) -> Tensor:
    """See `ops.gather`."""
    return _Gather.apply(x, path)


def combine(y: Tensor, path: Route, weights: Tensor, base: Tensor) -> Tensor:
    """See `ops.combine`."""
    return _Combine.apply(y, path, weights, base)


class _RMSNorm(torch.autograd.Function):
    """A third of the passes, most of them in place; both sums of the backward pass are matrix-vector products."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor, eps: float) -> Tensor:
        exact = torch.promote_types(x.dtype, torch.float32)
        rows = x.reshape(-1, x.shape[-1]).to(exact)
        # vecdot reads x once; x.pow(2).mean() would write a tensor as large as x first.
        scale = torch.linalg.vecdot(rows, rows).div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, gain, scale)
        return (rows * scale[:, None]).mul_(gain).to(x.dtype).view(x.shape)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        x, gain, scale = ctx.saved_tensors
        width, exact = x.shape[-1], scale.dtype
        rows, drows = x.reshape(-1, width).to(exact), dy.reshape(-1, width).to(exact)
        # The one new tensor of this pass; the gradient is written into it below.
        product = rows * drows
        dgain = product.t().mv(scale).to(gain.dtype)
        # d/dx of 1/rms: -x (x . g dy) / (d rms^3), for each row one number times the row.
        pull = product.mv(gain.to(exact)).mul_(scale).mul_(scale).mul_(scale).div_(-width)
        dx = torch.mul(drows, gain, out=product).mul_(scale[:, None]).addcmul_(rows, pull[:, None])
        return dx.to(x.dtype).view(x.shape), dgain, None


class _Rotate(torch.autograd.Function):
    """Into one buffer; the gradient is rotated back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin, 1)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        cos, sin = ctx.saved_tensors
        return _rotated(dy, cos, sin, -1), None, None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, direction: int) -> Tensor:
    exact = x.to(cos.dtype)
    # Halves, not even and odd places: that is how Hugging Face's weights are ordered.
    first, second = exact.chunk(2, dim=-1)
    out = torch.empty_like(exact)
    half = cos.shape[-1]
    # Rotating by the negative angle is the inverse, so the gradient is the same code with the sign turned.
    torch.mul(first, cos, out=out[..., :half]).addcmul_(second, sin, value=-direction)
    torch.mul(second, cos, out=out[..., half:]).addcmul_(first, sin, value=direction)
    return out.to(x.dtype)


class _GroupedSwiGLU(torch.autograd.Function):
    """One matrix product per expert written straight into its rows; everything elementwise in one pass over all rows.

    Keeps gate and up for the backward pass, not their product.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, counts: list[int], gate_up: Tensor, down: Tensor) -> Tensor:
        inner = down.shape[2]
        # Gate and up of all experts in one buffer: the elementwise part is one pass whatever the number of experts.
        both, y = x.new_empty(len(x), 2 * inner), torch.empty_like(x)
        for expert, rows in _runs(counts):
            torch.mm(x[rows], gate_up[expert].t(), out=both[rows])
        product = F.silu(both[:, :inner]).mul_(both[:, inner:])
        for expert, rows in _runs(counts):
            torch.mm(product[rows], down[expert].t(), out=y[rows])
        ctx.save_for_backward(x, both, gate_up, down)
        ctx.counts = counts
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, None, Tensor | None, Tensor | None]:  # type: ignore[override]
        x, both, gate_up, down = ctx.saved_tensors
        needs_x, _, needs_gate_up, needs_down = ctx.needs_input_grad
        gate, up = both.chunk(2, dim=-1)
        active = F.silu(gate)
        # Rows of a transposed gradient would make every product below copy.
        dy = dy.contiguous()
        dproduct = torch.empty_like(active)
        for expert, rows in _runs(ctx.counts):
            torch.mm(dy[rows], down[expert], out=dproduct[rows])
        dx = d_gate_up = d_down = None
        if needs_down:
            d_down = torch.empty_like(down)
            # Computed again rather than kept: one multiplication against a tensor [R, i] for each layer.
            product = active * up
            for expert, rows in _runs(ctx.counts, d_down):
                torch.mm(dy[rows].t(), product[rows], out=d_down[expert])
        dboth = torch.empty_like(both)
        # up's gradient first: dproduct is overwritten by the next line.
        torch.mul(dproduct, active, out=dboth[:, active.shape[1] :])
        torch.ops.aten.silu_backward.grad_input(dproduct.mul_(up), gate, grad_input=dboth[:, : active.shape[1]])
        if needs_gate_up:
            d_gate_up = torch.empty_like(gate_up)
            for expert, rows in _runs(ctx.counts, d_gate_up):
                torch.mm(dboth[rows].t(), x[rows], out=d_gate_up[expert])
        if needs_x:
            dx = torch.empty_like(x)
            for expert, rows in _runs(ctx.counts):
                torch.mm(dboth[rows], gate_up[expert], out=dx[rows])
        return dx, None, d_gate_up, d_down


def _runs(counts: list[int], zero_if_idle: Tensor | None = None) -> list[tuple[int, slice]]:
    """Return the rows of each expert that has any; the gradient of an idle expert is set to zero."""
    runs, start = [], 0
    for expert, count in enumerate(counts):
        if count:
            runs.append((expert, slice(start, start + count)))
        elif zero_if_idle is not None:
            zero_if_idle[expert].zero_()
        start += count
    return runs


class _Gather(torch.autograd.Function):
    """A token's gradient is the sum over its k rows, found by the inverse permutation."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, path: Route) -> Tensor:
        ctx.inverse, ctx.tokens = path.inverse, len(x)
        return x.index_select(0, path.token)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        # By permutation and in slot order: index_add_ on several threads would sum in another order each time.
        first, *others = ctx.inverse.view(ctx.tokens, -1).unbind(1)
        total = dy.index_select(0, first).to(torch.promote_types(dy.dtype, torch.float32))
        for slot in others:
            total += dy.index_select(0, slot)
        return total.to(dy.dtype), None


class _Combine(torch.autograd.Function):
    """Weights and sums in the precision of the weights (fp32); nothing of size [N, k, d] in that precision is kept."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, path: Route, weights: Tensor, base: Tensor) -> Tensor:
        # A copy, since the sum is built in it and autograd may still need base.
        total = base.to(weights.dtype, copy=True)
        inverse = path.inverse.view(weights.shape)
        for slot in range(weights.shape[1]):
            own = y.index_select(0, inverse[:, slot]).to(weights.dtype)
            total += own.mul_(weights[:, slot, None])
        ctx.save_for_backward(y, weights)
        ctx.path, ctx.dtype = path, base.dtype
        return total.to(base.dtype)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, None, Tensor, Tensor]:  # type: ignore[override]
        y, weights = ctx.saved_tensors
        path = ctx.path
        rows = dout.index_select(0, path.token)
        # The weight's gradient is a dot product of d terms: in bf16 it would lose what balancing needs.
        exact = rows.to(weights.dtype)
        dweights = torch.linalg.vecdot(exact, y.to(weights.dtype))
        dy = (exact * weights.flatten()[path.order, None]).to(y.dtype)
        return dy, None, dweights[path.inverse].view(weights.shape), dout
