"""The engine's own way through a plain model: all layers in one call of the kernels, with the bits of module by module.

Shapes: S sequences, L layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor, nn

from freehold.infer.pages import NO_PAGE, Pages
from freehold.kernels.packed import Packed
from freehold.kernels.step import Batch, LayerWeights, Plan, Result, Sizes
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
        modules = list(model.modules())
        self._plain = all(type(m) in PLAIN and "forward" not in m.__dict__ for m in modules)
        self._plain &= not any(isinstance(m, Experts) and m.gate_up_blocks is not None for m in modules)
        self._hooks = [hooks for m in modules for hooks in (m._forward_hooks, m._forward_pre_hooks)]
        self._seen: object = None
        self._plan: Plan | None = None
        self._angles = torch.empty(0), torch.empty(0)

    def takes(self) -> bool:
        """Return whether every module computes what the kernels do: none is of another kind, wrapped or observed."""
        return self._plain and not any(map(len, self._hooks))

    def run(self, parts: Sequence[tuple[Pages, Sequence[int]]], ends: Sequence[int], version: object) -> Result:
        """Read the next tokens of some sequences, whose pages were taken; `version` says which weights these are.

        ends: the rows of all of these tokens, one sequence after the other, for which the next token is drawn.
        """
        if self._plan is None or version != self._seen:
            self._plan, self._seen = _plan(self.model), version
        first, counts = [pages.length for pages, _ in parts], [len(ids) for _, ids in parts]
        positions = [range(start, start + count) for start, count in zip(first, counts, strict=True)]
        batch = Batch(
            torch.tensor([i for _, ids in parts for i in ids]),
            torch.tensor([position for each in positions for position in each]),
            torch.tensor(list(accumulate(counts, initial=0))),
            torch.tensor(first),
            torch.from_numpy(_tables([pages.table for pages, _ in parts])),
            torch.tensor(ends, dtype=torch.int64),
        )
        cos, sin = self._up_to(max(each.stop for each in positions))
        pool = parts[0][0].pool
        return self._plan.run(batch, cos, sin, pool.store, pool.small)

    def _up_to(self, length: int) -> tuple[Tensor, Tensor]:
        """Return the angles of at least this many positions, from 0."""
        if len(self._angles[0]) < length:
            config, half = self.model.config, self.model.config.head_dim // 2
            # A power of two, so that a growing answer computes them a few times only.
            positions = torch.arange(max(1024, 1 << (length - 1).bit_length()))
            cos, sin = rotary(positions, config.head_dim, config.rope_theta, torch.float32)
            self._angles = cos.reshape(-1, half), sin.reshape(-1, half)
        return self._angles


def _tables(tables: list[np.ndarray]) -> np.ndarray:
    """Return the pages of all sequences [L, S, blocks], filled up to the longest."""
    if len(tables) == 1:
        return np.ascontiguousarray(tables[0][:, None])
    found = np.full((len(tables[0]), len(tables), max(t.shape[1] for t in tables)), NO_PAGE, dtype=np.int32)
    for number, table in enumerate(tables):
        found[:, number, : table.shape[1]] = table
    return found


def _plan(model: Afmoe) -> Plan:
    config = model.config
    layers = [_layer(block, model.config.sliding_window) for block in model.model.layers.values()]
    sizes = Sizes(
        len(layers), config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim,
        config.num_experts, config.num_experts_per_tok, config.moe_intermediate_size, config.vocab_size,
        _words(model.lm_head),
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
