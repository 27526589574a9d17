"""The model that trains: a frozen base with factors, or every parameter, by the recipe's groups and router policy."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from freehold.checkpoint import base as frozen
from freehold.core.errors import CheckpointError
from freehold.losses.cross_entropy import CrossEntropy
from freehold.losses.protocol import LossSums, Scale
from freehold.model import adapted
from freehold.model.afmoe import Afmoe
from freehold.stages.adapt.config import AdaptConfig
from freehold.stages.adapt.source import Base
from freehold.trainer.drift import smallest_set
from freehold.trainer.job import DTYPES


@dataclass
class Built:
    """The model of a run, and what was read of its base."""

    model: Afmoe
    base_sha256: str
    router_sha256: str
    chosen: dict[str, list[int]] = field(default_factory=dict)


def build(config: AdaptConfig, base: Base, seed: int, mass: Callable[[Afmoe], Mapping[str, Tensor]]) -> Built:
    """Return the model that trains. `mass` measures each expert's share of the gate on the new text.

    ConfigError for a rank larger than a matrix and for a group that the model does not have.
    """
    found = frozen.Fingerprint()
    full = config.preset == "own"
    dtype = torch.float32 if full else DTYPES[config.trainer.dtype]
    quantize = "" if config.quantize == "none" else config.quantize
    model = frozen.build(base.folder, base.config, dtype, quantize, found)
    built = Built(model, found.value, router_hash(model))
    if config.experts is not None:
        built.chosen = {layer: smallest_set(each, config.experts) for layer, each in mass(model).items()}
    if full:
        model.requires_grad_(True)
    else:
        ranks = config.ranks(base.config.num_experts_per_tok)
        adapted.attach(model, ranks, config.alpha, torch.Generator().manual_seed(seed))
        _mask_experts(model, built.chosen)
    for layer in model.moe_layers().values():
        gate = layer.router.gate.weight
        if config.router == "full":
            gate.requires_grad_(True)
        elif full:
            # It stays in the checkpoint, so it stays a parameter; without a gradient AdamW leaves it as it is.
            gate.register_hook(torch.zeros_like)
    return built


def _mask_experts(model: Afmoe, chosen: Mapping[str, list[int]]) -> None:
    """Give the factors of experts that were not chosen no gradient: they stay zero."""
    for name, factors in adapted.attached(model).items():
        layer = name.partition(".experts")[0]
        if ".experts." in name and layer in chosen:
            mask = torch.zeros(len(factors.a), 1, 1)
            mask[chosen[layer]] = 1
            for parameter in (factors.a, factors.b):
                parameter.register_hook(lambda grad, mask=mask: grad * mask.to(grad.dtype))


def router_hash(model: Afmoe) -> str:
    """Return one hash over the router's gates and biases: SMEBU moves a bias without any gradient."""
    found = frozen.Fingerprint()
    for name, layer in model.moe_layers().items():
        found.add(f"{name}.gate", layer.router.gate.weight.detach().cpu())
        found.add(f"{name}.bias", layer.expert_bias.detach().cpu())
    return found.value


def check_router(built: Built, config: AdaptConfig) -> None:
    """Raise CheckpointError when a router that should be frozen has changed."""
    if config.router != "full" and router_hash(built.model) != built.router_sha256:
        raise CheckpointError(
            "the router has changed although it is frozen",
            where="adapt.router",
            found=router_hash(built.model)[:16],
            expected=built.router_sha256[:16],
        )


class HeldRouting:
    """Cross-entropy, and on old rows the divergence of the router's scores from the base's on the same rows.

    The scores of the pass are read by hooks; the base's are those of the same model without its factors.
    """

    def __init__(self, inner: CrossEntropy, weight: float) -> None:
        self.inner, self.weight = inner, weight
        self.model: Afmoe | None = None
        self._logits: list[Tensor] = []
        self._reading = True

    @property
    def reports(self) -> Mapping[str, str]:
        """Return the figures of cross-entropy, and the divergence per old token and layer."""
        return {**self.inner.reports, "loss/router_kl": "old"}

    def watch(self, model: Afmoe) -> None:
        """Read the router of every MoE layer of a model from now on."""
        self.model = model
        for layer in model.moe_layers().values():
            layer.router.register_forward_hook(self._read)

    def _read(self, module: Any, args: Any, output: tuple[Tensor, Tensor, Tensor]) -> None:
        if self._reading and torch.is_grad_enabled():
            self._logits.append(output[0])

    def counts(self, batch: Any) -> dict[str, int]:
        """Return positions with loss, and (token, layer) pairs of old text."""
        layers = 0 if self.model is None else len(self.model.moe_layers())
        return {**self.inner.counts(batch), "old": int((batch.old & (batch.document_ids != -1)).sum()) * layers}

    def __call__(
        self, hidden: Tensor, head: Tensor, columns: Mapping[str, Tensor], scales: Mapping[str, Scale]
    ) -> LossSums:
        """Return the sums; columns as in cross-entropy, and `old` [B, T]."""
        found = self.inner(hidden, head, columns, scales)
        logits, self._logits = self._logits, []
        rows = columns["old"].any(1)
        if not bool(rows.any()) or self.model is None:
            return LossSums(found.total, {**found.sums, "loss/router_kl": torch.zeros((), dtype=torch.float64)})
        keep = (columns["document_ids"][rows] != -1).flatten()
        old = [each.view(*rows.shape, -1, each.shape[-1])[rows].flatten(0, 1)[keep] for each in logits]
        base = self._base(columns["input_ids"][rows], columns["document_ids"][rows])
        kl = torch.stack([_divergence(b[keep], a) for b, a in zip(base, old, strict=True)]).sum()
        total = found.total + self.weight * scales["old"] * kl
        return LossSums(total, {**found.sums, "loss/router_kl": kl.detach().double()})

    @torch.no_grad()
    def _base(self, ids: Tensor, documents: Tensor) -> list[Tensor]:
        assert self.model is not None
        seen: list[Any] = []
        with adapted.disabled(self.model):
            self.model.hidden(ids, document_ids=documents, routings=seen)
        return [routing.logits for routing in seen]


def _divergence(base: Tensor, new: Tensor) -> Tensor:
    """Return the sum over tokens of KL(base || new), scores normalised over the experts."""
    p, q = (x.sigmoid() / x.sigmoid().sum(-1, keepdim=True) for x in (base, new))
    return (p * (p.clamp_min(1e-12).log() - q.clamp_min(1e-12).log())).sum()
