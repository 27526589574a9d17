"""The engine's own way through a plain model: all layers in one call of the kernels, with the bits of module by module.

Shapes: N tokens of one forward pass, d hidden width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from freehold.infer.cache import Step
from freehold.kernels.packed import Packed
from freehold.kernels.step import LayerWeights, Plan, Sizes
from freehold.model.afmoe import Afmoe, Block, Trunk
from freehold.model.attention import Attention
from freehold.model.layers import Embedding, Linear, RMSNorm, SwiGLU, rotary
from freehold.model.moe import Experts, MoE, Router

PLAIN = {Afmoe, Trunk, Block, Attention, Linear, RMSNorm, SwiGLU, Embedding, MoE, Experts, Router, nn.ModuleDict}
"""Modules whose forward pass the kernels repeat; a model with any other runs module by module."""


class Fused:
    """Runs a packed model; plans again when the weights have changed."""

    def __init__(self, model: Afmoe) -> None:
        self.model = model
        self._modules = list(model.modules())
        self._seen: object = None
        self._plan: Plan | None = None

    def takes(self) -> bool:
        """Return whether every module still computes what the kernels do: none replaced, wrapped or observed."""
        return all(
            type(m) in PLAIN and not m._forward_hooks and not m._forward_pre_hooks and "forward" not in m.__dict__
            for m in self._modules
        )

    def hidden(self, ids: Sequence[int], cache: Step, version: object) -> Tensor:
        """Return what the head is applied to, [N, d]; `version` says which weights these are."""
        if self._plan is None or version != self._seen:
            self._plan, self._seen = _plan(self.model), version
        config = self.model.config
        cos, sin = rotary(cache.positions, config.head_dim, config.rope_theta, torch.float32)
        half = config.head_dim // 2
        return self._plan.run(
            torch.tensor(ids), cos.view(-1, half), sin.view(-1, half), cache.offsets, cache.first, cache.tables,
            cache.pool.store,
        )  # fmt: skip


def _plan(model: Afmoe) -> Plan:
    config = model.config
    layers = [_layer(block, model.config.sliding_window) for block in model.model.layers.values()]
    sizes = Sizes(
        len(layers), config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim,
        config.num_experts, config.num_experts_per_tok, config.moe_intermediate_size,
        config.hidden_size**0.5 if config.mup_enabled else 1.0, config.route_scale, config.rms_norm_eps,
        config.head_dim**-0.5,
    )  # fmt: skip
    return Plan(sizes, layers, model.model.embed_tokens.weight, model.model.norm.weight)


def _words(linear: Linear) -> Tensor:
    assert isinstance(linear.pack, Packed)
    return linear.pack.words(linear.weight)


def _layer(block: nn.Module, window: int) -> LayerWeights:
    assert isinstance(block, Block)
    own, mlp = block.self_attn, block.mlp
    sliding = own.kind == "sliding_attention"
    shared = mlp.shared_experts if isinstance(mlp, MoE) else mlp
    assert shared.packs is not None
    router = gate_up = down = bias = None
    if isinstance(mlp, MoE):
        assert mlp.experts.packs is not None
        router, bias = _words(mlp.router.gate), mlp.expert_bias
        gate_up = mlp.experts.packs[0].words(*mlp.experts.gate_up_proj.chunk(2, dim=1))
        down = mlp.experts.packs[1].words(mlp.experts.down_proj)
    return LayerWeights(
        block.input_layernorm.weight, own.q_norm.weight, own.k_norm.weight, block.post_attention_layernorm.weight,
        block.pre_mlp_layernorm.weight, block.post_mlp_layernorm.weight, _words(own.q_proj), _words(own.k_proj),
        _words(own.v_proj), _words(own.gate_proj), _words(own.o_proj), router, gate_up, down,
        shared.packs[0].words(shared.gate_proj.weight, shared.up_proj.weight),
        shared.packs[1].words(shared.down_proj.weight), bias, len(shared.gate_proj.weight),
        window if sliding else 0, sliding,
    )  # fmt: skip
