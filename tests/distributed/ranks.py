"""Real processes over gloo for tests: a fork server that has torch loaded, worlds that stay open for many cases.

Spawning a process costs seconds of imports, and a fork of pytest's own process can hang once torch has started
threads. Here the fork server imports and does nothing else, so its forks are cheap and safe.
"""

from __future__ import annotations

import contextlib
import datetime
import faulthandler
import gc
import itertools
import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

PRELOAD = ["freehold.trainer.loop", "freehold.parallel.mesh", "torch.distributed.fsdp"]
TIMEOUT_S = 300.0
GRACE_S = 2.0
"""After one rank has failed, the others may still say why they did, too."""


class RankError(AssertionError):
    """What went wrong on which rank."""


class Ranks:
    """`size` processes with one gloo process group, which run function after function until one fails."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.folder = Path(tempfile.mkdtemp(prefix="ranks"))
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        self.processes, self.pipes = [], []
        for rank in range(size):
            mine, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, size, str(self.folder), theirs), daemon=True)
            process.start()
            theirs.close()
            self.processes.append(process)
            self.pipes.append(mine)

    def run(self, function: Callable[..., Any], *args: Any, timeout_s: float = TIMEOUT_S) -> list[Any]:
        """Call `function(*args)` on every rank; return the results by rank.

        The function must be at the top of a module. RankError holds the traceback of each rank that failed, or
        where the ranks were that did not answer; the world is closed then.
        """
        for pipe in self.pipes:
            pipe.send((function, args, timeout_s))
        results: dict[int, Any] = {}
        failures: dict[int, str] = {}
        end = time.monotonic() + timeout_s
        while len(results) + len(failures) < self.size and (left := end - time.monotonic()) > 0:
            waiting = [p for r, p in enumerate(self.pipes) if r not in results and r not in failures]
            for pipe in wait(waiting, left):
                rank = self.pipes.index(pipe)  # type: ignore[arg-type]
                try:
                    good, value = pipe.recv()  # type: ignore[union-attr]
                except (EOFError, ConnectionResetError):
                    self.processes[rank].join(GRACE_S)
                    good, value = (
                        False,
                        f"the process ended with code {self.processes[rank].exitcode}\n{self._where(rank)}",
                    )
                if good:
                    results[rank] = value
                else:
                    failures[rank] = value
                    end = min(end, time.monotonic() + GRACE_S)
        if len(results) == self.size:
            return [results[rank] for rank in range(self.size)]
        for rank in sorted(set(range(self.size)) - results.keys() - failures.keys()):
            failures[rank] = "no answer in time\n" + self._where(rank)
        self.close()
        raise RankError("\n".join(f"--- rank {rank} of {self.size}\n{text}" for rank, text in sorted(failures.items())))

    def _where(self, rank: int) -> str:
        with contextlib.suppress(OSError):
            return (self.folder / f"hang_{rank}").read_text()
        return ""

    def close(self) -> None:
        """End the processes."""
        for pipe in self.pipes:
            pipe.close()
        for process in self.processes:
            process.kill()
            process.join()

    @property
    def is_open(self) -> bool:
        """Whether every process is there."""
        return all(process.is_alive() for process in self.processes)


def _serve(rank: int, size: int, folder: str, pipe: Connection) -> None:
    import torch

    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank), "GLOO_SOCKET_IFNAME": "lo"}
    torch.set_num_threads(1)
    gc.freeze()  # what is imported stays: nothing to look through at each collection
    with open(f"{folder}/hang_{rank}", "w") as hang:
        faulthandler.enable(hang)  # a crash leaves its traceback there too
        for number in itertools.count():
            try:
                function, args, timeout_s = pipe.recv()
            except EOFError:
                return
            faulthandler.dump_traceback_later(0.9 * timeout_s, file=hang)
            try:
                # A file as the store: no port that somebody else could have taken.
                torch.distributed.init_process_group(
                    "gloo",
                    store=torch.distributed.FileStore(f"{folder}/store_{number}", size),
                    rank=rank,
                    world_size=size,
                    timeout=datetime.timedelta(seconds=TIMEOUT_S),
                )
                answer = (True, function(*args))
                torch.distributed.barrier()
            except BaseException:
                answer = (False, traceback.format_exc())
            pipe.send(answer)
            if answer[0]:
                torch.distributed.destroy_process_group()
                del answer
                gc.collect()  # every group has threads that wake up all the time until no reference is left
            faulthandler.cancel_dump_traceback_later()
