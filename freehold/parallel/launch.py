"""Starting the ranks of one machine: N copies of one command, told apart by the environment alone. Imports no torch.

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

from freehold.core.errors import ConfigError
from freehold.core.machine import check_memory_fits
from freehold.parallel.config import ParallelConfig
from freehold.parallel.heartbeat import FOLDER

LOOPBACK = "127.0.0.1"
RANK_BYTES = 300_000_000
"""What a process holds before its first tensor: Python, PyTorch, pyarrow (287 MB resident)."""


def place(environment: Mapping[str, str] = os.environ) -> tuple[int, int] | None:
    """Return (rank, world size) as a launcher told this process; None when no launcher did.

    Raises ConfigError when what it told is not whole.
    """
    if "RANK" not in environment and "WORLD_SIZE" not in environment:
        return None
    told = {name: environment.get(name) for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")}
    missing = [name for name, value in told.items() if not value]
    if not missing:
        with contextlib.suppress(ValueError):
            rank, world = int(told["RANK"] or ""), int(told["WORLD_SIZE"] or "")
            if 0 <= rank < world and 0 < int(told["MASTER_PORT"] or "") < 1 << 16:
                return rank, world
    raise ConfigError(
        "the launcher did not say which rank this is",
        where="environment",
        found=", ".join(f"{name}={value}" for name, value in told.items() if value),
        expected="RANK < WORLD_SIZE, MASTER_ADDR and MASTER_PORT",
        todo="unset RANK and WORLD_SIZE to run one process, or let `parallel.nproc` start the ranks",
    )


def leads() -> bool:
    """Tell whether this process is the one that writes what a run writes once: rank 0, or the only one."""
    found = place()
    return found is None or found[0] == 0


def check_fits_machine(parallel: ParallelConfig, stage: str) -> None:
    """Raise ConfigError when `nproc` is more than this machine has devices, or memory for; a dry run may be larger."""
    where, todo = f"{stage}.parallel.nproc", "--dry-run and `freehold plan` show a mesh larger than this machine"
    if parallel.device == "cpu":
        check_memory_fits(parallel.nproc * RANK_BYTES, f"{parallel.nproc} processes", where, todo)
    elif 0 < (devices := len(list(Path("/dev").glob("nvidia[0-9]*")))) < parallel.nproc:  # others: torch tells later
        raise ConfigError(
            "more processes than devices", where=where, found=parallel.nproc, expected=f"at most {devices}", todo=todo
        )


def free_port() -> int:
    """Return a port that nobody listens on, from below those that systems hand out for outgoing connections.

    Ranks may take a minute to start, and one of those others would be taken meanwhile.
    """
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
            # A process group of its own: a signal reaches it once, from the supervisor, and a kill all of it.
            self.process = subprocess.Popen(command, stdout=out, stderr=err, env=environment, process_group=0)

    def send(self, number: int) -> None:
        """Send a signal to the rank and all it started; nothing when it has gone."""
        if self.process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, number)

    def last_lines(self, count: int) -> list[str]:
        """Return the end of what the rank said on stderr."""
        with self.err.open("rb") as file:
            file.seek(max(0, self.err.stat().st_size - 200 * count))
            return file.read().decode(errors="replace").splitlines()[-count:]


def start(command: Sequence[str], nproc: int, folder: Path) -> list[Rank]:
    """Start `nproc` ranks of `command` that meet at a new port; their output and beats go to `folder`, a new one."""
    folder.mkdir(parents=True)
    base = {
        **os.environ,
        "WORLD_SIZE": str(nproc),
        "LOCAL_WORLD_SIZE": str(nproc),
        "MASTER_ADDR": LOOPBACK,
        "MASTER_PORT": str(free_port()),
        "GLOO_SOCKET_IFNAME": "lo0" if sys.platform == "darwin" else "lo",
        FOLDER: str(folder.resolve()),
    }
    ranks: list[Rank] = []
    try:
        for rank in range(nproc):
            ranks.append(Rank(rank, command, folder, {**base, "RANK": str(rank), "LOCAL_RANK": str(rank)}))
    except BaseException:
        kill(ranks)
        raise
    return ranks


def kill(ranks: Sequence[Rank]) -> None:
    """End every rank at once, also those that are stopped, and wait until they are gone."""
    for rank in ranks:
        rank.send(signal.SIGKILL)
    for rank in ranks:
        rank.process.wait()
