"""The tensors of a run: float32 masters, the weights to compute with, optimizers, expert biases.

`WholeState` is that of one process, `ShardedState` of one process among several. The loop knows neither: both have
the methods of `TrainState`, and a tensor is named as it is in a checkpoint.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from freehold.checkpoint import dcp
from freehold.core.errors import CheckpointError
from freehold.model.afmoe import Afmoe
from freehold.optim.adamw import gradient_norm
from freehold.optim.build import Optimizers
from freehold.parallel.mesh import World
from freehold.trainer.collapse import Alarm, reinitialise
from freehold.trainer.job import Job
from freehold.trainer.monitor import Routed


class TrainState(abc.ABC):
    """What both forms share; the abstract methods are all that sharding changes."""

    model: Afmoe
    masters: dict[str, Tensor]
    """float32 weights by name: what optimizers step, or this process's shard."""
    moe_layers: dict[str, Routed]
    """Every MoE layer of the model by name, also those of other pipeline stages."""

    def __init__(self, job: Job, world: World) -> None:
        self.job, self.world = job, world

    def _finish(self) -> None:
        """Complete the construction once model and masters exist."""
        self.model.recompute = self.job.trainer.recompute
        if self.job.trainer.compile:
            self.model.compile_layers()
        # After compiling: names stay, and gradients are collected by name.
        self.parameters = dict(self.model.named_parameters())
        for master in self.masters.values():
            # The gradient of a single micro-batch stays in the dtype it was computed in: that saves a copy.
            master.grad_dtype = None
        self.optimizers = self._new_optimizers()

    @abc.abstractmethod
    def _new_optimizers(self) -> Optimizers:
        """Return optimizers that remember nothing yet."""

    @abc.abstractmethod
    def publish(self) -> None:
        """Bring the masters into the weights that the model computes with."""

    @abc.abstractmethod
    def gradient_norm(self) -> Tensor:
        """Return the norm of the whole step's gradient, float64, the same on all processes; stays on the device."""

    @abc.abstractmethod
    def shapes(self) -> dict[str, torch.Size]:
        """Return the whole shape of each parameter."""

    @abc.abstractmethod
    def local(self, tensor: Tensor) -> Tensor:
        """Return the part of a parameter, its gradient or its checkpoint form that this process holds."""

    @abc.abstractmethod
    def gathered(self, tensor: Tensor) -> Tensor:
        """Return a tensor in its checkpoint form, complete; a collective."""

    @abc.abstractmethod
    def to_checkpoint(self, name: str, part: Tensor) -> Tensor:
        """Return the checkpoint form of a tensor that belongs to parameter `name` (weights, moments)."""

    @abc.abstractmethod
    def from_checkpoint(self, name: str, tensor: Tensor) -> Tensor:
        """Return what this process holds of a tensor in its checkpoint form."""

    # -- one step ----------------------------------------------------------------------------------------------

    def collect_gradients(self) -> None:
        """Move the micro-batch's gradients to the masters; several are added up in float32."""
        for name, parameter in self.parameters.items():
            if parameter.grad is not None:
                # A parameter without a gradient (an idle expert stack of another stage) leaves its master alone.
                master, gradient = self.masters[name], self.local(parameter.grad)
                if master.grad is None:
                    master.grad = gradient
                else:
                    # bfloat16 sums would lose what later micro-batches add.
                    exact = torch.promote_types(gradient.dtype, torch.float32)
                    master.grad = master.grad.to(exact).add_(gradient)
                # The memory of a micro-batch is free before the next one is computed.
                parameter.grad = None

    def gradients(self) -> dict[str, Tensor]:
        """Return the gradients that the step has, by name."""
        return {name: master.grad for name, master in self.masters.items() if master.grad is not None}

    def clear_gradients(self) -> None:
        """Forget the gradients of the step."""
        for master in self.masters.values():
            master.grad = None

    def broken(self) -> list[str]:
        """Return the names of weights here that are not finite; one read of the device."""
        # One read for all weights, not one for each.
        finite = torch.stack([torch.isfinite(master).all() for master in self.masters.values()])
        return [name for name, good in zip(self.masters, finite.tolist(), strict=True) if not good]

    # -- checkpoints -------------------------------------------------------------------------------------------

    def named(self) -> dict[str, Tensor]:
        """Return masters and expert biases by name: what a checkpoint calls the model."""
        return {**self.masters, **{n: b for n, b in self.model.named_buffers() if n.endswith("expert_bias")}}

    def tensors(self) -> dcp.State:
        """Return model and optimizer in their checkpoint form; they share memory with the state."""
        # Slots are named after their parameter, so that one rule places both.
        slots = self.optimizers.state_dict()
        return {
            "model": {name: self.to_checkpoint(name, tensor.detach()) for name, tensor in self.named().items()},
            "optimizer": {key: self.to_checkpoint(_owner(key), slot) for key, slot in slots.items()},
        }

    def read(self, folder: Path) -> dcp.State:
        """Read a checkpoint into tensors placed as those of this run are: of each, the part this rank holds."""
        # Asked once: for a sharded state these walk the whole model.
        named, shapes = self.named(), self.shapes()

        def empty(key: str, size: torch.Size, dtype: torch.dtype) -> Tensor | None:
            part, _, name = key.partition("/")
            owner = name if part == "model" else _owner(name)
            weights = part in ("model", "optimizer")
            # Biases and loads of all layers are on every pipeline stage.
            everywhere = owner.removesuffix(".expert_bias") in self.moe_layers
            if (weights and owner not in named and not everywhere) or (
                part == "balance" and name not in self.moe_layers
            ):
                return None  # another pipeline stage's, or no one's: reported when names are compared
            # A tensor of another shape is another model's: read whole, and refused by `load`.
            if weights and owner in self.masters and shapes[owner] == size:
                return self.empty_slot(owner, dtype)
            return torch.empty(size, dtype=dtype)

        return dcp.load(folder, verify=False, empty=empty)

    def empty_slot(self, name: str, dtype: torch.dtype) -> Tensor:
        """Return memory in checkpoint form for a tensor of parameter `name`'s shape."""
        return torch.empty(self.shapes()[name], dtype=dtype)

    def load(self, state: dcp.State, folder: Path) -> None:
        """Copy weights and optimizer state of a checkpoint; CheckpointError when it is another model's."""
        self._check_names(state, folder)
        named = self.named()
        # Biases keep their own shape; of a sharded weight the whole shape is compared.
        shapes = {name: tensor.shape for name, tensor in named.items()} | self.shapes()
        with torch.no_grad():
            for name, tensor in named.items():
                found = state["model"][name]
                # copy_ would broadcast some wrong shapes without a word.
                if shapes[name] != found.shape:
                    raise CheckpointError(
                        "a tensor has another shape",
                        where=f"{folder}: {name}",
                        found=tuple(found.shape),
                        expected=tuple(shapes[name]),
                    )
                tensor.copy_(self.from_checkpoint(name, found))
        self.copy_biases(state["model"])
        self.publish()
        # New optimizers: nothing is left of steps that a roll-back undoes.
        self.optimizers = self._new_optimizers()
        # Absent before the first step, and in a checkpoint that holds a model alone.
        slots = state.get("optimizer", {}).items()
        here = {key: slot for key, slot in slots if _owner(key) in self.masters}
        self.optimizers.load_state_dict({key: self.from_checkpoint(_owner(key), slot) for key, slot in here.items()})

    def _check_names(self, state: dcp.State, folder: Path) -> None:
        """Raise CheckpointError when the ranks together do not hold the tensors that the checkpoint holds."""
        # Each rank has read its own part only: the names of all are in the file.
        held = dcp.read_names(folder) if (folder / dcp.STATE).exists() else state
        dcp.match_keys(held["model"], {name for each in dcp.gather(list(self.named())) for name in each}, folder)
        if held.get("optimizer"):  # nothing is remembered before the first step
            owners = {_owner(key) for key in held["optimizer"]}
            dcp.match_keys(owners, {name for each in dcp.gather(list(self.masters)) for name in each}, folder)

    def copy_biases(self, model: Mapping[str, Tensor]) -> None:
        """Copy the expert biases of layers that other pipeline stages hold."""
        for name, layer in self.moe_layers.items():
            if not layer.here:
                layer.expert_bias.copy_(model[f"{name}.expert_bias"])

    # -- collapse ----------------------------------------------------------------------------------------------

    def reinitialise(self, alarm: Alarm, balance: Mapping[str, Tensor]) -> None:
        """Draw the routing of an alarm's experts again.

        Every process does so on whole tensors, with the same random numbers, and keeps its parts.
        """
        parts = {
            part: {name: tensor for name, tensor in tensors.items() if name.startswith(f"{alarm.layer}.")}
            for part, tensors in self.tensors().items()
        }
        whole = {part: {name: self.gathered(t) for name, t in tensors.items()} for part, tensors in parts.items()}
        reinitialise(alarm, {**whole, "balance": balance}, self.job.model.initializer_range)
        for part, tensors in whole.items():
            for name, tensor in tensors.items():
                owner = name if part == "model" else _owner(name)
                self.local(parts[part][name]).copy_(self.from_checkpoint(owner, tensor))
        self.publish()


def build_state(job: Job, world: World, seed: int, weights: Mapping[str, Tensor] | None = None) -> TrainState:
    """Return the state before the first step: drawn from `seed`, or with the `weights` given."""
    if world.size == 1:
        return WholeState(job, world, seed, weights)
    return ShardedState(job, world, seed, weights)


def _routed(model: Afmoe, whole: Afmoe, world: World) -> dict[str, Routed]:
    """Return what is kept of each MoE layer of the whole model, of which `model` is the part that is here."""
    here, layers = model.moe_layers(), {}
    # In the order of the whole model, the same on all ranks: collectives stack them.
    for name, layer in whole.moe_layers().items():
        # Loads and biases are a few numbers: every stage keeps those of all layers, so all move the same way.
        bias = here[name].expert_bias if name in here else torch.zeros_like(layer.expert_bias, device=world.device)
        layers[name] = Routed(bias, torch.zeros_like(bias, dtype=torch.int64), name in here)
    return layers


class WholeState(TrainState):
    """Everything is here: a tensor is its own checkpoint form."""

    def __init__(self, job: Job, world: World, seed: int, weights: Mapping[str, Tensor] | None) -> None:
        super().__init__(job, world)
        self.model = Afmoe(job.model) if job.build is None else job.build()
        if job.build is not None:
            self._check_frozen()
        elif weights is None:
            self.model.init_weights(torch.Generator().manual_seed(seed))
        else:
            dcp.match_keys(weights, self.model.state_dict(), job.folder)
            self.model.load_state_dict(weights)
        # After the weights are there: the same generator gives the same numbers on every device.
        self.model.to(world.device)
        self.moe_layers = _routed(self.model, self.model, world)
        # float32: a bfloat16 weight is too coarse for the updates of a late, small learning rate.
        # Of what trains only: a frozen weight needs neither a master nor moments.
        trained = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        self.masters = {n: p.detach().requires_grad_() for n, p in trained.items()}
        # Replaces the storage of matrices; where it does not, master and weight stay one tensor.
        self.model.to_compute(job.dtype)
        # Where the compute dtype is float32 the model computes with the masters themselves.
        self.copies = {n: p.detach() for n, p in trained.items() if p.data_ptr() != self.masters[n].data_ptr()}
        self._finish()

    def _check_frozen(self) -> None:
        """Raise CheckpointError when nothing of a model trains: a run without gradients would end without a word."""
        if not any(p.requires_grad for p in self.model.parameters()):
            raise CheckpointError("no parameter of the model trains", where=self.job.folder, expected="some factors")

    def _new_optimizers(self) -> Optimizers:
        """Return optimizers that also write the compute copies: one pass over memory less."""
        return Optimizers(self.masters, self.job.optim, self.copies)

    @torch.no_grad()
    def publish(self) -> None:
        """Copy the masters into the compute weights."""
        for name, copy in self.copies.items():
            copy.copy_(self.masters[name])

    def gradient_norm(self) -> Tensor:
        """Return the norm of all gradients together."""
        return gradient_norm(self.gradients().values())

    def shapes(self) -> dict[str, torch.Size]:
        """Return the shape of each parameter."""
        return {name: master.shape for name, master in self.masters.items()}

    def local(self, tensor: Tensor) -> Tensor:
        """Return the tensor."""
        return tensor

    def gathered(self, tensor: Tensor) -> Tensor:
        """Return the tensor."""
        return tensor

    def to_checkpoint(self, name: str, part: Tensor) -> Tensor:
        """Return the tensor."""
        return part

    def from_checkpoint(self, name: str, tensor: Tensor) -> Tensor:
        """Return the tensor."""
        return tensor


class ShardedState(TrainState):
    """This process's shards of the model, with the very numbers that a single process starts from."""

    def __init__(self, job: Job, world: World, seed: int, weights: Mapping[str, Tensor] | None) -> None:
        from freehold.parallel.plan import ShardedTensors, parallelize  # only sharded runs pay for FSDP's imports

        super().__init__(job, world)
        # Shapes without memory: no process could hold all of a large model.
        with torch.device("meta"):
            self.model, whole = Afmoe(job.model), Afmoe(job.model)
        parallelize(self.model, world, job.dtype)
        self.model.to_empty(device=world.device)
        # Fresh memory holds anything; parameters are filled below, buffers here.
        for layer in self.model.moe_layers().values():
            layer.expert_bias.zero_()
        self.shards = ShardedTensors(self.model, world)
        self.moe_layers = _routed(self.model, whole, world)
        if weights is not None:
            dcp.match_keys(weights, whole.state_dict(), job.folder)
            self.copy_biases(weights)
        # Drawn and dropped one tensor at a time: a process never holds the whole model.
        values = whole.initial_values(torch.Generator().manual_seed(seed)) if weights is None else weights.items()
        for name, value in values:
            # The generator has drawn the value all the same, so every layout starts from the same numbers.
            if name in self.shards.placed:  # else another pipeline stage holds it
                self.shards.fill_(name, value)
        # The shards themselves: what an optimizer writes there is what FSDP gathers next.
        self.masters = self.shards.masters()
        self._finish()

    def _new_optimizers(self) -> Optimizers:
        """Return optimizers whose Muon gathers each matrix on one rank before it is orthogonalised."""
        return Optimizers(self.masters, self.job.optim, shapes=self.shards.shapes(), sharded=self.shards.owners())

    def publish(self) -> None:
        """Drop the gathered weights: FSDP gathers the changed shards again."""
        self.shards.forget()

    def gradient_norm(self) -> Tensor:
        """Return the norm over all ranks; gradients of replicated tensors are summed first, FSDP summed the rest."""
        gradients = self.gradients()
        self.shards.sum_replicated_(gradients)
        return self.shards.norm(gradients, gradient_norm)

    def shapes(self) -> dict[str, torch.Size]:
        """Return the whole shape of each parameter."""
        return self.shards.shapes()

    def local(self, tensor: Tensor) -> Tensor:
        """Return the shard of a placed tensor."""
        return self.shards.local(tensor)

    def gathered(self, tensor: Tensor) -> Tensor:
        """Return a whole copy of a placed tensor; a collective."""
        return self.shards.gathered(tensor)

    def to_checkpoint(self, name: str, part: Tensor) -> Tensor:
        """Return a shard as the DTensor that says which part of the whole it is."""
        return self.shards.whole_form(name, part)

    def from_checkpoint(self, name: str, tensor: Tensor) -> Tensor:
        """Return the shard of a DTensor, or of a whole tensor."""
        return self.shards.part_of(name, tensor)

    def empty_slot(self, name: str, dtype: torch.dtype) -> Tensor:
        """Return memory for this rank's shard."""
        return self.to_checkpoint(name, torch.empty_like(self.masters[name], dtype=dtype).detach())


def _owner(key: str) -> str:
    """Return the parameter of an optimizer slot `<parameter>.<slot>`."""
    return key.rpartition(".")[0]
