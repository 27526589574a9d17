"""A model with low-rank factors: where they can be, putting them there, running without them, experts in blocks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from freehold.core.errors import ConfigError
from freehold.kernels.grouped import Weights
from freehold.model.afmoe import Afmoe
from freehold.model.groups import LINEAR, STACKS
from freehold.model.lora import Factors


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
