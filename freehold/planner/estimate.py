"""The plan of a run: numbers with units and error bars, what does not fit, and degrees that would."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

from freehold.core.config import fill, merge
from freehold.core.errors import ConfigError
from freehold.model.config import flops_per_token, parameter_counts
from freehold.planner.adapting import ADAPTER_ERROR, adapter_plan
from freehold.planner.config import PlanConfig
from freehold.planner.hardware import FACILITY, MFU_ERROR, RESTART_S
from freehold.planner.memory import (
    cache_bytes,
    gguf_bytes,
    serving_bytes,
    training_bytes,
    uneven_experts,
)

RESERVE = 0.08
"""Share of a device's memory left to communication buffers, fragmentation and the device's context."""
# Relative errors (about one standard deviation) of what is not counted exactly; combined by root of squares.
MEMORY_ERROR, TRAFFIC_ERROR, LINK_ERROR, PRICE_ERROR, POWER_ERROR, FAILURE_ERROR = 0.1, 0.1, 0.3, 0.2, 0.2, 0.5

DEGREES = ("replicate", "shard", "expert", "context", "pipeline", "recompute")
"""What a proposal says of `parallel`."""

FILES = ("BF16", "Q8_0", "Q6_K", "Q5_K_M", "Q5_K_S", "Q4_K_M", "Q4_K_S", "IQ4_XS", "Q3_K_L", "Q3_K_M", "Q3_K_S", "Q2_K")
"""GGUF types a plan gives the size of."""


class Figure(NamedTuple):
    """A number, its unit, and how wrong it may be, relative (0: exact, a count)."""

    value: float
    unit: str
    error: float = 0.0


class Traffic(NamedTuple):
    """What one rank receives over one axis in one optimizer step, and how long that takes if nothing hides it."""

    axis: str
    link: str
    ranks: int
    received_bytes: float
    seconds: float


def traffic(config: PlanConfig) -> list[Traffic]:
    """Return the communication of one optimizer step by axis; ranks are numbered context, shard, replicate, pipeline
    from the inside (`parallel/mesh.py`), and expert groups are neighbours, inside a machine as long as they fit.
    """
    m, p, machine, spec, b = config.model, config.parallel, config.machine, config.machine.spec, config.bytes_per_value
    counts = parameter_counts(m, config.parts)
    moe_layers = (m.num_hidden_layers - m.num_dense_layers) / p.pipeline
    experts = moe_layers * counts["expert"] * m.num_experts
    rest = counts["total"] / p.pipeline - experts
    tokens, passes = config.micro_tokens * config.micro_batches, config.micro_batches
    forwards = 2 if p.recompute == "full" else 1
    found: list[Traffic] = []

    def add(axis: str, ranks: int, stride: int, received: float, *, same: bool = False) -> None:
        if ranks < 2 or received <= 0:
            return
        inside = max(1, min(ranks, spec.per_node // stride))
        local = ranks * stride <= spec.per_node
        # What all ranks of a machine need comes in once over all its cards; else only neighbours' parts stay off.
        cards = inside if same else (ranks - 1) / max(ranks - inside, 1)
        rate = spec.node_bytes_s if local else min(spec.node_bytes_s, spec.network_bytes_s * cards)
        found.append(Traffic(axis, "node" if local else "network", ranks, received, received / rate))

    def gathered(parameters: float, ranks: int) -> float:
        # Weights for the forward and again for the backward pass, then gradients scattered in float32.
        return parameters * (ranks - 1) / ranks * (2 * b + 4) * passes

    replicas_of_experts = p.group // p.expert
    add("shard", p.group, 1, gathered(rest, p.group), same=True)
    split = gathered(experts / p.expert, replicas_of_experts)
    add("shard of experts", replicas_of_experts, p.expert, split, same=True)
    rows = tokens * m.num_experts_per_tok * m.hidden_size * b * machine.imbalance * machine.dispatch
    add("expert", p.expert, 1, rows * (p.expert - 1) / p.expert * 2 * (forwards + 1) * moe_layers)
    add("replicate", p.replicate, p.group, (experts + rest) / p.group * 4 * 2 * (p.replicate - 1) / p.replicate)
    full = m.num_full_layers / p.pipeline
    sliding = m.num_hidden_layers / p.pipeline - full
    seen = (
        tokens * (p.context - 1) * full
        + config.micro_sequences * passes * min(m.sliding_window, config.chunk_tokens) * sliding
    )
    add("context", p.context, 1, 2 * m.key_width * b * seen * (forwards + 1))
    add("pipeline", p.pipeline, p.group * p.replicate, 2 * tokens * m.hidden_size * b)
    if config.matrices == "muon":
        dense = (counts["muon"] - (m.num_hidden_layers - m.num_dense_layers) * counts["expert"] * m.num_experts) / (
            p.pipeline
        )
        add("muon", p.group, 1, 2 * b * dense / p.group)
    return found


def muon_flops(config: PlanConfig) -> float:
    """Return the FLOPs of the Newton-Schulz iterations on every hidden matrix once, m x n with m <= n.

    One is 4 m^2 n + 2 m^3; our CPU kernel makes X X^T and its square from one triangle each: 3 m^2 n + m^3.
    """
    if config.matrices != "muon":
        return 0.0
    wide, square = (3, 1) if config.machine.kernels == "native" else (4, 2)
    m = config.model
    d, moe_layers = m.hidden_size, m.num_hidden_layers - m.num_dense_layers
    matrices = [(3 * m.num_hidden_layers, d, m.query_width), (2 * m.num_hidden_layers, d, m.key_width)]
    matrices += [(3 * m.num_dense_layers, d, m.intermediate_size)]
    matrices += [(3 * moe_layers * m.num_experts, d, m.moe_intermediate_size)]
    matrices += [(3 * moe_layers, d, m.moe_intermediate_size * m.num_shared_experts)]
    flops = sum(n * (wide * min(a, b) ** 2 * max(a, b) + square * min(a, b) ** 3) for n, a, b in matrices)
    return config.newton_schulz_steps * flops


def estimate(config: PlanConfig, *, judge: bool = True) -> dict[str, Any]:
    """Return the plan: `figures` by slash names, `traffic`, `problems` (sentences) and the config it rests on.

    With `judge=False` nothing is said about what does not fit, for that may take a search.
    """
    m, p, machine, spec = config.model, config.parallel, config.machine, config.machine.spec
    counts = parameter_counts(m, config.parts)
    figures: dict[str, Figure] = {
        "parameters/total": Figure(counts["total"], "parameters"),
        "parameters/active": Figure(counts["active_with_head"], "parameters"),
        "parameters/rank": Figure(
            math.ceil(counts["total"] / (p.group * p.pipeline) + uneven_experts(config)), "parameters"
        ),
    }
    parts = training_bytes(config)
    errors = {"activations": MEMORY_ERROR, "logits": MEMORY_ERROR, "all_to_all": TRAFFIC_ERROR, "peak": MEMORY_ERROR}
    figures |= {f"memory/{name}": Figure(n, "bytes", errors.get(name, 0.01)) for name, n in parts.items()}
    for policy in ("none", "full"):
        other = config.model_copy(update={"parallel": p.model_copy(update={"recompute": policy})})
        figures[f"memory/peak_recompute_{policy}"] = Figure(training_bytes(other)["peak"], "bytes", MEMORY_ERROR)
    figures["memory/device"] = Figure(spec.memory_bytes, "bytes")

    step_tokens = config.sequences * config.batch.context_tokens
    flops = flops_per_token(m, config.batch.context_tokens, config.parts)
    rate = spec.flops * machine.mfu
    useful = flops * step_tokens / p.devices
    again = (flops - 6 * counts["head"]) / 3 * step_tokens / p.devices if p.recompute == "full" else 0.0
    arithmetic = (useful + again) / rate
    # The other roof: weights read three times a pass, kept activations written and read.
    local = parts["weights"] if p.group == 1 else (counts["total"] / p.pipeline) / p.expert * config.bytes_per_value
    moved = config.micro_batches * (3 * local + 2 * parts["activations"])
    work = max(arithmetic, moved / spec.memory_bytes_s)
    states = 2 * (parts["masters"] + parts["optimizer"]) + 2 * parts["gradients"]
    optimizer = max(muon_flops(config) / (p.group * p.pipeline) / rate, states / spec.memory_bytes_s)
    bubble = machine.bubble * work * (p.pipeline - 1) / config.micro_batches
    rows = traffic(config)
    talk = sum(row.seconds for row in rows)
    exposed = talk - min(talk * machine.overlap, work)
    step = work + optimizer + bubble + exposed
    bound = {"work": MFU_ERROR * work, "talk": LINK_ERROR * exposed, "optimizer": LINK_ERROR * optimizer}
    step_error = math.hypot(*bound.values()) / step
    figures |= {
        "step/tokens": Figure(step_tokens, "tokens"),
        "step/flops": Figure(flops * step_tokens, "FLOPs"),
        "step/arithmetic": Figure(arithmetic, "s", MFU_ERROR),
        "step/memory_roof": Figure(moved / spec.memory_bytes_s, "s", MEMORY_ERROR),
        "step/optimizer": Figure(optimizer, "s", LINK_ERROR),
        "step/bubble": Figure(bubble, "s", MFU_ERROR),
        "step/communication": Figure(talk, "s", LINK_ERROR),
        "step/exposed": Figure(exposed, "s", LINK_ERROR),
        "step/time": Figure(step, "s", step_error),
        "step/tokens_per_device": Figure(step_tokens / p.devices / step, "tokens/s", step_error),
        "step/mfu": Figure(useful / step / spec.flops, "of peak", step_error),
    }
    figures |= _risk(config, counts)
    if config.tokens:
        steps = config.tokens / step_tokens
        days = steps * step / figures["risk/goodput"].value / 86400
        hours = days * 24 * p.devices
        rent = hours * spec.usd_hour
        money_error = math.hypot(step_error, PRICE_ERROR)
        figures |= {
            "run/tokens": Figure(config.tokens, "tokens"),
            "run/steps": Figure(math.ceil(steps), "steps"),
            "run/days": Figure(days, "days", step_error),
            "run/device_hours": Figure(hours, "device-hours", step_error),
            "run/rent": Figure(rent, "USD", money_error),
            "run/cost": Figure(rent * machine.overhead, "USD", money_error),
            "run/energy": Figure(hours * spec.watts * FACILITY / 1e6, "MWh", math.hypot(step_error, POWER_ERROR)),
            "run/mfu": Figure(
                flops * config.tokens / (hours * 3600 * spec.flops), "of peak, stops included", step_error
            ),
        }
    figures |= _use(config)
    return {
        "name": config.name,
        "config": config.model_dump(mode="json"),
        "figures": figures,
        "traffic": rows,
        "problems": problems(config, parts["peak"]) if judge else [],
    }


def _use(config: PlanConfig) -> dict[str, Figure]:
    """Return the bytes of files, of serving one full context, and of QLoRA on one device; AFMoE shapes only."""
    if config.parts:
        return {}
    m = config.model
    figures = {f"files/{kind}": Figure(gguf_bytes(m, kind), "bytes", 0.005) for kind in FILES}
    for weights in ("BF16", "FP8", "NVFP4", "Q4_K_M"):
        held = serving_bytes(config, weights, m.max_position_embeddings)
        figures[f"serve/{weights}"] = Figure(held, "bytes", MEMORY_ERROR)
    cache = cache_bytes(m, m.max_position_embeddings)
    figures["serve/cache"] = Figure(cache, f"bytes a sequence of {m.max_position_embeddings:,} tokens", 0.01)
    for kind in ("Q4_0", "NF4"):
        adapting = adapter_plan(config, experts=kind)
        figures[f"qlora/{kind.lower()}_experts"] = Figure(adapting.device, "bytes", ADAPTER_ERROR)
    return figures


def _risk(config: PlanConfig, counts: dict[str, int]) -> dict[str, Figure]:
    """Return failures, the checkpoint interval of Young and Daly, sqrt(2 x write x time between stops), and goodput."""
    machine, p = config.machine, config.parallel
    muon = counts["muon"] if config.matrices == "muon" else 0
    size = 8 * muon + 12 * (counts["total"] - muon)  # masters with one or two moments
    write = size / machine.storage_bytes_s
    rate = machine.interruptions_per_device_hour * p.devices / 3600
    every = math.sqrt(2 * write / rate) if rate else math.inf
    lost = write / every + rate * (every / 2 + RESTART_S) if rate else 0.0
    if lost >= 1:
        raise ConfigError(
            "the run would never advance: stops come faster than it recovers",
            where="machine",
            found=f"a stop every {1 / rate:,.0f} s, {RESTART_S:,.0f} s to restart, {write:,.0f} s to save",
            todo="raise machine.storage_bytes_s or use fewer devices",
        )
    figures = {
        "risk/checkpoint": Figure(size, "bytes", 0.01),
        "risk/checkpoint_write": Figure(write, "s", LINK_ERROR),
        "risk/goodput": Figure(1 - lost, "of the time", FAILURE_ERROR * lost),
    }
    if rate:
        figures["risk/between_stops"] = Figure(1 / rate / 3600, "h", FAILURE_ERROR)
        figures["risk/checkpoint_every"] = Figure(every / 60, "min", FAILURE_ERROR / 2)
    return figures


def fits(config: PlanConfig) -> bool:
    """Return whether the peak leaves the reserve of the device's memory free."""
    return training_bytes(config)["peak"] <= (1 - RESERVE) * config.machine.spec.memory_bytes


def problems(config: PlanConfig, peak_bytes: float) -> list[str]:
    """Return a sentence for what does not fit, saying what would make it fit."""
    if fits(config):
        return []
    p, spec = config.parallel, config.machine.spec
    said = (
        f"Memory does not fit: a rank needs {peak_bytes / 2**30:,.1f} GiB and a {config.machine.device} has "
        f"{spec.memory_bytes / 2**30:,.1f} GiB, of which {RESERVE:.0%} stay free."
    )
    chunk = {"loss_chunk_tokens": 2048}
    single: list[dict[str, Any]] = [
        {"parallel": {"recompute": "full"}},
        {"batch": {"micro_sequences": 1}},
        chunk,
        {"parallel": {"recompute": "full"}, "batch": {"micro_sequences": 1}, **chunk},
    ]
    for change in single:
        other = changed(config, change)
        if other is not None and other != config and fits(other):
            return [f"{said} It fits with {_spell(change)} ({training_bytes(other)['peak'] / 2**30:,.1f} GiB)."]
    for factor in (1, 2, 4, 8, 16, 32, 64, 128, 256):
        best = search(config, devices=p.devices * factor, keep=1)
        if best:
            degrees = {
                "parallel": best[0].parallel.model_dump(include=set(DEGREES)),
                "batch": best[0].batch.model_dump(include={"sequences", "micro_sequences"}),
            }
            where = "these devices" if factor == 1 else f"{p.devices * factor:,} devices"
            return [f"{said} It fits on {where} with {_spell(degrees)}."]
    return [f"{said} No degrees up to {p.devices * 256:,} devices make it fit; take a larger device."]


def changed(config: PlanConfig, change: dict[str, Any]) -> PlanConfig | None:
    """Return the plan with `change` applied, or None when degrees then do not fit."""
    try:
        return fill(PlanConfig, merge(config.model_dump(), change), "plan")
    except ConfigError:
        return None


def _spell(change: dict[str, Any]) -> str:
    return " ".join(
        f"{key}.{inner}={value}" if inner else f"{key}={value}"
        for key, values in change.items()
        for inner, value in (values.items() if isinstance(values, dict) else [("", values)])
    )


def search(config: PlanConfig, devices: int = 0, keep: int = 5) -> list[PlanConfig]:
    """Return the fastest plans that fit on `devices` (default: the plan's own), powers of two of every degree."""
    devices = devices or config.parallel.devices
    found = []
    for degrees in _degrees(config, devices):
        data = degrees["replicate"] * degrees["shard"]
        rows = -(-config.sequences // data)  # of one data rank in a step
        for micro in (n for n in (8, 4, 2, 1) if rows % n == 0):  # fewer passes gather the weights less often
            batch = {"sequences": rows * data, "micro_sequences": micro}
            other = changed(config, {"parallel": degrees, "machine": {"devices": devices}, "batch": batch})
            if other is None or not fits(other):
                continue
            with contextlib.suppress(ConfigError):  # with this number of devices the run would never advance
                speed = estimate(other, judge=False)["figures"]["step/tokens_per_device"].value
                found.append((-speed, _spell({"parallel": degrees}), other))
            break
    return [other for _, _, other in sorted(found, key=lambda item: item[:2])[:keep]]


def _degrees(config: PlanConfig, devices: int) -> Iterator[dict[str, Any]]:
    m, node = config.model, config.machine.spec.per_node
    powers = [1 << n for n in range(devices.bit_length()) if devices % (1 << n) == 0]
    for pipeline in (n for n in powers if n <= min(8, m.num_hidden_layers)):
        for context in (n for n in powers if n <= 8 and not devices % (pipeline * n)):
            for shard in (n for n in powers if not devices % (pipeline * context * n)):
                for expert in (n for n in powers if n <= 8 * node and not shard * context % n):
                    for recompute in ("none", "full"):
                        replicate = devices // (pipeline * context * shard)
                        yield {"replicate": replicate, "shard": shard, "expert": expert, "context": context,
                               "pipeline": pipeline, "recompute": recompute}  # fmt: skip
