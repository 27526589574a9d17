"""The coordinates of this process among all of them, and the few things that all have to agree on.

Ranks are numbered pipeline stage first, then replicate, shard, context (innermost). FSDP treats shard x context as one
axis, `fsdp`; expert ranks are its innermost part, so that a small group of them is on one machine:

    dense   (pipeline, replicate, fsdp)         everything but experts
    sparse  (pipeline, replicate, edp, expert)  experts: sharded over `expert`, then over `edp`; fsdp = edp x expert
    tokens  (pipeline, replicate, shard, context)

One process has no meshes and no process group: every method of `World` then returns what it was given.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from freehold.core.errors import ConfigError
from freehold.model.device import choose_device
from freehold.parallel.config import ParallelConfig, check_degrees

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh


class Place(NamedTuple):
    """The coordinates of a rank."""

    pipeline: int
    replicate: int
    shard: int
    context: int


def place_of(rank: int, parallel: ParallelConfig) -> Place:
    """Return the coordinates of a rank."""
    # Innermost first. Neighbours exchange most: chunks of a row, then shards, then copies, then pipeline stages.
    rank, context = divmod(rank, parallel.context)
    rank, shard = divmod(rank, parallel.shard)
    pipeline, replicate = divmod(rank, parallel.replicate)
    return Place(pipeline, replicate, shard, context)


class World:
    """One process among `size`; made by `world`."""

    def __init__(self, parallel: ParallelConfig, rank: int = 0, size: int = 1) -> None:
        self.parallel, self.rank, self.size = parallel, rank, size
        self.place = place_of(rank, parallel)
        self.device = choose_device(parallel.device, "parallel.device", quiet=True)
        self.stream_dtype = torch.get_default_dtype()
        """The dtype of what one pipeline stage sends to the next; the plan sets it."""
        self.dense: DeviceMesh | None = None
        self.sparse: DeviceMesh | None = None
        self.tokens: DeviceMesh | None = None
        self._stage: ProcessGroup | None = None
        if size > 1:
            self._build()

    def _build(self) -> None:
        # One process needs none of this, and the import is slow.
        from torch.distributed.device_mesh import init_device_mesh

        p, kind = self.parallel, self.device.type
        edp = p.group // p.expert
        dense = init_device_mesh(kind, (p.pipeline, p.replicate, p.group), mesh_dim_names=("pp", "replicate", "fsdp"))
        self.dense = dense
        self.sparse = init_device_mesh(
            kind, (p.pipeline, p.replicate, edp, p.expert), mesh_dim_names=("pp", "replicate", "edp", "ep")
        )
        # Every rank takes part in making every group, also those it is not in, so the order is the same everywhere.
        self._stage = dense["replicate", "fsdp"]._flatten("stage").get_group()
        if p.context > 1:
            self.tokens = init_device_mesh(
                kind,
                (p.pipeline, p.replicate, p.shard, p.context),
                mesh_dim_names=("pp", "replicate", "shard", "context"),
            )

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that speaks and writes."""
        return self.rank == 0

    @property
    def data_rank(self) -> int:
        """Return the number of this rank among those that read different rows."""
        return self.place.replicate * self.parallel.shard + self.place.shard

    def rows(self, sequences: int) -> slice:
        """Return which rows of a step's `sequences` this rank reads."""
        each = sequences // self.parallel.data
        return slice(self.data_rank * each, (self.data_rank + 1) * each)

    def columns(self, tokens: int) -> slice:
        """Return which tokens of a row of `tokens` this rank sees."""
        each = tokens // self.parallel.context
        return slice(self.place.context * each, (self.place.context + 1) * each)

    def sum_(self, tensor: Tensor) -> Tensor:
        """Add, in place, over the ranks that hold the same layers: they see different tokens."""
        return self._reduce(tensor, "SUM", self._stage)

    def sum_parts_(self, tensor: Tensor) -> Tensor:
        """Add, in place, over the ranks that hold the parts of one copy of this pipeline stage."""
        return self._reduce(tensor, "SUM", self.dense["fsdp"].get_group() if self.dense else None)

    def sum_stages_(self, tensor: Tensor) -> Tensor:
        """Add, in place, over the stages of the pipeline."""
        # Checked by degree, not by group: with one stage the group has one rank and the call would only cost time.
        if self.parallel.pipeline == 1:
            return tensor
        return self._reduce(tensor, "SUM", self.dense["pp"].get_group() if self.dense else None)

    def sum_row_(self, tensor: Tensor) -> Tensor:
        """Add, in place, over the ranks that hold the chunks of the same rows."""
        if self.parallel.context == 1:
            return tensor
        return self._reduce(tensor, "SUM", self.tokens["context"].get_group() if self.tokens else None)

    def max_all_(self, tensor: Tensor) -> Tensor:
        """Take the largest, in place, over all processes."""
        return self._reduce(tensor, "MAX", None)

    def sum_all_(self, tensor: Tensor) -> Tensor:
        """Add, in place, over all processes; a pipeline stage that has nothing to add gives zeros."""
        return self._reduce(tensor, "SUM", None)

    def any(self, flag: bool) -> bool:
        """Return whether the flag is set on any process; all processes get the same answer."""
        # A read of the device: callers ask only where figures are read anyway.
        if self.size == 1:
            return flag
        return bool(self._reduce(torch.tensor(int(flag), device=self.device), "MAX", None))

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.size > 1:
            torch.distributed.barrier()

    def _reduce(self, tensor: Tensor, how: str, group: ProcessGroup | None) -> Tensor:
        if self.size > 1:
            torch.distributed.all_reduce(tensor, getattr(torch.distributed.ReduceOp, how), group=group)
        return tensor


def world(parallel: ParallelConfig, stage: str = "") -> World:
    """Return this process's world: alone, or in the process group that a launcher has opened.

    Raises ConfigError when the degrees do not multiply to the processes there are, or this one has no device.
    """
    place = f"{stage}.parallel" if stage else "parallel"
    # Before any group is opened: NCCL would fail much later, with a message about a peer.
    choose_device(parallel.device, f"{place}.device", quiet=True)
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        if parallel.devices > 1:
            raise ConfigError(
                "one process cannot hold a sharded model",
                where=place,
                found=parallel.product,
                expected="as many processes",
                todo=f"set {place}.nproc={parallel.devices}, or use a launcher that sets RANK and WORLD_SIZE",
            )
        return World(parallel)
    size = torch.distributed.get_world_size()
    check_degrees(parallel, size, "processes that were started", place)
    return World(parallel, torch.distributed.get_rank(), size)
