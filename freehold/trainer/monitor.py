"""What the loop measures between two log points: expert load, speed, and the machine's own matrix rate.

Loads count (token, expert) assignments of one whole optimizer step. With 2 rows of 4 tokens, 1 of them padding, top-2
of 4 experts, in 2 micro-batches: 7 real tokens make 14 assignments, 3.5 for each expert at perfect balance. The first
micro-batch adds its 8, the second its 6 (the padding token is routed, but not counted); a layer that is recomputed for
its gradient, and a validation, add nothing. Data ranks add up theirs before biases move, in integers.

    >>> first, second = torch.tensor([4, 2, 1, 1]), torch.tensor([3, 1, 1, 1])
    >>> loads = first + second
    >>> int(loads.sum()), loads.tolist()
    (14, [7, 3, 2, 2])
    >>> float(max_violation(loads))  # (7 - 3.5) / 3.5
    1.0
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from torch import Tensor

from freehold.model.config import flops_per_token
from freehold.optim.balance import max_violation
from freehold.parallel.mesh import World
from freehold.trainer.job import Job


@dataclass(frozen=True)
class Routed:
    """What every process keeps of each MoE layer, also of one that another pipeline stage holds."""

    expert_bias: Tensor
    """fp32 [E]; of a layer that is here its own buffer"""
    load_counts: Tensor
    """int64 [E], (token, expert) assignments of the step"""
    here: bool


REMEASURE_S = 60.0
"""Seconds between measurements of the matrix rate: each takes half a second from training."""


class LoadMonitor:
    """Sums expert loads over the steps between two log points, on the device; a skipped step does not count.

    Entropy and dead experts are those of the summed loads, MaxVio is the mean of each step's own: what the
    balancing rule sees.
    """

    def __init__(self, layers: Mapping[str, Routed]) -> None:
        self.layers = layers
        self.loads = {name: torch.zeros_like(layer.load_counts) for name, layer in self.layers.items()}
        self.violations: dict[str, list[Tensor]] = {name: [] for name in self.layers}
        self.counted: list[Tensor] = []
        """Of each step 1, or 0 when the device skipped it."""
        self.logit_max: dict[str, Tensor] = {}

    def add(self, logit_max: Mapping[str, Tensor], keep: Tensor | None = None) -> None:
        """Take the counts of one optimizer step, and the largest router logit over its micro-batches.

        keep: a 0-d bool where only the device knows whether the step counts; loads of a skipped step must be zero.
        """
        for name, layer in self.layers.items():
            self.loads[name] += layer.load_counts
            self.violations[name].append(max_violation(layer.load_counts))
            # On the device, like all else here: `take` reads it.
            self.logit_max[name] = torch.maximum(logit_max[name], self.logit_max.get(name, logit_max[name]))
        if self.layers:
            device = next(iter(self.loads.values())).device
            self.counted.append(torch.ones((), device=device) if keep is None else keep.float())

    def take(self) -> dict[str, float | int | list[int]]:
        """Return the metrics since the last call, and start again; nothing when no step was taken since.

        Each figure comes by layer (`moe/entropy/3`) and over all: the mean of MaxVio and entropy, the sum of dead
        experts, the largest bias and logit. Reads the device once a layer.
        """
        steps = torch.stack(self.counted).tolist() if self.counted else []
        values: dict[str, float | int | list[int]] = {}
        by_layer: dict[str, list[float]] = {}
        for name, load in self.loads.items() if any(steps) else ():
            figures, loads = self._of_layer(name, load, steps)
            number = name.split(".")[2]
            for key, figure in figures.items():
                values[f"{key}/{number}"] = figure
                by_layer.setdefault(key, []).append(figure)
            values[f"moe/load/{number}"] = loads
        for key, each in by_layer.items():
            # Dead experts add up, and the largest bias is the one to watch; only shares have a mean.
            mean = key in ("moe/max_vio", "moe/entropy")
            values[key] = sum(each) / len(each) if mean else sum(each) if key == "moe/dead" else max(each)
        self._clear()
        return values

    def _of_layer(self, name: str, load: Tensor, steps: list[float]) -> tuple[dict[str, float], list[int]]:
        experts = len(load)
        # A layer without tokens has shares of 0 and an entropy of 0.
        share = load.double() / load.sum().clamp_min(1)
        entropy = -(share * share.clamp_min(1e-12).log()).sum()
        bias, logit = self.layers[name].expert_bias.abs().max(), self.logit_max[name]
        # One tensor, one read; counts below 2^53 are exact in float64.
        scalars = torch.stack([x.double() for x in (entropy, bias, logit, *self.violations[name])])
        entropy_, bias_, logit_, *rest = torch.cat([scalars, load.double()]).tolist()
        violations, loads = rest[:-experts], [int(x) for x in rest[-experts:]]
        # MaxVio of a step that the device skipped is 0, and no step of the run.
        counted = [violation for violation, counts in zip(violations, steps, strict=True) if counts]
        return {
            "moe/max_vio": sum(counted) / len(counted),
            "moe/entropy": entropy_ / math.log(experts) if experts > 1 else 1.0,  # one expert is even
            "moe/dead": loads.count(0),
            "moe/bias_abs_max": bias_,
            "moe/router_logit_max": logit_,
        }, loads

    def _clear(self) -> None:
        for name, load in self.loads.items():
            load.zero_()
            self.violations[name].clear()
        self.counted.clear()
        self.logit_max.clear()


class Meter:
    """Figures of a log point: speed against the machine's own matrix rate, memory, time left, expert load."""

    def __init__(self, job: Job, world: World, step: int) -> None:
        self.job, self.world, self.device, self.process = job, world, world.device, psutil.Process()
        context = job.order.batch(step, slice(0, 1)).input_ids.shape[1]
        self.flops_per_token = flops_per_token(job.model, context)
        self.peak = gemm_flops_per_s(job.dtype, world.device) * world.size
        self.measured = -math.inf

    def mfu(self, speed: float) -> float:
        """Return the share of the machine's own matrix rate at `speed` tokens/s; NaN: unknown on a busy machine."""
        if speed * self.flops_per_token > self.peak and time.monotonic() - self.measured > REMEASURE_S:
            # More than all is a yardstick that was measured while others computed; the machine may be quiet now.
            self.measured = time.monotonic()
            self.peak = max(self.peak, gemm_flops_per_s(self.job.dtype, self.device) * self.world.size)
        share = speed * self.flops_per_token / self.peak
        return share if share <= 1 else math.nan

    def read(self, done: int, tokens: int, speed: float, step_s: float) -> dict[str, Any]:
        """Return the figures after `done` steps at `speed` tokens and 1 / `step_s` steps per second."""
        position = self.job.schedule.at(done - 1)
        memory = {"perf/memory_bytes": self.process.memory_info().rss}
        if self.device.type == "cuda":
            memory["perf/device_memory_bytes"] = torch.cuda.max_memory_allocated(self.device)
        return {
            "optim/lr": position.factor,
            "phase": position.phase,
            "tokens": tokens,
            "perf/tokens_per_s": speed,
            "perf/mfu": self.mfu(speed),
            **memory,
            "perf/eta_s": (self.job.schedule.total_steps - done) * step_s,
        }


class Stopwatch:
    """Speed since the last lap; validation and checkpoints restart it, so they do not count as training."""

    def __init__(self, step: int, tokens: int) -> None:
        self.restart(step, tokens)

    def restart(self, step: int, tokens: int) -> None:
        """Measure from here."""
        self.started, self.step, self.tokens = time.monotonic(), step, tokens

    def lap(self, step: int, tokens: int) -> tuple[float, float]:
        """Return tokens per second and seconds per step since the last lap."""
        # monotonic: the clock of the machine may be set while a run is on.
        seconds = time.monotonic() - self.started
        result = (tokens - self.tokens) / seconds, seconds / max(step - self.step, 1)
        self.restart(step, tokens)
        return result


def gemm_flops_per_s(
    dtype: torch.dtype, device: torch.device | str = "cpu", size: int = 2048, seconds: float = 0.5
) -> float:
    """Return the best rate of a square matrix product on a device now, in FLOP/s: what MFU is measured against."""
    own = torch.Generator().manual_seed(0)  # the run's own generator must not notice
    # Square and large: about the best rate that the device has.
    a, b = (torch.randn(size, size, generator=own).to(device, dtype) for _ in range(2))
    best, start = math.inf, time.perf_counter()
    while time.perf_counter() - start < seconds:
        before = time.perf_counter()
        # On a device the call returns before the product is done.
        torch.mm(a, b)
        if a.is_cuda:
            torch.cuda.synchronize(a.device)
        # The best of half a second: other load on the machine only slows it down.
        best = min(best, time.perf_counter() - before)
    return 2 * size**3 / best
