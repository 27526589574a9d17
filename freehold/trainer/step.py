"""One step's forward and backward passes: gradients in the masters, everything measured still on the device.

A step's loss is a sum over all its targets divided by their number, so the passes of its micro-batches just add up.

Shapes: B rows of a micro-batch, T tokens of a row that are here, d hidden width.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from freehold.core.marks import PADDING
from freehold.data.packing import Batch
from freehold.losses.attach import attach_loss
from freehold.losses.protocol import Loss, Scale
from freehold.model.moe import Routing
from freehold.optim.balance import router_losses
from freehold.parallel.mesh import World
from freehold.trainer.job import Job
from freehold.trainer.state import TrainState

if TYPE_CHECKING:
    from freehold.parallel.pipeline import Pipeline

NORM = "optim/grad_norm"
# The terms of expert balancing that act through the gradient, in the order in which they are summed.
ROUTER_SUMS = ("loss/sequence", "loss/router_z")


class StepResult(Mapping[str, float]):
    """The figures of one step by metric name. They stay on the device until someone looks at one.

    figures: float64 [f], the same on every rank. The first one is the loss that the guards watch.
    loads: int64 [layers, E] of all processes, where guards look at each step: read together with the figures.
    """

    def __init__(self, names: Sequence[str], figures: Tensor, logit_max: dict[str, Tensor] | None = None) -> None:
        self.names, self.figures, self.logit_max = list(names), figures, logit_max or {}
        self.loads: Tensor | None = None
        self._values: dict[str, float] | None = None
        self._loads: np.ndarray | None = None

    @classmethod
    def skipped(cls, names: Sequence[str]) -> StepResult:
        """Return the result of a step that was not run."""
        return cls(names, torch.full((len(names),), math.nan, dtype=torch.float64))

    def read(self) -> dict[str, float]:
        """Return the figures; the first call waits for the device."""
        if self._values is None:
            together = self.figures  # [f]
            if self.loads is not None:
                # Counts below 2^53 are exact in float64, so one tensor holds both: one wait for the device.
                together = torch.cat([self.figures, self.loads.flatten().double()])  # [f + layers * E]
            values = together.tolist()
            self._values = dict(zip(self.names, values, strict=False))
            if self.loads is not None:
                self._loads = np.array(values[len(self.names) :], dtype=np.int64).reshape(self.loads.shape)
        return self._values

    def host_loads(self) -> np.ndarray | None:
        """Return the loads [layers, E] on the host; None without layers, or for a step that was not run."""
        self.read()
        return self._loads

    @staticmethod
    def read_all(results: Sequence[StepResult]) -> None:
        """Read the figures of several steps with one wait for the device."""
        if results:
            for result, values in zip(results, torch.stack([r.figures for r in results]).tolist(), strict=True):
                result._values = dict(zip(result.names, values, strict=True))

    @property
    def loss(self) -> float:
        """Return the loss that the guards watch; reads the device."""
        return self.read()[self.names[0]]

    def norm(self) -> Tensor:
        """Return the gradient norm, a scalar on the device."""
        return self.figures[self.names.index(NORM)]

    def finite(self) -> Tensor:
        """Return whether loss and norm are finite, a bool scalar on the device."""
        # Also false for NaN, which compares as false.
        return (self.figures[0] < math.inf) & (self.norm() < math.inf)

    def __getitem__(self, name: str) -> float:
        return self.read()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


class ForwardBackward:
    """Runs the passes of a step on this process's part of its rows.

    deferred: the device is not waited for. Counts that need other ranks then stay on the device, and with them the
    scales that the loss multiplies with.
    """

    def __init__(self, job: Job, state: TrainState, world: World, *, deferred: bool) -> None:
        self.job, self.state, self.world, self.deferred = job, state, world, deferred
        self.loss = job.minimised()
        self.pipeline: Pipeline | None = None
        weights = (job.balance.sequence_loss, job.balance.router_z_loss)
        self.router_sums = [name for name, weight in zip(ROUTER_SUMS, weights, strict=True) if weight]

    @property
    def names(self) -> list[str]:
        """Return the names of a step's figures."""
        return [*self.loss.reports, NORM, *self.router_sums]

    def __call__(self, batch: Batch) -> StepResult:
        """Leave the gradients of the whole step in the masters; return its figures."""
        # Counts first: each pass scales its loss by the counts of the whole step.
        counts = self._counts(batch)
        # Validation leaves the model as it found it, but a caller may not.
        self.state.model.train()
        for layer in self.state.moe_layers.values():
            layer.load_counts.zero_()
        passes = _Passes(self, {name: 1 / at_least_one(count) for name, count in counts.items()})
        if self.job.parallel.pipeline > 1:
            self._pipe(batch, passes)
        else:
            # Cut on the host: a micro-batch goes to the device when its turn comes.
            for start in range(0, len(batch.input_ids), self.job.micro_sequences):
                columns = self.columns(batch.rows(start, start + self.job.micro_sequences))
                hidden, routing_loss = passes.forward(columns["input_ids"], columns["document_ids"])
                total = passes.loss(hidden, columns)
                # One backward pass for both, or the stream would be kept for two.
                (total if routing_loss is None else total + routing_loss).backward()
                self.state.collect_gradients()
        return self._result(passes, counts)

    def columns(self, batch: Batch) -> dict[str, Tensor]:
        """Return every array of a batch on the device, by field name; more fields need no change here."""
        # Fields, not a fixed list: a loss may need columns that the loop has never heard of.
        arrays = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
        return {name: self._to_device(torch.from_numpy(array)) for name, array in arrays.items()}

    def _to_device(self, tensor: Tensor) -> Tensor:
        """Copy to the device; through pinned memory where the copy would otherwise wait for the device."""
        if self.world.device.type == "cpu":
            return tensor
        return tensor.pin_memory().to(self.world.device, non_blocking=True)

    def _counts(self, batch: Batch) -> dict[str, int | Tensor]:
        """Return what divides the sums, of the whole step: the counts of the loss and `tokens` (without padding)."""
        # On the host, from the arrays: nothing was sent to the device yet.
        here = self.loss.counts(batch) | {"tokens": int((batch.document_ids != PADDING).sum())}
        if self.world.size == 1 and not self.deferred:
            return dict(here)
        # Ranks that read the same rows of a pipeline count them once.
        total = self.world.sum_(self._to_device(torch.tensor(list(here.values()))))
        return dict(zip(here, total.unbind() if self.deferred else total.tolist(), strict=True))

    def _result(self, passes: _Passes, counts: dict[str, int | Tensor]) -> StepResult:
        """Return the sums of all processes divided by their counts, and the norm of the gradient."""
        # One collective for all sums of a step.
        sums = dict(zip(passes.sums, self.world.sum_all_(passes.stacked()).unbind(), strict=True))
        figures = {name: sums[name] / at_least_one(counts[by]) for name, by in self.loss.reports.items()}
        figures[NORM] = self.state.gradient_norm()
        # Each router gets the published weight, so the reported figure is a mean over layers, too.
        routed = at_least_one(counts["tokens"] * len(self.state.moe_layers))
        figures |= {name: sums[name] / routed for name in self.router_sums}
        stacked = torch.stack([figures[name].double() for name in self.names])
        return StepResult(self.names, stacked, passes.logit_max)

    def _pipe(self, batch: Batch, passes: _Passes) -> None:
        """Send the step's micro-batches through the stages of the pipeline, forward and backward."""
        columns = self.columns(batch)
        self.pipeline = self.pipeline or self._new_pipeline(batch)
        # The schedule cuts one target tensor into micro-batches. It gets row numbers, so the loss may read any column.
        rows = torch.arange(len(batch.input_ids), device=self.world.device)

        def forward(x: Tensor, documents: Tensor, layers: Sequence[int]) -> Tensor:
            hidden, routing_loss = passes.forward(x, documents, layers)
            return hidden if routing_loss is None else attach_loss(hidden, routing_loss)

        def loss(hidden: Tensor, numbers: Tensor) -> Tensor:
            return passes.loss(hidden, {name: column.index_select(0, numbers) for name, column in columns.items()})

        self.pipeline.step(columns["input_ids"], rows, columns["document_ids"], forward, loss)
        self.state.collect_gradients()

    def _new_pipeline(self, batch: Batch) -> Pipeline:
        from freehold.parallel.pipeline import Pipeline  # which imports much of PyTorch's compiler

        rows, tokens = batch.input_ids.shape
        # The last stage cuts targets as the first one cuts ids, so both must know the size.
        micro_rows = min(self.job.micro_sequences, rows)
        assert self.world.dense is not None
        return Pipeline(
            self.job.model,
            self.world.dense["pp"].get_group(),
            stages=self.job.parallel.stages,
            micro_batches=rows // micro_rows,
            micro_shape=(micro_rows, tokens),
            dtype=self.job.dtype,
            device=self.world.device,
        )


class _Routings(list[Routing]):
    """Takes the routing of each MoE layer of a pass as it comes, in the order of `names`.

    A class of its own, because FSDP rebuilds plain lists that it finds among arguments.
    """

    def __init__(self, passes: _Passes, names: Sequence[str]) -> None:
        super().__init__()
        self.passes, self.names = passes, iter(names)

    def append(self, routing: Routing) -> None:
        """Count it; keep it only for a loss on it, since its logits then live until the backward pass."""
        self.passes.count(next(self.names), routing)
        if self.passes.job.balance.has_loss:
            super().append(routing)


class _Passes:
    """The forward passes of one step: sums over this process's tokens, and the largest router logits."""

    def __init__(self, step: ForwardBackward, scales: Mapping[str, Scale]) -> None:
        self.job, self.state, self.world = step.job, step.state, step.world
        self.minimised: Loss = step.loss
        self.scales = scales
        zero = torch.zeros((), dtype=torch.float64, device=step.world.device)
        self.sums = dict.fromkeys([*step.loss.reports, *ROUTER_SUMS], zero)
        self.logit_max: dict[str, Tensor] = {}

    def stacked(self) -> Tensor:
        """Return the sums as one float64 tensor."""
        return torch.stack(list(self.sums.values()))

    def _add(self, name: str, value: Tensor) -> None:
        # float64 whatever the sum was computed in: a step may have millions of targets.
        self.sums[name] = self.sums[name] + value.double()

    def forward(
        self, x: Tensor, documents: Tensor, layers: Sequence[int] | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Run some layers (all: None) on ids [B, T] or a stream [B, T, d].

        Returns what leaves them, [B, T, d], and the loss on their routing, if the recipe has one.
        """
        here = self.state.moe_layers
        # With several pipeline stages on a rank, a pass runs some of the layers that are here.
        names = [n for n, layer in here.items() if layer.here and (layers is None or int(n.split(".")[2]) in layers)]
        routings = _Routings(self, names)
        hidden = self.state.model.hidden(x, document_ids=documents, routings=routings, layers=layers)
        # Also where this stage has no MoE layer.
        if not routings:
            return hidden, None
        router = router_losses(
            self.job.balance,
            routings,
            documents != PADDING,
            scale=self.scales["tokens"],
            row_sum=self.world.sum_row_,
        )
        self._add("loss/sequence", router.sequence)
        self._add("loss/router_z", router.z)
        return hidden, router.total

    def count(self, name: str, routing: Routing) -> None:
        """Add one layer's routing of one micro-batch to the loads of the step."""
        self.state.moe_layers[name].load_counts.add_(routing.counts)
        largest = routing.logits.detach().amax()
        # A running maximum on the device; NaN stays NaN and shows in the metrics.
        self.logit_max[name] = torch.maximum(largest, self.logit_max.get(name, largest))

    def loss(self, hidden: Tensor, columns: Mapping[str, Tensor]) -> Tensor:
        """Return the loss of what left the last layer, [B, T, d]; a scalar."""
        found = self.minimised(hidden, self.state.model.lm_head.weight, columns, self.scales)
        for name, value in found.sums.items():
            self._add(name, value)
        return found.total


def at_least_one(count: int | Tensor) -> int | Tensor:
    """Return a count that can divide: a step without targets has a loss of 0."""
    return count.clamp_min(1).double() if isinstance(count, Tensor) else max(count, 1)
