"""What a step changes once its gradients are there: weights by the optimizers, expert biases by the balancing rule."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from freehold.optim.balance import BalanceRule
from freehold.parallel.mesh import World
from freehold.trainer.guards import Guards
from freehold.trainer.job import Job
from freehold.trainer.monitor import LoadMonitor, Routed
from freehold.trainer.state import TrainState
from freehold.trainer.step import StepResult


class Update:
    """Applies a step that the guards let pass, or lets the device decide whether it does."""

    def __init__(
        self, job: Job, world: World, state: TrainState, balance: BalanceRule, guards: Guards, monitor: LoadMonitor
    ) -> None:
        self.job, self.world, self.state = job, world, state
        self.balance, self.guards, self.monitor = balance, guards, monitor

    def __call__(self, step: int, result: StepResult) -> None:
        """Apply a step whose figures the host has seen and found good; its routing was shared already."""
        # Both are on the host already: the guards have read them.
        norm, factor = result["optim/grad_norm"], self.job.schedule.at(step).factor
        self.state.optimizers.step(factor, min(1.0, self.job.optim.clip_norm / (norm + 1e-6)))
        self._move_biases(step)
        self.monitor.add(result.logit_max)

    def on_device(self, step: int, result: StepResult) -> None:
        """Apply a step if its loss and gradient are finite; the host does not wait to learn whether they were."""
        # The same bits on every rank, since both figures were reduced over all of them.
        keep, factor = result.finite(), self.job.schedule.at(step).factor
        # A skipped step may have a NaN here; `keep` is false then and nothing uses it.
        clip = (self.job.optim.clip_norm / (result.norm() + 1e-6)).clamp_max(1.0)
        self.state.optimizers.step(factor, clip, keep)
        # Every balancing rule moves nothing when no token was routed, so zero loads skip it.
        for layer in self.state.moe_layers.values():
            layer.load_counts.mul_(keep)
        # A maximum that never counts: a NaN would stay in the monitor until the next log point.
        least = torch.full((), -math.inf, device=keep.device)
        result.logit_max.update({n: torch.where(keep, x, least.to(x.dtype)) for n, x in result.logit_max.items()})
        self.share_routing(result.logit_max)
        self._move_biases(step)
        self.monitor.add(result.logit_max, keep)

    def _move_biases(self, step: int) -> None:
        for name, layer in self.state.moe_layers.items():
            self.move_bias(step, name, layer)

    def share_routing(self, logit_max: dict[str, Tensor]) -> None:
        """Make loads and largest logits those of all processes: loads are integers, so biases agree to the bit."""
        layers = self.state.moe_layers
        if self.world.size == 1 or not layers:
            return
        # One collective for all layers: they are a few hundred integers.
        counts = self.world.sum_all_(torch.stack([layer.load_counts for layer in layers.values()]))  # [layers, E]
        least = torch.full((), -math.inf, device=self.world.device)  # of a layer that another stage holds
        largest = self.world.max_all_(torch.stack([logit_max.get(n, least).float() for n in layers]))
        for (name, layer), of_layer, maximum in zip(layers.items(), counts, largest, strict=True):
            layer.load_counts.copy_(of_layer)
            logit_max[name] = maximum

    def move_bias(self, step: int, name: str, layer: Routed) -> None:
        """Move one layer's bias by the loads of the step; further while its rate is raised."""
        # The rule moves the bias in place; the raised rate stretches that movement afterwards.
        before, factor = layer.expert_bias.clone(), self.guards.collapse.rate_factor(name, step)
        self.balance.update(name, layer.expert_bias, layer.load_counts)
        if factor != 1:
            layer.expert_bias.copy_(before + factor * (layer.expert_bias - before))
