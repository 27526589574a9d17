"""Steps whose figures are still on the device, until a log point reads them together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import Tensor

from freehold.trainer.guards import stacked_loads
from freehold.trainer.monitor import Routed
from freehold.trainer.step import StepResult


class Deferred:
    """A queue of steps: number, figures, loads [layers, E] (None without layers)."""

    def __init__(self) -> None:
        self._steps: list[tuple[int, StepResult, Tensor | None]] = []

    def add(self, step: int, result: StepResult, layers: Mapping[str, Routed]) -> None:
        """Keep a step. The loads are copied: the layers count the next step into the same memory."""
        self._steps.append((step, result, stacked_loads(layers.values())))

    def read(self) -> Iterator[tuple[int, StepResult, np.ndarray | None]]:
        """Yield the steps in order, with two reads of the device for all of them; the queue is empty then."""
        # Emptied first: what stops the run at one step must not see the same steps again.
        steps, self._steps = self._steps, []
        StepResult.read_all([result for _, result, _ in steps])
        found = [loads for _, _, loads in steps if loads is not None]
        loads = torch.stack(found).cpu().numpy() if found else [None] * len(steps)  # [steps, layers, E]
        for (step, result, _), load in zip(steps, loads, strict=True):
            yield step, result, load
