"""What the supervisor observes of a rank: its beats, whether it works or waits, how it ended. Imports no torch."""

from __future__ import annotations

import contextlib
import signal
import statistics
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import psutil

from freehold.core.process import split_answer
from freehold.parallel import launch
from freehold.parallel.config import SuperviseConfig
from freehold.parallel.heartbeat import read_beat

LAST_LINES = 30
"""Lines of a rank's stderr that a post-mortem keeps."""
START_S = 900.0
"""A rank without a first step for this long hangs: it compiles or reads a checkpoint meanwhile."""
SLOW_FACTOR = 2.0
"""A rank this many times as busy as the median of the others is slow."""
SLOW_SHARE = 0.5
"""A rank that works less than this share of the time waits itself, so the others do not wait for it alone."""
FULL_WINDOW = 0.9
"""The part of `slow_s` that must have been observed before a rank is called slow."""


@dataclass
class Watched:
    """One rank, and what was seen so far."""

    rank: launch.Rank
    beat: dict[str, Any] = field(default_factory=dict)
    moved: float = field(default_factory=time.monotonic)
    """When its beat last changed."""
    ended: float | None = None
    busy: deque[tuple[float, bool]] = field(default_factory=deque)
    """(time, whether it was at work or stopped rather than waiting) at each look."""
    state: str = ""

    def look(self, now: float, window_s: float) -> None:
        """Read beat, exit code and process state; `window_s`: how far back `busy` reaches."""
        beat = read_beat(self.rank.beat_path)
        if beat and beat != self.beat:
            self.beat, self.moved = beat, now
        if self.rank.process.poll() is not None:
            self.ended = self.ended or now
            return
        # It may end between the poll above and this read.
        with contextlib.suppress(psutil.Error):
            self.state = psutil.Process(self.rank.process.pid).status()
        # Saving and starting are not shared evenly: one rank works while the others wait, as they should.
        if self.beat.get("doing") == "step":
            self.busy.append((now, self.state not in (psutil.STATUS_SLEEPING, psutil.STATUS_IDLE)))
        # Only the last seconds count: a rank that was slow an hour ago is not slow.
        while self.busy and now - self.busy[0][0] > window_s:
            self.busy.popleft()

    @property
    def number(self) -> int:
        """Return the rank's number."""
        return self.rank.rank

    @property
    def share(self) -> float:
        """Return the share of the window in which it was at work or stopped."""
        return sum(at_work for _, at_work in self.busy) / max(len(self.busy), 1)

    @property
    def code(self) -> int | None:
        """Return its exit code; negative for a signal, None while it runs."""
        return self.rank.process.returncode

    @property
    def failed(self) -> bool:
        """Return whether it ended, and not well."""
        return self.code not in (None, 0)

    @property
    def killed(self) -> bool:
        """Return whether a signal ended it."""
        return self.code is not None and self.code < 0

    def reported(self) -> dict[str, Any] | None:
        """Return the error the rank reported as JSON, as `--json` makes it."""
        # The last line of stdout is the answer of `--json`, an error too.
        error = split_answer(self.rank.out.read_text(encoding="utf-8", errors="replace"))[0].get("error")
        return error if isinstance(error, dict) else None

    def record(self, now: float, by_us: bool) -> dict[str, Any]:
        """Return what a post-mortem says of this rank; `by_us`: the supervisor ended it."""
        code = self.code
        ending = "still running" if code is None else f"exit code {code}"
        if self.killed:
            ending = "ended by the supervisor" if by_us else f"signal {signal.Signals(-(code or 0)).name}"
        return {
            "rank": self.number,
            "pid": self.rank.process.pid,
            "ending": ending,
            "state": self.state,
            "silent_s": round(now - self.moved, 1),
            "busy_share": round(self.share, 2),
            **{key: self.beat.get(key) for key in ("step", "doing", "loss")},
            "error": self.reported(),
            "last_lines": self.rank.last_lines(LAST_LINES),
        }


def look_at(watched: Sequence[Watched], config: SuperviseConfig) -> float:
    """Look at every rank; return the time of the look."""
    now = time.monotonic()
    for each in watched:
        each.look(now, config.slow_s)
    return now


def hangs(each: Watched, now: float, since: float, config: SuperviseConfig) -> bool:
    """Return whether a rank that runs has not moved for too long, counted from `since` at the earliest."""
    # Before the first step ranks compile and read checkpoints, which takes longer than any step.
    starting = each.beat.get("doing", "start") in ("start", "done")
    limit = START_S if starting else config.hang_s
    return each.ended is None and now - max(each.moved, since) > limit


def slow_ranks(watched: Sequence[Watched], now: float, config: SuperviseConfig) -> Iterator[tuple[Watched, float]]:
    """Yield the ranks that the others wait for, and the others' median share; none before a full window of steps."""
    if len(watched) < 2 or not all(each.busy and each.beat.get("doing") == "step" for each in watched):
        return
    # Compared with the median of the others, not the mean: two slow ranks must not hide each other.
    for each in watched:
        full = now - each.busy[0][0] > FULL_WINDOW * config.slow_s
        others = statistics.median(other.share for other in watched if other is not each)
        if full and each.share >= SLOW_SHARE and each.share >= SLOW_FACTOR * others:
            yield each, others
