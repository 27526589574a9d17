"""Stages as processes: the lock of the run folder, a stage of a walk, the ranks of a stage, and how one ended."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from freehold.core.errors import ArtifactError, FreeholdError
from freehold.core.log import Log
from freehold.core.machine import disk_error
from freehold.core.process import forward_signals, split_answer
from freehold.parallel import launch
from freehold.parallel.hosts import Hosts, host_number
from freehold.parallel.supervise import Supervisor
from freehold.run.layout import RunFolder, newest_step
from freehold.run.recipe import Plan, StagePlan
from freehold.run.step_documents import documents_of_step


@dataclass(frozen=True)
class Options:
    """What the command line adds to a recipe."""

    clean: bool = False
    fork: str = ""
    parent: int = 0
    quiet: bool = False
    strict_code: bool = False
    """Refuse stages made by other code instead of warning."""


@dataclass(frozen=True)
class Ended:
    """How a stage's process ended."""

    code: int
    answer: dict[str, Any]
    """Its JSON answer; empty when it gave none."""
    asked: bool
    """Whether it was asked to stop."""


def stage_command(plan: Plan, stage: str, options: Options) -> list[str]:
    """Return the command that makes one stage of a resolved recipe as a child of this process."""
    command = [sys.executable, "-m", "freehold.cli", stage, str(plan.path), *plan.overrides]
    command += [f"name={json.dumps(plan.head.name)}", "--parent", str(os.getpid()), "--json"]
    flags = {"--clean": options.clean, "--quiet": options.quiet, "--strict-code": options.strict_code}
    return [*command, *(flag for flag, wanted in flags.items() if wanted)]


def run_process(command: Sequence[str], lock: int) -> Ended:
    """Run a stage's command to its end; SIGINT and SIGTERM are passed on and waited for, as it may have work to save.

    `lock` is the descriptor of the run folder's lock, which the process holds too.
    """
    asked: list[int] = []
    child: subprocess.Popen[bytes] | None = None

    def send(number: int) -> None:
        if child is not None:
            child.send_signal(number)

    with forward_signals(send, asked):
        child = subprocess.Popen(command, pass_fds=(lock,), stdout=subprocess.PIPE, process_group=0)
        for number in asked:  # came before the process existed
            send(number)
        output = None
        while output is None:  # a signal that comes just before a system call is handled only after the call
            with contextlib.suppress(subprocess.TimeoutExpired):
                output = child.communicate(timeout=1)[0]
    answer, other = split_answer(output.decode(errors="replace"))
    for line in filter(None, other):
        print(line, file=sys.stderr)
    return Ended(child.returncode, answer, bool(asked))


def supervise(stage: StagePlan, plan: Plan, options: Options) -> None:
    """Make one stage as `parallel.nproc` ranks that are started here, watched, and restarted when they fail."""
    launch.check_fits_machine(stage.parallel, stage.name)
    log, number = Log(quiet=options.quiet), host_number(stage.parallel.hosts)
    folder, hosts = stage.folder / "log", None
    if stage.parallel.hosts > 1:
        hosts = Hosts(folder / "hosts", number, stage.parallel.hosts, stage.parallel.nproc, log.say)
        # Each machine keeps the worlds it started; the first one where a run of one machine has them.
        folder = folder / f"host_{number}" if number else folder
    once = Options(quiet=options.quiet, strict_code=options.strict_code)  # --clean was done before the ranks start
    supervisor = Supervisor(
        stage_command(plan, stage.name, once),
        stage.parallel.nproc,
        folder,
        stage.parallel.supervise,
        newest_step=functools.partial(newest_step, stage.folder),
        documents_of=functools.partial(documents_of_step, stage.folder),
        say=log.warn,
        echo=None if options.quiet or number else log.say,
        hosts=hosts,
    )
    with contextlib.closing(hosts) if hosts is not None else contextlib.nullcontext():
        supervisor.run()


class StageFailed(FreeholdError):
    """A stage's process ended before its work did: its own error, or what its exit code says."""

    def __init__(self, stage: str, code: int, error: dict[str, Any] | None = None) -> None:
        self.code = code if code > 0 else 128 - code
        again = "run the same command again: it resumes where it was"
        if self.code in (128 + signal.SIGINT, 128 + signal.SIGTERM):
            super().__init__(f"{stage} was stopped", todo=again)
        elif self.code == 128 + signal.SIGKILL:
            memory = "lower batch.sequences or micro_sequences, batch.context_tokens or the model"
            super().__init__(
                f"{stage} was killed, perhaps by the system for lack of memory",
                todo=f"if it was memory: {memory}; else {again}",
            )
        elif error:
            what = error["what"] if error["what"].startswith(stage) else f"{stage}: {error['what']}"
            super().__init__(**{**error, "what": what})
        else:
            super().__init__(
                f"{stage} did not finish (exit code {code})", todo="see the message above; it is a bug of Freehold"
            )


@contextlib.contextmanager
def locked(run: RunFolder, patience_s: float = 10.0) -> Iterator[int]:
    """Lock the run folder for this process and those that inherit the yielded descriptor.

    The kernel releases it when the last of them ends. Waits a little for a killed run's last process. Raises
    ArtifactError when another process keeps it.
    """
    try:
        run.root.mkdir(parents=True, exist_ok=True)
        file = run.lock.open("w")
    except OSError as error:
        raise disk_error(error, run.root) from error
    with file:
        deadline = time.monotonic() + patience_s
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise ArtifactError(
                        "another freehold process is using this run folder",
                        where=run.root,
                        todo="wait for it, stop it, or give this run another name",
                    ) from None
                time.sleep(0.1)
        yield file.fileno()


def die_with(parent: int) -> None:
    """End this process soon after `parent` has gone: a killed walk must not leave a stage writing."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.2)
        os._exit(137)

    with contextlib.suppress(OSError, AttributeError):  # Linux: the kernel does it, to a stopped process too
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    threading.Thread(target=watch, daemon=True).start()
    # It may write to the terminal of a walk whose process group it is not in.
    signal.signal(signal.SIGTTOU, signal.SIG_IGN)
