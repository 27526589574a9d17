"""What a model takes in addition to its run: curation, synthesis, rollouts, evaluation; and all presets in one table.

Every row has its source and its error. What was never measured says so; amounts are inputs of these functions.
"""

from __future__ import annotations

from typing import NamedTuple

from freehold.core.config import fill
from freehold.core.table import Table
from freehold.model.config import ModelConfig, parameter_counts
from freehold.planner.config import PlanConfig
from freehold.planner.estimate import estimate
from freehold.planner.hardware import DEVICES, GB
from freehold.planner.published import PRESETS
from freehold.planner.serving import SERVE_ERROR, Setup, serve_row

BYTES_PER_TOKEN = 4.2
"""UTF-8 bytes of a token of a 200k vocabulary; of ours measured at 4,096 to 16,384 tokens, so a guess here."""
CURATE_BYTES_S = 11.3e6
"""Of one core, every step but the toxicity list, measured (docs/curation.md); on Ray the shards of many machines."""
CURATE_ERROR = 0.5
CORE_USD_HOUR = 0.04
ZSTD = 0.35
"""Size of text as zstd parquet."""
CLAIMED_PEAK = 0.90
"""What the project was announced with."""


class Item(NamedTuple):
    """One part of what a model takes."""

    what: str
    amount: str
    takes: str
    usd: float
    error: float
    source: str


def curation(candidate_tokens: float = 20e12) -> Item:
    """Return what curating the candidates takes."""
    size = candidate_tokens * BYTES_PER_TOKEN
    hours = size / CURATE_BYTES_S / 3600
    takes = f"{hours:,.0f} core-hours, {size * (ZSTD * 2) / 1e12:,.0f} TB of disk"
    return Item("curation, on Ray", f"{candidate_tokens / 1e12:g}T candidate tokens", takes, hours * CORE_USD_HOUR,
                CURATE_ERROR, "11.3 MB a core-second, measured on two cores; not on a cluster")  # fmt: skip


def generation(what: str, tokens: float, model: ModelConfig, source: str, context: int = 2048) -> Item:
    """Return what generating tokens takes: a full server of FP8 weights, on as many H200 as hold it."""
    setup = next(
        s for s in (Setup(f"{n} H200", DEVICES["h200"], n) for n in (1, 2, 4, 8, 16))
        if serve_row(model, "FP8", s, 256, context).fits
    )  # fmt: skip
    rate = serve_row(model, "FP8", setup, 256, context).tokens_s
    hours = tokens / rate / 3600 * setup.devices
    takes = f"{hours:,.0f} H200-hours at {rate / setup.devices:,.0f} tokens/s each"
    return Item(what, f"{tokens:,.3g} tokens", takes, hours * DEVICES["h200"].usd_hour, SERVE_ERROR, source)


def whole(config: PlanConfig, teacher: ModelConfig) -> list[Item]:
    """Return the parts of making this model; the run itself is the largest."""
    figures = estimate(config, judge=False)["figures"]
    run = figures["run/cost"]
    days = figures["run/days"].value
    return [
        curation(),
        generation("synthesis", 8e12, teacher, "8T tokens are published, the teacher is not: a Mini is assumed"),
        Item("the run", f"{config.tokens / 1e12:g}T tokens", f"{days:,.0f} days", run.value, run.error, "this plan"),
        generation("alignment rollouts", 20e9, config.model, "the amount is a guess: 1M rollouts of 20k tokens"),
        generation("evaluation", 1e9, config.model, "the amount is a guess: 100 suites of 10M tokens"),
    ]


def whole_table(config: PlanConfig, teacher: ModelConfig) -> Table:
    """Return the parts as a table, and what a token and an active parameter cost."""
    items = whole(config, teacher)
    rows = [[i.what, i.amount, i.takes, f"{i.usd:,.0f}", f"± {i.error:.0%}", i.source] for i in items]
    active = parameter_counts(config.model)["active_with_head"]
    total = sum(item.usd for item in items)
    note = (
        f"In all {total:,.0f} USD: {total / config.tokens:.2g} USD a trained token, {total / active:.2g} USD an active "
        "parameter. Published: 20M USD for 17T tokens and 13B active parameters, which is 1.2e-06 USD a token and "
        "0.0015 USD a parameter. The announced 0.0000118 USD is neither."
    )
    return Table(
        "All parts of a model", ("part", "amount", "takes", "USD", "error", "source"), rows, note, left=(0, 1, 2, 5)
    )


def presets_table() -> Table:
    """Return all presets: size, share of the experts that a token uses, days and dollars, share of the peak."""
    rows = []
    for name, preset in PRESETS.items():
        config = fill(PlanConfig, {"name": name, **preset}, "plan")
        figures = estimate(config, judge=False)["figures"]
        share = config.model.num_experts_per_tok / config.model.num_experts
        run = [
            f"{figures[key].value:,.{digits}f}" if key in figures else ""
            for key, digits in (("run/days", 1), ("run/cost", 0))
        ]
        peak = f"{figures['run/mfu'].value:.1%}" if "run/mfu" in figures else ""
        dense = config.model.num_dense_layers == config.model.num_hidden_layers
        rows.append([
            name, f"{figures['parameters/total'].value / 1e9:,.3f} B",
            f"{figures['parameters/active'].value / 1e9:,.3f} B",
            "dense" if dense else f"{share:.2%}", *run, peak,
        ])  # fmt: skip
    note = (
        "Routed share: experts a token uses over those there are, 1.56 % of Large next to 3.13 % (8 of 256) and 5.0 % "
        f"(8 of 160). Share of the peak: {CLAIMED_PEAK:.0%} was announced, and Large's own days, devices and tokens "
        "imply 11.8 %; at 90 % its 17T tokens would take 2,048 B300 4.3 days, not 33."
    )
    header = ("preset", "total", "active", "routed share", "days", "USD", "of peak")
    return Table("Presets", header, rows, note)


def interconnect(config: PlanConfig, factors: tuple[float, ...] = (1.0, 2.0)) -> Table:
    """Return what more bandwidth between machines gives: step time and days."""
    rows = []
    for factor in factors:
        machine = config.machine.model_copy(update={"network": factor * config.machine.network})
        figures = estimate(config.model_copy(update={"machine": machine}), judge=False)["figures"]
        days = figures["run/days"].value if "run/days" in figures else 0.0
        rate = machine.spec.network_bytes_s / GB
        rows.append([f"{rate:,.0f} GB/s", f"{figures['step/time'].value:.3g} s", f"{days:,.1f}"])
    note = "Each direction, each device. Links ± 30 %; most of the communication is hidden behind arithmetic."
    return Table("Bandwidth between machines", ("network", "step", "days"), rows, note)
