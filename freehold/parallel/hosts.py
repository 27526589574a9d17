"""Machines that run one stage together: they agree on each world through files in the run folder. Imports no torch.

Every machine runs the same command with its number in FREEHOLD_HOST and the address of machine 0 in MASTER_ADDR; its
supervisor starts and watches `parallel.nproc` ranks of its own. The folder, which all machines share, holds

    host_K.json    what machine K does: its newest world, whether it is ready, running, failed or finished, and a count
                   that rises every second: a count that stands still is a machine that is gone
    world.json     written by machine 0 once all are ready: number and port of the next world

So a machine that dies, hangs or loses its network ends the world on all machines, and the next one begins when all are
back: no one types anything. No clock is compared with another machine's.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from freehold.core.errors import ConfigError
from freehold.parallel import launch

BEAT_S = 1.0
LOST_S = 30.0
"""A machine whose count stands still for this long is lost; a shared file system may show a file late."""
POLL_S = 0.2
REMIND_S = 60.0
"""Seconds between lines that say for whom a machine waits."""


def host_number(hosts: int, environment: Mapping[str, str] = os.environ) -> int:
    """Return the number of this machine; ConfigError when several are configured and it is not said, or not one."""
    number = environment.get(launch.HOST, "")
    if hosts == 1:
        return 0
    if number.isdigit() and int(number) < hosts and environment.get("MASTER_ADDR"):
        return int(number)
    raise ConfigError(
        "which of the machines this one is was not said",
        where="environment",
        found=f"{launch.HOST}={number or 'unset'}, MASTER_ADDR={environment.get('MASTER_ADDR', 'unset')}",
        expected=f"{launch.HOST} from 0 to {hosts - 1}, and the address of machine 0 in MASTER_ADDR",
        todo="set both on each machine (Slurm: SLURM_NODEID, Kubernetes: JOB_COMPLETION_INDEX), or parallel.hosts=1",
    )


@dataclass
class Seen:
    """What was last read of another machine."""

    record: dict[str, Any] = field(default_factory=dict)
    moved: float = field(default_factory=time.monotonic)


class Hosts:
    """This machine among `count`, and what it knows of the others."""

    def __init__(self, folder: Path, number: int, count: int, nproc: int, say: Callable[[str], None]) -> None:
        self.folder, self.number, self.count, self.nproc, self.say = folder, number, count, nproc, say
        self.state: dict[str, Any] = {"world": 0, "state": "ready", "what": ""}
        self.seen = {other: Seen() for other in range(count) if other != number}
        self.beat = 0
        folder.mkdir(parents=True, exist_ok=True)
        # A thread: while this machine waits for a disk or judges a failure, the others must see that it lives.
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._keep_beating, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop the beat; the last state stays for the others to read."""
        self._stop.set()
        self._thread.join()
        self._write()

    def report(self, state: str, world: int, what: str = "") -> None:
        """Show the others what this machine does now."""
        self.state = {"world": world, "state": state, "what": what}
        self._write()

    def meet(self, last: int, stop: Callable[[], bool]) -> launch.Network | None:
        """Wait until all machines are ready after world `last`; return the next world, None when `stop` says so."""
        # With what ended the last world: the others may look only now.
        self.report("ready", last, self.state["what"])
        waited = time.monotonic()
        while not stop():
            self.look()
            found = self._next_world(last)
            if found is not None:
                first = self.number * self.nproc
                address = os.environ["MASTER_ADDR"]
                return launch.Network(found["world"], first, self.count * self.nproc, address, found["port"])
            if time.monotonic() - waited > REMIND_S:
                waited = time.monotonic()
                self.say(f"machine {self.number} waits for machine {', '.join(map(str, self._missing()))}")
            time.sleep(POLL_S)
        return None

    def _next_world(self, last: int) -> dict[str, Any] | None:
        file = self.folder / "world.json"
        if self.number:
            found = read(file)
            return found if found.get("world", 0) > last else None
        if self._missing():
            return None
        # Above every number that any machine has used: each has folders of its own for its worlds.
        world = 1 + max([last, *(seen.record["world"] for seen in self.seen.values())])
        write(file, found := {"world": world, "port": launch.free_port()})
        return found

    def _missing(self) -> list[int]:
        """Return the machines that are not ready, as far as this one can know."""
        # Only machine 0 waits for each of the others; they wait for what it writes.
        if self.number:
            return [0]
        return [n for n, seen in self.seen.items() if self._silent_s(seen) > LOST_S or not self._ready(seen)]

    def _ready(self, seen: Seen) -> bool:
        return seen.record.get("state") == "ready" and seen.record["beat"] != seen.record.get("first")

    def _silent_s(self, seen: Seen) -> float:
        return time.monotonic() - seen.moved

    def look(self) -> None:
        """Read what the other machines show."""
        for number, seen in self.seen.items():
            record = read(self.folder / f"host_{number}.json")
            if record and record.get("beat") != seen.record.get("beat"):
                # The first beat that is read may be that of a machine long gone: only a rise shows that it lives.
                first = seen.record.get("first", record["beat"])
                seen.record, seen.moved = {**record, "first": first}, time.monotonic()

    def trouble(self, world: int) -> str:
        """Return what ended a world on another machine; empty while all run it or have finished it."""
        self.look()
        for number, seen in self.seen.items():
            state, theirs = seen.record.get("state"), seen.record.get("world", 0)
            if state in ("failed", "ready") and theirs >= world:
                return f"machine {number}: {seen.record['what'] or 'it was started again'}"
            if state != "finished" and self._silent_s(seen) > LOST_S:
                return f"machine {number} is lost: no sign for {self._silent_s(seen):.0f} s"
        return ""

    def finish(self, world: int, stop: Callable[[], bool]) -> str:
        """Wait until every machine has finished a world that went well here; return what went wrong elsewhere."""
        # Machine 0 writes the stage's last files when others have nothing left to do: it may still need them.
        while not stop():
            if trouble := self.trouble(world):
                return trouble
            if all(seen.record.get("state") == "finished" for seen in self.seen.values()):
                return ""
            time.sleep(POLL_S)
        return "stopped"

    def _keep_beating(self) -> None:
        while not self._stop.wait(BEAT_S):
            self._write()

    def _write(self) -> None:
        self.beat += 1
        # Another process of this machine counts from elsewhere, so that a restart is a change too.
        write(self.folder / f"host_{self.number}.json", {**self.state, "beat": f"{os.getpid()}.{self.beat}"})


def write(path: Path, record: dict[str, Any]) -> None:
    """Write a small file that readers see whole; a disk that refuses is a missed beat."""
    with contextlib.suppress(OSError):
        # A reader on another machine sees the old file or the new one, never half of either.
        temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
        temporary.write_text(json.dumps(record), encoding="utf-8")
        temporary.replace(path)


def read(path: Path) -> dict[str, Any]:
    """Return a small file's record; empty when it is not there."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}
