"""One hard model, one hard batch, and what one process makes of them, in float64."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import tiny
import torch
from torch import Tensor

from freehold.data.packing import IGNORE, PADDING
from freehold.losses.cross_entropy import chunked_loss
from freehold.model.afmoe import Afmoe
from freehold.model.config import ModelConfig
from freehold.optim.balance import router_losses
from freehold.optim.config import SmebuConfig

TOKENS = 24
BALANCE = SmebuConfig(sequence_loss=0.1, router_z_loss=0.01)


def config(**changes: Any) -> ModelConfig:
    """Return the hard shape with six layers; chunks of 6 tokens are just wider than its window of 5."""
    return tiny.hard("sliding full sliding sliding full sliding", **changes)


def build(shape: ModelConfig) -> Afmoe:
    """A model with attention and routing far from uniform, in training mode; the same in every process."""
    return tiny.disturb(Afmoe(shape).double()).train()


class Rows(NamedTuple):
    """ids, targets, document ids [B, T]."""

    ids: Tensor
    targets: Tensor
    documents: Tensor

    def part(self, rows: slice = slice(None), columns: slice = slice(None)) -> Rows:
        """Return some rows, some columns."""
        return Rows(*(x[rows, columns] for x in self))


def batch() -> Rows:
    """Documents that end inside, at and far beyond the ends of chunks of 6 and 12; padding over a whole chunk."""
    generator = torch.Generator().manual_seed(1)
    ids, targets = (torch.randint(13, 96, (4, TOKENS), generator=generator) for _ in range(2))
    lengths = [[24], [6, 6, 12], [4, 6, 9, -5], [10, 7, -7]]
    documents = torch.full((4, TOKENS), PADDING, dtype=torch.int32)
    for row, pieces in enumerate(lengths):
        at = 0
        for number, length in enumerate(pieces):
            documents[row, at : at + abs(length)] = number if length > 0 else PADDING
            at += abs(length)
    targets[documents == PADDING] = IGNORE
    targets[0, 3:7] = IGNORE
    return Rows(ids, targets, documents)


class Result(NamedTuple):
    """Loss, gradients by name, and expert loads by layer."""

    loss: float
    gradients: dict[str, Tensor]
    loads: dict[str, Tensor]


def scales(whole: Rows) -> tuple[float, float]:
    """Return 1 / targets and 1 / real tokens of the whole step."""
    return 1 / int((whole.targets != IGNORE).sum()), 1 / int((whole.documents != PADDING).sum())


def head_loss(model: Afmoe, hidden: Tensor, targets: Tensor, whole: Rows) -> Tensor:
    """Return cross-entropy and z-loss of some positions, at their share of the step."""
    return chunked_loss(hidden, model.lm_head.weight, targets, scale=scales(whole)[0], z_loss=1e-2).total


def routing_loss(routings: list[Any], documents: Tensor, whole: Rows, **across: Any) -> Tensor:
    """Return the losses on the routing of some tokens, at their share of the step."""
    return router_losses(BALANCE, routings, documents != PADDING, scale=scales(whole)[1], **across).total


def loss_of(model: Afmoe, rows: Rows, whole: Rows, loads: dict[str, Tensor], **across: Any) -> Tensor:
    """Return all losses of some rows, or of a chunk of them; add their expert loads."""
    routings: list[Any] = []
    hidden = model.hidden(rows.ids, document_ids=rows.documents, routings=routings)
    add_loads(loads, model, routings)
    return head_loss(model, hidden, rows.targets, whole) + routing_loss(routings, rows.documents, whole, **across)


@cache
def one_process(shape: ModelConfig, micro_rows: int = 4) -> Result:
    """Train nothing, but take the gradient of the whole batch on one device."""
    model, whole, loss = build(shape), batch(), 0.0
    loads: dict[str, Tensor] = {}
    for start in range(0, len(whole.ids), micro_rows):
        part = loss_of(model, whole.part(slice(start, start + micro_rows)), whole, loads)
        part.backward()
        loss += part.item()
    return Result(loss, gradients(model), loads)


def gradients(model: Afmoe) -> dict[str, Tensor]:
    """Return the gradient of each parameter."""
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def add_loads(loads: dict[str, Tensor], model: Afmoe, routings: list[Any], layers: Any = None) -> None:
    """Add the expert loads of a pass over some layers (None: all) to those of each MoE layer by name."""
    names = [n for n in model.moe_layers() if layers is None or int(n.split(".")[2]) in layers]
    for name, routing in zip(names, routings, strict=True):
        loads[name] = loads.get(name, 0) + routing.counts


def difference(found: Result, expected: Result) -> tuple[float, float, bool]:
    """Return the relative error of the loss, the worst of any gradient, and whether all loads are equal."""
    assert found.gradients.keys() == expected.gradients.keys()
    least = 1e-3 * max(float(g.abs().max()) for g in expected.gradients.values())  # what is 0 but for rounding
    worst = max(
        float((found.gradients[n] - g).abs().max() / g.abs().max().clamp_min(least))
        for n, g in expected.gradients.items()
    )
    same = all(torch.equal(found.loads[n], counts) for n, counts in expected.loads.items())
    return abs(found.loss / expected.loss - 1), worst, same
