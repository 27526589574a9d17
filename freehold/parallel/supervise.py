"""Keeping a run alive: start its ranks, watch them, and start them again from the last good checkpoint. No torch.

A world is one set of ranks that met at one port. It ends well when every rank exits with 0. It ends badly when a rank
dies or hangs; then all are killed, what happened is written down, and a new world with a new port goes on from the
newest finished checkpoint. It ends for good when the user asked for it, when a rank told of a mistake of the user's
(the same recipe would meet it again), or when worlds keep ending without one new checkpoint between them. A full disk
is told as well, but ends the run only when nobody has made room for `disk_wait_s`.

Why the first rank that fails is not always the one to blame: a killed rank takes the connections of all others down.
So a signal from outside comes first, then a told error, then the rank whose last words are not about its peers.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from freehold.core.artifact import write_json
from freehold.core.errors import ArtifactError, FreeholdError
from freehold.core.machine import FULL, disk_error
from freehold.core.process import forward_signals, split_answer
from freehold.parallel import launch
from freehold.parallel.config import SuperviseConfig
from freehold.parallel.heartbeat import DUMP, read_beat

POLL_S = 0.1
STOPPED_S = 5.0
"""A gap this long between two looks means that the supervisor itself did not run."""
GRACE_S = 2.0
"""How long the other ranks may take to say what they saw of a failure."""
LAST_LINES = 30
MIN_FREE_BYTES = 1 << 20
LOST_A_PEER = ("Connection closed by peer", "Connection reset", "Broken pipe", "Connection refused", "Socket Timeout")


class WorldFailed(FreeholdError):
    """A run that its supervisor gave up."""

    code = 3


class RankError(FreeholdError):
    """A mistake of the user's that a rank met and told; starting again would meet it again."""


@dataclass
class _Watched:
    """What the supervisor knows of one rank."""

    rank: launch.Rank
    beat: dict[str, Any] = field(default_factory=dict)
    moved: float = field(default_factory=time.monotonic)
    """When its beat last changed."""
    ended: float | None = None
    busy: deque[tuple[float, bool]] = field(default_factory=deque)
    """(time, whether it was at work or stopped rather than waiting) at each look."""
    state: str = ""

    def look(self, now: float, window_s: float) -> None:
        beat = read_beat(self.rank.beat_path)
        if beat and beat != self.beat:
            self.beat, self.moved = beat, now
        if self.rank.process.poll() is not None:
            self.ended = self.ended or now
            return
        with contextlib.suppress(psutil.Error):
            self.state = psutil.Process(self.rank.process.pid).status()
        if self.beat.get("doing") == "step":  # saving and starting are not shared evenly
            self.busy.append((now, self.state not in (psutil.STATUS_SLEEPING, psutil.STATUS_IDLE)))
        while self.busy and now - self.busy[0][0] > window_s:
            self.busy.popleft()

    @property
    def share(self) -> float:
        return sum(at_work for _, at_work in self.busy) / max(len(self.busy), 1)

    @property
    def code(self) -> int | None:
        return self.rank.process.returncode

    def told(self) -> dict[str, Any] | None:
        """Return the error the rank reported as JSON, as `--json` makes it."""
        error = split_answer(self.rank.out.read_text(encoding="utf-8", errors="replace"))[0].get("error")
        return error if isinstance(error, dict) else None

    def record(self, now: float, by_us: bool) -> dict[str, Any]:
        code = self.code
        ending = "still running" if code is None else f"exit code {code}"
        if code is not None and code < 0:
            ending = "ended by the supervisor" if by_us else f"signal {signal.Signals(-code).name}"
        return {
            "rank": self.rank.rank,
            "pid": self.rank.process.pid,
            "ending": ending,
            "state": self.state,
            "silent_s": round(now - self.moved, 1),
            "busy_share": round(self.share, 2),
            **{key: self.beat.get(key) for key in ("step", "doing", "loss")},
            "told": self.told(),
            "last_lines": self.rank.last_lines(LAST_LINES),
        }


@dataclass(frozen=True)
class End:
    """How a world ended."""

    what: str
    """One sentence; empty when all is well."""
    blamed: tuple[int, ...] = ()
    told: dict[str, Any] | None = None
    ranks: tuple[dict[str, Any], ...] = ()


class Supervisor:
    """Runs one command as `nproc` ranks to its end, through as many worlds as it takes.

    `folder` gets a folder of output and beats for each world, `supervisor.jsonl` with every event, and a
    `post_mortem_NNN.json` for each world that failed. `newest_step` returns the step of the newest finished checkpoint
    (-1 without one); `documents_of` names the documents of a step.
    """

    def __init__(
        self,
        command: Sequence[str],
        nproc: int,
        folder: Path,
        config: SuperviseConfig,
        *,
        newest_step: Callable[[], int],
        documents_of: Callable[[int], list[dict[str, Any]]] = lambda _: [],
        say: Callable[[str], None] = print,
        echo: Callable[[str], None] | None = None,
    ) -> None:
        self.command, self.nproc, self.folder, self.config = list(command), nproc, folder, config
        self.newest_step, self.documents_of, self.say, self.echo = newest_step, documents_of, say, echo
        self.asked: list[int] = []
        self.ranks: list[launch.Rank] = []
        self.resumed = 0.0
        folder.mkdir(parents=True, exist_ok=True)
        self.number = len(list(folder.glob("world_*")))

    def run(self) -> str:
        """Return what rank 0 printed once a world ended well.

        Raises RankError for a mistake that a rank told, WorldFailed when the supervisor gives up, and
        KeyboardInterrupt when the user asked to stop and the ranks have.
        """
        futile, full_times, full_since, before = 0, 0, 0.0, self.newest_step()
        with forward_signals(self._pass_on, self.asked, self._note_resume):
            while True:
                self.number += 1
                end = self._one_world()
                if not end.what:
                    return self.ranks[0].out.read_text(encoding="utf-8", errors="replace")
                if self.asked:
                    raise KeyboardInterrupt
                step = self.newest_step()
                gained, before = step > before, step
                if gained:
                    futile = full_times = 0
                if self._full(end):  # no mistake in the recipe, and room may be made meanwhile
                    full_since = full_since if full_times else time.monotonic()
                    full_times += 1
                    left_s = self.config.disk_wait_s - (time.monotonic() - full_since)
                    gives_up, pause_s = left_s <= 0, min(2.0 ** min(full_times, 6), 60.0, max(left_s, 0.0))
                else:
                    futile += not gained
                    gives_up = end.told is not None or futile > self.config.max_relaunches
                    pause_s = min(2.0 ** min(futile - 1, 6) - 1, 60.0) if futile else 0.0
                path = self._post_mortem(end, step, "give up" if gives_up else f"start again from step {max(step, 0)}")
                if gives_up and end.told is not None:
                    raise RankError(**end.told)
                if gives_up:
                    raise WorldFailed(
                        f"the run was given up: {futile + full_times} times in a row it ended without a new checkpoint",
                        where=path,
                        found=end.what,
                        todo="the file named above tells what each rank saw; run the same command again to go on",
                    )
                self.say(f"{end.what}; starting again from step {max(step, 0)} in {pause_s:.0f} s ({path})")
                self._pause(pause_s)

    def _full(self, end: End) -> bool:
        """Tell whether a world ended for want of room; on a disk that is quite full a rank cannot even tell."""
        if end.told is None:
            return shutil.disk_usage(self.folder).free < MIN_FREE_BYTES
        return any(os.strerror(number) in str(end.told.get("what")) for number in FULL)

    def _one_world(self) -> End:
        """Start the ranks and watch them to their end, whatever it is; none is left running."""
        config, folder = self.config, self.folder / f"world_{self.number:03d}"
        try:
            self.ranks = launch.start(self.command, self.nproc, folder)
        except OSError as error:
            if error.errno not in FULL:
                raise
            return End(f"no rank could be started: {error.strerror}", told=disk_error(error, folder).to_dict())
        self.event("started", nproc=self.nproc, from_step=self.newest_step())
        for number in self.asked:  # came before there was anyone to pass it on to
            self._pass_on(number)
        watched = [_Watched(rank) for rank in self.ranks]
        slow: set[int] = set()
        said, looked = 0, time.monotonic()
        try:
            while True:
                time.sleep(POLL_S)
                now = time.monotonic()
                if now - looked > STOPPED_S:  # the machine slept, or all of us were stopped: nobody hung meanwhile
                    self.resumed = now
                looked = now
                for each in watched:
                    each.look(now, config.slow_s)
                said = self._echo(said)
                if all(each.code == 0 for each in watched):
                    self.event("finished", step=watched[0].beat.get("step"))
                    return End("")
                if any(each.code not in (None, 0) for each in watched):
                    return self._failed(watched)
                silent = [each for each in watched if each.ended is None and self._hangs(each, now)]
                if silent:
                    return self._hung(watched, silent)
                for each in self._slow(watched, now):
                    if each.rank.rank not in slow:
                        slow.add(each.rank.rank)
                        others = statistics.median(o.share for o in watched if o is not each)
                        self.say(
                            f"rank {each.rank.rank} is slow: at work or stopped {each.share:.0%} of the last "
                            f"{config.slow_s:g} s, the others {others:.0%}; they wait for it"
                        )
                        self.event("slow", rank=each.rank.rank, share=each.share, others=others)
        finally:
            launch.kill(self.ranks)
            self._echo(said)

    def _hangs(self, each: _Watched, now: float) -> bool:
        starting = each.beat.get("doing", "start") in ("start", "done")
        limit = self.config.start_s if starting else self.config.hang_s
        return now - max(each.moved, self.resumed) > limit

    def _slow(self, watched: list[_Watched], now: float) -> Iterator[_Watched]:
        """Yield the ranks that the others wait for; none until a whole window of steps was seen."""
        if len(watched) > 1 and all(e.busy and e.beat.get("doing") == "step" for e in watched):
            for each in watched:
                whole = now - each.busy[0][0] > 0.9 * self.config.slow_s
                others = statistics.median(other.share for other in watched if other is not each)
                if whole and each.share >= 0.5 and each.share >= self.config.slow_factor * others:
                    yield each

    def _failed(self, watched: list[_Watched]) -> End:
        """Judge a world of which a rank has ended badly, once the others had a moment to say what they saw."""
        deadline = time.monotonic() + (self.config.hang_s if self.asked else GRACE_S)  # asked to stop, they save
        while time.monotonic() < deadline and any(each.code is None for each in watched):
            time.sleep(POLL_S)
            for each in watched:
                each.look(time.monotonic(), self.config.slow_s)
        dead = sorted((e for e in watched if e.code not in (None, 0)), key=lambda e: (e.ended, e.rank.rank))
        ours = {e.rank.rank for e in watched if e.code is None}
        launch.kill(self.ranks)
        killed = [e for e in dead if e.code is not None and e.code < 0]
        # A rank that lost a peer may tell that as an abort of its own: a signal nobody sent to it is not the cause.
        sent = [e for e in killed if -int(e.code or 0) not in (signal.SIGABRT,)]
        told = [e for e in dead if e.code == 2 and e.told()]
        innocent = [e for e in dead if any(w in line for line in e.rank.last_lines(LAST_LINES) for w in LOST_A_PEER)]
        first = (sent or told or [e for e in dead if e not in innocent] or dead)[:1]
        if sent:
            first = [e for e in sent if e.ended == sent[0].ended]
        names = ", ".join(str(e.rank.rank) for e in first)
        one, perhaps = first[0], ""
        if one.code is not None and one.code < 0:
            how = f"was ended by {signal.Signals(-one.code).name}" if len(first) == 1 else "were ended by a signal"
            if -one.code == signal.SIGKILL:
                perhaps = ", perhaps by the system for lack of memory"
        elif told and one in told:
            how = f"told: {(one.told() or {}).get('what')}"
        else:
            how = f"failed with exit code {one.code}: {(one.rank.last_lines(1) or [''])[-1].strip()}"
        what = f"rank{'s' * (len(first) > 1)} {names} {how} after step {one.beat.get('step', 'none')}{perhaps}"
        return self._end(what, watched, first, ours, None if sent or not told else told[0].told())

    def _hung(self, watched: list[_Watched], silent: list[_Watched]) -> End:
        """Judge a world in which nothing moves: name who is stopped or stayed behind, and where each one stands."""
        for each in watched:
            each.rank.send(DUMP)
        time.sleep(min(GRACE_S, 0.5))
        # Who is silent first is not who is to blame: those that wait may have spoken before it.
        alive = [e for e in watched if e.ended is None]
        stopped = [e for e in alive if e.state in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP)]
        steps = [e.beat.get("step", -1) for e in alive]
        behind = [e for e in alive if e.beat.get("step", -1) == min(steps)] if len(set(steps)) > 1 else []
        spinning = [e for e in alive if e.share > 0.9] if any(e.share < 0.5 for e in alive) else []
        blamed = stopped or behind or spinning
        ours = {e.rank.rank for e in watched if e.code is None}
        launch.kill(self.ranks)
        who = f"rank{'s' * (len(blamed) > 1)} {', '.join(str(e.rank.rank) for e in blamed)}"
        if stopped:
            why = f"{who} {'is' if len(blamed) == 1 else 'are'} stopped (SIGSTOP)"
        elif blamed:
            why = f"{who} {'is' if len(blamed) == 1 else 'are'} behind the others"
        else:
            why = "which rank is to blame is not known; the stack of each is in its last lines"
        longest = max(time.monotonic() - e.moved for e in silent)
        return self._end(f"nothing has moved for {longest:.0f} s: {why}", watched, blamed, ours, None)

    def _end(
        self,
        what: str,
        watched: list[_Watched],
        blamed: Sequence[_Watched],
        ours: set[int],
        told: dict[str, Any] | None,
    ) -> End:
        now = time.monotonic()
        records = tuple(e.record(now, e.rank.rank in ours) for e in watched)
        return End(what, tuple(e.rank.rank for e in blamed), told, records)

    def _post_mortem(self, end: End, newest: int, decision: str) -> Path:
        """Write down how a world ended; return the file."""
        steps = [record["step"] for record in end.ranks if record["step"] is not None]
        step = max(steps, default=None)
        documents: list[dict[str, Any]] = []
        trouble = None
        if step is not None:
            try:
                documents = self.documents_of(step)
            except FreeholdError as error:
                trouble = str(error)
        path = self.folder / f"post_mortem_{self.number:03d}.json"
        record = {
            "what": end.what,
            "decision": decision,
            "blamed_ranks": list(end.blamed),
            "world": self.number,
            "nproc": self.nproc,
            "steps_done": step,
            "newest_checkpoint_step": newest if newest >= 0 else None,
            "documents_of_the_running_step": documents,
            "documents_unknown": trouble,
            "ranks": list(end.ranks),
        }
        with contextlib.suppress(ArtifactError):  # on a full disk the run is worth more than its story
            write_json(path, record)
        self.event("failed", what=end.what, blamed=list(end.blamed), step=step, newest=newest, decision=decision)
        return path

    def event(self, name: str, **facts: Any) -> None:
        """Append one line to `supervisor.jsonl`."""
        with contextlib.suppress(OSError), (self.folder / "supervisor.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"at": time.time(), "event": name, "world": self.number, **facts}) + "\n")

    # -- what the user sees and asks ---------------------------------------------------------------------------

    def _echo(self, said: int) -> int:
        """Pass on what rank 0 has said on stderr since `said` bytes; return how many bytes that makes."""
        if self.echo is None:
            return said
        with self.ranks[0].err.open("rb") as file:
            file.seek(said)
            text = file.read()
        whole = text[: text.rfind(b"\n") + 1]
        for line in whole.decode(errors="replace").splitlines():
            self.echo(line)
        return said + len(whole)

    def _pass_on(self, number: int) -> None:
        for rank in self.ranks:
            rank.send(number)

    def _note_resume(self) -> None:
        self.resumed = time.monotonic()

    def _pause(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and not self.asked:
            time.sleep(POLL_S)
