"""Pipeline parallelism: groups of consecutive layers on different ranks, several micro-batches under way at a time.

The schedules are PyTorch's. A rank's model is an `Afmoe` from which the layers of other ranks are missing: what is
left keeps its names, so a checkpoint does not depend on how a run was sharded. Losses are sums over the whole step, so
micro-batches add up and PyTorch's division of gradients is off.

Shapes: B rows of a micro-batch, C tokens of a row that are here, d model width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleInterleaved1F1B

from freehold.model.afmoe import Afmoe
from freehold.model.config import ModelConfig
from freehold.parallel.mesh import World

Forward = Callable[[Tensor, Tensor, Sequence[int]], Tensor]
"""Run some layers: (ids [B, C] or stream [B, C, d], document ids [B, C], layer numbers) -> stream [B, C, d]"""
Loss = Callable[[Tensor, Tensor], Tensor]
"""Return the loss of one micro-batch: (hidden [B, C, d], targets [B, C]) -> scalar"""


def stage_layers(layers: int, stages: int) -> list[range]:
    """Cut layer numbers 0 .. layers - 1 into groups whose lengths differ by one at most."""
    # Rounded up, so that the longer groups come first: the last stage also has the head.
    ends = [(number * layers + stages - 1) // stages for number in range(stages + 1)]
    return [range(start, end) for start, end in zip(ends, ends[1:], strict=False)]


def rank_stages(layers: int, stages: int, ranks: int, rank: int) -> dict[int, range]:
    """Return the layers of each stage that one of the pipeline's ranks holds: stages are assigned to ranks in turn."""
    cuts = stage_layers(layers, stages)
    return {number: cuts[number] for number in range(rank, stages, ranks)}


def keep_layers(model: Afmoe, stages: Iterable[range]) -> None:
    """Remove from a model what belongs to other ranks: only the layers of `stages` stay, and what is at their ends."""
    # On the meta device, before any memory is taken: a rank never holds the layers of another.
    kept, trunk = {number for stage in stages for number in stage}, model.model
    for number in range(model.config.num_hidden_layers):
        if number not in kept:
            del trunk.layers[str(number)]
    if 0 not in kept:
        trunk.embed_tokens = None  # type: ignore[assignment]
    if model.config.num_hidden_layers - 1 not in kept:
        trunk.norm = model.lm_head = None  # type: ignore[assignment]


def relay(model: Afmoe, world: World, input_ids: Tensor, document_ids: Tensor) -> Tensor | None:
    """Run one batch [B, C] forward from stage to stage, all others waiting; return the last stage's hidden [B, C, d].

    None on the ranks that do not hold the last stage.
    """
    # Validation has no micro-batches to overlap, so it needs no schedule.
    assert world.dense is not None
    group, degrees, config = world.dense["pp"].get_group(), world.parallel, model.config
    x, held, ranks = input_ids, world.place.pipeline, degrees.pipeline
    for number, layers in enumerate(stage_layers(config.num_hidden_layers, degrees.stages)):
        if number % ranks != held:
            continue
        if number:
            # What arrives has the shape of the ids, one vector a token.
            x = torch.empty(*input_ids.shape, config.hidden_size, dtype=world.stream_dtype, device=input_ids.device)
            dist.recv(x, group=group, group_src=(number - 1) % ranks)
        x = model.hidden(x, document_ids=document_ids, layers=layers)
        if number + 1 < degrees.stages:
            dist.send(x, group=group, group_dst=(number + 1) % ranks)
    return x if (degrees.stages - 1) % ranks == held else None


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
        config: ModelConfig,
        group: dist.ProcessGroup,
        *,
        stages: int,
        micro_batches: int,
        micro_shape: tuple[int, int],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Take the shape (B, C) of every micro-batch and the `dtype` of the stream.

        All shapes are given to PyTorch: else it runs each stage once more to learn them, and those tokens are counted.
        With one stage a rank the schedule is 1F1B, with several it is the interleaved one.
        """
        self.stages = rank_stages(config.num_hidden_layers, stages, dist.get_world_size(group), dist.get_rank(group))
        ids = torch.empty(micro_shape, dtype=torch.int64, device="meta")
        stream = torch.empty(*micro_shape, config.hidden_size, dtype=dtype, device="meta", requires_grad=True)
        parts: list[Any] = [
            PipelineStage(
                # Called late: the functions belong to one step, the schedule to the run.
                _Stage(layers, lambda *arguments: self._forward(*arguments)),
                number,
                stages,
                device,
                input_args=ids if number == 0 else stream,
                output_args=stream,
                group=group,
            )
            for number, layers in self.stages.items()
        ]
        # Gradients are sums over the whole step already; the schedule must not divide them by its micro-batches.
        self.is_first, self.is_last = 0 in self.stages, stages - 1 in self.stages
        options: dict[str, Any] = {"loss_fn": lambda *arguments: self._loss(*arguments), "scale_grads": False}
        self._schedule = (
            Schedule1F1B(parts[0], micro_batches, **options)
            if len(parts) == 1
            else ScheduleInterleaved1F1B(parts, micro_batches, **options)
        )
        self._forward: Forward
        self._loss: Loss

    def step(self, input_ids: Tensor, targets: Tensor, document_ids: Tensor, forward: Forward, loss: Loss) -> None:
        """Run every micro-batch of ids, targets and documents [micro-batches * B, C] forward and backward.

        Each rank is given all three; `forward` is called for each stage here, `loss` on the last one.
        """
        self._forward, self._loss = forward, loss
        # Only the first stage takes ids, only the last one targets: PyTorch passes streams between the others.
        arguments = (input_ids,) if self.is_first else ()
        target = targets if self.is_last else None
        self._schedule.step(*arguments, target=target, return_outputs=False, document_ids=document_ids)
