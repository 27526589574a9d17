"""The forward pass of answering as one call, for weights packed once; the bits are those of kernel after kernel.

No gradients. Shapes: N tokens, S sequences, L layers, d hidden width, D head width.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from freehold.kernels.cpu import call


class LayerWeights(NamedTuple):
    """What one layer reads, in the order of `Layer` in step.cpp: gains and bias fp32, matrices packed.

    A dense layer has no router, experts and bias; its feed-forward takes the place of the shared expert.
    """

    input_norm: Tensor
    q_norm: Tensor
    k_norm: Tensor
    post_attention_norm: Tensor
    pre_mlp_norm: Tensor
    post_mlp_norm: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    gate: Tensor
    o: Tensor
    router: Tensor | None
    gate_up: Tensor | None
    down: Tensor | None
    shared_gate_up: Tensor
    shared_down: Tensor
    bias: Tensor | None
    shared_inner: int
    window: int
    """0: all keys"""
    rotates: bool


class Sizes(NamedTuple):
    """What all layers share, in the order of `Model` in step.cpp."""

    layers: int
    width: int
    heads: int
    groups: int
    head_width: int
    experts: int
    chosen: int
    inner: int
    embedding_scale: float
    route_scale: float
    eps: float
    attention_scale: float


class Plan:
    """The weights of one version of a model, as addresses; holds them."""

    def __init__(self, sizes: Sizes, layers: Sequence[LayerWeights], embedding: Tensor, gain: Tensor) -> None:
        self.sizes, self.layers, self.embedding, self.gain = sizes, layers, embedding, gain
        # Eight integers and four doubles, then a row of addresses for each layer: as C++ reads them.
        self._sizes = torch.frombuffer(bytearray(struct.pack("8q4d", *sizes)), dtype=torch.int64)
        rows = [[w.data_ptr() if isinstance(w, Tensor) else int(w or 0) for w in layer] for layer in layers]
        self._layers = torch.tensor(rows, dtype=torch.int64)

    def run(
        self, ids: Tensor, cos: Tensor, sin: Tensor, offsets: Tensor, first: Tensor, tables: Tensor, store: Tensor
    ) -> Tensor:
        """Return what the head is applied to, [N, d], for ids int64 [N] with angles cos and sin fp32 [N, D/2].

        The tokens are those of S sequences, `tables` int32 [L, S, blocks]; the rest as in `packed.attention`.
        """
        out = self.embedding.new_empty(len(ids), self.sizes.width)
        call(
            "step", out, self._sizes, self._layers, ids, self.embedding, cos, sin, offsets, first, tables,
            tables.shape[2], store, self.gain, out, len(ids), len(first),
        )  # fmt: skip
        return out
