"""Several adapters on one model: each row of a step uses its own, rows of the base use none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from freehold.core.errors import ConfigError, RequestError
from freehold.model.adapted import shape_of, sites
from freehold.model.afmoe import Afmoe
from freehold.model.lora import Factors, Pair, Rows

Adapters = Mapping[str, Mapping[str, Pair]]
"""By the adapter's name its factors by the name of their matrix."""


class Shared:
    """The adapters of an engine's model. A request names one by `Sampling.adapter`; empty is the base."""

    def __init__(self, model: Afmoe, adapters: Adapters) -> None:
        """Give the model the factors of all adapters; ConfigError for one that trained the router."""
        self.names = ("", *adapters)
        self.rows = Rows(len(self.names))
        for group, name, module, attribute in sites(model):
            parts = [pairs.get(name) for pairs in adapters.values()]
            if all(part is None for part in parts):
                continue
            if group == "router":
                raise ConfigError(
                    "an adapter of the router cannot be served next to others",
                    where=name,
                    found="factors on the router",
                    expected="adapters trained with router: frozen",
                    todo="merge it (adapt.merge) and serve the merged model",
                )
            setattr(module, attribute, self._stacked(shape_of(module, attribute), parts, model))
        for layer in model.moe_layers().values():
            layer.adapter_rows = self.rows

    def _stacked(self, shape: tuple[int, int, int], parts: Sequence[Pair | None], model: Afmoe) -> Factors:
        """Return the factors of all adapters of one matrix: zeros for the base and for those that lack it.

        Smaller ranks are filled with zeros, which change no bit of a sum.
        """
        stacks, outs, ins = shape
        rank, weight = max(part.rank for part in parts if part is not None), model.lm_head.weight
        # Scales are inside B: one number serves all.
        factors = Factors(stacks * len(self.names), outs, ins, rank, rank)
        a = factors.a.data.view(stacks, len(self.names), rank, ins)
        b = factors.b.data.view(stacks, len(self.names), outs, rank)
        for number, part in enumerate(parts, 1):
            if part is not None:
                a[:, number, : part.rank], b[:, number, :, : part.rank] = part.a, part.b * part.scale
        factors.rows = self.rows
        return factors.to(weight.device, weight.dtype).requires_grad_(False)

    def number(self, name: str) -> int:
        """Return the place of an adapter; RequestError for one that is not loaded."""
        if name not in self.names:
            raise RequestError(
                "no such adapter", where="adapter", found=name, expected=", ".join(self.names[1:]) or "none is loaded"
            )
        return self.names.index(name)

    def begin(self, numbers: Sequence[int], tokens: Sequence[int]) -> None:
        """Say whose the next pass's tokens are: sequences in the order of their adapters, with how many tokens each."""
        self.rows.counts.zero_()
        for number, count in zip(numbers, tokens, strict=True):
            self.rows.counts[number] += count
