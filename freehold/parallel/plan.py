"""Which tensor is sharded over which axis: the only file that knows.

    expert stacks    [E, ., .]   sharded over `ep`, then over `edp`, both by experts: a matrix is never cut
    matrices         [m, n]      sharded over `fsdp` by rows; embedding, each block and the head are gathered apart
    gains            [d]         on every rank, in fp32: together they are a few hundred kilobytes
    expert biases    [E]         on every rank, with the same update everywhere

The order of application is fixed: other stages' layers out, attention cores for chunks, experts sharded (DTensor)
and their dispatcher, FSDP2 from the inside out (experts, block, embedding, the rest), gradients summed, not averaged.
The loss is a sum over the tokens of all ranks divided by their number, so sums are right for every tensor; a mean over
the ranks of a group would be wrong for experts, whose group is another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from freehold.model.afmoe import Afmoe
from freehold.model.moe import Experts, MoE
from freehold.parallel.context import ContextParallel
from freehold.parallel.dispatch import AllToAll
from freehold.parallel.mesh import World
from freehold.parallel.owners import OwnerShards


def parallelize(model: Afmoe, world: World, dtype: torch.dtype) -> None:
    """Shard a model in place, on the meta device or with its weights.

    Matrices are gathered and multiplied in `dtype`; what is sharded, and gradients, stay in the precision they have.
    """
    assert world.dense is not None
    assert world.sparse is not None
    degrees = world.parallel
    # Copies are an outer axis of FSDP (HSDP): gradients are reduced within a shard group, then between copies.
    dense, sparse = world.dense["fsdp"], world.sparse["edp"]
    if degrees.replicate > 1:
        dense, sparse = world.dense["replicate", "fsdp"], world.sparse["replicate", "edp"]
    world.stream_dtype = dtype
    if degrees.pipeline > 1:
        from freehold.parallel.pipeline import keep_layers, rank_stages  # which imports much of PyTorch's compiler

        stages = rank_stages(model.config.num_hidden_layers, degrees.stages, degrees.pipeline, world.place.pipeline)
        keep_layers(model, stages.values())
    if world.tokens is not None:
        ContextParallel(world.tokens["context"].get_group()).apply(model)
    if degrees.expert > 1:
        for moe in model.moe_layers().values():
            _partition(moe.experts, world)
            moe.dispatcher = AllToAll(world.sparse["ep"].get_group())
    # FSDP pads shards and starts a collective for each group; a gain is smaller than either costs.
    gains = {parameter for parameter in model.parameters() if parameter.ndim == 1}
    exact = next(model.parameters()).dtype
    policy = MixedPrecisionPolicy(
        param_dtype=None if dtype == exact else dtype, reduce_dtype=exact, cast_forward_inputs=False
    )
    # From the inside out: what an inner call takes, the outer one no longer sees.
    for block in model.model.layers.values():
        if isinstance(block.mlp, MoE):
            fully_shard(block.mlp.experts, mesh=sparse, mp_policy=policy)
        fully_shard(block, mesh=dense, mp_policy=policy, ignored_params=gains)
    if model.model.embed_tokens is not None:
        fully_shard(model.model.embed_tokens, mesh=dense, mp_policy=policy)
    # The head stays gathered between `hidden` and the gradient of the loss, which reads it directly.
    fully_shard(model, mesh=dense, mp_policy=policy, reshard_after_forward=False, ignored_params=gains)
    register_fsdp_forward_method(model, "hidden")
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            # gloo has no pre-multiplied sum; with a factor of 1 the plain sum is what is wanted anyway.
            module.set_force_sum_reduction_for_comms(True)


def _partition(experts: Experts, world: World) -> None:
    """Give each rank of `ep` its share of the experts, and pass the local share to the matrix products."""
    assert world.sparse is not None
    for name, parameter in list(experts.named_parameters()):
        # No source rank: every rank has the same weights, or they are on the meta device.
        sharded = distribute_tensor(parameter.detach(), world.sparse["ep"], [Shard(0)], src_data_rank=None)
        experts.register_parameter(name, nn.Parameter(sharded))
    experts.local_weights = lambda: tuple(local(p) for p in (experts.gate_up_proj, experts.down_proj))  # type: ignore


def local(tensor: Tensor) -> Tensor:
    """Return the part of a tensor that this rank holds; differentiable."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class ShardedTensors:
    """A sharded model with its memory, as the training loop sees it: plain local tensors by name."""

    def __init__(self, model: Afmoe, world: World) -> None:
        self.model, self.world = model, world
        self.parameters = dict(model.named_parameters())
        self.placed: dict[str, Tensor] = {**self.parameters, **dict(model.named_buffers())}

    @staticmethod
    def local(tensor: Tensor) -> Tensor:
        """Return the part of a placed tensor that this rank holds."""
        return local(tensor)

    @staticmethod
    def gathered(tensor: Tensor) -> Tensor:
        """Return a placed tensor complete, a copy; a collective."""
        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.clone()

    def forget(self) -> None:
        """Drop gathered weights: the parts have changed."""
        # The head stays gathered after a step (see `parallelize`), so it would be read with old values.
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def masters(self) -> dict[str, Tensor]:
        """Return the local part of each parameter: what an optimizer writes there is what FSDP gathers."""
        return {name: local(p.detach()).requires_grad_() for name, p in self.parameters.items()}

    def shapes(self) -> dict[str, torch.Size]:
        """Return the complete shape of each parameter."""
        return {name: p.shape for name, p in self.parameters.items()}

    def whole_form(self, name: str, part: Tensor) -> Tensor:
        """Return a local tensor (weights, moments) as a part of the complete tensor: the form for checkpoints."""
        # Slots with other dimensions than the weight (AdamW's step) are the same on every rank.
        placed = self.placed[name]
        if not isinstance(placed, DTensor) or part.ndim != placed.ndim:
            return part
        return DTensor.from_local(
            part, placed.device_mesh, placed.placements, run_check=False, shape=placed.shape, stride=placed.stride()
        )

    def part_of(self, name: str, whole: Tensor) -> Tensor:
        """Return this rank's part of a complete tensor that belongs to a parameter or buffer (weights, moments)."""
        placed = self.placed[name]
        if isinstance(whole, DTensor):
            return whole.to_local()
        if not isinstance(placed, DTensor) or whole.ndim != placed.ndim:
            return whole
        sizes, offsets = compute_local_shape_and_global_offset(placed.shape, placed.device_mesh, placed.placements)
        return whole[tuple(slice(offset, offset + size) for size, offset in zip(sizes, offsets, strict=True))]

    @torch.no_grad()
    def fill_(self, name: str, whole: Tensor) -> None:
        """Copy this rank's part of a complete parameter or buffer into its place."""
        local(self.placed[name].detach()).copy_(self.part_of(name, whole))

    def sum_replicated_(self, gradients: Mapping[str, Tensor]) -> None:
        """Add up, in place, the gradients of what every rank holds complete; FSDP has done so for the rest."""
        # Sorted and flat: the same order on every rank, and one collective for all gains.
        whole = [gradients[name] for name in sorted(gradients) if not isinstance(self.placed[name], DTensor)]
        if whole:
            flat = self.world.sum_(torch.cat([gradient.flatten() for gradient in whole]))
            for gradient, total in zip(whole, flat.split([g.numel() for g in whole]), strict=True):
                gradient.copy_(total.view_as(gradient))

    def norm(self, gradients: Mapping[str, Tensor], norm: Callable[[Iterable[Tensor]], Tensor]) -> Tensor:
        """Return the norm of all gradients of all ranks, each counted once; `norm` is that of tensors together."""
        # Every rank holds the same gains, so they are added after the sum over ranks; float64, as the sum is long.
        parts = [g for n, g in gradients.items() if isinstance(self.placed[n], DTensor) and g.numel()]
        whole = [g for n, g in gradients.items() if not isinstance(self.placed[n], DTensor)]
        nothing = torch.zeros((), dtype=torch.float64, device=self.world.device)
        square = self.world.sum_parts_(norm(parts).double().square() if parts else nothing.clone())
        square = square + (norm(whole).double().square() if whole else nothing)
        return self.world.sum_stages_(square).sqrt()

    def owners(self) -> OwnerShards:
        """Return which rank orthogonalises which matrix for Muon."""
        assert self.world.dense is not None
        return OwnerShards(self.shapes(), self.world.dense["fsdp"].get_group())
