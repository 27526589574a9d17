"""Which rank is to blame when a world ends, in one sentence. Imports no torch.

The first rank that fails is not always the one to blame: a killed rank takes the connections of all others down. So a
signal from outside comes first, then a reported error, then the rank whose last words are not about its peers.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import psutil

from freehold.parallel import launch
from freehold.parallel.heartbeat import DUMP
from freehold.parallel.observe import LAST_LINES, Watched

LOST_A_PEER = ("Connection closed by peer", "Connection reset", "Broken pipe", "Connection refused", "Socket Timeout")
"""What gloo and NCCL say in a rank whose peer has gone."""
STACK_S = 0.5
"""How long ranks may take to write their stacks before they are killed."""
SPINNING, WAITING = 0.9, 0.5
"""Shares of busy time: above the first a rank loops, below the second it waits for another."""


@dataclass(frozen=True)
class End:
    """How a world ended."""

    what: str
    """One sentence; empty when all is well."""
    blamed: tuple[int, ...] = ()
    error: dict[str, Any] | None = None
    """A mistake of the user's that a rank reported."""
    ranks: tuple[dict[str, Any], ...] = ()
    """What was seen of each rank."""

    @property
    def steps_done(self) -> int | None:
        """Return the steps that the furthest rank had done; None before the first beat."""
        return max((record["step"] for record in self.ranks if record["step"] is not None), default=None)


def of_failed(watched: Sequence[Watched]) -> End:
    """Judge a world of which a rank has ended badly; ends those that still run."""
    dead = sorted((each for each in watched if each.failed), key=lambda each: (each.ended, each.number))
    by_us = end_the_rest(watched)
    # A rank that lost a peer may abort itself: SIGABRT is not a signal that another process sent.
    sent = [each for each in dead if each.killed and each.code != -signal.SIGABRT]
    # Exit code 2 is a FreeholdError: a sentence for the user, not a traceback.
    reported = [each for each in dead if each.code == 2 and each.reported()]
    blamed = (sent or reported or [each for each in dead if not lost_a_peer(each)] or dead)[:1]
    if sent:
        # One event outside (a job's time limit, the memory killer) ends several ranks in the same look.
        blamed = [each for each in sent if each.ended == sent[0].ended]
    # A rank that was killed had no mistake in the recipe, whatever its peers report.
    error = None if sent or not reported else reported[0].reported()
    return end_of(_how_it_failed(blamed, error), watched, blamed, by_us, error)


def _how_it_failed(blamed: Sequence[Watched], error: dict[str, Any] | None) -> str:
    one, perhaps = blamed[0], ""
    if one.killed:
        name = signal.Signals(-(one.code or 0)).name
        how = f"was ended by {name}" if len(blamed) == 1 else "were ended by a signal"
        perhaps = ", perhaps by the system for lack of memory" if name == "SIGKILL" else ""
    elif error is not None:
        how = f"reported: {error.get('what')}"
    else:
        how = f"failed with exit code {one.code}: {(one.rank.last_lines(1) or [''])[-1].strip()}"
    return f"{names(blamed)} {how} after step {one.beat.get('step', 'none')}{perhaps}"


def of_hung(watched: Sequence[Watched], silent: Sequence[Watched]) -> End:
    """Judge a world in which nothing moves: name who is stopped or stayed behind; ends all ranks."""
    # The stack of each rank goes to its stderr, and with its last lines into the post-mortem.
    for each in watched:
        each.rank.send(DUMP)
    time.sleep(STACK_S)
    # Who is silent first is not who is to blame: those that wait may have spoken before it.
    alive = [each for each in watched if each.ended is None]
    stopped = [each for each in alive if each.state in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP)]
    steps = [each.beat.get("step", -1) for each in alive]
    behind = [each for each in alive if each.beat.get("step", -1) == min(steps)] if len(set(steps)) > 1 else []
    waits = any(each.share < WAITING for each in alive)
    spinning = [each for each in alive if waits and each.share > SPINNING]
    blamed = stopped or behind or spinning
    is_, why = "is" if len(blamed) == 1 else "are", "which rank is to blame is not known; see the stack of each rank"
    if blamed:
        why = f"{names(blamed)} {is_} " + ("stopped (SIGSTOP)" if stopped else "behind the others")
    longest = max(time.monotonic() - each.moved for each in silent)
    return end_of(f"nothing has moved for {longest:.0f} s: {why}", watched, blamed, end_the_rest(watched))


def end_of(
    what: str,
    watched: Sequence[Watched],
    blamed: Sequence[Watched],
    by_us: set[int],
    error: dict[str, Any] | None = None,
) -> End:
    """Return the end of a world with the record of each rank; `by_us`: the ranks that the supervisor ended."""
    now = time.monotonic()
    # All ranks, not only the blamed: who is innocent is our judgement, and the reader may judge otherwise.
    records = tuple(each.record(now, each.number in by_us) for each in watched)
    return End(what, tuple(each.number for each in blamed), error, records)


def end_the_rest(watched: Sequence[Watched]) -> set[int]:
    """Kill the ranks that still run; return their numbers."""
    # Asked before they are killed: afterwards all have an exit code.
    running = {each.number for each in watched if each.code is None}
    launch.kill([each.rank for each in watched])
    return running


def lost_a_peer(each: Watched) -> bool:
    """Return whether a rank's last words are about another one."""
    return any(words in line for line in each.rank.last_lines(LAST_LINES) for words in LOST_A_PEER)


def names(watched: Sequence[Watched]) -> str:
    """Return `rank 3` or `ranks 3, 5`."""
    return f"rank{'s' * (len(watched) > 1)} {', '.join(str(each.number) for each in watched)}"
