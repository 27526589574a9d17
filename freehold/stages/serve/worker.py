"""One thread that does the model's work, a few requests in turn, while the server listens."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
from collections import deque
from collections.abc import AsyncGenerator, Callable, Generator
from dataclasses import dataclass, field
from typing import Any, TypeVar

from freehold.core.errors import RequestError

T = TypeVar("T")


class Overloaded(RequestError):
    """Too many requests wait already."""


class Stopping(RequestError):
    """The server ends before the answer does."""


@dataclass
class _Job:
    items: Generator[Any]
    deliver: Callable[[str, Any], None]
    """Called in the worker's thread with ("item", x), ("error", e) or ("end", None)."""
    left: threading.Event = field(default_factory=threading.Event)
    """Set when no one waits for the result any more."""


class Worker:
    """Runs generators in a thread of its own: `running` of them in turn, an item each; at most `limit` more wait."""

    def __init__(self, limit: int, running: int = 1) -> None:
        self._most_running = running
        self._jobs: queue.Queue[_Job | None] = queue.Queue(maxsize=limit)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="freehold-model", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Requests that have not begun."""
        return self._jobs.qsize()

    def begin_to_stop(self) -> None:
        """End all work, also what waits, with `Stopping`; returns before it has ended."""
        self._stopping.set()
        with contextlib.suppress(queue.Full):  # then the thread is awake anyway
            self._jobs.put_nowait(None)

    def stop(self) -> None:
        """End all work and wait for the thread."""
        self.begin_to_stop()
        self._thread.join(timeout=10)

    async def run(self, items: Generator[T]) -> AsyncGenerator[T, None]:
        """Yield what `items` yields in the worker's thread; whoever stops listening stops the work.

        Raises Overloaded when the queue is full, and whatever the generator raises.
        """
        loop = asyncio.get_running_loop()
        results: asyncio.Queue[tuple[str, Any]] = asyncio.Queue()

        def deliver(what: str, value: Any) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: the server is going down
                loop.call_soon_threadsafe(results.put_nowait, (what, value))

        job = _Job(items, deliver)
        if self._stopping.is_set():
            raise Stopping("the server is stopping")
        try:
            self._jobs.put_nowait(job)
        except queue.Full:
            raise Overloaded(
                "too many requests wait already", found=self._jobs.qsize(), todo="try again in a moment"
            ) from None
        try:
            while True:
                what, value = await results.get()
                if what == "end":
                    return
                if what == "error":
                    raise value
                yield value
        finally:
            job.left.set()

    def _run(self) -> None:
        running: deque[_Job] = deque()
        while not self._stopping.is_set():
            self._begin(running)
            if running and self._turn(job := running.popleft()):
                running.append(job)
        with contextlib.suppress(queue.Empty):
            while True:
                waiting = self._jobs.get_nowait()
                running.extend([waiting] if waiting else [])
        for job in running:
            job.items.close()
            job.deliver("error", Stopping("the server is stopping"))

    def _begin(self, running: deque[_Job]) -> None:
        """Take jobs that wait; wait for one when there is nothing to do."""
        while len(running) < self._most_running:
            try:
                job = self._jobs.get(block=not running)
            except queue.Empty:
                return
            if job is None:
                return
            running.append(job)

    def _turn(self, job: _Job) -> bool:
        """Make one item; return whether there may be more."""
        if job.left.is_set():
            job.items.close()
            return False
        try:
            item = next(job.items)
        except StopIteration:
            job.deliver("end", None)
            return False
        except Exception as error:
            job.deliver("error", error)
            return False
        job.deliver("item", item)
        return True
