"""More experts without a jump: copies that no token chooses at first, and dense layers cut into experts.

A copy has its expert's weights and router row, and a selection bias below the range of the scores. Weights of chosen
experts do not see the bias, so the function is exactly the same at step 0. Balancing raises the bias of idle experts
and lets the copies in. Growth by copies: arXiv:2604.19835; dense to experts: arXiv:2410.07524.

Shapes: E experts, d width, i expert width.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from freehold.core.errors import ConfigError
from freehold.model.config import ModelConfig
from freehold.stages.reshape.config import GrowConfig
from freehold.stages.reshape.prune import moe_numbers


def grow(
    config: ModelConfig, state: Mapping[str, Tensor], settings: GrowConfig
) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Return a model with more experts that computes the same; a dense model's layers are cut into experts."""
    if config.num_dense_layers == config.num_hidden_layers:
        return cut_dense(config, state, settings)
    return copied(config, state, settings)


def copied(
    config: ModelConfig, state: Mapping[str, Tensor], settings: GrowConfig
) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Return a model with copies of its experts, which no token chooses before the bias has moved."""
    before, after = config.num_experts, settings.experts
    if after <= before or after % before:
        raise ConfigError(
            "a model grows to a multiple of its experts", where="experts", found=after, expected=f"{2 * before}, ..."
        )
    if settings.bias > -1.0:
        # Scores are sigmoids, between 0 and 1: a smaller step down leaves some copies above some experts.
        raise ConfigError(
            "copies would be chosen immediately", where="bias", found=settings.bias, expected="at most -1"
        )
    generator, new, times = torch.Generator().manual_seed(settings.seed), dict(state), after // before
    for number in moe_numbers(config):
        stem = f"model.layers.{number}.mlp"
        for name in ("experts.gate_up_proj", "experts.down_proj"):
            tensor = state[f"{stem}.{name}"]
            new[f"{stem}.{name}"] = tensor.repeat(times, *(1,) * (tensor.ndim - 1))  # [times E, ...]
        rows, bias = state[f"{stem}.router.gate.weight"], state[f"{stem}.expert_bias"]
        noise = torch.randn(after - before, rows.shape[1], generator=generator)
        noise *= settings.noise * rows.norm(dim=1, keepdim=True).repeat(times - 1, 1) / rows.shape[1] ** 0.5
        # Without noise a copy would stay a copy: it would get the tokens, and the gradients, of its expert.
        new[f"{stem}.router.gate.weight"] = torch.cat([rows, rows.repeat(times - 1, 1) + noise])
        # Below the lowest bias there is, since a copy of a favoured expert is favoured as well.
        low = bias.min() + settings.bias
        new[f"{stem}.expert_bias"] = torch.cat([bias, low.expand(after - before).clone()])
    return config.model_copy(update={"num_experts": after}), new


def cut_dense(
    config: ModelConfig, state: Mapping[str, Tensor], settings: GrowConfig
) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Return a model whose dense layers, but the first, are cut into experts that are all used.

    Each feed-forward of width i becomes one shared expert (its first part) and `experts` routed ones. A router without
    a preference gives each of k experts the weight route_scale / k: with route_scale = k the sum is the dense layer's.
    """
    experts, width = settings.experts, config.intermediate_size
    top_k = settings.top_k or experts
    if width % (experts + 1) or top_k != experts:
        raise ConfigError(
            "a dense layer does not divide into these experts",
            where="experts",
            found=f"{experts} routed and 1 shared of width {width}, {top_k} used",
            expected=f"experts + 1 that divides {width}, all used at first (top_k 0)",
        )
    new, each = dict(state), width // (experts + 1)
    for number in range(1, config.num_hidden_layers):
        stem = f"model.layers.{number}.mlp"
        gate, up, down = (new.pop(f"{stem}.{name}_proj.weight") for name in ("gate", "up", "down"))
        parts = [(gate[a : a + each], up[a : a + each], down[:, a : a + each]) for a in range(0, width, each)]
        for name, tensor in zip(("gate", "up", "down"), parts[0], strict=True):
            new[f"{stem}.shared_experts.{name}_proj.weight"] = tensor.contiguous()
        new[f"{stem}.experts.gate_up_proj"] = torch.stack([torch.cat([g, u]) for g, u, _ in parts[1:]])  # [E, 2i, d]
        new[f"{stem}.experts.down_proj"] = torch.stack([d for _, _, d in parts[1:]])  # [E, d, i]
        # No preference: every score is one half, every weight the same.
        new[f"{stem}.router.gate.weight"] = torch.zeros(experts, config.hidden_size)
        new[f"{stem}.expert_bias"] = torch.zeros(experts)
    shape = {
        "num_dense_layers": 1, "num_experts": experts, "num_experts_per_tok": top_k, "moe_intermediate_size": each,
        "num_shared_experts": 1, "route_scale": float(top_k),
    }  # fmt: skip
    return config.model_copy(update=shape), new
