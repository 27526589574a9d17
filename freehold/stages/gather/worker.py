"""Readers in a process of their own: one hostile or damaged file costs itself, not the run.

The child is a fork that reads one file after the other, and is forked again when it dies. What it answers is JSON: the
text of a file that took it over must not run in the parent.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import resource
import select
import signal
import struct
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NoReturn

from freehold.core.errors import ConfigError
from freehold.ledger.evidence import Finding
from freehold.text.reading import Member, Part, Reading, Web

FILE_MEMORY_BYTES = 2_000_000_000
"""What reading one file may allocate: a page of 8 MB takes 0.3 GB."""
WAIT = 20
"""How often the CPU time may pass on the clock, for a child that waits and does not compute."""

Read = Callable[[str, Member, bytes, Reading], Iterable[Part]]
HEAD = struct.Struct("!Q")


class Worker:
    """Reads files in a child process; a context manager, so that no child outlives its source."""

    def __init__(self, read: Read, file_s: float, memory_bytes: int = FILE_MEMORY_BYTES) -> None:
        """Take the function to run there: (reader, member, bytes, reading) -> parts, for one file."""
        self.read, self.file_s, self.memory_bytes = read, file_s, memory_bytes
        self.child = 0
        self.asking, self.answering = -1, -1

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def parts(self, reader: str, member: Member, data: bytes, reading: Reading) -> list[Part]:
        """Return the texts of one file; a file that takes too much is noted in `reading.skipped`."""
        if not self.child:
            self._fork()
        head = {"reader": reader, "path": member.path, "limit": reading.limit_bytes, "select": reading.select}
        head["charset"] = member.web.charset if member.web else ""
        try:
            send(self.asking, json.dumps(head).encode())
            send(self.asking, data)
            answer = json.loads(receive(self.answering, WAIT * self.file_s))
        except (OSError, EOFError, ValueError):
            reading.skipped.append((member.path, self._end()))
            return []
        reading.skipped += [(path, reason) for path, reason in answer["skipped"]]
        if answer["wrong"]:
            raise ConfigError(**answer["wrong"])
        if answer["bug"]:
            raise RuntimeError(f"reading {member.path} failed\n{answer['bug']}")
        return [
            Part(member, part["anchor"], part["text"], tuple(Finding(**one) for one in part["findings"]))
            for part in answer["parts"]
        ]

    def _fork(self) -> None:
        questions, answers = os.pipe(), os.pipe()
        self.child = os.fork()
        if self.child == 0:
            os.close(questions[1])
            os.close(answers[0])
            _serve(self.read, questions[0], answers[1], self.file_s, self.memory_bytes)
        os.close(questions[0])
        os.close(answers[1])
        self.asking, self.answering = questions[1], answers[0]

    def _end(self) -> str:
        """End the child; return what ended it."""
        if not self.child:
            return ""
        for pipe in (self.asking, self.answering):
            os.close(pipe)
        status = wait_for(self.child, 0.5)
        if status is None:
            os.kill(self.child, signal.SIGKILL)
            os.waitpid(self.child, 0)
        self.child = 0
        return ended_by(status, self.file_s, self.memory_bytes)


def ended_by(status: int | None, file_s: float, memory_bytes: int) -> str:
    """Return what a child's wait status says of its end; None: it did not end by itself."""
    if status is None or (os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGPROF):
        return f"its reader took more than {file_s:g} s"
    if os.WIFSIGNALED(status):
        return f"its reader was ended by {signal.Signals(os.WTERMSIG(status)).name}"
    return f"its reader needed more than {memory_bytes / 1e9:g} GB"


def wait_for(child: int, seconds: float) -> int | None:
    """Return the status of a child that ends by itself within some time, or None."""
    for _ in range(20):
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status
        select.select([], [], [], seconds / 20)
    return None


def _serve(read: Read, asked: int, answer: int, file_s: float, memory_bytes: int) -> NoReturn:
    """Read files until the parent closes its end; never return to the code that forked."""
    status = 1
    try:
        signal.signal(signal.SIGPROF, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends the child
        limit_memory(memory_bytes)
        while True:
            head = json.loads(receive(asked))
            data = receive(asked)
            # Its default action ends the process, in whatever library it is.
            signal.setitimer(signal.ITIMER_PROF, file_s)
            found = _answer(read, head, data, memory_bytes)
            signal.setitimer(signal.ITIMER_PROF, 0)
            send(answer, json.dumps(found).encode())
    except EOFError:
        status = 0
    finally:
        os._exit(status)


def _answer(read: Read, head: dict[str, Any], data: bytes, memory_bytes: int) -> dict[str, Any]:
    web = Web("", "", "", head["charset"], {}) if head["charset"] else None
    member = Member(head["path"], "", len(data), lambda limit: data, web=web)
    reading = Reading(head["limit"], head["select"])
    parts: list[Part] = []
    wrong: dict[str, Any] = {}
    bug = ""
    try:
        parts = list(read(head["reader"], member, data, reading))
    except MemoryError:
        reading.skipped.append((member.path, f"its reader needed more than {memory_bytes / 1e9:g} GB"))
    except ConfigError as error:
        wrong = error.to_dict()
    except Exception:
        bug = traceback.format_exc()
    made = [
        {"anchor": p.anchor, "text": p.text, "findings": [dataclasses.asdict(f) for f in p.findings]} for p in parts
    ]
    return {"parts": made, "skipped": reading.skipped, "wrong": wrong, "bug": bug}


def limit_memory(memory_bytes: int) -> None:
    """Let this process allocate some bytes more than it has; no limit where the system does not say what it has."""
    with contextlib.suppress(OSError, ValueError):
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + memory_bytes
        resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))


def send(pipe: int, data: bytes) -> None:
    """Send one message."""
    view = memoryview(HEAD.pack(len(data)) + data)
    while view:
        view = view[os.write(pipe, view) :]


def receive(pipe: int, wait_s: float | None = None) -> bytes:
    """Return one message; EOFError when the other side is gone or does not answer in time."""
    (size,) = HEAD.unpack(_exactly(pipe, HEAD.size, wait_s))
    return _exactly(pipe, size, wait_s)


def _exactly(pipe: int, size: int, wait_s: float | None) -> bytes:
    pieces, left = [], size
    while left:
        if wait_s is not None and not select.select([pipe], [], [], wait_s)[0]:
            raise EOFError("no answer in time")
        piece = os.read(pipe, min(left, 1 << 20))
        if not piece:
            raise EOFError("the other side is gone")
        pieces.append(piece)
        left -= len(piece)
    return b"".join(pieces)
