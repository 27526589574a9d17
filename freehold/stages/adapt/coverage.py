"""What was adapted, and whether it moved: the report that fails a run in which a planned group did not train."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from freehold.core.table import Table
from freehold.model.afmoe import Afmoe
from freehold.model.groups import ADAPTABLE, FULL_ONLY, group_of
from freehold.trainer.errors import TrainingError


class CoverageError(TrainingError):
    """A group that was planned to train and did not."""


@dataclass
class Watch:
    """Sees the first steps: which masters had a gradient, which moved, and which experts had tokens."""

    model: Afmoe
    steps: int
    planned: tuple[str, ...]
    chosen: Mapping[str, list[int]] = field(default_factory=dict)
    """Of each MoE layer the experts that are adapted; empty: all."""
    last_layer_masked: bool = False
    """Whether some tokens carry no loss: in the last layer such a token gives its experts no gradient."""
    seen: int = 0
    gradient: dict[str, Tensor] = field(default_factory=dict)
    """By master: of a stack of experts bool [E], else a bool."""
    tokens: dict[str, Tensor] = field(default_factory=dict)
    """By MoE layer: tokens of each expert in the steps that were seen."""
    first: dict[str, Tensor] = field(default_factory=dict)
    moved: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Keep what the masters were: factors B start at zero, everything else is copied."""
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                self.first[name] = parameter.detach().float().clone()

    def __call__(self, step: int, masters: Mapping[str, Tensor], loads: Mapping[str, Tensor]) -> None:
        """See one step; CoverageError after the last of the first steps when a planned group did not train."""
        if self.seen >= self.steps:
            return
        self.seen += 1
        for name, master in masters.items():
            found = _any(name, torch.zeros(1) if master.grad is None else master.grad)
            self.gradient[name] = found | self.gradient.get(name, torch.zeros_like(found))
        for layer, counts in loads.items():
            self.tokens[layer] = counts.detach().cpu() + self.tokens.get(layer, torch.zeros_like(counts).cpu())
        if self.seen == self.steps:
            self.look(masters)
            self.check()

    def look(self, masters: Mapping[str, Tensor]) -> None:
        """Record which masters differ from what they were."""
        for name, master in masters.items():
            if name in self.first:
                self.moved[name] = _any(name, master.detach().float().cpu() - self.first[name])

    def check(self) -> None:
        """Raise CoverageError for a planned group without a gradient, or whose routed experts did not all move."""
        trained = {group_of(name) for name in self.moved}
        for group in self.planned:
            if group not in trained:
                raise self._failed(group, "no parameter of the group trains")
        for name, moved in self.moved.items():
            if name.endswith(".a"):  # A moves from the second step on, B from the first
                continue
            still = self._still(name, moved)
            if still:
                raise self._failed(group_of(name), f"{name} did not move: {still}")

    def _still(self, name: str, moved: Tensor) -> str:
        """Return what of a master should have moved and did not; empty when all did."""
        if moved.ndim == 0 or not _is_experts(name):
            return "" if bool(moved.all()) else "the matrix is as it was"
        layer = name.partition(".experts")[0]
        routed = self.tokens.get(layer, torch.zeros(len(moved), dtype=torch.int64)) > 0
        if layer in self.chosen:
            only = torch.zeros_like(routed)
            only[self.chosen[layer]] = True
            routed &= only
        idle = (routed & ~moved).nonzero().flatten().tolist()
        last = f"model.layers.{self.model.config.num_hidden_layers - 1}.mlp"
        if idle and self.last_layer_masked and layer == last and bool((routed & moved).any()):
            return ""  # tokens without loss reach the last layer's experts and ask nothing of them
        return f"experts {idle} had tokens and are as they were" if idle else ""

    def _failed(self, group: str, found: str) -> CoverageError:
        return CoverageError(
            "a group that was planned to train did not",
            where=f"adapt.groups: {group}",
            found=found,
            expected=f"every planned group moves within {self.steps} steps",
            todo="no adapter was written; look at coverage.json, raise check_steps if the warm-up is longer",
        )

    def table(self, ranks: Mapping[str, int], quantize: str) -> list[dict[str, Any]]:
        """Return a row for each group of the model, adapted or not."""
        rows = {group: _Row(group) for group in (*ADAPTABLE, *FULL_ONLY)}
        for name, parameter in self.model.named_parameters():
            rows[group_of(name)].add(name, parameter)
        for layer in self.model.moe_layers().values():
            rows["bias"].tensors += 1
            rows["bias"].parameters += layer.expert_bias.numel()
            for group, blocks in (
                ("experts.gate_up", layer.experts.gate_up_blocks), ("experts.down", layer.experts.down_blocks)
            ):  # fmt: skip
                if blocks is not None:
                    rows[group].tensors += 1
                    rows[group].parameters += len(blocks.data) * blocks.outs * blocks.ins
                    rows[group].bits = 8 * blocks.data.numel() / (len(blocks.data) * blocks.outs * blocks.ins)
        return [self._filled(row, ranks, quantize) for row in rows.values() if row.tensors]

    def _filled(self, row: _Row, ranks: Mapping[str, int], quantize: str) -> dict[str, Any]:
        of_group = {name: moved for name, moved in self.moved.items() if group_of(name) == row.group}
        b = {name: moved for name, moved in of_group.items() if not name.endswith(".a")}
        if row.trained:
            state = "adapted" if row.group in ranks and row.factors else "trained in full"
        elif row.group in self.planned:
            state = "missed"
        else:
            state = f"frozen, {quantize}" if row.bits not in (0.0, 16.0, 32.0) else "frozen"
        if state == "adapted" and row.bits not in (0.0, 16.0, 32.0):
            state = f"adapted, base in {quantize}"
        return {
            "group": row.group,
            "state": state,
            "tensors": row.tensors,
            "parameters": row.parameters,
            "trained_parameters": row.trained,
            "rank": ranks.get(row.group),
            "bits": round(row.bits, 3),
            "with_gradient": sum(int(self.gradient[n].sum()) for n in b if n in self.gradient),
            "moved": sum(int(moved.sum()) for moved in b.values()),
            "of": sum(moved.numel() for moved in b.values()),
        }


@dataclass
class _Row:
    group: str
    tensors: int = 0
    parameters: int = 0
    trained: int = 0
    factors: bool = False
    bits: float = 0.0

    def add(self, name: str, parameter: Tensor) -> None:
        """Count one parameter: a matrix of the base, or a factor."""
        if parameter.requires_grad:
            self.trained += parameter.numel()
        if name.endswith((".a", ".b")):
            self.factors = True
            return
        self.tensors += 1
        self.parameters += parameter.numel()
        self.bits = 8.0 * parameter.element_size()


def _is_experts(name: str) -> bool:
    return group_of(name).startswith("experts.")


def _any(name: str, tensor: Tensor) -> Tensor:
    """Return whether a master has a number that is not zero: of a stack of experts for each of them."""
    nonzero = tensor.detach().cpu() != 0
    return nonzero.flatten(1).any(1) if _is_experts(name) and tensor.ndim == 3 else nonzero.any()


def show(rows: list[dict[str, Any]]) -> str:
    """Return the report as a table for people."""
    cells = [
        (
            row["group"], row["state"], f"{row['tensors']:,}", f"{row['parameters']:,}",
            f"{row['trained_parameters']:,}", str(row["rank"] or ""), f"{row['bits']:g}",
            f"{row['moved']:,} of {row['of']:,}" if row["of"] else "",
        )
        for row in rows
    ]  # fmt: skip
    header = ("group", "state", "tensors", "parameters", "trained", "rank", "bits", "moved")
    return Table("what is adapted", header, cells, left=(0, 1)).text()
