"""Opens environments by name, and checks that their verifiers know right from wrong before a model learns from them."""

from __future__ import annotations

import contextlib
import io
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from freehold.core import extensions
from freehold.environments.protocol import (
    GROUP,
    Conversations,
    Environment,
    EnvironmentFault,
    Message,
    Split,
    Task,
    total,
)

NEEDS = ("name", "version", "task", "start", "step", "reward", "gold", "wrong")
PATIENCE_SECONDS = 300.0
"""How long one call of an environment may take before the run stops with an error; no reward depends on it."""
T = TypeVar("T")


def open_environment(
    name: str, settings: Mapping[str, Any], seed: int, conversations: Conversations, where: str
) -> Environment:
    """Return the environment that an entry point makes; ConfigError when there is none of that name or form."""
    make = extensions.load(GROUP, name, where)
    found = make(settings, seed, conversations)
    if missing := [need for need in NEEDS if not hasattr(found, need)]:
        raise EnvironmentFault(
            "an environment does not follow the protocol",
            where=f"{where}: {name}",
            found=f"no {', '.join(missing)}",
            expected=", ".join(NEEDS),
            todo="see docs/alignment.md",
        )
    return found  # type: ignore[no-any-return]


def guarded(where: str, call: Callable[[], T], patience_s: float = PATIENCE_SECONDS) -> T:
    """Return what a call of an environment returns; what it prints is dropped.

    EnvironmentFault when it raises or does not return in time: a fault is never a reward of 0.
    """
    found: list[T] = []
    raised: list[BaseException] = []

    def run() -> None:
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                found.append(call())
        except BaseException as error:
            raised.append(error)

    # A thread, not a signal: signals reach the main thread alone, and the loop may run in another.
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(patience_s)
    if raised and isinstance(raised[0], EnvironmentFault):
        raise raised[0]
    if raised or not found:
        error = raised[0] if raised else None
        raise EnvironmentFault(
            "an environment raised an error" if error else "an environment does not return",
            where=where,
            found=f"{type(error).__name__}: {error}" if error else f"no result after {patience_s:g} s",
            expected="a result for every answer, however wrong",
            todo="repair the environment; the rollouts of finished steps are kept",
        ) from error
    return found[0]


def play(environment: Environment, task: Task, turns: Sequence[Message]) -> float:
    """Return the reward of a transcript of the assistant's turns."""
    state = environment.start(task)
    done: list[Message] = []
    for turn in turns:
        done.append(turn)
        reply = environment.step(task, state, turn)
        state = reply.state
        if reply.done:
            break
    return total(environment.reward(task, state, done), f"{environment.name}: {task.id}")


def transcript(environment: Environment, task: Task, turns: Sequence[Message]) -> list[Message]:
    """Return the assistant's turns with what the environment says between them."""
    state, found = environment.start(task), list[Message]()
    for turn in turns:
        found.append(turn)
        reply = environment.step(task, state, turn)
        state = reply.state
        if reply.done:
            break
        found += reply.messages
    return found


def check(environment: Environment, split: Split = "train", tasks: int = 4) -> None:
    """Raise EnvironmentFault when a right transcript does not score 1, or one that is none scores above 0."""
    for number in range(tasks):
        task = environment.task(split, number)
        for wanted, transcripts in ((1.0, environment.gold(task)), (0.0, environment.wrong(task))):
            for turns in transcripts:
                found = play(environment, task, turns)
                if found != wanted:
                    raise EnvironmentFault(
                        "a verifier does not know right from wrong",
                        where=f"{environment.name}: {task.id}",
                        found=f"{found:g} for {list(turns)!r}"[:300],
                        expected=f"{wanted:g}",
                        todo="repair the environment before a model learns from it",
                    )
