"""One thread that does the model's work, one request after the other, while the server listens."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import AsyncGenerator, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

from freehold.core.errors import RequestError

T = TypeVar("T")


class Overloaded(RequestError):
    """Too many requests wait already."""


@dataclass
class _Job:
    make: Callable[[], Iterator[Any]]
    deliver: Callable[[str, Any], None]
    """Called in the worker's thread with ("item", x), ("error", e) or ("end", None)."""
    left: threading.Event = field(default_factory=threading.Event)
    """Set when nobody waits for the result any more."""


class Worker:
    """Runs iterators in a thread of its own; at most `limit` wait."""

    def __init__(self, limit: int) -> None:
        self._jobs: queue.Queue[_Job | None] = queue.Queue(maxsize=limit)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="freehold-model", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Requests that have not begun."""
        return self._jobs.qsize()

    def stop(self) -> None:
        """Drop the work that waits, end the piece being done, and wait for the thread."""
        self._stopping.set()
        with self._jobs.mutex:
            self._jobs.queue.clear()
        self._jobs.put(None)
        self._thread.join(timeout=10)

    async def run(self, make: Callable[[], Iterator[T]]) -> AsyncGenerator[T, None]:
        """Yield what `make()` yields in the worker's thread; whoever stops listening stops the work.

        Raises Overloaded when the queue is full, and whatever the iterator raises.
        """
        loop = asyncio.get_running_loop()
        results: asyncio.Queue[tuple[str, Any]] = asyncio.Queue()

        def deliver(what: str, value: Any) -> None:
            loop.call_soon_threadsafe(results.put_nowait, (what, value))

        job = _Job(make, deliver)
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
        while (job := self._jobs.get()) is not None:
            if job.left.is_set():
                continue
            try:
                self._work(job)
            except RuntimeError as error:  # the loop that listened is closed: the server is going down
                if not self._stopping.is_set() and "loop" not in str(error):
                    raise

    def _work(self, job: _Job) -> None:
        try:
            items = job.make()
            for item in items:
                job.deliver("item", item)
                if job.left.is_set() or self._stopping.is_set():
                    items.close()  # type: ignore[attr-defined]
                    break
        except Exception as error:
            job.deliver("error", error)
        else:
            job.deliver("end", None)
