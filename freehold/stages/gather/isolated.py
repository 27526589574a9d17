"""An iterator in a process of its own, with limits: what reads outside bytes item by item does not take the run along.

The child is a fork that sends its items as they are made, each as a JSON header and bytes; nothing is unpickled. CPU
time is counted from item to item, memory for the child. `freehold.stages.gather.worker` does the same for one file.
"""

from __future__ import annotations

import json
import os
import signal
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from freehold.core.errors import ConfigError, DataError, FreeholdError
from freehold.stages.gather.paths import Changed
from freehold.stages.gather.worker import FILE_MEMORY_BYTES, WAIT, ended_by, limit_memory, receive, send, wait_for

KINDS: dict[str, type[FreeholdError]] = {kind.__name__: kind for kind in (ConfigError, DataError, Changed)}
"""Errors that pass from the child as what they are; any other is a bug, and passes with its traceback."""
Item = tuple[dict[str, Any], bytes]


class EndedError(Exception):
    """The child died; the text says why."""


def isolated(
    make: Callable[[], Iterator[Item]], item_s: float, memory_bytes: int = FILE_MEMORY_BYTES
) -> Iterator[Item]:
    """Yield what `make()` yields, made in a child process; closing the iterator ends the child.

    Raises EndedError when the child takes more than `item_s` of CPU time for an item or more memory than it may, and
    what the iterator raises.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        _serve(make, writing, item_s, memory_bytes)
    os.close(writing)
    try:
        while True:
            try:
                head = json.loads(receive(reading, WAIT * item_s))
                data = receive(reading, WAIT * item_s)
            except EOFError:
                status, child = wait_for(child, 0.5), _gone(child)
                raise EndedError(ended_by(status, item_s, memory_bytes)) from None
            if head.get("end"):
                _raise(head)
                return
            yield head, data
    finally:
        os.close(reading)
        _gone(child)


def _gone(child: int) -> int:
    """End a child that is still there; return no child."""
    if child:
        try:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        except (ProcessLookupError, ChildProcessError):
            pass  # it ended by itself, and was waited for
    return 0


def _raise(head: dict[str, Any]) -> None:
    if head["kind"]:
        raise KINDS[head["kind"]](**head["wrong"])
    if head["bug"]:
        raise RuntimeError(f"reading failed\n{head['bug']}")


def _serve(make: Callable[[], Iterator[Item]], pipe: int, item_s: float, memory_bytes: int) -> NoReturn:
    """Send the items, then how it ended; never return to the code that forked."""
    status = 1
    try:
        signal.signal(signal.SIGPROF, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends the child
        limit_memory(memory_bytes)
        end = _items(make, pipe, item_s)
        send(pipe, json.dumps(end, default=str).encode())
        send(pipe, b"")
        status = 0
    finally:
        os._exit(status)


def _items(make: Callable[[], Iterator[Item]], pipe: int, item_s: float) -> dict[str, Any]:
    """Send every item; return what ended it. Its CPU limit's default action ends the process, wherever it is."""
    end: dict[str, Any] = {"end": True, "kind": "", "wrong": {}, "bug": ""}
    signal.setitimer(signal.ITIMER_PROF, item_s)
    try:
        for head, data in make():
            send(pipe, json.dumps(head).encode())
            send(pipe, data)
            signal.setitimer(signal.ITIMER_PROF, item_s)
    except MemoryError:
        os._exit(1)  # the parent says so
    except FreeholdError as error:
        if type(error).__name__ in KINDS:
            return end | {"kind": type(error).__name__, "wrong": error.to_dict()}
        return end | {"bug": traceback.format_exc()}
    except Exception:
        return end | {"bug": traceback.format_exc()}
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    return end
