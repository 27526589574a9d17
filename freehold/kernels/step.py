"""The forward pass of answering as one call, for weights packed once; the bits are those of kernel after kernel.

No gradients. Shapes: N tokens, S sequences, B rows to draw for, L layers, d hidden width, D head width, V vocabulary,
P positions.
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
    vocab: int
    head: Tensor
    """Packed"""
    embedding_scale: float
    route_scale: float
    eps: float
    attention_scale: float


class Batch(NamedTuple):
    """The new tokens of S sequences, one sequence after the other; the rest as in `packed.attention`."""

    ids: Tensor
    """int64 [N]"""
    positions: Tensor
    """int64 [N]"""
    offsets: Tensor
    first: Tensor
    tables: Tensor
    """int32 [L, S, blocks]"""
    ends: Tensor
    """int64 [B]: the rows whose next token is drawn"""


class Result(NamedTuple):
    """What one pass found."""

    hidden: Tensor
    """[N, d]: what the head is applied to"""
    logits: Tensor
    """[B, V]"""
    partition: Tensor
    """fp32 [B]: log(sum(exp(logits)))"""


class Plan:
    """The weights of one version of a model, as addresses; holds them."""

    def __init__(self, sizes: Sizes, layers: Sequence[LayerWeights], embedding: Tensor, gain: Tensor) -> None:
        self.sizes, self.layers, self.embedding, self.gain = sizes, layers, embedding, gain
        numbers = [value.data_ptr() if isinstance(value, Tensor) else value for value in sizes]
        # Ten integers and four doubles, then a row of addresses for each layer: as C++ reads them.
        self._sizes = torch.frombuffer(bytearray(struct.pack("10q4d", *numbers)), dtype=torch.int64)
        rows = [[w.data_ptr() if isinstance(w, Tensor) else int(w or 0) for w in layer] for layer in layers]
        self._layers = torch.tensor(rows, dtype=torch.int64)

    def run(self, batch: Batch, cos: Tensor, sin: Tensor, store: Tensor, small: bool) -> Result:
        """Read a batch; cos and sin fp32 [P, D/2] are angles, `store` holds the pages; small: with 8 bits a value."""
        sizes, rows, draws = self.sizes, len(batch.ids), len(batch.ends)
        new = self.embedding.new_empty
        out, picked, logits = new(rows, sizes.width), new(draws, sizes.width), new(draws, sizes.vocab)
        partition = new(draws, dtype=torch.float32)
        call(
            "step", out, self._sizes, self._layers, batch.ids, batch.positions, self.embedding, cos, sin, batch.offsets,
            batch.first, batch.tables, batch.tables.shape[2], store, small, self.gain, out, rows, len(batch.first),
            batch.ends, draws, picked, logits, partition,
        )  # fmt: skip
        return Result(out, logits, partition)
