"""Muon: momentum, then orthogonalisation of each matrix by Newton-Schulz (Jordan et al. 2024).

Learning rate per matrix: lr * sqrt(max(1, fan_out / fan_in)) (trinity report, section 3.4). Stacked experts are
orthogonalised as a batch of matrices, never flattened into one.

Shapes: E experts, i expert width, d hidden width, n matrices of one shape.

The rates of one layer with d = 512, i = 128 and E = 8 at lr 0.02. An orthogonal matrix moves each output by about
the same amount whatever fan_in is; the factor makes up for outputs that are more than inputs.

    >>> size = torch.Size
    >>> rate_scale("o_proj.weight", size((512, 512)))  # square: 0.02
    1.0
    >>> rate_scale("experts.down_proj", size((8, 512, 128)))  # [E, d, i]: fan_out / fan_in = 4, so 0.04
    2.0
    >>> rate_scale("experts.gate_up_proj", size((8, 256, 512)))  # [E, 2i, d]: two maps of 128 outputs, so 0.02
    1.0
    >>> as_matrices("experts.gate_up_proj", torch.empty(8, 256, 512)).shape  # 2E matrices, orthogonalised alone
    torch.Size([16, 128, 512])
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from freehold.kernels import cpu

# One (a, b, c) per iteration, from the defaults of the public dion repository (trinity.md, section 4).
COEFFICIENTS = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)

# mu of the momentum buffer; the update looks ahead by one momentum step (Nesterov), as in Jordan et al. 2024.
MOMENTUM = 0.95
# Elements of a matrix from which PyTorch's CPU product of one is faster than its product of a batch.
ONE_BY_ONE_FROM = 2**17
# Elements of one shape that are orthogonalised together; it bounds the memory of a step next to its states.
BATCH_ELEMENTS = 2**24


def as_matrices(name: str, tensor: Tensor) -> Tensor:
    """View a parameter as a batch of the matrices it holds, [n, fan_out, fan_in].

    A stack [E, 2i, d] of gate and up projections holds 2E matrices, not E: gate and up are two maps.
    """
    if name.endswith("gate_up_proj"):
        experts, rows, columns = tensor.shape
        return tensor.view(experts * 2, rows // 2, columns)
    return tensor.view(math.prod(tensor.shape[:-2]), *tensor.shape[-2:])


def rate_scale(name: str, shape: torch.Size) -> float:
    """Return sqrt(max(1, fan_out / fan_in)) of the matrices in a parameter of that shape; see `as_matrices`."""
    # Gate and up are two maps in one matrix: its rows are twice the fan-out of each.
    fan_out, fan_in = shape[-2] // 2 if name.endswith("gate_up_proj") else shape[-2], shape[-1]
    return math.sqrt(max(1.0, fan_out / fan_in))


def orthogonalize(matrices: Tensor, steps: int = 5, *, in_place: bool = False) -> Tensor:
    """Return matrices near the orthogonal factor of each [n, r, c] input (singular values drawn towards 1).

    Computed in bfloat16 on the smaller side, as the published recipe does; float64 stays float64 for tests. `in_place`
    may overwrite the input. Who computes follows from the shape alone (decision 0016), so a seed keeps its bits: the
    CPU kernel where it is available, else PyTorch, as a batch, or on CPUs one by one from a size on.
    """
    x = matrices if matrices.dtype == torch.float64 else matrices.bfloat16()
    # The last ones: with fewer iterations the early, steep ones are skipped.
    coefficients = COEFFICIENTS[-steps:]
    if not len(x):  # a rank may have none
        return x
    if cpu.available(x, *x.shape[-2:]):
        # The kernel reads rows one after another.
        x = x.contiguous()
        x = x.clone() if x is matrices and not in_place else x
        cpu.orthogonalize_(x, torch.tensor(coefficients))
        return x
    # The Gram matrix of the shorter side is the smaller one.
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.transpose(-2, -1)
    if x.device.type == "cpu" and x[0].numel() >= ONE_BY_ONE_FROM:
        x = torch.cat([newton_schulz(matrix[None], coefficients) for matrix in x])
    else:
        x = newton_schulz(x, coefficients)
    # A view: the update is written with its own strides, so nothing is copied.
    return x.transpose(-2, -1) if tall else x


def newton_schulz(x: Tensor, coefficients: Sequence[tuple[float, float, float]]) -> Tensor:
    """Take the steps on all matrices [n, r, c], r <= c, as one batch: the plain form."""
    # Frobenius norm 1 bounds the largest singular value by 1, where the polynomials converge.
    x = x / (x.flatten(1).norm(dim=1).view(-1, 1, 1) + 1e-7).to(x.dtype)
    for a, b, c in coefficients:
        # Three products an iteration: X, XX^T and its square are all that is needed.
        gram = torch.bmm(x, x.transpose(-2, -1))
        gram = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, gram, x, beta=a)
    return x


class ShardedMatrices(Protocol):
    """Orthogonalises updates of which only parts may be here: the seam for sharded parameters."""

    def __call__(
        self, updates: Mapping[str, Tensor], orthogonalize: Callable[[Tensor], Tensor]
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield by name the orthogonalised part of each update [n, r, c]; the function given takes whole matrices."""
        ...


class Muon(torch.optim.Optimizer):
    """Muon over named parameters; matrices of one shape are orthogonalised together.

    The learning rate is set from outside each step through `param_groups[0]["lr"]`.
    """

    def __init__(
        self,
        named: Iterable[tuple[str, Tensor]],
        lr: float,
        steps: int = 5,
        weight_decay: float = 0.0,
        copies: Mapping[Tensor, Tensor] | None = None,
        shapes: Mapping[str, torch.Size] | None = None,
        sharded: ShardedMatrices | None = None,
    ) -> None:
        """Take named parameters; `copies`: where a parameter is wanted a second time, in another dtype.

        Where only parts of parameters are here, `shapes` are the complete ones, and `sharded` orthogonalises the parts.
        """
        named = list(named)
        self.copies, self.sharded = copies or {}, sharded
        self.shapes = shapes or {name: parameter.shape for name, parameter in named}
        for name, parameter in named:
            if parameter.ndim < 2:
                raise ValueError(f"Muon steps matrices; {name} has shape {tuple(parameter.shape)}")
        self.names = [name for name, _ in named]
        defaults: dict[str, Any] = {
            "lr": lr,
            "steps": steps,
            "weight_decay": weight_decay,
        }
        super().__init__([parameter for _, parameter in named], defaults)

    @torch.no_grad()
    def step(  # type: ignore[override]
        self, closure: None = None, scale: float | Tensor = 1.0, keep: Tensor | None = None
    ) -> None:
        """Take one step from `scale` times the gradients in `.grad`; parameters without one stay as they are.

        keep: a 0-d bool on the device; where it is False nothing changes.
        """
        for group in self.param_groups:
            named = {n: p for n, p in zip(self.names, group["params"], strict=True) if p.grad is not None}
            if self.sharded is not None:
                self._step_sharded(self.sharded, named, _Move(group, scale, keep))
                continue
            # By shape of a matrix: a batch of equal matrices is one kernel, many small ones are not.
            waiting: dict[torch.Size, list[str]] = {}
            for name, parameter in named.items():
                shape = as_matrices(name, parameter).shape[1:]
                names = waiting.setdefault(shape, [])
                names.append(name)
                if sum(named[n].numel() for n in names) >= BATCH_ELEMENTS:
                    self._step_batch({n: named[n] for n in waiting.pop(shape)}, _Move(group, scale, keep))
            for names in waiting.values():
                self._step_batch({n: named[n] for n in names}, _Move(group, scale, keep))

    def _step_sharded(self, sharded: ShardedMatrices, named: Mapping[str, Tensor], move: _Move) -> None:
        """Step parameters of which only parts are here."""
        updates = {name: _empty(as_matrices(name, p).shape, p) for name, p in named.items()}
        for name, parameter in named.items():
            self._update_momentum(parameter, updates[name], move)
        for name, update in sharded(updates, partial(orthogonalize, steps=move.group["steps"])):
            self._apply(name, named[name], update, move)

    def _step_batch(self, named: Mapping[str, Tensor], move: _Move) -> None:
        """Step some parameters whose matrices are of one shape, orthogonalised as one batch."""
        shapes = [as_matrices(name, parameter).shape for name, parameter in named.items()]
        numbers = [shape[0] for shape in shapes]
        stacked = _empty((sum(numbers), *shapes[0][1:]), next(iter(named.values())))  # [n, r, c]
        for parameter, update in zip(named.values(), stacked.split(numbers), strict=True):
            self._update_momentum(parameter, update, move)
        whole = orthogonalize(stacked, move.group["steps"], in_place=True)
        for (name, parameter), update in zip(named.items(), whole.split(numbers), strict=True):
            self._apply(name, parameter, update, move)

    def _update_momentum(self, parameter: Tensor, update: Tensor, move: _Move) -> None:
        """Move a parameter's momentum; write the matrices to orthogonalise into `update` [n, r, c]."""
        state, gradient = self.state[parameter], parameter.grad
        assert gradient is not None
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(parameter)
        momentum = state["momentum"]
        if move.on_host and update.dtype == torch.bfloat16 and cpu.available(gradient, gradient.numel()):
            cpu.muon_momentum_(momentum, gradient, update, move.scale, MOMENTUM, nesterov=True)
            return
        # The momentum is float32 whatever the gradient was computed in.
        gradient = gradient.to(momentum.dtype) * move.scale
        if move.keep is None:
            momentum.mul_(MOMENTUM).add_(gradient)
        else:  # a skipped gradient may hold NaN, which no multiplication with 0 removes
            momentum.copy_(torch.where(move.keep, momentum.mul(MOMENTUM).add_(gradient), momentum))
        # Look ahead by one momentum step (Nesterov): what the momentum will be, not what it was.
        update.copy_(gradient.add(momentum, alpha=MOMENTUM).view(update.shape))

    def _apply(self, name: str, parameter: Tensor, update: Tensor, move: _Move) -> None:
        """Move a parameter and its copy by the orthogonalised update [n, r, c]."""
        step = move.group["lr"] * rate_scale(name, self.shapes[name])
        # Decoupled: decay does not pass through the orthogonalisation.
        decay, copy = 1 - move.group["lr"] * move.group["weight_decay"], self.copies.get(parameter)
        written = update if copy is None else copy
        kernel = all(cpu.available(t, t.numel()) for t in (update, written))
        if move.on_host and parameter.dtype == torch.float32 and kernel:
            cpu.muon_move_(parameter, update.contiguous(), copy, step, decay)
            return
        # A view: the parameter itself is moved.
        matrices = as_matrices(name, parameter)
        if move.keep is None:
            matrices.mul_(decay).add_(update, alpha=-step)
        else:
            matrices.copy_(torch.where(move.keep, matrices.mul(decay).add_(update, alpha=-step), matrices))
        if copy is not None:
            copy.copy_(parameter)


class _Move(NamedTuple):
    """How one step moves every parameter of a group."""

    group: dict[str, Any]
    scale: float | Tensor
    keep: Tensor | None

    @property
    def on_host(self) -> bool:
        """Return whether scale and decision are known on the host: the CPU kernels take numbers."""
        return self.keep is None and not isinstance(self.scale, Tensor)


def _empty(shape: Iterable[int], parameter: Tensor) -> Tensor:
    """Return room for updates in the precision they are orthogonalised in."""
    return parameter.new_empty(*shape, dtype=torch.float64 if parameter.dtype == torch.float64 else torch.bfloat16)
