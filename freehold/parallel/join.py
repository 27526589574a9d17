"""Opening the process group, and checking that all ranks mean the same run."""

from __future__ import annotations

import datetime
import os
from collections.abc import Mapping
from typing import Any

import torch

from freehold.core.errors import ConfigError
from freehold.model.device import choose_device
from freehold.parallel import launch
from freehold.parallel.config import ParallelConfig
from freehold.parallel.heartbeat import FOLDER

PATIENCE_S = 600.0
"""How long a collective may take at least before it counts as failed; a supervisor acts sooner."""


def join(parallel: ParallelConfig, claims: Mapping[str, str]) -> None:
    """Open the process group that a launcher has prepared and compare what each rank means to run.

    Does nothing without a launcher. `claims` names what has to be the same everywhere (recipe, code, seed, inputs) and
    gives the hash of each. Raises ConfigError, on every rank, that names the first claim and the ranks that differ from
    rank 0; or that the ranks did not meet.
    """
    found = launch.place()
    if found is None or torch.distributed.is_initialized():
        return
    rank, size = found
    # Longer than the supervisor waits: a rank that hangs must be named by it, not by a timeout in an innocent rank.
    patience = datetime.timedelta(seconds=max(PATIENCE_S, 2 * parallel.supervise.hang_s))
    # Counts and claims travel as CPU tensors, so a CUDA run needs both libraries.
    backend = "gloo" if choose_device(parallel.device, quiet=True).type == "cpu" else "cpu:gloo,cuda:nccl"
    try:
        torch.distributed.init_process_group(backend, rank=rank, world_size=size, timeout=patience)
    except torch.distributed.DistError as error:
        # Under a supervisor the port may have been taken meanwhile; it starts again at another one.
        if FOLDER in os.environ:
            raise
        raise ConfigError(
            "the ranks did not meet",
            where=f"MASTER_ADDR={os.environ['MASTER_ADDR']} MASTER_PORT={os.environ['MASTER_PORT']}, rank {rank}",
            found=str(error).splitlines()[0],
            expected=f"rank 0 at that address and port, reached by all {size} ranks",
            todo="give every rank the same address of rank 0's machine and a port that is free there",
        ) from error
    claimed: list[Any] = [None] * size
    torch.distributed.all_gather_object(claimed, dict(claims))
    # Every rank sees all claims and raises the same error: none is left waiting in a collective.
    for name, value in claimed[0].items():
        others = [number for number, claim in enumerate(claimed) if claim.get(name) != value]
        if others:
            raise ConfigError(
                f"the ranks do not run the same {name}",
                where=f"rank{'s' * (len(others) > 1)} {', '.join(map(str, others))}",
                found=str(claimed[others[0]].get(name))[:16],
                expected=f"{value[:16]}, as rank 0",
                todo="give every rank the same recipe, overrides, code and finished stages",
            )


def leave() -> None:
    """Close the process group of a run that has ended well, if there is one."""
    if torch.distributed.is_initialized():
        # A rank that leaves early closes connections that slower ranks still use.
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
