"""Starting the ranks of one machine: N copies of one command that differ in their environment only. Imports no torch.

Only `RANK`, `WORLD_SIZE`, `LOCAL_RANK`, `MASTER_ADDR` and `MASTER_PORT` are set, so any other launcher that sets them
(torchrun, Slurm, Kubernetes) does as well. Why plain processes and not torch's elastic agent: docs/decisions/0015.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from freehold.core.errors import ConfigError
from freehold.core.machine import check_memory_fits
from freehold.parallel.config import ParallelConfig
from freehold.parallel.heartbeat import FOLDER

LOOPBACK = "127.0.0.1"
HOST = "FREEHOLD_HOST"
"""The environment variable with the number of this machine, where `parallel.hosts` are several."""
RANK_BYTES = 300_000_000
"""What a process holds before its first tensor: Python, PyTorch, pyarrow (287 MB resident)."""


def place(environment: Mapping[str, str] = os.environ) -> tuple[int, int] | None:
    """Return (rank, world size) as a launcher set them for this process; None without a launcher.

    Raises ConfigError when it set only a part of them.
    """
    if "RANK" not in environment and "WORLD_SIZE" not in environment:
        return None
    given = {name: environment.get(name) for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")}
    missing = [name for name, value in given.items() if not value]
    if not missing:
        with contextlib.suppress(ValueError):
            rank, world = int(given["RANK"] or ""), int(given["WORLD_SIZE"] or "")
            if 0 <= rank < world and 0 < int(given["MASTER_PORT"] or "") < 1 << 16:
                return rank, world
    raise ConfigError(
        "the launcher did not say which rank this is",
        where="environment",
        found=", ".join(f"{name}={value}" for name, value in given.items() if value),
        expected="RANK < WORLD_SIZE, MASTER_ADDR and MASTER_PORT",
        todo="unset RANK and WORLD_SIZE to run one process, or let `parallel.nproc` start the ranks",
    )


def leads() -> bool:
    """Return whether this process writes what a run writes once: rank 0, the only one, or the first machine's."""
    found = place()
    # A machine's supervisor is no rank: that of the first machine does what rank 0 would.
    return os.environ.get(HOST, "0") == "0" if found is None else found[0] == 0


def check_fits_machine(parallel: ParallelConfig, stage: str) -> None:
    """Raise ConfigError when `nproc` is more than this machine has devices, or memory for; a dry run may be larger."""
    where, todo = f"{stage}.parallel.nproc", "--dry-run and `freehold plan` show a mesh larger than this machine"
    # Counted without torch, which takes a second to import; other kinds of device are checked when torch is loaded.
    devices = len(list(Path("/dev").glob("nvidia[0-9]*")))
    if parallel.device == "cpu" or (parallel.device == "auto" and devices < parallel.nproc):
        check_memory_fits(parallel.nproc * RANK_BYTES, f"{parallel.nproc} processes", where, todo)
    elif 0 < devices < parallel.nproc:
        raise ConfigError(
            "more processes than devices", where=where, found=parallel.nproc, expected=f"at most {devices}", todo=todo
        )


def free_port() -> int:
    """Return a port without a listener, from below those that systems use for outgoing connections.

    Ranks may take a minute to start, and one of those others would be taken meanwhile.
    """
    # The system's own random numbers: a seeded generator would give two runs on one machine the same port.
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind((LOOPBACK, port))
            return port


class Rank:
    """One started rank: its process, and the files its output goes to."""

    def __init__(self, rank: int, command: Sequence[str], folder: Path, environment: Mapping[str, str]) -> None:
        self.rank = rank
        self.beat_path, self.out, self.err = (folder / f"rank_{rank}.{kind}" for kind in ("json", "out", "txt"))
        with self.out.open("wb") as out, self.err.open("wb") as err:
            # A process group of its own: a signal reaches it once, from the supervisor, and a kill its children too.
            self.process = subprocess.Popen(command, stdout=out, stderr=err, env=environment, process_group=0)

    def send(self, number: int) -> None:
        """Send a signal to the rank and all it started; nothing when it has gone."""
        if self.process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, number)

    def last_lines(self, count: int) -> list[str]:
        """Return the end of what the rank said on stderr."""
        # The end only: a rank may have written gigabytes.
        with self.err.open("rb") as file:
            file.seek(max(0, self.err.stat().st_size - 200 * count))
            return file.read().decode(errors="replace").splitlines()[-count:]


class Network(NamedTuple):
    """A world: its number, the first rank of this machine, how many ranks there are, and where they meet."""

    world: int
    first_rank: int
    size: int
    address: str
    port: int


def alone(world: int, nproc: int) -> Network:
    """Return a world of this machine's ranks only, at a new port."""
    return Network(world, 0, nproc, LOOPBACK, free_port())


def start(command: Sequence[str], nproc: int, folder: Path, network: Network) -> list[Rank]:
    """Start this machine's `nproc` ranks of `command`; their output and beats go to `folder`, a new one."""
    # Never an old folder: beats of an earlier world would look like those of this one.
    folder.mkdir(parents=True)
    base = {
        **os.environ,
        "WORLD_SIZE": str(network.size),
        "LOCAL_WORLD_SIZE": str(nproc),
        "MASTER_ADDR": network.address,
        "MASTER_PORT": str(network.port),
        FOLDER: str(folder.resolve()),
    }
    # Between machines the interface is the user's to name, or follows from the host name.
    if network.address == LOOPBACK:
        base["GLOO_SOCKET_IFNAME"] = "lo0" if sys.platform == "darwin" else "lo"
    # Each rank differs from the others in two variables only, as with any other launcher.
    ranks: list[Rank] = []
    try:
        for local in range(nproc):
            rank = network.first_rank + local
            ranks.append(Rank(rank, command, folder, {**base, "RANK": str(rank), "LOCAL_RANK": str(local)}))
    except BaseException:
        # Also for a signal: ranks that were started must not outlive this process.
        kill(ranks)
        raise
    return ranks


def kill(ranks: Sequence[Rank]) -> None:
    """Kill every rank, also those that are stopped, and wait until they are gone."""
    # SIGKILL: it reaches a stopped process, and a rank in a collective does not return to Python for others.
    for rank in ranks:
        rank.send(signal.SIGKILL)
    for rank in ranks:
        rank.process.wait()
