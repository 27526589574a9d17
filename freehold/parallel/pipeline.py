"""Pipeline parallelism: runs of consecutive layers on different ranks, several micro-batches under way at a time.

The schedules are PyTorch's. A rank's model is an `Afmoe` from which the layers of other ranks are missing: what is
left keeps its names, so a checkpoint does not tell how a run was spread. Losses are sums over the whole step, so
micro-batches add up and PyTorch's division of gradients is off.

Shapes: B rows of a micro-batch, C tokens of a row that are here, d model width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleInterleaved1F1B

from freehold.core.errors import ConfigError
from freehold.model.afmoe import Afmoe

Forward = Callable[[Tensor, Tensor, Sequence[int]], Tensor]
"""Run some layers: (ids [B, C] or stream [B, C, d], document ids [B, C], layer numbers) -> stream [B, C, d]"""
Loss = Callable[[Tensor, Tensor], Tensor]
"""Return the loss of one micro-batch: (hidden [B, C, d], targets [B, C]) -> scalar"""
STAGES_PER_RANK = {"1f1b": 1, "interleaved": 2}


def stage_layers(layers: int, stages: int) -> list[range]:
    """Cut layer numbers 0 .. layers - 1 into runs whose lengths differ by one at most."""
    ends = [(number * layers + stages - 1) // stages for number in range(stages + 1)]
    return [range(start, end) for start, end in zip(ends, ends[1:], strict=False)]


def check_pipeline(layers: int, degree: int, schedule: str, micro_batches: int) -> None:
    """Raise ConfigError unless so many layers and micro-batches can go through a pipeline of `degree` ranks."""
    stages = degree * STAGES_PER_RANK[schedule]
    if stages > layers:
        raise ConfigError(
            "there are more pipeline stages than layers",
            where="parallel.pipeline",
            found=f"{stages} stages ({degree} ranks, {schedule}), {layers} layers",
            todo="lower parallel.pipeline, or use the schedule 1f1b",
        )
    rounds = max(1, micro_batches // degree)
    if micro_batches < degree or (schedule == "interleaved" and micro_batches % rounds):
        raise ConfigError(
            "the micro-batches of a step do not fill the pipeline",
            where="parallel.pipeline",
            found=f"{micro_batches} micro-batches a step for {degree} ranks, {schedule}",
            expected=f"a multiple of {degree}" if schedule == "interleaved" else f"at least {degree}",
            todo="raise the rows of a step, or lower those of a micro-batch",
        )


def keep_stages(model: Afmoe, stages: Sequence[range]) -> None:
    """Take out of a model what belongs to other ranks: only the layers of `stages` stay, and what is at their ends."""
    kept, trunk = {number for stage in stages for number in stage}, model.model
    for number in range(model.config.num_hidden_layers):
        if number not in kept:
            del trunk.layers[str(number)]
    if 0 not in kept:
        trunk.embed_tokens = None  # type: ignore[assignment]
    if model.config.num_hidden_layers - 1 not in kept:
        trunk.norm = model.lm_head = None  # type: ignore[assignment]


class _Stage(nn.Module):
    """What PyTorch's schedule calls for a micro-batch; the parameters are the model's, not its own."""

    def __init__(self, layers: range, forward: Forward) -> None:
        super().__init__()
        self.layers, self.run = layers, forward

    def forward(self, x: Tensor, document_ids: Tensor) -> Tensor:
        return self.run(x, document_ids, self.layers)


class Pipeline:
    """The stages of one rank and the order in which micro-batches pass through them."""

    def __init__(
        self,
        model: Afmoe,
        group: dist.ProcessGroup,
        *,
        schedule: Literal["1f1b", "interleaved"],
        micro_batches: int,
        micro_shape: tuple[int, int],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Split the model in place. `micro_shape` is (B, C), the same for each micro-batch; `dtype` the stream's.

        All shapes are given to PyTorch, which else runs each stage once more to learn them, and counts its tokens.
        """
        self.rank, self.degree = dist.get_rank(group), dist.get_world_size(group)
        self.group = group
        count = self.degree * STAGES_PER_RANK[schedule]
        cuts = stage_layers(model.config.num_hidden_layers, count)
        self.mine = range(self.rank, count, self.degree)
        self.stage_layers = cuts
        keep_stages(model, [cuts[number] for number in self.mine])
        ids = torch.empty(micro_shape, dtype=torch.int64, device="meta")
        stream = torch.empty(*micro_shape, model.config.hidden_size, dtype=dtype, device="meta", requires_grad=True)
        stages = [
            PipelineStage(
                _Stage(cuts[number], lambda *arguments: self._forward(*arguments)),
                number,
                count,
                device,
                input_args=ids if number == 0 else stream,
                output_args=stream,
                group=group,
            )
            for number in self.mine
        ]
        options: dict[str, Any] = {"loss_fn": lambda *arguments: self._loss(*arguments), "scale_grads": False}
        self.schedule: Schedule1F1B | ScheduleInterleaved1F1B
        if schedule == "1f1b":
            self.schedule = Schedule1F1B(stages[0], micro_batches, **options)
        else:
            self.schedule = ScheduleInterleaved1F1B([*stages], micro_batches, **options)
        self._forward: Forward
        self._loss: Loss

    @property
    def is_first(self) -> bool:
        """Tell whether token ids enter here."""
        return 0 in self.mine

    @property
    def is_last(self) -> bool:
        """Tell whether the loss is computed here."""
        return len(self.stage_layers) - 1 in self.mine

    def step(self, input_ids: Tensor, targets: Tensor, document_ids: Tensor, forward: Forward, loss: Loss) -> None:
        """Run every micro-batch of ids, targets and documents [micro-batches * B, C] forward and backward.

        Each rank is given all three; `forward` is called for each stage here, `loss` on the last one.
        """
        self._forward, self._loss = forward, loss
        arguments = (input_ids,) if self.is_first else ()
        target = targets if self.is_last else None
        self.schedule.step(*arguments, target=target, return_outputs=False, document_ids=document_ids)


class _Attached(torch.autograd.Function):
    """The stream as it is; its gradient goes on, and the loss gets a gradient of 1."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, loss: Tensor) -> Tensor:  # type: ignore[override]
        ctx.loss = loss.dtype, loss.device
        return h.view_as(h)

    @staticmethod
    def backward(ctx: Any, dh: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        dtype, device = ctx.loss
        return dh, torch.ones((), dtype=dtype, device=device)


def attach_loss(h: Tensor, loss: Tensor) -> Tensor:
    """Return h; when its gradient is taken, so is that of `loss` (a scalar), as if it were added to the training loss.

    For losses on what happens inside a stage, which the last stage cannot see.
    """
    return _Attached.apply(h, loss)
