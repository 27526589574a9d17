"""What the loop watches: expert load, and the machine's own matrix rate to measure itself against."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from freehold.model.moe import MoE
from freehold.optim.balance import max_violation


@dataclass
class RoutedElsewhere:
    """What every process keeps of a MoE layer of another pipeline stage: its loads and bias, which move alike."""

    expert_bias: Tensor
    load_counts: Tensor
    last_router_logit_max: Tensor | None = None


Routed = MoE | RoutedElsewhere


class LoadMonitor:
    """Sums expert loads over the steps between two reports; a skipped step is none.

    Entropy and dead experts are those of the summed loads, MaxVio is the mean of each step's own: what the
    balancing rule sees.
    """

    def __init__(self, layers: Mapping[str, Routed]) -> None:
        self.layers = layers
        self.loads = {name: torch.zeros_like(layer.load_counts) for name, layer in self.layers.items()}
        self.violations: dict[str, list[float]] = {name: [] for name in self.layers}
        self.logit_max: dict[str, Tensor] = {}

    def add(self, logit_max: Mapping[str, Tensor]) -> None:
        """Take the counts of one optimizer step, and the largest router logit over its micro-batches."""
        for name, layer in self.layers.items():
            self.loads[name] += layer.load_counts
            self.violations[name].append(max_violation(layer.load_counts))
            self.logit_max[name] = torch.maximum(logit_max[name], self.logit_max.get(name, logit_max[name]))

    def take(self) -> dict[str, float | int | list[int]]:
        """Return the metrics since the last call, and start anew; nothing when no step was taken since.

        Each figure comes by layer (`moe/entropy/3`) and over all: the mean of MaxVio and entropy, the sum of dead
        experts, the largest bias and logit.
        """
        values: dict[str, float | int | list[int]] = {}
        by_layer: dict[str, list[float]] = {}
        for name, load in self.loads.items():
            steps, number = self.violations[name], name.split(".")[2]
            if not steps:
                continue
            share = load.double() / load.sum().clamp_min(1)
            entropy = float(-(share * share.clamp_min(1e-12).log()).sum())
            figures: dict[str, float] = {
                "moe/max_vio": sum(steps) / len(steps),
                "moe/entropy": entropy / math.log(len(load)) if len(load) > 1 else 1.0,  # one expert is even
                "moe/dead": int((load == 0).sum()),
                "moe/bias_abs_max": float(self.layers[name].expert_bias.abs().max()),
                "moe/router_logit_max": float(self.logit_max.pop(name)),
            }
            for key, figure in figures.items():
                values[f"{key}/{number}"] = figure
                by_layer.setdefault(key, []).append(figure)
            values[f"moe/load/{number}"] = load.tolist()
            load.zero_()
            steps.clear()
        for key, each in by_layer.items():
            mean = key in ("moe/max_vio", "moe/entropy")
            values[key] = sum(each) / len(each) if mean else sum(each) if key == "moe/dead" else max(each)
        return values


def gemm_flops_per_s(
    dtype: torch.dtype, device: torch.device | str = "cpu", size: int = 2048, seconds: float = 0.5
) -> float:
    """Return the best rate of a square matrix product on a device now, in FLOP/s: what MFU is measured against."""
    own = torch.Generator().manual_seed(0)  # the run's own generator must not notice
    a, b = (torch.randn(size, size, generator=own).to(device, dtype) for _ in range(2))
    best, start = math.inf, time.perf_counter()
    while time.perf_counter() - start < seconds:
        before = time.perf_counter()
        torch.mm(a, b)
        if a.is_cuda:
            torch.cuda.synchronize(a.device)
        best = min(best, time.perf_counter() - before)
    return 2 * size**3 / best
