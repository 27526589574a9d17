"""What the loop watches: expert load, and the machine's own matrix rate to measure itself against."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping

import torch

from freehold.model.moe import MoE
from freehold.optim.balance import max_violation


class LoadMonitor:
    """Sums expert loads over the steps between two reports.

    MaxVio, entropy and dead experts are those of the summed loads; the rule itself sees each step's.
    """

    def __init__(self, layers: Mapping[str, MoE]) -> None:
        self.layers = layers
        self.loads = {name: torch.zeros_like(layer.load_counts) for name, layer in self.layers.items()}
        self.violations: dict[str, list[float]] = {name: [] for name in self.layers}

    def add(self) -> None:
        """Take the counts of one optimizer step."""
        for name, layer in self.layers.items():
            self.loads[name] += layer.load_counts
            self.violations[name].append(max_violation(layer.load_counts))

    def take(self) -> dict[str, float | int | list[int]]:
        """Return the metrics since the last call, and start anew.

        `moe/max_vio` is the mean over steps and layers of each step's own MaxVio.
        """
        values: dict[str, float | int | list[int]] = {}
        means, entropies, dead = [], [], 0
        for name, load in self.loads.items():
            number = name.split(".")[2] if "." in name else name
            steps = self.violations[name]
            means.append(sum(steps) / max(len(steps), 1))
            share = load.double() / load.sum().clamp_min(1)
            entropies.append(float(-(share * share.clamp_min(1e-12).log()).sum()) / math.log(len(load)))
            dead += int((load == 0).sum())
            values[f"moe/max_vio/{number}"] = means[-1]
            values[f"moe/load/{number}"] = load.tolist()
            load.zero_()
            steps.clear()
        if self.layers:
            biases = [layer.expert_bias for layer in self.layers.values()]
            values["moe/bias_abs_max"] = max(float(b.abs().max()) for b in biases)
            values["moe/router_logit_max"] = max(
                float(layer.last_router_logit_max or 0) for layer in self.layers.values()
            )
        values["moe/max_vio"] = sum(means) / max(len(means), 1)
        values["moe/entropy"] = sum(entropies) / max(len(entropies), 1)
        values["moe/dead"] = dead
        return values


def gemm_flops_per_s(dtype: torch.dtype, size: int = 2048, seconds: float = 0.5) -> float:
    """Return the best rate of a square matrix product on this machine now, in FLOP/s: what MFU is measured against."""
    own = torch.Generator().manual_seed(0)  # the run's own generator must not notice
    a, b = (torch.randn(size, size, generator=own).to(dtype) for _ in range(2))
    best, start = math.inf, time.perf_counter()
    while time.perf_counter() - start < seconds:
        before = time.perf_counter()
        torch.mm(a, b)
        best = min(best, time.perf_counter() - before)
    return 2 * size**3 / best
