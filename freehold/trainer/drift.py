"""How far a model's routing is from its base's, layer by layer: what a change of weights did to who computes what.

Shapes: N tokens that count, E experts, k chosen by each, L MoE layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from freehold.core.marks import PADDING
from freehold.data.packing import Batch
from freehold.model.afmoe import Afmoe
from freehold.model.moe import MoE, Routing

ROWS = 8
"""Rows of one pass."""
EDGE = 0.2
"""Share of the tokens that are closest to another choice, for `edge_flips`."""
FIGURES = ("overlap", "weighted_overlap", "same_set", "kl", "mixing_tv", "load_tv")
"""What `LayerDrift` says of a layer, in the order of tables."""

Forward = Callable[[Tensor, Tensor], list[Routing]]


@dataclass(frozen=True)
class LayerDrift:
    """One layer of a model compared with the same layer of its base."""

    layer: str
    overlap: float
    """Mean share of the chosen experts that are the base's."""
    weighted_overlap: float
    """The same, each expert counted by its weight in the base."""
    same_set: float
    """Share of tokens with the same experts."""
    kl: float
    """KL divergence of the base's scores, normalised over the experts, from the model's; nats."""
    mixing_tv: float
    """Total variation between the final weights of the experts, mean over tokens."""
    load_tv: float
    """Total variation between the shares of assignments."""
    max_vio: float
    """Largest load over the mean load minus 1, of the model."""
    max_vio_base: float
    dead: int
    """Experts that the base uses and the model does not."""
    margin: float
    """Median gap between the last chosen and the first rejected biased score of the base."""
    edge_flips: float
    """Share of the changed tokens among the 20 % of the smallest margin: near 1, the base was undecided."""
    router_overlap: float = 1.0
    """Overlap of the model's router with the base's on the base's own inputs: 1 while the router is frozen."""


@dataclass(frozen=True)
class Drift:
    """All layers; `loads` and `base_loads` are shares [L, E]."""

    layers: list[LayerDrift]
    loads: list[list[float]]
    base_loads: list[list[float]]

    def mean(self, name: str) -> float:
        """Return a figure's mean over the layers."""
        return sum(getattr(layer, name) for layer in self.layers) / max(len(self.layers), 1)

    def record(self) -> dict[str, Any]:
        """Return the means, the worst of MaxVio, and every layer, as JSON-able data."""
        means = {name: round(self.mean(name), 6) for name in (*FIGURES, "margin", "edge_flips", "router_overlap")}
        return {
            **means,
            "max_vio": round(max((layer.max_vio for layer in self.layers), default=0.0), 4),
            "max_vio_base": round(max((layer.max_vio_base for layer in self.layers), default=0.0), 4),
            "dead": sum(layer.dead for layer in self.layers),
            "layers": [{key: _short(value) for key, value in vars(layer).items()} for layer in self.layers],
        }


def _short(value: Any) -> Any:
    return round(value, 6) if isinstance(value, float) else value


@dataclass
class _Sums:
    """Sums over the tokens of one layer."""

    k: int
    tokens: int = 0
    same: float = 0.0
    weighted: float = 0.0
    sets: float = 0.0
    kl: float = 0.0
    mixing: float = 0.0
    router: float = 0.0
    loads: Tensor | int = 0
    base_loads: Tensor | int = 0
    margins: list[Tensor] | None = None
    changed: list[Tensor] | None = None

    def add(self, base: Routing, new: Routing, bias: Tensor, keep: Tensor) -> None:
        """Add the tokens of one pass; `keep` [N] says which count."""
        experts = base.logits.shape[1]
        sets = [_mask(r.chosen[keep], experts) for r in (base, new)]  # [N, E] bool
        weights = [_mixed(r.chosen[keep], r.weights[keep], experts) for r in (base, new)]  # [N, E], sum 1
        shares = [_shares(r.logits[keep]) for r in (base, new)]
        both = (sets[0] & sets[1]).sum(1)  # [N]
        changed = both < self.k
        self.tokens += len(both)
        self.same += float(both.sum()) / self.k
        self.weighted += float((weights[0] * sets[1]).sum())
        self.sets += float((~changed).sum())
        self.kl += float((shares[0] * (shares[0] / shares[1]).log()).sum())
        self.mixing += float((weights[0] - weights[1]).abs().sum()) / 2
        self.base_loads, self.loads = self.base_loads + sets[0].sum(0), self.loads + sets[1].sum(0)
        biased = (base.logits[keep].double().sigmoid() + bias.double()).sort(1, descending=True).values
        gap = biased[:, self.k - 1] - biased[:, self.k] if self.k < experts else torch.ones(len(biased))
        self.margins = [*(self.margins or []), gap]
        self.changed = [*(self.changed or []), changed]

    def finish(self, layer: str) -> LayerDrift:
        """Return the figures of the layer."""
        count = max(self.tokens, 1)
        loads, base = (torch.as_tensor(each, dtype=torch.float64) for each in (self.loads, self.base_loads))
        margins, changed = torch.cat(self.margins or [torch.zeros(1)]), torch.cat(self.changed or [torch.zeros(1)])
        edge = margins <= margins.quantile(EDGE)
        flips = float(changed.sum())
        return LayerDrift(
            layer=layer,
            overlap=self.same / count,
            weighted_overlap=self.weighted / count,
            same_set=self.sets / count,
            kl=max(self.kl / count, 0.0),
            mixing_tv=self.mixing / count,
            load_tv=float((loads - base).abs().sum()) / 2 / max(float(base.sum()), 1.0),
            max_vio=_max_vio(loads),
            max_vio_base=_max_vio(base),
            dead=int(((loads == 0) & (base > 0)).sum()),
            margin=float(margins.median()),
            edge_flips=float((changed.bool() & edge).sum()) / flips if flips else 0.0,
            router_overlap=self.router / count,
        )


def _mask(chosen: Tensor, experts: int) -> Tensor:
    return torch.zeros(len(chosen), experts, dtype=torch.bool).scatter_(1, chosen, True)


def _mixed(chosen: Tensor, weights: Tensor, experts: int) -> Tensor:
    shares = weights.double() / weights.double().sum(1, keepdim=True)
    return torch.zeros(len(chosen), experts, dtype=torch.float64).scatter_(1, chosen, shares)


def _shares(logits: Tensor) -> Tensor:
    scores = logits.double().sigmoid().clamp_min(1e-12)
    return scores / scores.sum(1, keepdim=True)


def _max_vio(loads: Tensor) -> float:
    return float(loads.max() / loads.mean().clamp_min(1e-12)) - 1.0


def routings_of(model: Afmoe) -> Forward:
    """Return what runs a model on ids and documents [B, T] and returns the routing of each MoE layer."""

    def run(ids: Tensor, documents: Tensor) -> list[Routing]:
        found: list[Routing] = []
        model.hidden(ids, document_ids=documents, routings=found)
        return found

    return run


@torch.no_grad()
def compare(
    base: Forward,
    new: Forward,
    layers: dict[str, MoE],
    batches: Iterable[Batch],
    base_layers: dict[str, MoE] | None = None,
) -> Drift:
    """Run a base and a model on the same rows and compare their routing.

    `layers` are the model's MoE layers by name, `base_layers` those of the base where it is another model. The model's
    routers are also asked about the base's inputs (`router_overlap`), which separates router from inputs.
    """
    k = next(iter(layers.values())).router.top_k if layers else 1
    sums = {name: _Sums(k) for name in layers}
    for batch in batches:
        for start in range(0, len(batch.input_ids), ROWS):
            part = batch.rows(start, start + ROWS)
            ids, documents = torch.from_numpy(part.input_ids), torch.from_numpy(part.document_ids)
            keep = (documents != PADDING).flatten()
            inputs: list[Tensor] = []
            hooks = [
                layer.router.register_forward_pre_hook(lambda _, args, seen=inputs: seen.append(args[0]))
                for layer in (base_layers or layers).values()
            ]
            before = base(ids, documents)
            for hook in hooks:
                hook.remove()
            after = new(ids, documents)
            for number, (name, layer) in enumerate(layers.items()):
                bias = (base_layers or layers)[name].expert_bias.detach()
                sums[name].add(before[number], after[number], bias, keep)
                chosen = layer.router(inputs[number].to(layer.router.gate.weight.dtype), layer.expert_bias)[2]
                both = _mask(chosen[keep], len(bias)) & _mask(before[number].chosen[keep], len(bias))
                sums[name].router += float(both.sum()) / k
    rows = [(_share(s.loads), _share(s.base_loads)) for s in sums.values()]
    return Drift([s.finish(n) for n, s in sums.items()], [new for new, _ in rows], [old for _, old in rows])


def _share(loads: Tensor | int) -> list[float]:
    counts = torch.as_tensor(loads, dtype=torch.float64)
    return [round(float(x), 6) for x in counts / counts.sum().clamp_min(1)] if counts.ndim else []


def gate_mass(model: Afmoe, batches: Iterable[Batch]) -> dict[str, Tensor]:
    """Return the share of each layer's routing weight that each expert gets on some rows: [E] each, sum 1."""
    names = list(model.moe_layers())
    run = routings_of(model)
    total = {name: torch.zeros(model.config.num_experts, dtype=torch.float64) for name in names}
    with torch.no_grad():
        for batch in batches:
            for start in range(0, len(batch.input_ids), ROWS):
                part = batch.rows(start, start + ROWS)
                ids, documents = torch.from_numpy(part.input_ids), torch.from_numpy(part.document_ids)
                keep = (documents != PADDING).flatten()
                for name, routing in zip(names, run(ids, documents), strict=True):
                    total[name] += _mixed(routing.chosen[keep], routing.weights[keep], len(total[name])).sum(0)
    return {name: mass / mass.sum().clamp_min(1e-12) for name, mass in total.items()}


def smallest_set(mass: Tensor, share: float) -> list[int]:
    """Return the fewest experts that together have `share` of the mass, the largest first."""
    order = mass.argsort(descending=True, stable=True)
    enough = int((mass[order].cumsum(0) < share - 1e-9).sum()) + 1
    return [int(expert) for expert in order[:enough]]


def heat_map(drift: Drift, title: str) -> str:
    """Return an SVG of each expert's change of load, a row for each layer: blue has lost, red has gained."""
    cell, left, top = 18, 150, 30
    experts = len(drift.loads[0]) if drift.loads else 0
    most = max((abs(a - b) for new, old in _rows(drift) for a, b in zip(new, old, strict=True)), default=0.0) or 1.0
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + cell * experts + 20}" '
        f'height="{top + cell * len(drift.layers) + 40}" font-family="sans-serif" font-size="11">',
        f'<text x="4" y="16">{title}</text>',
    ]
    for row, (layer, (new, old)) in enumerate(zip(drift.layers, _rows(drift), strict=True)):
        y = top + row * cell
        parts.append(f'<text x="4" y="{y + 13}">{layer.layer.removeprefix("model.")} {layer.overlap:.3f}</text>')
        for expert, (a, b) in enumerate(zip(new, old, strict=True)):
            strength = round(255 * (1 - abs(a - b) / most))
            colour = f"rgb(255,{strength},{strength})" if a > b else f"rgb({strength},{strength},255)"
            parts.append(
                f'<rect x="{left + expert * cell}" y="{y}" width="{cell}" height="{cell}" fill="{colour}">'
                f"<title>expert {expert}: {100 * b:.1f} % to {100 * a:.1f} %</title></rect>"
            )
    bottom = top + len(drift.layers) * cell + 20
    parts.append(f'<text x="4" y="{bottom}">full colour: {100 * most:.1f} % of a layer\'s assignments</text></svg>')
    return "\n".join(parts) + "\n"


def _rows(drift: Drift) -> list[tuple[list[float], list[float]]]:
    return list(zip(drift.loads, drift.base_loads, strict=True))
