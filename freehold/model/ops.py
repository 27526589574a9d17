"""The operations that are worth a fast form, and the one place that chooses the form.

Each has a plain reference (any device, any dtype, autograd through every step), which its fast forms are tested
against: the CPU kernels of cpu.py where they are available, else PyTorch's operators put together with care.
Fast forms are deterministic: rows are moved by permutations, never added by atomics.

Shapes: N tokens, k experts per token, R = N k rows sorted by expert, E experts, d model width, i expert width;
B sequences, T queries, S keys, H query heads, K key-value heads, D head width.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from freehold.kernels import cpu

# --- linear maps ------------------------------------------------------------------------------------------------

# Below this the kernels' packing of the weight costs more than it gains (one token a sequence, when answering).
NATIVE_MIN_ROWS = 32


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """Return x weight^T: x [..., n], weight [m, n] -> [..., m]."""
    if _native(x, *weight.shape):
        return cpu.linear(x, weight)
    return F.linear(x, weight)


def feed_forward(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Return down(silu(gate(x)) * up(x)): x [..., d], gate and up [f, d], down [d, f] -> [..., d]."""
    if _native(x, *gate.shape):
        return cpu.feed_forward(x, gate, up, down)[0]
    return feed_forward_reference(x, gate, up, down)


def feed_forward_reference(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """The plain form."""
    return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)


def gated(x: Tensor, gate: Tensor) -> Tensor:
    """Return x * sigmoid(gate), elementwise."""
    return cpu.gated(x, gate) if _native(x, x.shape[-1]) else x * torch.sigmoid(gate)


def _native(x: Tensor, *widths: int) -> bool:
    """Tell whether the CPU kernels are the faster way for x [..., d]."""
    return x.numel() >= NATIVE_MIN_ROWS * x.shape[-1] and cpu.available(x, *widths)


def _fused(x: Tensor) -> bool:
    """Tell whether PyTorch makes one pass of several operations on x."""
    return x.is_cuda or torch.compiler.is_compiling()


# --- norms and rotation -----------------------------------------------------------------------------------------


def rms_norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """Return x / sqrt(mean(x^2) + eps) * gain over the last dimension, computed in fp32 or finer, in the dtype of x."""
    if gain.dtype == torch.float32 and _native(x, x.shape[-1]):
        return cpu.norm(x, gain, eps, None, None)
    return rms_norm_reference(x, gain, eps) if _fused(x) else _RMSNorm.apply(x, gain, eps)


def rms_norm_reference(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """The plain form; fused by PyTorch on CUDA and where it compiles, a dozen passes over memory on CPUs otherwise."""
    exact = torch.promote_types(x.dtype, torch.float32)
    return F.rms_norm(x.to(exact), gain.shape, gain.to(exact), eps).to(x.dtype)


class _RMSNorm(torch.autograd.Function):
    """A third of the passes, most of them in place; both sums of the backward pass are matrix-vector products."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor, eps: float) -> Tensor:
        exact = torch.promote_types(x.dtype, torch.float32)
        rows = x.reshape(-1, x.shape[-1]).to(exact)
        scale = torch.linalg.vecdot(rows, rows).div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, gain, scale)
        return (rows * scale[:, None]).mul_(gain).to(x.dtype).view(x.shape)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        x, gain, scale = ctx.saved_tensors
        width, exact = x.shape[-1], scale.dtype
        rows, drows = x.reshape(-1, width).to(exact), dy.reshape(-1, width).to(exact)
        product = rows * drows
        dgain = product.t().mv(scale).to(gain.dtype)
        pull = product.mv(gain.to(exact)).mul_(scale).mul_(scale).mul_(scale).div_(-width)
        dx = torch.mul(drows, gain, out=product).mul_(scale[:, None]).addcmul_(rows, pull[:, None])
        return dx.to(x.dtype).view(x.shape), dgain, None


def norm_rotate(x: Tensor, gain: Tensor, eps: float, cos: Tensor, sin: Tensor) -> Tensor:
    """Normalise each head of [B, T, H, D] and rotate it by angles [B or 1, 1, T, D/2]; see `rms_norm` and `rotate`."""
    half = cos.shape[-1]
    if gain.dtype == cos.dtype == torch.float32 and _native(x, half):
        return cpu.norm(x, gain, eps, cos.reshape(-1, half), sin.reshape(-1, half))
    return rotate(rms_norm(x, gain, eps).transpose(1, 2), cos, sin).transpose(1, 2)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate [B, H, T, D] by angles [B or 1, 1, T, D/2]; dimension j is paired with j + D/2 (as Llama and NeoX do)."""
    return rotate_reference(x, cos, sin) if _fused(x) else _Rotate.apply(x, cos, sin)


def rotate_reference(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The plain form."""
    first, second = x.to(cos.dtype).chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


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
    first, second = exact.chunk(2, dim=-1)
    out = torch.empty_like(exact)
    half = cos.shape[-1]
    torch.mul(first, cos, out=out[..., :half]).addcmul_(second, sin, value=-direction)
    torch.mul(second, cos, out=out[..., half:]).addcmul_(first, sin, value=direction)
    return out.to(x.dtype)


# --- experts ----------------------------------------------------------------------------------------------------


def grouped_swiglu(x: Tensor, counts: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Apply to each row the SwiGLU of its expert.

    x [R, d] sorted by expert, counts [E] rows of each, gate_up [E, 2i, d], down [E, d, i] -> [R, d].
    CUDA: grouped GEMM kernels. CPU: one GEMM per expert into shared buffers.
    """
    if x.is_cuda:
        return grouped_swiglu_gemm(x, counts, gate_up, down)
    if _native(x, *down.shape[1:]):
        return cpu.experts(x, counts, gate_up, down)[0]
    return _grouped_swiglu_buffered(x, counts, gate_up, down)


@torch.compiler.disable
def _grouped_swiglu_buffered(x: Tensor, counts: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    return _GroupedSwiGLU.apply(x, counts.tolist(), gate_up, down)


def grouped_swiglu_reference(x: Tensor, counts: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """The plain form: one expert after another."""
    parts = []
    for expert, rows in enumerate(x.split(counts.tolist())):
        gate, up = F.linear(rows, gate_up[expert]).chunk(2, dim=-1)
        parts.append(F.linear(F.silu(gate) * up, down[expert]))
    return torch.cat(parts)


def grouped_swiglu_gemm(x: Tensor, counts: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Through `F.grouped_mm`, without asking the device for the counts; row strides must be multiples of 16 bytes."""
    ends = counts.cumsum(0, dtype=torch.int32)
    gate, up = F.grouped_mm(x, gate_up.transpose(1, 2), offs=ends).chunk(2, dim=-1)
    return F.grouped_mm(F.silu(gate) * up, down.transpose(1, 2), offs=ends)


class _GroupedSwiGLU(torch.autograd.Function):
    """One matrix product per expert written straight into its rows; everything elementwise over all rows at once.

    Keeps gate and up for the backward pass, not their product.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, counts: list[int], gate_up: Tensor, down: Tensor) -> Tensor:
        inner = down.shape[2]
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
        dy = dy.contiguous()
        dproduct = torch.empty_like(active)
        for expert, rows in _runs(ctx.counts):
            torch.mm(dy[rows], down[expert], out=dproduct[rows])
        dx = d_gate_up = d_down = None
        if needs_down:
            d_down = torch.empty_like(down)
            product = active * up
            for expert, rows in _runs(ctx.counts, d_down):
                torch.mm(dy[rows].t(), product[rows], out=d_down[expert])
        dboth = torch.empty_like(both)
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


# --- moving tokens to experts and back --------------------------------------------------------------------------


class Route(NamedTuple):
    """Where each assignment goes: row r of the sorted form is assignment `order[r]`; `inverse` is the way back."""

    order: Tensor
    inverse: Tensor
    token: Tensor


def route(chosen: Tensor) -> Route:
    """Sort the assignments [N, k] by expert, keeping the order of tokens within one."""
    order = chosen.flatten().argsort(stable=True)
    inverse = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    return Route(order, inverse, order // chosen.shape[1])


def gather(x: Tensor, path: Route) -> Tensor:
    """Return each assignment's copy of its token, sorted by expert: [N, d] -> [R, d]."""
    if _native(x, x.shape[-1]):
        return cpu.gather(x, path.token, path.inverse)
    return _Gather.apply(x, path)


def gather_reference(x: Tensor, path: Route) -> Tensor:
    """The plain form."""
    return x[path.token]


class _Gather(torch.autograd.Function):
    """A token's gradient is the sum over its k rows, found by the inverse permutation."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, path: Route) -> Tensor:
        ctx.inverse, ctx.tokens = path.inverse, len(x)
        return x.index_select(0, path.token)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        first, *others = ctx.inverse.view(ctx.tokens, -1).unbind(1)
        total = dy.index_select(0, first).to(torch.promote_types(dy.dtype, torch.float32))
        for slot in others:
            total += dy.index_select(0, slot)
        return total.to(dy.dtype), None


def combine(y: Tensor, path: Route, weights: Tensor, base: Tensor) -> Tensor:
    """Return base [N, d] plus each token's results y [R, d] weighted by `weights` [N, k], summed in fp32 or finer."""
    if _native(y, y.shape[-1]) and weights.dtype == torch.float32:
        return cpu.combine(y, path.inverse, weights, base)
    return _Combine.apply(y, path, weights, base)


def combine_reference(y: Tensor, path: Route, weights: Tensor, base: Tensor) -> Tensor:
    """The plain form."""
    own = y[path.inverse].view(*weights.shape, -1) * weights[..., None]
    return (base + own.sum(1)).to(base.dtype)


class _Combine(torch.autograd.Function):
    """Weights and sums in the precision of the weights (fp32); nothing of size [N, k, d] in that precision is kept."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, path: Route, weights: Tensor, base: Tensor) -> Tensor:
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
        exact = rows.to(weights.dtype)
        dweights = torch.linalg.vecdot(exact, y.to(weights.dtype))
        dy = (exact * weights.flatten()[path.order, None]).to(y.dtype)
        return dy, None, dweights[path.inverse].view(weights.shape), dout


# --- attention --------------------------------------------------------------------------------------------------

BLOCK_TOKENS = 128
# Beyond this a matrix of who sees whom is too large to hold, and PyTorch's own kernel is used.
BLOCKWISE_MAX_TOKENS = 4096


def first_seen(tokens: int, window: int | None, document_ids: Tensor | None, rows: int) -> Tensor | None:
    """Return the first key each query sees (int32 [B, T]) where it sees all from there to itself, else None.

    That holds for causal order, a window, and documents that lie one after another (ids [B, T] never falling, with
    padding, -1, at the end).
    """
    device = torch.device("cpu") if document_ids is None else document_ids.device
    place = torch.arange(tokens, dtype=torch.int32, device=device)
    start = torch.zeros(rows, tokens, dtype=torch.int32, device=device)
    if document_ids is not None:
        ids = document_ids.masked_fill(document_ids == -1, torch.iinfo(document_ids.dtype).max)
        if bool((ids.diff(dim=1) < 0).any()):
            return None
        fresh = torch.zeros_like(start)
        fresh[:, 1:] = (ids.diff(dim=1) != 0) * place[1:]
        start = fresh.cummax(1).values
    return start if window is None else torch.maximum(start, place - window + 1)


def interval_attention(q: Tensor, k: Tensor, v: Tensor, start: Tensor) -> Tensor:
    """Attend from query t to keys start[b, t] .. t, q [B, H, T, D], k and v [B, K, T, D] -> [B, H, T, D]; a kernel."""
    return cpu.attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), start)[0].transpose(1, 2)


class Block(NamedTuple):
    """Queries [start, end) of some sequences, the span of keys any of them sees, and 0 or -inf for each pair."""

    sequences: slice
    queries: slice
    keys: slice
    bias: Tensor


def attention_blocks(allowed: Tensor) -> list[Block]:
    """Cut the pairs that `allowed` ([B, 1, T, S] bool, or [1, 1, T, S] for all) into blocks without the empty part."""
    rows, _, tokens, width = allowed.shape
    starts = range(0, tokens, BLOCK_TOKENS)
    seen = torch.stack([allowed[:, 0, start : start + BLOCK_TOKENS].any(1) for start in starts], 1).to(torch.uint8)
    first, beyond = seen.argmax(-1).tolist(), (width - seen.flip(-1).argmax(-1)).tolist()
    blocks = []
    for row in range(rows):
        for number, start in enumerate(starts):
            queries, keys = slice(start, start + BLOCK_TOKENS), slice(first[row][number], beyond[row][number])
            part = allowed[row, 0, queries, keys]
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
        dq, dk, dv = _like_tokens_first(q), torch.zeros_like(k, dtype=exact), torch.zeros_like(v, dtype=exact)
        for block in ctx.blocks:
            qs, ks, vs = _part(q, block.sequences, block.queries, k), _keys(k, block), _keys(v, block)
            dpart = _part(dout, block.sequences, block.queries, k)
            p = _probabilities(qs, ks, block.bias, q.shape[-1])
            dp = torch.bmm(dpart, vs.transpose(1, 2)).to(exact)
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
    return part.reshape(part.shape[0] * k.shape[1], -1, x.shape[-1])


def _keys(x: Tensor, block: Block) -> Tensor:
    """Return the keys or values a block sees: [n K, s, D]."""
    return x[block.sequences, :, block.keys].flatten(0, 1)


def _like_tokens_first(q: Tensor) -> Tensor:
    """Return an empty [B, H, T, D] laid out as [B, T, H, D], which is how the next matrix product reads it."""
    batch, heads, tokens, width = q.shape
    return q.new_empty(batch, tokens, heads, width).transpose(1, 2)
