"""Low-rank factors on any matrix of a model: y = W x + s B A x (LoRA, Hu et al. 2021), on stacked experts too.

The base is frozen and may be in blocks of four bits; the factors are one more stretch of the same sum, so factors of
zeros change no bit. Several adapters may share a model: rows are then sorted by adapter.

Shapes: R rows, n inputs, m outputs, r rank, E experts, S adapters that share a map, N tokens, k experts per token.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from freehold.core.errors import ConfigError
from freehold.kernels import grouped
from freehold.kernels.grouped import Weights
from freehold.model.groups import LINEAR, STACKS

if TYPE_CHECKING:
    from freehold.model.afmoe import Afmoe

RANK_MULTIPLE = 16
"""What the kernels take: smaller ranks are filled with zeros, which get no gradient and stay zeros."""


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


# --- a model with factors --------------------------------------------------------------------------------------------


def sites(model: Afmoe) -> Iterator[tuple[str, str, nn.Module, str]]:
    """Yield every place that may have factors: group, name of the matrix, its module, the attribute for the factors."""
    for name, layer in model.model.layers.items():
        for group, path in LINEAR.items():
            # The routed experts of an MoE layer are no dense matrices, and a dense layer has no router.
            found = _submodule(layer, path)
            if isinstance(found, nn.Linear):
                yield group, f"model.layers.{name}.{path}", found, "factors"
        stack = _submodule(layer, "mlp.experts")
        if stack is not None:
            for group, attribute in STACKS.items():
                yield group, f"model.layers.{name}.mlp.experts.{attribute}", stack, f"factors_{attribute}"


def _submodule(module: nn.Module, path: str) -> nn.Module | None:
    found: Any = module
    for part in path.split("."):
        found = getattr(found, part, None)
    return found if isinstance(found, nn.Module) else None


def shape_of(module: nn.Module, attribute: str) -> tuple[int, int, int]:
    """Return stacks, outputs and inputs of the matrix at a place."""
    if attribute == "factors":
        outs, ins = module.weight.shape  # type: ignore[misc]
        return 1, int(outs), int(ins)
    name = attribute.removeprefix("factors_")
    blocks: Weights | None = getattr(module, f"{name.removesuffix('_proj')}_blocks")
    if blocks is not None:
        return len(blocks.data), blocks.outs, blocks.ins
    stacks, outs, ins = getattr(module, name).shape
    return int(stacks), int(outs), int(ins)


def attach(model: Afmoe, ranks: Mapping[str, int], alpha: float, generator: torch.Generator) -> dict[str, Factors]:
    """Freeze a model and give the matrices of some groups factors of these ranks; return them by name.

    ConfigError for a rank larger than the matrix, and for a group that this model does not have.
    """
    model.requires_grad_(False)
    found: dict[str, Factors] = {}
    seen = set()
    for group, name, module, attribute in sites(model):
        if group not in ranks:
            continue
        stacks, outs, ins = shape_of(module, attribute)
        if ranks[group] > min(outs, ins):
            raise ConfigError(
                "the rank is larger than the matrix",
                where=f"{group}: {name}",
                found=f"rank {ranks[group]}",
                expected=f"at most {min(outs, ins)}, the smaller side of {outs} x {ins}",
                todo="lower adapt.rank",
            )
        factors = Factors(stacks, outs, ins, ranks[group], alpha)
        factors.init_weights(generator)
        setattr(module, attribute, factors)
        found[name] = factors
        seen.add(group)
    if missing := sorted(set(ranks) - seen):
        raise ConfigError(
            "the model has no matrix of this group", where="adapt.groups", found=", ".join(missing), expected="fewer"
        )
    return found


def attached(model: Afmoe) -> dict[str, Factors]:
    """Return the factors of a model by the name of their matrix."""
    found = {}
    for _, name, module, attribute in sites(model):
        factors = getattr(module, attribute)
        if factors is not None:
            found[name] = factors
    return found


@contextlib.contextmanager
def disabled(model: Afmoe) -> Iterator[None]:
    """Run the base: inside, no factor counts."""
    factors = list(attached(model).values())
    before = [each.enabled for each in factors]
    for each in factors:
        each.enabled = False
    try:
        yield
    finally:
        for each, was in zip(factors, before, strict=True):
            each.enabled = was


@torch.no_grad()
def quantize_experts(model: Afmoe, kind: str) -> None:
    """Keep the routed experts of a model as blocks of a type, layer by layer: the numbers are freed."""
    for layer in model.moe_layers().values():
        layer.experts.quantize(kind)
