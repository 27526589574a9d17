"""The walk: which stage reads which, what is finished, what must be made, and in which order.

A stage is finished when its folder has a manifest whose key is today's: the same filled config, seed, inputs and code.
Each stage that must be made runs in a process of its own, so that its bits do not depend on what ran before it.
Imports no torch: an up-to-date run answers in a second.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import importlib
import json
import os
import platform
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, Field

from freehold.core import artifact
from freehold.core.artifact import MANIFEST, Workspace, read_json, read_manifest, write_json, write_manifest
from freehold.core.code import code_sha256
from freehold.core.config import Config, difference, fill, load_recipe, merge, override, to_yaml, unknown_key
from freehold.core.errors import ArtifactError, ConfigError, FreeholdError
from freehold.core.log import Log
from freehold.core.machine import disk_error, machine_limits
from freehold.parallel import launch
from freehold.parallel.supervise import Supervisor
from freehold.run import policy_check
from freehold.run.step_documents import documents_of_step

WALK: dict[str, tuple[str, ...]] = {
    "gather": (),
    "curate": ("gather",),
    "rephrase": ("curate",),
    "tokenize": ("curate", "rephrase"),
    "pretrain": ("tokenize",),
    "align": ("pretrain", "tokenize", "curate"),
    "evaluate": ("pretrain", "align", "tokenize", "curate"),
    "export": ("align",),
    "serve": ("align",),
}
"""Each stage of the walk in order, and the stages it reads."""

RESUMABLE = {"curate", "pretrain", "align"}
"""Stages that go on from their own checkpoints (curate: from its shards); the others start again, each takes under a
minute."""

KEY = "key.json"


class Head(Config):
    """The part of a recipe that is about the whole run."""

    model_config = ConfigDict(coerce_numbers_to_str=True)  # a run may be called 2024

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="name of the run folder below runs_dir")
    seed: int = Field(0, ge=0, lt=2**63, description="the one seed every random choice follows from")
    runs_dir: Path = Field(Path("runs"), description="where run folders lie")
    until: str = Field("serve", description="last stage of the walk to run")


@dataclass(frozen=True)
class Recipe:
    """A filled recipe: the head and each stage's declaration."""

    head: Head
    stages: dict[str, Any]
    path: Path
    overrides: tuple[str, ...]

    @property
    def run_folder(self) -> Path:
        """Return the folder of the run."""
        return self.head.runs_dir / self.head.name


@dataclass(frozen=True)
class Options:
    """What the command line adds to a recipe."""

    clean: bool = False
    fork: str = ""
    parent: int = 0
    quiet: bool = False


def stage_config_class(stage: str) -> type[Config]:
    """Return the declaration of a stage, without importing torch."""
    module = importlib.import_module(f"freehold.stages.{stage}.config")
    return getattr(module, f"{stage.capitalize()}Config")  # type: ignore[no-any-return]


def resolve(path: Path, overrides: Sequence[str] = (), stage: str = "", fork: str = "") -> Recipe:
    """Fill a recipe: its base, itself, then dotted overrides (relative to `stage` when one is given).

    Raises ConfigError naming the key, its neighbour, what was found and what was expected.
    """
    data = load_recipe(path)
    full = []
    for item in overrides:
        first = item.removeprefix("--").partition("=")[0].partition(".")[0]
        whole = first in WALK or first in Head.model_fields
        full.append(item if whole or not stage else f"{stage}.{item.removeprefix('--')}")
    data = override(data, full)
    if fork:
        data = merge(data, {"name": fork})
    known = [*Head.model_fields, *WALK]
    for key in data:
        if key not in known:
            raise unknown_key(path, str(key), known)
    head = {key: value for key, value in data.items() if key not in WALK}
    filled = fill(Head, head, "")
    if filled.until not in WALK:
        raise ConfigError("no such stage", where="until", found=filled.until, expected=", ".join(WALK))
    stages = {}
    for name in WALK:
        section = data.get(name) or {}
        if not isinstance(section, dict):
            raise ConfigError("a stage's section is not a mapping", where=name, found=type(section).__name__)
        stages[name] = fill(stage_config_class(name), section, name)
    return Recipe(filled, stages, path, tuple(full))


def key_of(recipe: Recipe, stage: str) -> dict[str, Any]:
    """Return all that decides a stage's bytes: config, seed, code, and the content of its inputs.

    How the work is spread over processes is not among it, so that a run can go on with more or fewer of them: it
    changes the order of sums, nothing else, and each checkpoint says what it was.
    Raises ArtifactError when an input is not finished.
    """
    folder = recipe.run_folder
    return {
        "config": {k: v for k, v in recipe.stages[stage].model_dump(mode="json").items() if k != "parallel"},
        "seed": recipe.head.seed,
        "code_sha256": code_sha256(f"freehold.stages.{stage}.run"),
        "inputs": {name: read_manifest(folder / name, kind=name)["content_sha256"] for name in WALK[stage]},
    }


def state_of(recipe: Recipe, stage: str, *, verify: bool = False) -> tuple[str, list[str]]:
    """Return (done | stale | started | absent, differences) of a stage's folder against the recipe.

    Files are compared by size, with `verify` also by hash.
    """
    folder = recipe.run_folder / stage
    finished = (folder / MANIFEST).exists()
    key = key_of(recipe, stage)
    if not finished and not (folder / KEY).exists():
        return "absent", []
    try:
        old = read_manifest(folder, kind=stage) if finished else read_json(folder / KEY)
    except ArtifactError as error:
        return "stale", [f"{folder}: {str(error).splitlines()[0]}"]
    changes = difference({name: old.get(name) for name in key}, key)
    if finished:
        for name, record in old["files"].items():
            path = folder / name
            if not path.exists() or path.stat().st_size != record["bytes"]:
                changes.append(f"{path}: missing or of another size")
            elif verify and artifact.sha256_file(path) != record["sha256"]:
                changes.append(f"{path}: its hash differs")
    if changes:
        return "stale", changes
    return ("done" if finished else "started"), []


def check_stage(recipe: Recipe, stage: str, options: Options) -> str:
    """Return `done`, `resume` or `make`; wipe what must be made again.

    Raises ArtifactError, showing the differences, when finished or resumable work was made by another recipe or
    other code and `--clean` was not given.
    """
    folder = recipe.run_folder / stage
    state, changes = state_of(recipe, stage, verify=options.clean)
    if state == "done" and not (options.clean and not options.parent):
        return "done"
    if state == "started" and stage in RESUMABLE:
        for leftover in folder.glob("*.tmp"):
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        return "resume"
    worth_keeping = (folder / MANIFEST).exists() or (stage in RESUMABLE and any(folder.glob("checkpoints/step_*")))
    if state != "done" and worth_keeping and not options.clean:
        changes = changes or [f"{folder / KEY}: missing"]
        shown = changes[:12] + ([f"... and {len(changes) - 12} more"] if len(changes) > 12 else [])
        raise ArtifactError(
            f"{stage} was made by another recipe, other inputs or other code",
            where=folder,
            found="\n            ".join(shown),
            todo="--clean makes it again here, --fork NAME keeps this run and makes another beside it, "
            "or take the change back",
        )
    if folder.exists():
        for path in folder.iterdir():
            if path.name not in {"log", "answers.jsonl"}:  # what a teacher answered is kept, by its request
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    return "make"


def run_stage(recipe: Recipe, stage: str, options: Options) -> dict[str, Any]:
    """Make one stage here and now, in this process; return its manifest. Does nothing when it is done."""
    folder = recipe.run_folder / stage
    if not launch.leads():
        return _follow(recipe, stage, options)
    what = check_stage(recipe, stage, options)
    if what == "done":
        return read_manifest(folder)
    parallel = getattr(recipe.stages[stage], "parallel", None)
    if launch.place() is None and parallel is not None and parallel.nproc:
        return _supervise(recipe, stage, options)
    key = key_of(recipe, stage)
    for name in WALK[stage]:
        artifact.verify_files(recipe.run_folder / name, read_manifest(recipe.run_folder / name))
    settings = recipe.stages[stage].model_dump(mode="json")
    policies = [recipe.stages[name].policy for name in ("gather", "rephrase")]
    policy_check.before_stage(recipe.run_folder, stage, policies[0], settings, policies[1])
    log = Log(folder, quiet=options.quiet)
    log.say(f"== {stage}" + (" (going on)" if what == "resume" else ""))
    artifact.write_atomic(folder / "resolved.yaml", to_yaml(recipe.stages[stage]))
    write_json(folder / KEY, key)
    work = Workspace(
        folder=folder,
        stage=stage,
        run_name=recipe.head.name,
        seed=recipe.head.seed,
        log=log,
        inputs={name: recipe.run_folder / name for name in WALK[stage]},
        documents_of_step=functools.partial(documents_of_step, folder),
    )
    started = time.monotonic()
    try:
        with machine_limits(folder):
            counts = _work(recipe, stage, work, key)
    finally:
        log.live("")  # what is said next has a line of its own
    seconds = time.monotonic() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    timing = folder / "timing.json"
    before = read_json(timing) if timing.exists() else {}
    write_json(timing, {**before, "total_s": round(seconds, 1), "peak_memory_bytes": peak})
    manifest = write_manifest(
        folder,
        kind=stage,
        counts=counts,
        config=key["config"],
        config_sha256=artifact.sha256_json(key["config"]),
        code_sha256=key["code_sha256"],
        inputs=key["inputs"],
        seed=recipe.head.seed,
        run=recipe.head.name,
        seconds=round(seconds, 1),
        peak_memory_bytes=peak,
        machine={"system": platform.platform(), "cpu": cpu_name(), "cores": os.cpu_count()},
    )
    log.say(f"   {stage} done in {seconds:.0f} s, {peak / 1e9:.1f} GB at most")
    log.close()
    return manifest


def _follow(recipe: Recipe, stage: str, options: Options) -> dict[str, Any]:
    """Take part in a stage as a rank that leads nothing: it writes what is its own, and says nothing but errors."""
    folder = recipe.run_folder / stage
    if not options.clean and state_of(recipe, stage)[0] == "done":
        return read_manifest(folder)
    work = Workspace(
        folder=folder,
        stage=stage,
        run_name=recipe.head.name,
        seed=recipe.head.seed,
        log=Log(quiet=True),
        inputs={name: recipe.run_folder / name for name in WALK[stage]},
        documents_of_step=functools.partial(documents_of_step, folder),
        leads=False,
    )
    if not hasattr(recipe.stages[stage], "parallel"):  # one process does it all
        return {"counts": {}}
    with machine_limits(folder):
        return {"counts": _work(recipe, stage, work, key_of(recipe, stage))}


def _work(recipe: Recipe, stage: str, work: Workspace, key: dict[str, Any]) -> dict[str, Any]:
    """Do a stage's work in this process: alone, or with the other ranks once all agree on what it is."""
    config = recipe.stages[stage]
    spread = hasattr(config, "parallel") and launch.place() is not None
    if spread:
        from freehold.parallel import join

        config_sha256 = artifact.sha256_json(config.model_dump(mode="json"))
        recipe_sha256 = artifact.sha256_json([config_sha256, recipe.head.seed, recipe.head.name])
        inputs_sha256 = artifact.sha256_json(key["inputs"])
        join.join(config.parallel, {"recipe": recipe_sha256, "code": key["code_sha256"], "input": inputs_sha256})
    counts: dict[str, Any] = importlib.import_module(f"freehold.stages.{stage}.run").run(config, work)
    if spread:
        join.leave()
    return counts


def _supervise(recipe: Recipe, stage: str, options: Options) -> dict[str, Any]:
    """Make one stage as `parallel.nproc` ranks that are started here, watched, and started again when they fail."""
    folder, parallel = recipe.run_folder / stage, recipe.stages[stage].parallel
    launch.check_fits_machine(parallel, stage)
    command = [*_command(recipe, stage), "--parent", str(os.getpid()), "--json"]
    log = Log(quiet=options.quiet)
    supervisor = Supervisor(
        command + (["--quiet"] if options.quiet else []),
        parallel.nproc,
        folder / "log",
        parallel.supervise,
        newest_step=lambda: max(
            (int(p.parent.name[5:]) for p in folder.glob(f"checkpoints/step_*/{MANIFEST}")), default=-1
        ),
        documents_of=lambda step: documents_of_step(folder, step),
        say=log.warn,
        echo=None if options.quiet else log.say,
    )
    supervisor.run()
    return read_manifest(folder)


def _command(recipe: Recipe, stage: str) -> list[str]:
    """Return the command that makes one stage of a filled recipe, whatever its run is called."""
    name = f"name={json.dumps(recipe.head.name)}"
    return [sys.executable, "-m", "freehold.cli", stage, str(recipe.path), *recipe.overrides, name]


def run_walk(recipe: Recipe, options: Options, lock: int) -> dict[str, str]:
    """Run every stage that is not done, in order, each in a process of its own; return what was done with each.

    `lock` is the descriptor that `locked` gave: each stage's process holds it too, so that a killed walk's last
    stage is gone before another walk starts.
    """
    result = {}
    names = list(WALK)
    for stage in names[: names.index(recipe.head.until) + 1]:
        with contextlib.suppress(ArtifactError):
            if state_of(recipe, stage, verify=options.clean)[0] == "done":
                result[stage] = "up to date"
                continue
        if options.fork and _take_over(recipe, stage):
            result[stage] = "taken over"
            continue
        command = [*_command(recipe, stage), "--parent", str(os.getpid()), "--json"]
        if options.clean:
            command.append("--clean")
        if options.quiet:
            command.append("--quiet")
        code, answer, asked = in_own_process(command, lock)
        if code:
            raise StageFailed(stage, 130 if asked and not answer else code, answer.get("error"))
        result[stage] = "made"
        if asked and stage != recipe.head.until:
            raise KeyboardInterrupt
    return result


def in_own_process(command: Sequence[str], lock: int) -> tuple[int, dict[str, Any], bool]:
    """Run a stage's command; return its exit code, its answer in JSON, and whether it was asked to stop.

    It has a process group of its own, so that a signal for the walk reaches it once, from here, wherever that came
    from: SIGINT and SIGTERM are passed on and the stage is waited for, as it may have work to save.
    """
    asked: list[int] = []
    child: subprocess.Popen[bytes] | None = None

    def pass_on(number: int, _: object) -> None:
        asked.append(number)
        if child is not None:
            child.send_signal(number)

    def suspend(number: int, _: object) -> None:
        if child is not None:
            child.send_signal(signal.SIGSTOP)
        os.kill(os.getpid(), signal.SIGSTOP)  # and here it goes on, some day
        if child is not None:
            child.send_signal(signal.SIGCONT)

    handlers = {signal.SIGINT: pass_on, signal.SIGTERM: pass_on, signal.SIGTSTP: suspend}
    before = {n: signal.signal(n, handlers[n]) for n in handlers if signal.getsignal(n) != signal.SIG_IGN}
    try:
        child = subprocess.Popen(command, pass_fds=(lock,), stdout=subprocess.PIPE, process_group=0)
        for number in asked:  # came before there was anyone to pass it on to
            child.send_signal(number)
        output = None
        while output is None:  # by the second: a signal that comes just before a system call is handled only after it
            with contextlib.suppress(subprocess.TimeoutExpired):
                output = child.communicate(timeout=1)[0]
    finally:
        for n, handler in before.items():
            signal.signal(n, handler)
    *other, last = output.decode(errors="replace").splitlines() or [""]
    try:
        answer = dict(json.loads(last))
    except (ValueError, TypeError):  # it ended without an answer: what it printed may say why
        other, answer = [*other, last], {}
    for line in filter(None, other):
        print(line, file=sys.stderr)
    return child.returncode, answer, bool(asked)


class StageFailed(FreeholdError):
    """A stage's process ended before its work did: its own error (`told`), or what its exit code says."""

    def __init__(self, stage: str, code: int, told: dict[str, Any] | None = None) -> None:
        self.code = code if code > 0 else 128 - code
        again = "run the same command again: it goes on where it was"
        if self.code in (128 + signal.SIGINT, 128 + signal.SIGTERM):
            super().__init__(f"{stage} was stopped", todo=again)
        elif self.code == 128 + signal.SIGKILL:
            memory = "lower batch.sequences or micro_sequences, batch.context_tokens or the model"
            super().__init__(
                f"{stage} was killed, perhaps by the system for lack of memory",
                todo=f"if it was memory: {memory}; else {again}",
            )
        elif told:
            what = told["what"] if told["what"].startswith(stage) else f"{stage}: {told['what']}"
            super().__init__(**{**told, "what": what})
        else:
            super().__init__(
                f"{stage} did not finish (exit code {code})", todo="see the message above; it is a mistake of ours"
            )


def take_over_before(recipe: Recipe, stage: str) -> None:
    """With --fork, bring the stages before `stage` into the new run, as far as they are the same."""
    for earlier in list(WALK)[: list(WALK).index(stage)]:
        if not (recipe.run_folder / earlier).exists() and not _take_over(recipe, earlier):
            return


def _take_over(recipe: Recipe, stage: str) -> bool:
    """With --fork, hard-link a stage from the run the recipe names if it is the same; tell whether it was."""
    original = resolve(recipe.path, [o for o in recipe.overrides if not o.startswith("name=")])
    source, target = original.run_folder / stage, recipe.run_folder / stage
    if target.exists() or not (source / MANIFEST).exists():
        return False
    key, old = key_of(recipe, stage), read_manifest(source, kind=stage)
    if difference({name: old.get(name) for name in key}, key):
        return False
    artifact.verify_files(source, old)
    temporary = target.with_name(target.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.copytree(source, temporary, copy_function=os.link)
    temporary.rename(target)
    return True


@contextlib.contextmanager
def locked(run_folder: Path, patience_s: float = 10.0) -> Iterator[int]:
    """Hold the run folder for this process and those it hands the yielded descriptor to; the kernel lets go when
    the last of them dies.

    Waits a little for a killed run's last process to go. Raises ArtifactError when somebody else stays.
    """
    try:
        run_folder.mkdir(parents=True, exist_ok=True)
        lock = (run_folder / ".lock").open("w")
    except OSError as error:
        raise disk_error(error, run_folder) from error
    with lock as file:
        deadline = time.monotonic() + patience_s
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise ArtifactError(
                        "another freehold is at work in this run folder",
                        where=run_folder,
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

    with contextlib.suppress(
        OSError, AttributeError
    ):  # Linux: the kernel does it at once, and to a stopped process too
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    threading.Thread(target=watch, daemon=True).start()
    signal.signal(signal.SIGTTOU, signal.SIG_IGN)  # it may write to the terminal of a walk it is not in the group of


def cpu_name() -> str:
    """Return the processor's name, as the system tells it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()
