"""What each expert does for a domain: token share, gate mass, saliency and lift, by layer.

Saliency is REAP's (arXiv:2510.13999): the mean over an expert's tokens of gate times norm of its output. Lift is the
domain's token share over that of the reference text: above 1 is a specialist, not merely a busy expert. Shares sum to
1 in each layer.

Shapes: N tokens, k experts per token, E experts, R = N k rows sorted by expert.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from freehold.core.errors import DataError
from freehold.model.afmoe import Afmoe
from freehold.model.rows import route

SCORES = ("tokens", "mass", "saliency")
"""By what experts can be ranked."""
CHUNK_TOKENS = 512


@dataclass
class LayerScores:
    """Sums of one MoE layer, all fp64 [E]."""

    tokens: Tensor
    mass: Tensor
    outputs: Tensor
    """Sum of gate times norm of output."""

    def share(self, kind: str) -> Tensor:
        """Return a score [E] that sums to 1."""
        if kind == "saliency":
            # A mean over an expert's own tokens: a rare expert that matters where it is used ranks high.
            value = self.outputs / self.tokens.clamp(min=1)
        else:
            value = {"tokens": self.tokens, "mass": self.mass}[kind]
        return value / value.sum().clamp(min=1e-30)


@dataclass
class Scores:
    """The scores of every MoE layer on some text, by layer number."""

    layers: dict[int, LayerScores] = field(default_factory=dict)
    text_tokens: int = 0

    def table(self, reference: Scores | None = None) -> dict[str, dict[str, list[float]]]:
        """Return rounded scores by layer, with the lift over a reference text where one is given."""
        found = {}
        for number, layer in sorted(self.layers.items()):
            row = {kind: [round(float(v), 5) for v in layer.share(kind)] for kind in SCORES}
            if reference is not None:
                ours, theirs = layer.share("tokens"), reference.layers[number].share("tokens")
                row["lift"] = [
                    round(float(v), 4)
                    for v in ours / theirs.clamp(min=1 / max(1.0, float(reference.layers[number].tokens.sum())))
                ]
            found[str(number)] = row
        return found


@torch.inference_mode()
def score_experts(model: Afmoe, chunks: Sequence[Sequence[int]]) -> Scores:
    """Run a model over chunks of ids and return what its experts did; DataError without any text."""
    if not any(len(chunk) > 1 for chunk in chunks):
        raise DataError("there is no text to score experts on", found="0 tokens", todo="give more text")
    found, device = Scores(), next(model.parameters()).device
    with _watched(model.eval(), found):
        for ids in chunks:
            model.hidden(torch.tensor([list(ids)], device=device))
            found.text_tokens += len(ids)
    return found


@contextmanager
def _watched(model: Afmoe, found: Scores) -> Iterator[None]:
    handles = []
    for name, moe in model.moe_layers().items():
        experts = moe.expert_bias.numel()
        zero = torch.zeros(experts, dtype=torch.float64)
        layer = LayerScores(zero.clone(), zero.clone(), zero.clone())
        found.layers[int(name.split(".")[2])] = layer
        latest: list[tuple[Tensor, Tensor]] = []
        handles.append(moe.router.register_forward_hook(_routed(layer, latest)))
        handles.append(moe.experts.register_forward_hook(_computed(layer, latest)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _routed(layer: LayerScores, latest: list[tuple[Tensor, Tensor]]) -> Callable[..., None]:
    def add(module: nn.Module, inputs: Any, outputs: tuple[Tensor, Tensor, Tensor]) -> None:
        _, weights, chosen = outputs
        latest[:] = [(weights, chosen)]
        flat = chosen.flatten().cpu()
        layer.tokens.index_add_(0, flat, torch.ones(len(flat), dtype=torch.float64))
        layer.mass.index_add_(0, flat, weights.flatten().double().cpu())

    return add


def _computed(layer: LayerScores, latest: list[tuple[Tensor, Tensor]]) -> Callable[..., None]:
    def add(module: nn.Module, inputs: Any, output: Tensor) -> None:
        weights, chosen = latest[0]
        # The experts see rows sorted by expert: the gate of each row is found by the same sort.
        order = route(chosen).order
        gates = weights.flatten()[order].double().cpu()
        owners = chosen.flatten()[order].cpu()
        layer.outputs.index_add_(0, owners, gates * output.double().norm(dim=-1).cpu())

    return add


@contextmanager
def fewer_experts(model: Afmoe, *, k: int = 0, mass: float = 0.0) -> Iterator[list[float]]:
    """Run a model with another number of experts a token; yields a list that gets [experts used, tokens].

    k: that many for every token. mass: as many of the model's own k as carry this share of the routing weight, at
    least one. The weights of those that are left are normalised again, as the router does.
    """
    used, handles, before = [0.0, 0.0], [], {}
    for name, moe in model.moe_layers().items():
        before[name] = moe.router.top_k
        if k:
            moe.router.top_k = k
        handles.append(moe.router.register_forward_hook(_adaptive(mass, moe.router.route_scale, used)))
    try:
        yield used
    finally:
        for handle in handles:
            handle.remove()
        for name, moe in model.moe_layers().items():
            moe.router.top_k = before[name]


def _adaptive(mass: float, scale: float, used: list[float]) -> Callable[..., Any]:
    def keep(module: nn.Module, inputs: Any, outputs: tuple[Tensor, Tensor, Tensor]) -> Any:
        logits, weights, chosen = outputs
        used[0], used[1] = used[0] + chosen.numel(), used[1] + len(chosen)
        if not mass:
            return None
        # The bias decides the order of choice; the weight decides who counts.
        ranked, order = weights.sort(dim=1, descending=True)  # [N, k]
        share = ranked / ranked.sum(1, keepdim=True)
        # Kept as long as those before carry less than asked: the best one always is.
        kept = share.cumsum(1) - share < mass
        used[0] -= float((~kept).sum())
        ranked = ranked * kept
        ranked = ranked / ranked.sum(1, keepdim=True) * scale
        return logits, torch.empty_like(weights).scatter_(1, order, ranked), chosen

    return keep


@torch.inference_mode()
def bits_per_token(model: Afmoe, chunks: Sequence[Sequence[int]]) -> float:
    """Return the mean bits of a token of the chunks, each read from its first."""
    total, count = 0.0, 0
    for ids in chunks:
        tokens = torch.tensor([list(ids)])
        logits = model(tokens[:, :-1]).float().log_softmax(-1)
        total -= float(logits.gather(2, tokens[:, 1:, None]).double().sum())
        count += tokens.shape[1] - 1
    return total / math.log(2) / max(count, 1)


def chunks_of(ids: Sequence[int], begin: Sequence[int], tokens: int) -> list[list[int]]:
    """Cut a text into chunks that begin as every text does, `tokens` in all at most."""
    size = CHUNK_TOKENS - len(begin)
    found = [[*begin, *ids[at : at + size]] for at in range(0, min(len(ids), tokens), size)]
    return [chunk for chunk in found if len(chunk) > 1 + len(begin)]
