"""Weights go into a model one after the other, so that no second copy of them is ever in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from freehold.model.afmoe import Afmoe
from freehold.model.layers import Linear, SwiGLU
from freehold.model.moe import Experts


def fill(model: Afmoe, weights: Iterable[tuple[str, Tensor]], dtype: torch.dtype, *, packed: bool = False) -> None:
    """Give a model on the meta device its weights by name, matrices in the dtype to compute in.

    packed: each matrix but the embedding and the head is packed for the CPU kernels as soon as it is complete, and only
    that form stays: about half the memory of a model that answers. Its parameters are then on the meta device, so
    that it can neither be saved nor trained.
    """
    if packed:
        model.pack()
    units = _units(model) if packed else {}
    for name, tensor in weights:
        where, _, key = name.rpartition(".")
        module = model.get_submodule(where)
        if key in module._buffers:
            module._buffers[key] = tensor  # the bias of experts is fp32, whatever the rest is
            continue
        value = tensor.to(dtype) if tensor.ndim > 1 else tensor
        module._parameters[key] = nn.Parameter(value, requires_grad=False)
        unit = units.get(name)
        if unit is not None:
            unit()


def _units(model: Afmoe) -> dict[str, Callable[[], None]]:
    """Return by name of a weight what packs its matrices once all of them are there."""
    units: dict[str, Callable[[], None]] = {}
    for name, module in model.named_modules():
        if isinstance(module, Experts):
            units |= dict.fromkeys((f"{name}.gate_up_proj", f"{name}.down_proj"), _packing_experts(module))
        elif isinstance(module, SwiGLU):
            units |= dict.fromkeys((f"{name}.{part}.weight" for part in GATED), _packing_gated(module))
        elif isinstance(module, Linear) and module is not model.lm_head:
            # A part of a SwiGLU comes after it, and is packed with it.
            units.setdefault(f"{name}.weight", _packing(module))
    return units


GATED = ("gate_proj", "up_proj", "down_proj")


def _packing_experts(module: Experts) -> Callable[[], None]:
    def pack() -> None:
        assert module.packs is not None
        if _there(module.gate_up_proj, module.down_proj):
            module.packs[0].keep_alone(*module.gate_up_proj.chunk(2, dim=1))
            module.packs[1].keep_alone(module.down_proj)
            module.gate_up_proj, module.down_proj = _shape(module.gate_up_proj), _shape(module.down_proj)

    return pack


def _packing_gated(module: SwiGLU) -> Callable[[], None]:
    def pack() -> None:
        assert module.packs is not None
        gate, up, down = (getattr(module, name) for name in GATED)
        if _there(gate.weight, up.weight, down.weight):
            module.packs[0].keep_alone(gate.weight, up.weight)
            module.packs[1].keep_alone(down.weight)
            for part in (gate, up, down):
                part.weight = _shape(part.weight)

    return pack


def _packing(module: Linear) -> Callable[[], None]:
    def pack() -> None:
        assert module.pack is not None
        module.pack.keep_alone(module.weight)
        module.weight = _shape(module.weight)

    return pack


def _there(*weights: Tensor) -> bool:
    return all(weight.device.type != "meta" for weight in weights)


def _shape(weight: Tensor) -> nn.Parameter:
    """Return a parameter that has the shape of another and no memory: to read it is an error of PyTorch."""
    return nn.Parameter(torch.empty_like(weight, device="meta"), requires_grad=False)
