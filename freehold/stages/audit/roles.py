"""Experts: load is what the router sends, a role is what is lost without one.

Observed routing does not predict what removing an expert does (2606.10703), so a role needs an ablation: the expert is
barred from selection, and the loss of each source is compared with that of the others and with barred experts of like
load. Holm's correction over all pairs of expert and source.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from freehold.core.statistics import holm, normal_p
from freehold.core.table import Table
from freehold.losses.cross_entropy import summed_nll
from freehold.model.moe import MoE, Routing
from freehold.stages.audit import picture
from freehold.stages.audit.config import Roles
from freehold.stages.audit.subject import CannotAnswer, Finding, Subject

PERMUTATIONS = 200
BARRED = -1e9
"""Bias of an expert that may not be chosen: far below any score, which is between 0 and 1."""
ROWS = 8


@dataclass
class _Rows:
    """Held-out rows with their sources."""

    ids: Tensor  # [R, T + 1]
    sources: np.ndarray  # [R] number of the source
    names: list[str]


@dataclass(frozen=True)
class Effect:
    """What barring one expert costs one source, beyond what it costs the others."""

    layer: str
    expert: int
    load: float
    source: str
    nats: float
    z: float
    control_z: float
    """Against the barred expert of the same layer whose load is nearest."""
    role: bool = False


def audit(subject: Subject, config: Roles) -> Finding:
    """Return load and roles of the product's experts; CannotAnswer for a dense model or without held-out text."""
    model = subject.product.model
    layers = list(model.moe_layers().items())[-config.layers :]
    if not layers:
        raise CannotAnswer("the model has no experts")
    rows = _rows(subject, config)
    base, loads = _run(subject, rows, [name for name, _ in layers])
    found = Finding()
    _load(loads, rows, found, subject)
    effects: list[Effect] = []
    for name, moe in layers:
        effects += _layer(subject, rows, base, name, moe, loads[name], config)
    decided = _decide(effects)
    _report(decided, found)
    return found


def _rows(subject: Subject, config: Roles) -> _Rows:
    names, rows, sources = [], [], []
    for name, shard in subject.split("validation").items():
        width = config.row_tokens + 1
        count = min(len(shard.data) // width, max(1, config.tokens_per_source // config.row_tokens))
        if count < 2:
            continue
        names.append(name)
        rows += [np.asarray(shard.data[i * width : (i + 1) * width]).astype(np.int64) for i in range(count)]
        sources += [len(names) - 1] * count
    if len(names) < 2:
        raise CannotAnswer("a role is a difference between sources", found=", ".join(names) or "no held-out text")
    return _Rows(torch.from_numpy(np.stack(rows)), np.array(sources), names)


@torch.no_grad()
def _run(subject: Subject, rows: _Rows, layers: list[str]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Return nats a token of each row [R], and for each layer the share of its assignments [R, E]."""
    model, found = subject.product.model, []
    model.eval()
    loads: dict[str, list[np.ndarray]] = {name: [] for name in layers}
    numbers = {name: list(model.moe_layers()).index(name) for name in layers}
    for first in range(0, len(rows.ids), ROWS):
        ids = rows.ids[first : first + ROWS]
        routings: list[Routing] = []
        hidden = model.hidden(ids[:, :-1], routings=routings)
        nll = summed_nll(hidden, model.lm_head.weight, ids[:, 1:])  # [r, T]
        found += nll.mean(1).tolist()
        for name in layers:
            chosen = routings[numbers[name]].chosen.view(len(ids), -1)  # [r, T k]
            experts = model.moe_layers()[name].expert_bias.numel()
            loads[name] += [np.bincount(row, minlength=experts) / len(row) for row in chosen.numpy()]
    return np.array(found), {name: np.stack(rows_of) for name, rows_of in loads.items()}


def _load(loads: dict[str, np.ndarray], rows: _Rows, found: Finding, subject: Subject) -> None:
    """Add the mutual information of expert and source, in bits, with the largest of shuffled sources as its null."""
    table = []
    for name, shares in loads.items():
        value = _information(shares, rows.sources)
        random = subject.random("roles", name)
        null = [_information(shares, random.permutation(rows.sources)) for _ in range(PERMUTATIONS)]
        p = (1 + sum(n >= value for n in null)) / (1 + PERMUTATIONS)
        found.figures[f"roles/load_information_bits/{name.split('.')[2]}"] = round(value, 5)
        table.append([name.split(".")[2], f"{value:.4f}", f"{float(np.mean(null)):.4f}", f"{p:.3f}"])
    note = (
        "Load describes; it is no role. Bits between expert and source; under shuffled sources; p of the permutation."
    )
    found.tables.append(Table("Experts: load", ["layer", "information", "shuffled", "p"], table, note))


def _information(shares: np.ndarray, sources: np.ndarray) -> float:
    joint = np.stack([shares[sources == s].sum(0) for s in range(sources.max() + 1)])  # [S, E]
    joint = joint / joint.sum()
    independent = joint.sum(0, keepdims=True) * joint.sum(1, keepdims=True)
    some = joint > 0
    return float((joint[some] * np.log2(joint[some] / independent[some])).sum())


def _layer(
    subject: Subject, rows: _Rows, base: np.ndarray, name: str, moe: MoE, shares: np.ndarray, config: Roles
) -> list[Effect]:
    """Bar the most selective experts of a layer, one after the other; the bias is restored bit for bit."""
    per_source = np.stack([shares[rows.sources == s].mean(0) for s in range(len(rows.names))])  # [S, E]
    selective = per_source.max(0) / per_source.mean(0).clip(1e-9)
    chosen = sorted(np.argsort(-selective)[: config.experts_per_layer].tolist())
    losses, kept = {}, moe.expert_bias.clone()
    for expert in chosen:
        try:
            moe.expert_bias[expert] = BARRED
            losses[expert] = _run(subject, rows, [])[0] - base
        finally:
            moe.expert_bias.copy_(kept)
    load = shares.mean(0)
    effects = []
    for expert, change in losses.items():
        control = min((e for e in chosen if e != expert), key=lambda e: abs(load[e] - load[expert]))
        for number, source in enumerate(rows.names):
            inside = rows.sources == number
            nats, z = _contrast(change, inside)
            _, control_z = _contrast(change - losses[control], inside)
            effects.append(Effect(name.split(".")[2], expert, float(load[expert]), source, nats, z, control_z))
    return effects


def _contrast(change: np.ndarray, inside: np.ndarray) -> tuple[float, float]:
    """Return the mean inside minus that outside, and how many standard errors that is (Welch)."""
    one, other = change[inside], change[~inside]
    gap = float(one.mean() - other.mean())
    error = float(np.sqrt(one.var(ddof=1) / len(one) + other.var(ddof=1) / len(other)))
    return gap, gap / error if error > 0 else 0.0


def _decide(effects: list[Effect]) -> list[Effect]:
    """Mark the roles: dearer for one source than for the others, and than barring an expert of like load."""
    kept = holm([normal_p(e.z) if e.z > 0 else 1.0 for e in effects])
    against = holm([normal_p(e.control_z) if e.control_z > 0 else 1.0 for e in effects])
    return [Effect(**{**vars(e), "role": a and b}) for e, a, b in zip(effects, kept, against, strict=True)]


def _report(effects: list[Effect], found: Finding) -> None:
    roles = sorted((e for e in effects if e.role), key=lambda e: -e.nats)
    found.figures |= {"roles/pairs": len(effects), "roles/found": len(roles)}
    found.details["roles"] = [vars(e) for e in roles]
    rows = [
        [e.layer, str(e.expert), f"{100 * e.load:.1f}", e.source, f"{e.nats:+.4f}", f"{e.z:.1f}", f"{e.control_z:.1f}"]
        for e in roles[:20]
    ]
    note = f"{len(effects)} pairs of expert and source were tried; a role needs z and the control's z, Holm-corrected."
    header = ["layer", "expert", "load %", "source", "nats beyond others", "z", "z against like load"]
    found.tables.append(Table("Experts: roles", header, rows, note, left=(3,)))
    if roles:
        bars = [(f"{e.source} {e.layer}/{e.expert}", e.nats, e.nats, e.nats) for e in roles[:12]]
        found.pictures["roles"] = picture.bars("Roles: nats lost beyond the other sources", bars)
