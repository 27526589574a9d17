"""Muon: momentum, then orthogonalisation of each matrix by Newton-Schulz (Jordan et al. 2024).

Learning rate per matrix: lr * sqrt(max(1, fan_out / fan_in)) (trinity report, section 3.4). Stacked experts are
orthogonalised as a batch of matrices, never flattened into one.

Shapes: E experts, i expert width, d hidden width, n matrices of one shape.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol

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
    return tensor.view(math.prod(tensor.shape[:-2]), *tensor.shape[-2:])


def lr_scale(name: str, shape: torch.Size) -> float:
    """Return sqrt(max(1, fan_out / fan_in)) of the matrices in a parameter of that shape; see `as_matrices`."""
    fan_out, fan_in = shape[-2] // 2 if name.endswith("gate_up_proj") else shape[-2], shape[-1]
    return math.sqrt(max(1.0, fan_out / fan_in))


def orthogonalize(matrices: Tensor, steps: int = 5) -> Tensor:
    """Return matrices near the orthogonal factor of each [n, r, c] input (singular values drawn towards 1).

    Computed in bfloat16 on the smaller side, as the published recipe does; float64 stays float64 for tests.
    """
    x = matrices if matrices.dtype == torch.float64 else matrices.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.transpose(-2, -1)
    coefficients = COEFFICIENTS[-steps:] if steps < len(COEFFICIENTS) else COEFFICIENTS
    if len(x) >= torch.get_num_threads() and native.available(x, *x.shape[-2:]):
        x = x.contiguous() if tall or x.data_ptr() != matrices.data_ptr() else x.clone()
        native.orthogonalize_(x, torch.tensor(coefficients))
        return x.transpose(-2, -1) if tall else x
    x = x / (x.flatten(1).norm(dim=1).view(-1, 1, 1) + 1e-7).to(x.dtype)
    for a, b, c in coefficients:
        gram = torch.bmm(x, x.transpose(-2, -1))
        gram = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, gram, x, beta=a)
    return x.transpose(-2, -1) if tall else x


def orthogonalize_all(updates: Mapping[str, Tensor], steps: int = 5) -> Iterator[tuple[str, Tensor]]:
    """Yield the matrices of each update (see `as_matrices`), orthogonalised; those of one shape go in one batch."""
    batches: dict[tuple[int, int], list[tuple[str, Tensor]]] = {}
    for name, update in updates.items():
        matrices = as_matrices(name, update)
        batches.setdefault((matrices.shape[1], matrices.shape[2]), []).append((name, matrices))
    for items in batches.values():
        stacked = torch.cat([m.to(torch.bfloat16) if m.dtype != torch.float64 else m for _, m in items])
        whole = orthogonalize(stacked, steps)
        yield from zip([name for name, _ in items], whole.split([len(m) for _, m in items]), strict=True)


class Together(Protocol):
    """Orthogonalises updates of which only parts may be here: the seam for sharded parameters."""

    def __call__(
        self, updates: Mapping[str, Tensor], steps: int, orthogonalize: Callable[..., Iterator[tuple[str, Tensor]]]
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield the part of each update by name, as `as_matrices` views it; the function given takes whole updates."""
        ...


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
        shapes: Mapping[str, torch.Size] | None = None,
        together: Together | None = None,
    ) -> None:
        """Take named parameters; `copies`: where a parameter is wanted a second time, in another dtype.

        Where only parts of parameters are here, `shapes` are those of the whole, and `together` orthogonalises them.
        """
        named = list(named)
        self.copies, self.together = copies or {}, together
        self.shapes = shapes or {name: parameter.shape for name, parameter in named}
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
            weights, updates = dict(zip(self.names, group["params"], strict=True)), {}
            for name, parameter in weights.items():
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(parameter)
                momentum = state["momentum"]
                gradient = parameter.grad.to(momentum.dtype)
                gradient = gradient * scale if scale != 1 else gradient
                momentum.mul_(group["momentum"]).add_(gradient)
                updates[name] = gradient.add(momentum, alpha=group["momentum"]) if group["nesterov"] else momentum
            if self.together is not None:
                directions = self.together(updates, group["steps"], orthogonalize_all)
            else:
                directions = orthogonalize_all(updates, group["steps"])
            for name, direction in directions:
                if group["weight_decay"]:
                    weights[name].mul_(1 - group["lr"] * group["weight_decay"])
                matrices = as_matrices(name, weights[name])
                matrices.add_(direction, alpha=-group["lr"] * lr_scale(name, self.shapes[name]))
            for parameter in group["params"]:
                if parameter.grad is not None and parameter in self.copies:
                    self.copies[parameter].copy_(parameter)
