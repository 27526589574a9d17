"""The drift table: the adapted model against its base on old and new data, with the floor next to it, and the gate."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from freehold.checkpoint import base as frozen
from freehold.core.artifact import Workspace
from freehold.core.table import Table
from freehold.model import adapted
from freehold.model.afmoe import Afmoe
from freehold.model.moe import MoE, Routing
from freehold.stages.adapt.config import AdaptConfig
from freehold.stages.adapt.source import Base
from freehold.trainer.drift import FIGURES, Drift, Forward, compare, heat_map, routings_of
from freehold.trainer.errors import TrainingError
from freehold.trainer.job import DTYPES
from freehold.trainer.validate import HeldOut, bits_per_byte

REMEDIES = (
    ("halve adapt.optim.lr", "less of the gain"),
    ("raise adapt.replay.share, e.g. to 0.25", "that share of every step's time"),
    ("adapt.router: replay_kl", "a forward pass without factors over the old rows, about a third of a step for each"),
    ("adapt.preset: specialise, factors on the experts alone", "about half of the gain at the same rate"),
)
"""What to do against drift, in this order, and what it costs."""


def measure(
    config: AdaptConfig, base: Base, model: Afmoe, new: Mapping[str, HeldOut], old: Mapping[str, HeldOut]
) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the figures of old data, new data and the floor, and a picture of each.

    The floor is the base as it computes here, in its dtype and blocks, against the same base in float32: what is left
    without any training.
    """
    model.eval().requires_grad_(False)
    full = config.preset == "own"
    start = frozen.build(base.folder, base.config, DTYPES[config.trainer.dtype]).eval() if full else model
    rows: dict[str, Any] = {}
    pictures: dict[str, str] = {}

    def run_base(ids: Tensor, documents: Tensor) -> list[Routing]:
        with adapted.disabled(model):
            return routings_of(start)(ids, documents)

    def bits_of_base(sources: Mapping[str, HeldOut]) -> float:
        with adapted.disabled(model):
            return bits_per_byte(start, sources)["val/bpb"]

    for name, sources in (("old", old), ("new", new)):
        if sources:
            batches = [held.batch for held in sources.values()]
            drift = compare(
                run_base, routings_of(model), model.moe_layers(), batches, start.moe_layers() if full else None
            )
            rows[name] = _row(drift, bits_of_base(sources), bits_per_byte(model, sources)["val/bpb"])
            pictures[name] = heat_map(drift, f"change of load on {name} data, overlap by layer")
    if config.drift.floor:
        rows["floor"] = _floor(base, run_base, bits_of_base, model.moe_layers(), old or new)
    return rows, pictures


def _row(drift: Drift, before: float, after: float) -> dict[str, Any]:
    rise = after / before - 1 if before else 0.0
    return {**drift.record(), "bpb_base": round(before, 6), "bpb": round(after, 6), "bpb_rise": round(rise, 6)}


def _floor(
    base: Base,
    run_base: Forward,
    bits: Callable[[Mapping[str, HeldOut]], float],
    layers: dict[str, MoE],
    sources: Mapping[str, HeldOut],
) -> dict[str, Any]:
    """Return the same figures for the base against itself in float32, without blocks."""
    exact = frozen.build(base.folder, base.config, torch.float32).eval()
    batches = [held.batch for held in sources.values()]
    with torch.no_grad():
        drift = compare(routings_of(exact), run_base, layers, batches, exact.moe_layers())
        return _row(drift, bits_per_byte(exact, sources)["val/bpb"], bits(sources))


def problems(config: AdaptConfig, row: Mapping[str, Any]) -> list[str]:
    """Return how old data breaks the limits; empty when it does not."""
    limits = config.drift.limits
    found = []
    for name, broken, limit in (
        ("overlap", row["overlap"] < limits.overlap, f"at least {limits.overlap:g}"),
        ("kl", row["kl"] > limits.kl, f"at most {limits.kl:g}"),
        ("load_tv", row["load_tv"] > limits.load_tv, f"at most {limits.load_tv:g}"),
        ("dead", row["dead"] > 0, "no expert that loses all its tokens"),
        ("bpb_rise", row["bpb_rise"] > limits.bits_per_byte, f"at most {limits.bits_per_byte:g}"),
    ):
        if broken:
            found.append(f"{name} {row[name]:.4g}, {limit}")
    return found


def judge(config: AdaptConfig, drift: dict[str, Any], work: Workspace) -> None:
    """Raise TrainingError when the routing or the loss on old data moved beyond the limits; print remedies."""
    row = drift.get("old")
    if row is None:
        work.log.warn("no old data: what the model forgot was not measured")
        return
    found = problems(config, row)
    if not found:
        work.log.say("  the drift gate passes on old data")
        return
    remedies = [f"{what} (costs {price})" for what, price in REMEDIES]
    if not config.drift.gate:
        work.log.warn(f"the drift gate would fail on old data: {'; '.join(found)}")
        return
    raise TrainingError(
        "the model drifted too far from its base on old data",
        where=work.folder / "drift.json",
        found="; ".join(found),
        expected="the limits of adapt.drift.limits",
        todo="what was trained is kept, but the stage is not finished; in this order: "
        + "; ".join(remedies)
        + "; or accept it with drift.gate=false",
    )


def table(drift: Mapping[str, Any]) -> Table:
    """Return the table for people: floor, old, new."""
    header = ("data", *FIGURES, "MaxVio", "of base", "dead", "bpb", "of base", "change")
    named = {"floor": "floor (base against float32)", "old": "old", "new": "new"}
    if drift.get("stand_in"):
        named["old"] = "old (a stand-in: the base's own text is not known)"
    cells = []
    for key, name in named.items():
        if row := drift.get(key):
            figures = [f"{row[each]:.4f}" for each in FIGURES]
            loads = [f"{row['max_vio']:.2f}", f"{row['max_vio_base']:.2f}", str(row["dead"])]
            bits = [f"{row['bpb']:.4f}", f"{row['bpb_base']:.4f}", f"{100 * row['bpb_rise']:+.2f} %"]
            cells.append([name, *figures, *loads, *bits])
    if "floor" not in drift:
        return Table("drift (without its floor: drift.floor is off)", header, cells)
    return Table("drift from the base", header, cells)


def short(drift: Mapping[str, Any]) -> dict[str, Any]:
    """Return the figures for the manifest, without those of each layer."""
    return {
        name: {key: value for key, value in row.items() if key != "layers"}
        for name, row in drift.items()
        if isinstance(row, dict)
    }
