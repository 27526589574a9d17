"""Routing collapse: noticed from the expert loads before the loss shows it, and what can be done about one expert.

What is watched is log2 of how many equal shares the busiest expert of a layer gets: 0 bits is perfect balance,
log2(E / k) is every token on one expert, and MaxVio = 2**bits - 1. The entropy of the loads cannot fall by more than
this rises (a divergence is at most the largest log-ratio), so it needs no watch of its own.

Shapes: L layers with experts; E experts; k experts per token; W steps in the window.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from freehold.trainer.config import CollapseConfig

# An expert with less than this part of an equal share counts as dead.
STARVED = 0.01
# A slow drift alarms when it is this many times as large as a rise within one window.
DRIFT = 1.5
# raise_rate: the balance step of a layer that collapses, times this. Our choice: a collapse that took a hundred
# published steps is undone in ten.
RATE_FACTOR = 10.0
# raise_rate: for this many steps; three windows of the detector, so that the next alarm judges the cure.
RAISE_STEPS = 100
# An expert must be dead through this many windows: balancing brings many back by itself.
DEAD_WINDOWS = 3


@dataclass(frozen=True)
class Alarm:
    """One layer that collapses: why, since when, and which experts."""

    layer: str
    reason: Literal["rise", "drift", "dead"]
    step: int
    """The step whose loads raised the alarm."""
    first_step: int
    """The first step whose update may be to blame; of a dead expert the first without tokens."""
    experts: tuple[int, ...]
    """Those with too many tokens (rise, drift) or almost none (dead)."""
    bits: float
    """How far the busiest expert's log2 share rose; 0 for dead."""

    @property
    def number(self) -> int:
        """Return the layer's index in the model."""
        return int(self.layer.split(".")[2])

    def __str__(self) -> str:
        """Say it in one line."""
        who = f"expert{'s' * (len(self.experts) > 1)} {', '.join(map(str, self.experts))}"
        if self.reason == "dead":
            return f"layer {self.number}: almost no tokens for {who} since step {self.first_step}"
        how = f"since step {self.first_step}" if self.reason == "rise" else "over its lowest, slowly"
        return f"layer {self.number}: the busiest share (of {who}) grew {2**self.bits:.1f}-fold {how}"


class CollapseDetector:
    """Watches the loads of every layer over a window of steps; its state belongs into the checkpoint.

    A layer raises an alarm when, with the threshold t = min(rise_bits, half of log2(E / k)),

    - rise: the median of the newest third of the window is t above that of the oldest third (Tukey's resistant
      line: a slope that no single odd batch can move),
    - drift: that median is 1.5 t above the lowest it ever was,
    - dead: an expert got under 1 % of an equal share in every step of three windows.

    Its window then starts again, so that the next alarm comes a window later at the earliest.
    """

    def __init__(
        self, config: CollapseConfig, layers: Sequence[str], experts: int, top_k: int, first_step: int
    ) -> None:
        self.config, self.layers, self.first_step = config, list(layers), first_step
        self.limit = min(config.rise_bits, math.log2(experts / top_k) / 2)
        window = config.window_steps
        self.bits = np.full((len(self.layers), window), np.nan)
        self.steps = np.full(window, first_step, dtype=np.int64)
        self.lowest = np.full(len(self.layers), np.inf)
        self.idle_steps = np.zeros((len(self.layers), experts), dtype=np.int64)
        self.raised_until = np.zeros(len(self.layers), dtype=np.int64)

    @property
    def oldest_step(self) -> int:
        """Return the first step that an alarm of the next step could blame."""
        return int(self.steps[0])

    def watch(self, step: int, loads: np.ndarray) -> list[Alarm]:
        """Take the loads [L, E] of step `step`; return the layers that collapse."""
        # Shares of 64-bit counts; float32 would round above 16 million tokens.
        loads = loads.astype(np.float64)
        # A first window is as uneven as a collapse: only its time separates the two.
        unwatched = step < self.first_step + self.config.warmup_steps
        if unwatched or self.limit == 0 or not loads.any():
            return []
        mean = loads.mean(axis=1, keepdims=True)
        # A ring would save the copy and cost the reader: L x W numbers a step.
        self.bits = np.append(self.bits[:, 1:], np.log2(loads.max(axis=1, keepdims=True) / mean), axis=1)
        self.steps = np.append(self.steps[1:], step)
        self.idle_steps = np.where(loads < STARVED * mean, self.idle_steps + 1, 0)
        alarms = [self._judge(index, step, loads[index]) for index in range(len(self.layers))]
        return [alarm for alarm in alarms if alarm is not None]

    def _judge(self, index: int, step: int, load: np.ndarray) -> Alarm | None:
        name, bits, third = self.layers[index], self.bits[index], self.config.window_steps // 3
        alarm = None
        # The oldest entry is NaN until the window is full.
        if not np.isnan(bits[0]):
            old, new = float(np.median(bits[:third])), float(np.median(bits[-third:]))
            # Of medians, not of single steps: one lucky batch sets no standard.
            self.lowest[index] = min(self.lowest[index], new)
            drift = new - float(self.lowest[index])
            # To blame is the update after the last step that was still about as low as the layer ever was.
            low = np.flatnonzero(bits <= self.lowest[index] + self.limit / 2)
            first = int(self.steps[low[-1] if len(low) else 0])
            # Those within a quarter of the busiest: a collapse may be on several.
            busy = tuple(map(int, np.flatnonzero(load >= 0.75 * load.max())))
            if new - old >= self.limit:
                alarm = Alarm(name, "rise", step, first, busy, new - old)
            elif drift >= DRIFT * self.limit:
                alarm = Alarm(name, "drift", step, first, busy, drift)
        # Balancing needs time to bring an expert back, and many come back by themselves.
        patience = DEAD_WINDOWS * self.config.window_steps
        dead = tuple(map(int, np.flatnonzero(self.idle_steps[index] >= patience)))
        if alarm is None and dead:
            alarm = Alarm(name, "dead", step, step - patience + 1, dead, 0.0)
        if alarm is not None:
            # The same trouble must not alarm again at the next step.
            self.bits[index], self.idle_steps[index] = np.nan, 0
        return alarm

    def raise_rate(self, layer: str, step: int) -> None:
        """Raise the balance step of a layer for RAISE_STEPS steps, from `step` on."""
        self.raised_until[self.layers.index(layer)] = step + RAISE_STEPS

    def rate_factor(self, layer: str, step: int) -> float:
        """Return the factor on the balancing rule's movement of a layer's bias in a step."""
        return RATE_FACTOR if step < self.raised_until[self.layers.index(layer)] else 1.0

    def state_dict(self) -> dict[str, Tensor]:
        """Return all that decides the next alarm."""
        return {name: torch.from_numpy(getattr(self, name).copy()) for name in self._STATE} if self.layers else {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state_dict` returned; a checkpoint without it leaves the detector as it is."""
        for name, tensor in state.items():
            setattr(self, name, tensor.numpy().copy())

    _STATE = ("bits", "steps", "lowest", "idle_steps", "raised_until")


@torch.no_grad()
def reinitialise(alarm: Alarm, state: Mapping[str, Mapping[str, Tensor]], sigma: float) -> None:
    """Draw the router's rows of an alarm's experts again, and the matrices of dead ones; changes `state` in place.

    `state` is the loop's own (`model`, `optimizer`, `balance`). A new row is drawn from the normal distribution of the
    layer's other rows, so that it scores an average token as they do; the bias becomes the mean of theirs. The
    matrices of an expert with too many tokens are trained and stay; those of a dead one, which momentum alone has
    are drawn again with `sigma`. What optimizer and balancing rule remember of these experts is forgotten.
    """
    rows = list(alarm.experts)
    gate, bias = (state["model"][f"{alarm.layer}.{name}"] for name in ("router.gate.weight", "expert_bias"))
    # Statistics of the healthy rows only.
    others = torch.ones_like(bias, dtype=torch.bool)
    others[rows] = False
    if not others.any():
        return
    # Each dimension has its own, so that a new row looks like the others.
    deviation = gate[others].std(0, correction=0).expand(len(rows), -1)
    gate[rows] = torch.normal(gate[others].mean(0).expand(len(rows), -1), deviation)
    # Not 0: biases are centred over all experts, not over these.
    bias[rows] = bias[others].mean()
    forgotten = [f"{alarm.layer}.router.gate.weight"]
    if alarm.reason == "dead":
        for name in (f"{alarm.layer}.experts.{matrix}" for matrix in ("gate_up_proj", "down_proj")):
            fresh = torch.empty_like(state["model"][name][rows])
            state["model"][name][rows] = torch.nn.init.trunc_normal_(fresh, 0.0, sigma, -3 * sigma, 3 * sigma)
            forgotten.append(name)
    for key, slot in state["optimizer"].items():
        # Momentum would pull the new rows back to where the old ones were.
        if key.rpartition(".")[0] in forgotten and slot.ndim:
            slot[rows] = 0
    if alarm.layer in state["balance"]:
        state["balance"][alarm.layer][rows] = 0
