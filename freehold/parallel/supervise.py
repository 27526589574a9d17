"""Keeping a run alive: start its ranks, watch them, start them again from the last good checkpoint. Imports no torch.

A world is one set of ranks that met at one port. It ends well when every rank exits with 0. It ends badly when a rank
dies or hangs; then all are killed, a post-mortem is written, and a new world at a new port resumes from the newest
finished checkpoint. It ends for good when the user asked for it, when a rank reported a mistake of the user's (the same
recipe would meet it again), or when worlds keep ending without a new checkpoint between them. A full disk is reported
too, but ends the run only when no one has made room for `disk_wait_s`.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from freehold.core.artifact import write_json
from freehold.core.errors import ArtifactError, FreeholdError
from freehold.core.machine import FULL, disk_error
from freehold.core.process import forward_signals
from freehold.parallel import launch, verdict
from freehold.parallel.config import SuperviseConfig
from freehold.parallel.hosts import Hosts
from freehold.parallel.observe import Watched, hangs, look_at, slow_ranks
from freehold.parallel.relaunch import Decision, Patience
from freehold.parallel.verdict import End

POLL_S = 0.1
STOPPED_S = 5.0
"""A gap this long between two looks means that the supervisor itself did not run."""
GRACE_S = 2.0
"""How long the other ranks may take to say what they saw of a failure."""


class WorldFailed(FreeholdError):
    """A run that its supervisor gave up."""

    code = 3


class RankError(FreeholdError):
    """A mistake of the user's that a rank met and reported; starting again would meet it again."""


class Supervisor:
    """Runs one command as `nproc` ranks to its end, through any number of worlds.

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
        hosts: Hosts | None = None,
    ) -> None:
        """Take what to run and how to follow it; `hosts`: the other machines, if there are any."""
        self.command, self.nproc, self.folder, self.config = list(command), nproc, folder, config
        self.newest_step, self.documents_of, self.say, self.echo = newest_step, documents_of, say, echo
        self.hosts = hosts
        self.asked: list[int] = []
        self.ranks: list[launch.Rank] = []
        # When all of us last woke from a stop: a rank's silence before that means nothing.
        self.resumed = 0.0
        folder.mkdir(parents=True, exist_ok=True)
        # Not their count: worlds of several machines may skip a number.
        self.number = max((int(path.name[6:]) for path in folder.glob("world_[0-9]*")), default=0)

    def run(self) -> str:
        """Return what rank 0 printed once a world ended well.

        Raises RankError for a mistake that a rank reported, WorldFailed when the supervisor gives up, and
        KeyboardInterrupt when the user asked to stop and the ranks have.
        """
        patience = Patience(self.config, self.folder, self.newest_step())
        with forward_signals(self._pass_on, self.asked, self._note_resume):
            while True:
                network = self._next_world()
                if network is None:
                    raise KeyboardInterrupt
                self.number = network.world
                end = self._one_world(network)
                self._report("failed" if end.what else "finished", end.what)
                if self.hosts is not None and not end.what:
                    end = End(self.hosts.finish(self.number, lambda: bool(self.asked)))
                if not end.what:
                    return self.ranks[0].out.read_text(encoding="utf-8", errors="replace")
                if self.asked:
                    raise KeyboardInterrupt
                self._after_failure(end, patience)

    def _next_world(self) -> launch.Network | None:
        """Return where the next ranks meet, once all machines are ready; None when the user asked to stop meanwhile."""
        if self.hosts is None:
            return launch.alone(self.number + 1, self.nproc)
        return self.hosts.meet(self.number, lambda: bool(self.asked))

    def _report(self, state: str, what: str = "") -> None:
        if self.hosts is not None:
            self.hosts.report(state, self.number, what)

    def _after_failure(self, end: End, patience: Patience) -> None:
        """Write the post-mortem; return when the next world may start, raise when there is none."""
        # Read once: a background save may finish between two reads, and record and decision must agree.
        step = self.newest_step()
        decision = patience.after(end, step)
        path = self._post_mortem(end, step, decision)
        if decision.give_up and end.error is not None:
            raise RankError(**end.error)
        if decision.give_up:
            raise WorldFailed(
                f"the run was given up: {patience.failures} times in a row it ended without a new checkpoint",
                where=path,
                found=end.what,
                todo="the file named above holds what each rank saw; run the same command again to resume",
            )
        self.say(f"{end.what}; starting again from step {max(step, 0)} in {decision.pause_s:.0f} s ({path})")
        self._pause(decision.pause_s)

    def _one_world(self, network: launch.Network) -> End:
        """Start the ranks and watch them to their end; none is left running."""
        folder = self.folder / f"world_{self.number:03d}"
        try:
            self.ranks = launch.start(self.command, self.nproc, folder, network)
        except OSError as error:
            # A full disk is judged like one that a rank reports; anything else is a mistake of ours.
            if error.errno not in FULL:
                raise
            return End(f"no rank could be started: {error.strerror}", error=disk_error(error, folder).to_dict())
        self._report("running")
        self.event("started", nproc=self.nproc, from_step=self.newest_step())
        # A signal may have come before there was a rank to pass it on to.
        for number in self.asked:
            self._pass_on(number)
        echo = Echo(self.ranks[0].err, self.echo)
        try:
            return self._watch([Watched(rank) for rank in self.ranks], echo)
        finally:
            # Whatever happened here, also an exception of ours: no rank may outlive its supervisor.
            launch.kill(self.ranks)
            echo.rest()

    def _watch(self, watched: list[Watched], echo: Echo) -> End:
        """Look at the ranks until the world has ended; return how."""
        slow: set[int] = set()
        looked = time.monotonic()
        while True:
            time.sleep(POLL_S)
            # Before the look: what a rank printed because of a failure comes after the failure.
            echo.read()
            now = look_at(watched, self.config)
            # The machine slept, or all of us were stopped: no rank hung meanwhile.
            if now - looked > STOPPED_S:
                self.resumed = now
            looked = now
            if all(each.code == 0 for each in watched):
                self.event("finished", step=watched[0].beat.get("step"))
                return End("")
            if any(each.failed for each in watched):
                return self._failed(watched, echo)
            echo.say()
            if self.hosts is not None and (trouble := self.hosts.trouble(self.number)):
                return verdict.end_of(trouble, watched, [], verdict.end_the_rest(watched))
            silent = [each for each in watched if hangs(each, now, self.resumed, self.config)]
            if silent:
                return verdict.of_hung(watched, silent)
            self._name_slow(watched, now, slow)

    def _failed(self, watched: list[Watched], echo: Echo) -> End:
        """Let the other ranks say what they saw, or save if the user asked to stop; then judge."""
        if not self.asked:
            # Whatever rank 0 prints now follows from the failure. The sentence that names the cause comes first, and
            # the post-mortem holds the rest.
            echo.mute()
        deadline = time.monotonic() + (self.config.hang_s if self.asked else GRACE_S)
        while time.monotonic() < deadline and any(each.code is None for each in watched):
            time.sleep(POLL_S)
            look_at(watched, self.config)
        return verdict.of_failed(watched)

    def _name_slow(self, watched: list[Watched], now: float, slow: set[int]) -> None:
        """Warn once of each rank that the others wait for."""
        for each, others in slow_ranks(watched, now, self.config):
            if each.number not in slow:
                slow.add(each.number)
                self.say(
                    f"rank {each.number} is slow: at work or stopped {each.share:.0%} of the last "
                    f"{self.config.slow_s:g} s, the others {others:.0%}; they wait for it"
                )
                self.event("slow", rank=each.number, share=each.share, others=others)

    # -- records ------------------------------------------------------------------------------------------------

    def _post_mortem(self, end: End, newest: int, decision: Decision) -> Path:
        """Write down how a world ended; return the file."""
        step, documents, trouble = end.steps_done, list[dict[str, Any]](), None
        try:
            documents = self.documents_of(step) if step is not None else []
        except FreeholdError as error:
            trouble = str(error)
        path = self.folder / f"post_mortem_{self.number:03d}.json"
        decided = "give up" if decision.give_up else f"start again from step {max(newest, 0)}"
        record = {
            "what": end.what,
            "decision": decided,
            "blamed_ranks": list(end.blamed),
            "world": self.number,
            "nproc": self.nproc,
            "steps_done": step,
            "newest_checkpoint_step": newest if newest >= 0 else None,
            "documents_of_the_running_step": documents,
            "documents_unknown": trouble,
            "ranks": list(end.ranks),
        }
        # On a full disk the run is worth more than its post-mortem.
        with contextlib.suppress(ArtifactError):
            write_json(path, record)
        self.event("failed", what=end.what, blamed=list(end.blamed), step=step, newest=newest, decision=decided)
        return path

    def event(self, name: str, **facts: Any) -> None:
        """Append one line to `supervisor.jsonl`."""
        # Opened for each line: events are rare, and a copy of the file is whole at any time.
        with contextlib.suppress(OSError), (self.folder / "supervisor.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"at": time.time(), "event": name, "world": self.number, **facts}) + "\n")

    # -- what the user asks --------------------------------------------------------------------------------------

    def _pass_on(self, number: int) -> None:
        for rank in self.ranks:
            rank.send(number)

    def _note_resume(self) -> None:
        self.resumed = time.monotonic()

    def _pause(self, seconds: float) -> None:
        # In small pieces, so that a wish to stop is seen.
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and not self.asked:
            time.sleep(POLL_S)


class Echo:
    """Passes on what rank 0 says on stderr, unless the look after it finds that a rank failed."""

    def __init__(self, path: Path, say: Callable[[str], None] | None) -> None:
        self.path, self._say, self.done = path, say, 0
        self.lines: list[str] = []

    def read(self) -> None:
        """Read the whole lines that are new; `say` passes them on."""
        if self._say is None:
            return
        with self.path.open("rb") as file:
            file.seek(self.done)
            text = file.read()
        # A line that is still being written comes with the next look.
        complete = text[: text.rfind(b"\n") + 1]
        self.done += len(complete)
        self.lines += complete.decode(errors="replace").splitlines()

    def say(self) -> None:
        """Pass on what was read."""
        lines, self.lines = self.lines, []
        if self._say is not None:
            for line in lines:
                self._say(line)

    def mute(self) -> None:
        """Drop what was read and pass nothing more on."""
        self.lines, self._say = [], None

    def rest(self) -> None:
        """Pass on what is left when the ranks have ended."""
        self.read()
        self.say()
