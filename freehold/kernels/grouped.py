"""Grouped maps with adapter factors: y = x W^T + u B^T for rows sorted by group, from weights that may be in blocks.

Weights are numbers, words packed once, or blocks of a GGUF type that are unpacked stretch by stretch inside the
product: no copy of a stack ever exists. Where the CPU kernels are missing PyTorch's operators do the same.

Shapes: G groups, R rows sorted by group, n inputs, m outputs, r rank (filled with zeros up to a multiple of 16).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from freehold.kernels import cpu, quantize
from freehold.kernels.cpu import call

PLAIN, WORDS = 0, 1
FORMS = {"Q4_0": 2, "Q8_0": 3, "Q4_K": 4, "NF4": 5}
"""Block types that the kernels multiply from, by their numbers in cpu.cpp."""
NF4_VALUES, NF4_BYTES = 64, 34
"""Values and bytes of a block of NF4: an fp16 scale, then 32 bytes of two levels each."""
# Quantiles of a normal distribution (Dettmers et al. 2023, appendix E), as in cpu.cpp.
NF4_LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


@dataclass(frozen=True)
class Weights:
    """A stack of maps [stacks, m, n], one for `share` groups that follow each other."""

    data: Tensor
    """[stacks, m, n] in the dtype to compute in, packed words, or uint8 [stacks, m, bytes of a row]"""
    outs: int
    ins: int
    form: int = PLAIN
    share: int = 1

    @classmethod
    def of(cls, data: Tensor, share: int = 1) -> Weights:
        """Return plain weights: [stacks, m, n], or one matrix [m, n]."""
        stack = data if data.ndim == 3 else data[None]
        return cls(stack, stack.shape[1], stack.shape[2], PLAIN, share)

    def shared(self, share: int) -> Weights:
        """Return the same weights, each for `share` groups."""
        return Weights(self.data, self.outs, self.ins, self.form, share)

    def matrix(self, stack: int, dtype: torch.dtype) -> Tensor:
        """Return one map [m, n] as numbers."""
        return self.data[stack] if self.form == PLAIN else unpack(self, dtype, stack)[0]


def block_bytes(kind: str, width: int) -> int:
    """Return the bytes of a row of `width` numbers; ValueError when it is no whole number of blocks."""
    values, size = (NF4_VALUES, NF4_BYTES) if kind == "NF4" else _sizes(kind)
    if width % values:
        raise ValueError(f"{kind} needs rows of whole {values}s, not of {width}")
    return width // values * size


def _sizes(kind: str) -> tuple[int, int]:
    return quantize.TYPES[kind].values, quantize.TYPES[kind].bytes


@torch.no_grad()
def pack(kind: str, weights: Tensor) -> Weights:
    """Return weights [stacks, m, n] as blocks of a type; ValueError for a width that does not fit.

    Q4_0, Q8_0 and Q4_K are bit for bit those of a GGUF file. One stack at a time is in float32.
    """
    stacks, outs, ins = weights.shape
    data = torch.empty(stacks, outs, block_bytes(kind, ins), dtype=torch.uint8)
    for stack, weight in enumerate(weights):
        rows = weight.detach().float()
        data[stack] = _nf4(rows) if kind == "NF4" else torch.from_numpy(quantize.quantize(kind, rows.numpy()))
    return Weights(data, outs, ins, FORMS[kind])


def _nf4(rows: Tensor) -> Tensor:
    """Return rows [m, n] as NF4: of each 64 the largest magnitude as fp16, and the nearest of 16 levels."""
    blocks = rows.reshape(len(rows), -1, NF4_VALUES)  # [m, n / 64, 64]
    scale = blocks.abs().amax(-1, keepdim=True).half()
    exact = scale.float()
    shares = torch.where(exact > 0, blocks / exact, torch.zeros_like(blocks))
    levels = torch.tensor(NF4_LEVELS)
    number = torch.bucketize(shares, (levels[1:] + levels[:-1]) / 2).to(torch.uint8)
    packed = number[..., :32] | (number[..., 32:] << 4)
    raw = torch.from_numpy(scale.numpy().view(np.uint8).copy()).view(*scale.shape[:2], 2)
    return torch.cat([raw, packed], -1).reshape(len(rows), -1)


@torch.no_grad()
def unpack(weights: Weights, dtype: torch.dtype, stack: int | None = None) -> Tensor:
    """Return blocks as numbers [stacks, m, n] (one stack: [1, m, n]), rounded once to `dtype`."""
    data = weights.data if stack is None else weights.data[stack : stack + 1]
    out = torch.empty(len(data), weights.outs, weights.ins, dtype=torch.float32)
    if cpu.available(out):
        call("unpack", out, data.contiguous(), weights.form, out, len(data) * weights.outs, weights.ins)
    else:
        kind = next(kind for kind, form in FORMS.items() if form == weights.form)
        out = _unpack_plain(kind, data).view_as(out)
    return out.to(dtype)


def _unpack_plain(kind: str, data: Tensor) -> Tensor:
    if kind != "NF4":
        return torch.from_numpy(_dequantized(kind, data.numpy()))
    blocks = data.reshape(-1, NF4_BYTES)
    scale = torch.from_numpy(blocks[:, :2].contiguous().numpy().view(np.float16).astype(np.float32))
    numbers = torch.cat([blocks[:, 2:] & 15, blocks[:, 2:] >> 4], -1).long()
    return torch.tensor(NF4_LEVELS)[numbers] * scale


def _dequantized(kind: str, data: np.ndarray) -> np.ndarray:
    values, size = _sizes(kind)
    blocks = data.reshape(-1, size)
    scale = np.ascontiguousarray(blocks[:, :2]).view(np.float16).astype(np.float32)
    if kind == "Q8_0":
        return np.ascontiguousarray(blocks[:, 2:]).view(np.int8).astype(np.float32) * scale
    if kind == "Q4_0":
        q = blocks[:, 2:]
        return (np.concatenate([q & 15, q >> 4], 1).astype(np.float32) - 8) * scale
    low = np.ascontiguousarray(blocks[:, 2:4]).view(np.float16).astype(np.float32)
    q = blocks[:, 4:16].astype(np.int32)
    steps = np.concatenate([q[:, :4] & 63, (q[:, 8:] & 15) | (q[:, :4] >> 6 << 4)], 1)
    lows = np.concatenate([q[:, 4:8] & 63, (q[:, 8:] >> 4) | (q[:, 4:8] >> 6 << 4)], 1)
    pairs = blocks[:, 16:].reshape(-1, 4, 1, 32)
    levels = np.concatenate([pairs & 15, pairs >> 4], 2).reshape(-1, 8, 32).astype(np.float32)
    return (levels * (scale * steps)[:, :, None] - (low * lows)[:, :, None]).reshape(-1, values).astype(np.float32)


# --- products ----------------------------------------------------------------------------------------------------


def product(x: Tensor, counts: Tensor, w: Weights, u: Tensor | None = None, b: Tensor | None = None) -> Tensor:
    """Return x W^T + u B^T [R, m]: x [R, n], counts int64 [G], u [R, r] and b [G, m, r] or neither."""
    x = x.contiguous()
    y = x.new_empty(len(x), w.outs)
    if _native(x, w):
        rank = 0 if b is None else b.shape[2]
        call("grouped", x, x, counts, len(counts), w.share, w.data, w.form, u, b, rank, y, w.ins, w.outs)
        return y
    for group, rows in _runs(counts):
        torch.mm(x[rows], w.matrix(group // w.share, x.dtype).t(), out=y[rows])
        if u is not None and b is not None:
            y[rows] += u[rows] @ b[group].t()
    return y


def input_gradient(dy: Tensor, counts: Tensor, w: Weights, du: Tensor | None = None, a: Tensor | None = None) -> Tensor:
    """Return dy W + du A [R, n]: dy [R, m], du [R, r] and a [G, r, n] or neither."""
    dy = dy.contiguous()
    dx = dy.new_empty(len(dy), w.ins)
    if _native(dy, w):
        rank = 0 if a is None else a.shape[1]
        stack = w.share, w.data, w.form
        call("grouped_input_gradient", dy, dy, counts, len(counts), *stack, du, a, rank, dx, w.ins, w.outs)
        return dx
    for group, rows in _runs(counts):
        torch.mm(dy[rows], w.matrix(group // w.share, dy.dtype), out=dx[rows])
        if du is not None and a is not None:
            dx[rows] += du[rows] @ a[group]
    return dx


def weight_gradient(dy: Tensor, x: Tensor, counts: Tensor) -> Tensor:
    """Return dy^T x of each group, [G, m, n]: dy [R, m], x [R, n]; zero for a group without rows."""
    dy, x = dy.contiguous(), x.contiguous()
    outs, ins = dy.shape[1], x.shape[1]
    dw = x.new_empty(len(counts), outs, ins)
    if cpu.available(x, outs, ins):
        call("grouped_weight_gradient", x, dy, x, counts, len(counts), dw, ins, outs)
        return dw
    dw.zero_()
    for group, rows in _runs(counts):
        torch.mm(dy[rows].t(), x[rows], out=dw[group])
    return dw


def silu(both: Tensor) -> Tensor:
    """Multiply up by silu of gate, for both = gate | up: [R, 2i] -> [R, i]."""
    both = both.contiguous()
    gate, up = both.chunk(2, dim=-1)
    if not cpu.available(both, gate.shape[-1]):
        return torch.nn.functional.silu(gate).mul_(up)
    out = both.new_empty(gate.shape)
    call("silu", both, both, out, len(both), gate.shape[-1])
    return out


def silu_gradient(dproduct: Tensor, both: Tensor) -> Tensor:
    """Return the gradient of gate | up [R, 2i] for that of their product [R, i]."""
    dproduct = dproduct.contiguous()
    gate, up = both.chunk(2, dim=-1)
    dboth = torch.empty_like(both)
    if cpu.available(both, gate.shape[-1]):
        call("silu_gradient", both, dproduct, both, dboth, len(both), gate.shape[-1])
        return dboth
    torch.mul(dproduct, torch.nn.functional.silu(gate), out=dboth[:, gate.shape[1] :])
    torch.ops.aten.silu_backward.grad_input(dproduct * up, gate, grad_input=dboth[:, : gate.shape[1]])
    return dboth


def _native(x: Tensor, w: Weights) -> bool:
    # Never by the number of rows: a token's bits would depend on its batch.
    return cpu.available(x, w.ins, w.outs)


def _runs(counts: Tensor) -> Iterator[tuple[int, slice]]:
    at = 0
    for group, count in enumerate(counts.tolist()):
        if count:
            yield group, slice(at, at + count)
        at += count
