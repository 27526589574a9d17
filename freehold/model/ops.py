"""The operations that are worth a fast form, and the one place that chooses the form.

Each has a plain form in reference.py, which its fast forms are tested against: the CPU kernels where they are
available, else PyTorch's operators put together with care (composed.py).
Fast forms are deterministic: rows are moved by permutations, never added by atomics.

Shapes: N tokens, k experts per token, R = N k rows sorted by expert, E experts, d model width, i expert width;
B sequences, T queries, S keys, H query heads, K key-value heads, D head width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from freehold.kernels import cpu, packed, routing
from freehold.kernels.packed import Packed
from freehold.model import composed, reference
from freehold.model.rows import Route

Packs = tuple[Packed, Packed]
"""Of a SwiGLU: gate with up, and down. An engine asks for packs; they serve where no gradient is wanted."""


def _native(x: Tensor, *widths: int) -> bool:
    """Return whether the CPU kernels take x [..., d]: by type and widths alone.

    Never by the number of rows: another kernel rounds in another order, and a token's bits would depend on its batch.
    """
    return cpu.available(x, *widths)


def _fused(x: Tensor) -> bool:
    """Return whether PyTorch makes one pass of several operations on x."""
    # Then the plain form is the fast one: a gradient written by hand would only hide it from the compiler.
    return x.is_cuda or torch.compiler.is_compiling()


def linear(x: Tensor, weight: Tensor, pack: Packed | None = None) -> Tensor:
    """Return x weight^T: x [..., n], weight [m, n] -> [..., m]."""
    if pack is not None and not torch.is_grad_enabled():
        return packed.linear(x, pack.words(weight), len(weight))
    if _native(x, *weight.shape):
        return cpu.linear(x, weight)
    return F.linear(x, weight)


def feed_forward(x: Tensor, gate: Tensor, up: Tensor, down: Tensor, packs: Packs | None = None) -> Tensor:
    """Return down(silu(gate(x)) * up(x)): x [..., d], gate and up [f, d], down [d, f] -> [..., d]."""
    if packs is not None and not torch.is_grad_enabled():
        # To the kernel it is one expert that takes every row.
        rows = torch.tensor([x.numel() // x.shape[-1]])
        return packed.experts(x, rows, packs[0].words(gate, up), packs[1].words(down), len(gate))
    if _native(x, *gate.shape):
        return cpu.feed_forward(x, gate, up, down)[0]
    return reference.feed_forward(x, gate, up, down)


def gated(x: Tensor, gate: Tensor) -> Tensor:
    """Return x * sigmoid(gate), elementwise."""
    return cpu.gated(x, gate) if _native(x, x.shape[-1]) else x * torch.sigmoid(gate)


def rms_norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """Return x / sqrt(mean(x^2) + eps) * gain over the last dimension, computed in fp32 or finer, in the dtype of x."""
    # Gains stay fp32 in a bf16 model; one that was cast is not for the kernel.
    if gain.dtype == torch.float32 and _native(x, x.shape[-1]):
        return cpu.norm(x, gain, eps, None, None)
    return reference.rms_norm(x, gain, eps) if _fused(x) else composed.rms_norm(x, gain, eps)


def norm_rotate(x: Tensor, gain: Tensor, eps: float, cos: Tensor, sin: Tensor) -> Tensor:
    """Normalise each head of [B, T, H, D] and rotate it by angles [B or 1, 1, T, D/2]; see `rms_norm` and `rotate`."""
    half = cos.shape[-1]
    if gain.dtype == cos.dtype == torch.float32 and _native(x, half):
        return cpu.norm(x, gain, eps, cos.reshape(-1, half), sin.reshape(-1, half))
    return rotate(rms_norm(x, gain, eps).transpose(1, 2), cos, sin).transpose(1, 2)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate [B, H, T, D] by angles [B or 1, 1, T, D/2]; dimension j is paired with j + D/2 (as Llama and NeoX do)."""
    return reference.rotate(x, cos, sin) if _fused(x) else composed.rotate(x, cos, sin)


def router_logits(x: Tensor, gate: Tensor, pack: Packed | None = None) -> Tensor:
    """Return the logits [N, E] of tokens [N, d] for a gate [E, d], in fp32 or finer whatever the weights are."""
    exact = torch.promote_types(x.dtype, torch.float32)
    if not (_native(x, x.shape[1]) and exact == torch.float32):
        return F.linear(x.to(exact), gate.to(exact))
    if pack is not None and not torch.is_grad_enabled():
        filled = -(-len(gate) // 16) * 16
        return packed.linear(x.float(), pack.words(gate), filled)[:, : len(gate)]
    # The kernels take 16 outputs at a time: experts of zeros fill the last ones, and are cut off.
    filled_gate = F.pad(gate.float(), (0, 0, 0, -len(gate) % 16))
    return cpu.linear(x.float(), filled_gate)[:, : len(gate)]


def choose(logits: Tensor, bias: Tensor, k: int, scale: float) -> tuple[Tensor, Tensor]:
    """Return weights [N, k] and experts int64 [N, k] for logits [N, E]; the best first, the lower index in a tie.

    The bias [E] decides who is chosen. Weights are the sigmoids without it, normalised over the chosen, times `scale`.
    """
    if logits.dtype == torch.float32 and cpu.available(logits):
        return routing.choose(logits, bias, k, scale)
    return reference.choose(logits, bias, k, scale)


def grouped_swiglu(x: Tensor, counts: Tensor, gate_up: Tensor, down: Tensor, packs: Packs | None = None) -> Tensor:
    """Apply to each row the SwiGLU of its expert.

    x [R, d] sorted by expert, counts [E] rows of each, gate_up [E, 2i, d], down [E, d, i] -> [R, d].
    CUDA: grouped GEMM kernels. CPU: one GEMM per expert into shared buffers.
    """
    if packs is not None and not torch.is_grad_enabled():
        gate, up = gate_up.chunk(2, dim=1)  # [E, i, d] each
        return packed.experts(x, counts, packs[0].words(gate, up), packs[1].words(down), down.shape[2])
    if x.is_cuda:
        return grouped_swiglu_gemm(x, counts, gate_up, down)
    if _native(x, *down.shape[1:]):
        return cpu.experts(x, counts, gate_up, down)[0]
    return composed.grouped_swiglu(x, counts, gate_up, down)


def grouped_swiglu_gemm(x: Tensor, counts: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Through `F.grouped_mm`, without asking the device for the counts; row strides must be multiples of 16 bytes."""
    # Where each expert's rows end: all the kernel needs, and it stays on the device.
    ends = counts.cumsum(0, dtype=torch.int32)  # [E]
    gate, up = F.grouped_mm(x, gate_up.transpose(1, 2), offs=ends).chunk(2, dim=-1)  # [R, i] each
    return F.grouped_mm(F.silu(gate) * up, down.transpose(1, 2), offs=ends)  # [R, d]


def gather(x: Tensor, path: Route) -> Tensor:
    """Return each assignment's copy of its token, sorted by expert: [N, d] -> [R, d]."""
    if _native(x, x.shape[-1]):
        return cpu.gather(x, path.token, path.inverse)
    return composed.gather(x, path)


def combine(y: Tensor, path: Route, weights: Tensor, base: Tensor) -> Tensor:
    """Return base [N, d] plus each token's results y [R, d] weighted by `weights` [N, k], summed in fp32 or finer."""
    if _native(y, y.shape[-1]) and weights.dtype == torch.float32:
        return cpu.combine(y, path.inverse, weights, base)
    return composed.combine(y, path, weights, base)
