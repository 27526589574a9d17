"""Muon: momentum, then orthogonalisation of each matrix by Newton-Schulz (Jordan et al. 2024).

Learning rate per matrix: lr * sqrt(max(1, fan_out / fan_in)) (trinity report, section 3.4). Stacked experts are
orthogonalised as a batch of matrices, never flattened into one.

Shapes: E experts, i expert width, d hidden width, n matrices of one shape.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from freehold.kernels import native

# One (a, b, c) per iteration, from the defaults of the public dion repository (trinity.md, section 4).
COEFFICIENTS = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)


def as_matrices(name: str, tensor: Tensor) -> Tensor:
    """View a parameter as a batch of the matrices it holds, [n, fan_out, fan_in].

    A stack [E, 2i, d] of gate and up projections holds 2E matrices, not E: gate and up are two maps.
    """
    if name.endswith("gate_up_proj"):
        experts, rows, columns = tensor.shape
        return tensor.view(experts * 2, rows // 2, columns)
    return tensor.view(-1, *tensor.shape[-2:])


def orthogonalize(matrices: Tensor, steps: int = 5) -> Tensor:
    """Return matrices near the orthogonal factor of each [n, r, c] input (singular values drawn towards 1).

    Computed in bfloat16 on the smaller side, as the published recipe does; float64 stays float64 for tests.
    """
    x = matrices if matrices.dtype == torch.float64 else matrices.bfloat16()
    coefficients = COEFFICIENTS[-steps:] if steps < len(COEFFICIENTS) else COEFFICIENTS
    if len(x) >= torch.get_num_threads() and native.available(x, *x.shape[-2:]):
        x = x.clone(memory_format=torch.contiguous_format) if x is matrices else x.contiguous()
        native.orthogonalize_(x, torch.tensor(coefficients))
        return x
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.transpose(-2, -1)
    x = x / (x.flatten(1).norm(dim=1).view(-1, 1, 1) + 1e-7).to(x.dtype)
    for a, b, c in coefficients:
        gram = torch.bmm(x, x.transpose(-2, -1))
        gram = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, gram, x, beta=a)
    return x.transpose(-2, -1) if tall else x


class Muon(torch.optim.Optimizer):
    """Muon over named parameters; matrices of one shape are orthogonalised in one batch.

    The learning rate is set from outside each step through `param_groups[0]["lr"]`.
    """

    def __init__(
        self,
        named: Iterable[tuple[str, Tensor]],
        lr: float,
        momentum: float = 0.95,
        nesterov: bool = True,
        steps: int = 5,
        weight_decay: float = 0.0,
        copies: Mapping[Tensor, Tensor] | None = None,
    ) -> None:
        """Take named parameters; `copies`: where a parameter is wanted a second time, in another dtype."""
        named = list(named)
        self.copies = copies or {}
        for name, parameter in named:
            if parameter.ndim < 2:
                raise ValueError(f"Muon steps matrices; {name} has shape {tuple(parameter.shape)}")
        self.names = [name for name, _ in named]
        defaults: dict[str, Any] = {
            "lr": lr,
            "momentum": momentum,
            "nesterov": nesterov,
            "steps": steps,
            "weight_decay": weight_decay,
        }
        super().__init__([parameter for _, parameter in named], defaults)

    @torch.no_grad()
    def step(self, closure: None = None, scale: float = 1.0) -> None:  # type: ignore[override]
        """Take one step from `scale` times the gradients in `.grad`; parameters without one are left alone."""
        for group in self.param_groups:
            batches: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = {}
            for name, parameter in zip(self.names, group["params"], strict=True):
                if parameter.grad is not None:
                    matrices = as_matrices(name, parameter)
                    batches.setdefault((matrices.shape[1], matrices.shape[2]), []).append((parameter, matrices))
            for (fan_out, fan_in), items in batches.items():
                step = group["lr"] * math.sqrt(max(1.0, fan_out / fan_in))
                decay = 1 - group["lr"] * group["weight_decay"]
                numbers = [len(matrices) for _, matrices in items]
                dtype = torch.float64 if items[0][0].dtype == torch.float64 else torch.bfloat16
                stacked = items[0][0].new_empty(sum(numbers), fan_out, fan_in, dtype=dtype)
                for (parameter, matrices), update in zip(items, stacked.split(numbers), strict=True):
                    self._momentum(parameter, update, matrices.shape, group, scale)
                whole = orthogonalize(stacked, group["steps"])
                for (parameter, matrices), update in zip(items, whole.split(numbers), strict=True):
                    copy = self.copies.get(parameter)
                    written = update if copy is None else copy
                    if parameter.dtype == torch.float32 and all(
                        native.available(t, t.numel()) for t in (update, written)
                    ):
                        native.muon_move_(parameter, update.contiguous(), copy, step, decay)
                        continue
                    matrices.mul_(decay).add_(update, alpha=-step)
                    if copy is not None:
                        copy.copy_(parameter)

    def _momentum(
        self, parameter: Tensor, update: Tensor, shape: torch.Size, group: dict[str, Any], scale: float
    ) -> None:
        """Move a parameter's momentum and write what is to be orthogonalised to `update`."""
        state, gradient, decay = self.state[parameter], parameter.grad, group["momentum"]
        assert gradient is not None
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(parameter)
        momentum = state["momentum"]
        if update.dtype == torch.bfloat16 and native.available(gradient, gradient.numel()):
            native.muon_momentum_(momentum, gradient, update, scale, decay, group["nesterov"])
            return
        gradient = gradient.to(momentum.dtype) * scale
        momentum.mul_(decay).add_(gradient)
        moved = gradient.add(momentum, alpha=decay) if group["nesterov"] else momentum
        update.copy_(moved.view(shape))
