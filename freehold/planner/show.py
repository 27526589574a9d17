"""A plan as tables: every number with its unit and its error bar."""

from __future__ import annotations

from typing import Any

from freehold.core.config import fill
from freehold.core.table import Table
from freehold.planner.config import PlanConfig
from freehold.planner.estimate import Figure, estimate
from freehold.planner.hardware import FACILITY, MFU_ERROR
from freehold.planner.published import PRESETS, PUBLISHED

COMPARED = ("figure", "planned", "published", "off", "source")
TITLES = {
    "parameters": "Parameters",
    "memory": "Memory of the fullest rank",
    "step": "One optimizer step",
    "run": "The run",
    "risk": "Failures",
    "files": "Files",
    "serve": "Serving: weights and one full context",
    "qlora": "QLoRA on one device, one sequence",
}
_SCALES = ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
_WORDS = {
    "E": "quintillion ",
    "P": "quadrillion ",
    "T": "trillion ",
    "G": "billion ",
    "M": "million ",
    "k": "thousand ",
}


def number(value: float, unit: str, *, binary: bool = False) -> str:
    """Return a value with its unit, scaled: bytes as GB (or GiB), FLOPs and watts by prefix, counts by word."""
    first, _, rest = unit.partition(" ")
    if first == "bytes":
        scales = ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")) if binary else ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"))
        for scale, name in scales:
            if value >= scale:
                return f"{value / scale:,.1f} {name} {rest}".rstrip()
        return f"{value:,.0f} {unit}"
    if first in ("of", "s", "h", "min", "days", "MWh", "tokens/s"):
        if first == "of":
            return f"{value:.1%} {unit}"
        return f"{value:,.0f} {unit}" if value >= 1000 else f"{value:.3g} {unit}"
    for scale, prefix in _SCALES:
        if value >= scale and (value >= 1e6 or unit == "FLOPs"):
            return f"{value / scale:,.2f} {prefix if unit == 'FLOPs' else _WORDS[prefix]}{unit}"
    return f"{value:,.2f} {unit}" if value < 100 and value != int(value) else f"{value:,.0f} {unit}"


def _bar(figure: Figure, *, binary: bool = False) -> str:
    if not figure.error:
        return "exact" if figure.unit in ("parameters", "tokens", "steps", "FLOPs") else "given"
    return "± " + number(figure.value * figure.error, figure.unit.split(",")[0], binary=binary).split(" a sequence")[0]


def tables(plan: dict[str, Any]) -> list[Table]:
    """Return the tables of a plan: its figures by group, communication, and what others published."""
    figures: dict[str, Figure] = plan["figures"]
    found = []
    for group, title in TITLES.items():
        mine = {name: f for name, f in figures.items() if name.startswith(f"{group}/")}
        if not mine:
            continue
        binary = group in ("memory", "serve", "qlora")
        rows = [
            [name.partition("/")[2], number(f.value, f.unit, binary=binary), _bar(f, binary=binary)]
            for name, f in mine.items()
        ]
        found.append(Table(title, ("what", "planned", "error"), rows))
    if plan["traffic"]:
        rows = [
            [t.axis, t.link, f"{t.ranks:,} ranks", number(t.received_bytes, "bytes"), number(t.seconds, "s")]
            for t in plan["traffic"]
        ]
        note = "Received by one rank in one step; bytes ± 10 %, seconds ± 30 %, before overlap."
        header = ("axis", "link", "among", "bytes", "time if nothing hides it")
        found.append(Table("Communication", header, rows, note, left=(0, 1)))
    compared = comparison(plan)
    if compared:
        rows = [
            [
                row["figure"],
                number(row["planned"], row["unit"]),
                number(row["published"], row["unit"]),
                f"{row['planned'] / row['published'] - 1:+.1%}",
                row["source"],
            ]
            for row in compared
        ]
        found.append(Table("Compared with what was published", COMPARED, rows, "", left=(0, 4)))
    return found


def comparison(plan: dict[str, Any]) -> list[dict[str, Any]]:
    """Return our figure and each published one of this preset; none for another shape or number of tokens."""
    preset = PRESETS.get(plan["name"], {})
    asked = fill(PlanConfig, preset, "preset").model_dump(mode="json") if preset else {}
    if any(plan["config"][key] != asked.get(key) for key in ("model", "parts", "tokens")):
        return []
    return [
        {
            "figure": row.figure,
            "planned": plan["figures"][row.figure].value,
            "published": row.value,
            "unit": plan["figures"][row.figure].unit,
            "source": row.source,
        }
        for row in PUBLISHED.get(plan["name"], [])
        if row.figure in plan["figures"]
    ]


def assumptions(config: PlanConfig) -> str:
    """Return one sentence with every input the times, prices and risks rest on."""
    m, spec = config.machine, config.machine.spec
    p = config.parallel
    return (
        f"Assumed: {p.devices:,} x {m.device} ({spec.flops / 1e12:,.4g} TFLOP/s dense bf16, "
        f"{spec.usd_hour:,.2f} USD an hour{'; ' + spec.note if spec.note else ''}), replicate {p.replicate} x shard "
        f"{p.shard} x context {p.context} x pipeline {p.pipeline}, expert {p.expert}, recompute {p.recompute}; "
        f"arithmetic at {m.mfu:.1%} of peak ± {MFU_ERROR:.0%}, {m.overlap:.0%} of communication hidden, busiest "
        f"expert rank {m.imbalance:g} x the mean, all money {m.overhead:g} x the rent, {FACILITY:g} W at the meter "
        f"for a watt of device, a stop every {_hours(m.interruptions_per_device_hour)} device-hours."
    )


def _hours(rate: float) -> str:
    return f"{1 / rate:,.0f}" if rate else "infinitely many"


def search_table(plans: list[PlanConfig]) -> Table:
    """Return the table of `--search`: degrees that fit, the fastest first."""
    rows = []
    for config in plans:
        p, figures = config.parallel, estimate(config, judge=False)["figures"]
        rows.append([
            f"replicate={p.replicate} shard={p.shard} expert={p.expert} context={p.context} "
            f"pipeline={p.pipeline} recompute={p.recompute} micro_sequences={config.micro_sequences}",
            number(figures["memory/peak"].value, "bytes", binary=True),
            number(figures["step/time"].value, "s"),
            number(figures["step/tokens_per_device"].value, "tokens/s"),
        ])  # fmt: skip
    note = "Powers of two, 8 % of memory kept free. Errors as in the plan itself."
    return Table("Degrees that fit", ("parallel", "peak memory", "step", "each device"), rows, note)


def to_json(plan: dict[str, Any]) -> dict[str, Any]:
    """Return the plan as plain data."""
    return {
        **plan,
        "figures": {name: f._asdict() for name, f in plan["figures"].items()},
        "traffic": [t._asdict() for t in plan["traffic"]],
        "published": comparison(plan),
    }
