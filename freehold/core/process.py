"""How our processes talk to each other: one line of JSON at the end of stdout, and signals passed on once."""

from __future__ import annotations

import contextlib
import json
import os
import signal
from collections.abc import Callable, Iterator
from typing import Any


def split_answer(output: str) -> tuple[dict[str, Any], list[str]]:
    """Return the answer of a `--json` command (`{"error": ...}` when it failed) and the other lines it printed.

    The answer is empty when the last line is no JSON object: the process ended without one.
    """
    *other, last = output.splitlines() or [""]
    try:
        return dict(json.loads(last)), other
    except (ValueError, TypeError):
        return {}, [*other, last]


@contextlib.contextmanager
def forward_signals(
    send: Callable[[int], None], asked: list[int], resumed: Callable[[], None] = lambda: None
) -> Iterator[None]:
    """While open, pass SIGINT and SIGTERM to child processes and note them in `asked`; suspend and wake with them.

    The children have process groups of their own, so a signal reaches each of them once, from here. `resumed` is
    called after a suspension.
    """

    def ask(number: int, _: object) -> None:
        asked.append(number)
        send(number)

    def suspend(_: int, __: object) -> None:
        send(signal.SIGSTOP)
        os.kill(os.getpid(), signal.SIGSTOP)  # the process sleeps here until SIGCONT
        send(signal.SIGCONT)
        resumed()

    handlers: dict[int, Any] = {signal.SIGINT: ask, signal.SIGTERM: ask, signal.SIGTSTP: suspend}
    previous = {n: signal.signal(n, handlers[n]) for n in handlers if signal.getsignal(n) != signal.SIG_IGN}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
