"""What runs the model for the engine: in one call of the kernels where it can, else module by module, same bits.

Shapes: N tokens of one forward pass, B rows that draw, d hidden width, V vocabulary.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from freehold.infer.cache import Step
from freehold.infer.fused import Fused
from freehold.infer.pages import PagePool, Pages
from freehold.kernels import cpu
from freehold.kernels.step import Result
from freehold.losses.logprob import log_partition
from freehold.model.afmoe import Afmoe
from freehold.model.config import ModelConfig

_VERSION = operator.attrgetter("_version")


class Runner:
    """Reads tokens with a model that someone else may be training.

    Attributes:
        one_call: whether the fused way may compute; False where the model computes something it does not know.
    """

    def __init__(self, model: Afmoe, pool: PagePool, exact: bool) -> None:
        self.model, self.pool = model, pool
        if exact:
            # Weights are packed into the panels that the kernels read, once for each version of the
            # weights, not for each call.
            model.pack()
        self._fused = Fused(model) if exact else None
        self.one_call = exact
        self._weights: list[tuple[Any, str]] = [
            (tensors, name)
            for module in model.modules()
            for tensors in (module._parameters, module._buffers)
            for name, tensor in tensors.items()
            if tensor is not None
        ]
        self._version = self._weights_version()

    def read(self, parts: Sequence[tuple[Pages, Sequence[int]]], ends: Sequence[int]) -> Result:
        """Read the next tokens of some sequences; return their hidden states [N, d], in this order.

        ends: the rows of them to which the head is applied.
        """
        if self.model.training:
            self.model.eval()
        for pages, ids in parts:
            pages.extend(len(ids))
        if self._fused is not None and self.one_call and self._fused.takes():
            found = self._fused.run(parts, ends, self._version)
        else:
            found = self._module_by_module(parts, ends)
        for pages, ids in parts:
            pages.advance(len(ids))
        return found

    def weights_changed(self) -> bool:
        """Return whether the weights are others than at the last call."""
        version, before = self._weights_version(), self._version
        self._version = version
        return version != before

    def _module_by_module(self, parts: Sequence[tuple[Pages, Sequence[int]]], ends: Sequence[int]) -> Result:
        device = self.pool.store.device
        # One row of all tokens, without padding: the cache knows whose each of them is.
        cache = Step(self.pool, [(pages, len(ids)) for pages, ids in parts])
        tokens = torch.tensor([[i for _, ids in parts for i in ids]], device=device)  # [1, N]
        hidden = self.model.hidden(tokens, positions=cache.positions, cache=cache)[0]
        # The head on the rows that draw only: with a vocabulary of 200,192 it is the largest matrix there is.
        logits = self.model.lm_head(hidden[torch.tensor(ends, dtype=torch.int64, device=device)])  # [B, V]
        return Result(hidden, logits, log_partition(logits))

    def _weights_version(self) -> tuple[list[int], list[int]]:
        # PyTorch counts in-place changes of a tensor; the address catches a tensor that was replaced. Looked up by
        # name, because walking all modules would cost more than a layer of a small model.
        found: list[Tensor] = [tensors[name] for tensors, name in self._weights]
        return [*map(Tensor.data_ptr, found)], [*map(_VERSION, found)]


def not_exact(model: Afmoe) -> str | None:
    """Return why this model's answers depend on their batch on this machine; None when they do not."""
    weight = model.lm_head.weight
    if weight.device.type != "cpu":
        return f"on {weight.device.type} sums depend on the shapes of a batch"
    return not_exact_as(model.config, weight.dtype)


def not_exact_as(config: ModelConfig, dtype: torch.dtype) -> str | None:
    """Return why a model of this shape and dtype is not exact on this machine's CPU; None when it is."""
    # Rotated halves of a head are read 16 numbers at a time.
    widths = (
        config.hidden_size, config.head_dim // 2, config.query_width, config.key_width, config.intermediate_size,
        config.moe_intermediate_size, config.vocab_size,
    )  # fmt: skip
    like = torch.empty(0, dtype=dtype)
    if cpu.available(like, *widths):
        return None
    return cpu.describe(dtype) if not cpu.available(like) else "row widths that are no multiples of 16"
