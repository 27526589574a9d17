"""What bounds a connection: headers, body, idle time, frozen readers, and how many there are."""

from __future__ import annotations

import asyncio
import logging
import resource
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from freehold.stages.serve.errors import ApiError, Json

HEADER_S = 15.0
"""Time until the headers of a request are complete."""
BODY_S = 60.0
"""Time until its body is complete."""
FROZEN_S = 60.0
"""Time a client may stop reading its answer."""
DRAIN_S = 2.0
"""Time the rest of a refused body is read and dropped, so that the client sees the refusal and not a reset."""
HEADER_BYTES = 16 << 10
MAX_CONNECTIONS = 4096
KERNEL_BACKLOG = 2048
REPEAT_S = 60.0
"""An error of the event loop is logged once in this time, with the number of its repetitions."""


def raise_open_files() -> int:
    """Raise this process's limit of open files to the most it is allowed; return the limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        soft = hard
    return 1 << 20 if soft == resource.RLIM_INFINITY else soft


def connection_limits(open_files: int) -> tuple[int, int]:
    """Return how many connections are held at a time, and how many may be accepted in one turn of the loop.

    Accepted sockets and closed ones that the loop has not yet released both count as open files: a third of the
    limit stays free for them and for the files of the process.
    """
    spare = max(16, open_files // 3)
    return max(1, min(MAX_CONNECTIONS, open_files - spare)), max(1, min(128, spare // 4))


class BoundedProtocol(H11Protocol):
    """HTTP/1.1 whose connections end when their client is silent, slow or superfluous.

    When there are too many connections, the one that has waited longest without a request is closed for the new one,
    so that idle clients cannot lock others out.
    """

    most = MAX_CONNECTIONS

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take a connection; close the longest idle one when there are too many."""
        super().connection_made(transport)
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self.waiting_since = time.monotonic()
        self._start("header", HEADER_S)
        if len(self.connections) > self.most:
            idle = [c for c in self.connections if isinstance(c, BoundedProtocol) and c.idle]
            min(idle, key=lambda c: c.waiting_since, default=self).abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the timers."""
        for name in list(self._timers):
            self._stop(name)
        super().connection_lost(exc)

    @property
    def idle(self) -> bool:
        """Whether no request is being answered."""
        return self.cycle is None or self.cycle.response_complete

    def abort(self) -> None:
        """Close the connection without waiting for anything."""
        self.connections.discard(self)
        self.transport.abort()

    def handle_events(self) -> None:
        """Handle what has arrived; from the end of the headers on, the body has a limit of its own."""
        super().handle_events()
        if not self.idle:
            self._stop("header")
        elif "header" not in self._timers:
            self._start("header", HEADER_S)

    def on_response_complete(self) -> None:
        """Begin to wait for the next request; what is left of an unread body is dropped for a moment only."""
        self.waiting_since = time.monotonic()
        self._start("header", HEADER_S)
        if self.cycle is not None and self.cycle.more_body:
            self._start("drain", DRAIN_S)
        super().on_response_complete()

    def pause_writing(self) -> None:
        """Begin to count the time a client does not read."""
        self._start("frozen", FROZEN_S)
        super().pause_writing()

    def resume_writing(self) -> None:
        """Count again from the next time."""
        self._stop("frozen")
        super().resume_writing()

    def _start(self, name: str, after_s: float) -> None:
        self._stop(name)
        self._timers[name] = self.loop.call_later(after_s, self.abort)

    def _stop(self, name: str) -> None:
        timer = self._timers.pop(name, None)
        if timer is not None:
            timer.cancel()


class LimitBody:
    """Refuses bodies that are too long or too slow, and requests that state two lengths."""

    def __init__(self, app: ASGIApp, limit_bytes: int) -> None:
        self.app, self.limit_bytes = app, limit_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass one request on."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        names = Counter(name for name, _ in scope["headers"])
        # Which of the two counts is a matter of opinion, and a proxy in front may have the other one.
        if names[b"content-length"] and names[b"transfer-encoding"]:
            error = ApiError(400, "A request has one length: Content-Length or Transfer-Encoding.", "invalid_length")
            return await Json(error.body, 400, headers={"Connection": "close"})(scope, receive, send)
        read_bytes, complete, deadline = 0, False, asyncio.get_running_loop().time() + BODY_S

        async def counting() -> Message:
            nonlocal read_bytes, complete
            try:
                async with asyncio.timeout_at(None if complete else deadline):
                    message = await receive()
            except TimeoutError:
                raise ApiError(408, f"The body did not arrive within {BODY_S:g} s.", "request_timeout") from None
            read_bytes += len(message.get("body", b""))
            complete = not message.get("more_body", False)
            if read_bytes > self.limit_bytes:
                too_long = f"The body is longer than {self.limit_bytes} bytes; no such prompt fits the context."
                raise ApiError(413, too_long, "request_too_large")
            return message

        await self.app(scope, counting, send)


def mute_repeats(log: logging.Logger) -> Callable[[asyncio.AbstractEventLoop, dict[str, Any]], None]:
    """Return a handler for errors of the event loop that logs each kind once a minute, not each time.

    A loop that cannot accept connections reports it for each attempt: gigabytes an hour.
    """
    last: dict[str, float] = {}
    muted: Counter[str] = Counter()

    def handle(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        kind = f"{context['message']} ({error!r})"
        now = loop.time()
        if now - last.get(kind, -REPEAT_S) < REPEAT_S:
            muted[kind] += 1
            return
        last[kind] = now
        repeats = f" ({muted.pop(kind)} repetitions were not logged)" if muted[kind] else ""
        log.error("%s%s", kind, repeats, exc_info=error if not isinstance(error, OSError) else None)

    return handle
