"""Threads that do the model's work while the server listens: a few requests each, in turn."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections import Counter, deque
from collections.abc import AsyncGenerator, Callable, Generator, Hashable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from freehold.core.errors import RequestError

T = TypeVar("T")
LONGEST_RETRY_S = 60
"""The most seconds a client is asked to wait before it tries again."""


class Overloaded(RequestError):
    """Too many requests wait already, or one waited too long; `retry_s` is when to try again."""

    retry_s = 1


class Stopping(RequestError):
    """The server ends before the answer does."""


@dataclass(eq=False)
class _Job:
    items: Generator[Any]
    deliver: Callable[[str, Any], None]
    """Called in the worker's thread with ("item", x), ("error", e) or ("end", None)."""
    tenant: Hashable
    left: threading.Event = field(default_factory=threading.Event)
    """Set when no one waits for the result any more."""
    began: float = 0.0


class Worker:
    """Runs generators in threads of its own: each `running` of them in turn, an item each; at most `limit` more wait.

    The next to begin is the oldest of the tenant that has the fewest running, so no one can take all places by asking
    often. One that has not begun after `deadline_s` is refused, since its client will have given up. An item that is
    None is not delivered: it only gives others their turn.
    """

    def __init__(self, limit: int, running: int = 1, threads: int = 1, deadline_s: float | None = None) -> None:
        self._limit, self._most_running, self._deadline_s = limit, running, deadline_s
        self._places = running * threads
        self._waiting: deque[_Job] = deque()
        self._busy: Counter[Hashable] = Counter()
        self._job_s = 1.0
        self._changed = threading.Condition()
        self._stopping = threading.Event()
        self._threads = [
            threading.Thread(target=self._run, name=f"freehold-model-{number}", daemon=True)
            for number in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def waiting(self) -> int:
        """Requests that have not begun."""
        return len(self._waiting)

    def begin_to_stop(self) -> None:
        """End all work, also what waits, with `Stopping`; returns before it has ended."""
        self._stopping.set()
        with self._changed:
            self._changed.notify_all()

    def stop(self) -> None:
        """End all work and wait for the threads."""
        self.begin_to_stop()
        for thread in self._threads:
            thread.join(timeout=10)

    async def run(self, items: Generator[T | None], tenant: Hashable = None) -> AsyncGenerator[T, None]:
        """Yield what `items` yields in the worker's thread; whoever stops listening stops the work.

        Raises Overloaded when the queue is full or the deadline passed, and whatever the generator raises.
        """
        loop = asyncio.get_running_loop()
        results: asyncio.Queue[tuple[str, Any]] = asyncio.Queue()

        def deliver(what: str, value: Any) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: the server is going down
                loop.call_soon_threadsafe(results.put_nowait, (what, value))

        job = _Job(items, deliver, tenant)
        self._add(job)
        timer = loop.call_later(self._deadline_s, self._give_up, job) if self._deadline_s else None
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
            if timer is not None:
                timer.cancel()

    def _add(self, job: _Job) -> None:
        with self._changed:
            if self._stopping.is_set():
                raise Stopping("the server is stopping")
            if len(self._waiting) >= self._limit:
                raise self._overloaded("too many requests wait already")
            self._waiting.append(job)
            self._changed.notify()

    def _give_up(self, job: _Job) -> None:
        """Refuse a request that waited too long; nothing if it has begun."""
        with self._changed:
            if job not in self._waiting:
                return
            self._waiting.remove(job)
            error = self._overloaded(f"the request waited {self._deadline_s:g} s and did not begin")
        job.deliver("error", error)

    def _overloaded(self, what: str) -> Overloaded:
        error = Overloaded(what, found=f"{len(self._waiting)} requests wait", todo="try again in a moment")
        # As long as those who wait will take, from how long the last ones took.
        error.retry_s = max(1, min(LONGEST_RETRY_S, round(self._job_s * (len(self._waiting) + 1) / self._places)))
        return error

    def _run(self) -> None:
        running: deque[_Job] = deque()
        while not self._stopping.is_set():
            self._begin(running)
            if running:
                job = running.popleft()
                if self._turn(job):
                    running.append(job)
                else:
                    self._ended(job)
        with self._changed:
            running.extend(self._waiting)
            self._waiting.clear()
        for job in running:
            job.items.close()
            job.deliver("error", Stopping("the server is stopping"))

    def _begin(self, running: deque[_Job]) -> None:
        """Take jobs that wait; wait for one when there is nothing to do."""
        with self._changed:
            while not (running or self._waiting or self._stopping.is_set()):
                self._changed.wait()
            while self._waiting and len(running) < self._most_running:
                # min takes the first of equals: within a tenant, and between those with the same number, the oldest.
                job = min(self._waiting, key=lambda job: self._busy[job.tenant])
                self._waiting.remove(job)
                self._busy[job.tenant] += 1
                job.began = time.monotonic()
                running.append(job)

    def _ended(self, job: _Job) -> None:
        with self._changed:
            self._job_s += 0.2 * (time.monotonic() - job.began - self._job_s)
            self._busy[job.tenant] -= 1
            if not self._busy[job.tenant]:
                del self._busy[job.tenant]  # names of clients must not fill the memory

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
        if item is not None:
            job.deliver("item", item)
        return True
