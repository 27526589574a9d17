"""The walk: which stages are finished, which must be made, and in which order.

A stage is finished when its folder has a manifest whose key is today's: the same config, seed, contract versions and
inputs. Each stage that must be made runs in its own process, so that its bits do not depend on what ran before it.
Imports no torch: an up-to-date run answers in a second.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import platform
import resource
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from freehold.core import artifact
from freehold.core.artifact import Workspace, read_json, read_manifest, write_json, write_manifest
from freehold.core.config import difference, refill, to_yaml
from freehold.core.errors import ArtifactError
from freehold.core.log import Log
from freehold.core.machine import cpu_name, machine_limits
from freehold.ledger.policy import Origin
from freehold.parallel import launch
from freehold.run import ancestry, policy_check, removal, repair
from freehold.run.anchoring import anchored
from freehold.run.code_spans import add_span, other_code, other_contract, read_spans
from freehold.run.layout import GATHER, RELEASE, REPHRASE, before, finished_parts, until
from freehold.run.lengthen import branch_command, lengthen, recorded
from freehold.run.processes import Options, StageFailed, run_process, stage_command, supervise
from freehold.run.recipe import Plan, StagePlan, recorded_config, resolve
from freehold.run.step_documents import documents_of_step

MOST_CHANGES = 12
"""Differences shown of a stage that was made by another recipe; the rest is counted."""


@dataclass(frozen=True)
class State:
    """A stage's folder compared with its plan."""

    what: Literal["done", "damaged", "stale", "started", "absent"]
    changes: tuple[str, ...] = ()
    other_code: str = ""
    """What made it, when that is not this program's code: `theirs -> ours`."""


def state_of(stage: StagePlan, *, verify: bool = False, strict_code: bool = False) -> State:
    """Compare a stage's folder with its plan: files by size, with `verify` also by hash.

    Other code is a change only with `strict_code`. Raises ArtifactError when an input is not finished.
    """
    finished, key_file = stage.run.finished(stage.name), stage.run.key(stage.name)
    key = stage.key()
    if not finished and not key_file.exists():
        return State("absent")
    try:
        old = read_manifest(stage.folder, kind=stage.name) if finished else read_json(key_file)
    except ArtifactError as error:
        return State("damaged", (f"{error.where or stage.folder}: {error.what}",))
    changes = key_changes(stage, old, key)
    code = other_code(old, stage.code_sha256())
    if code and strict_code:
        changes.append(f"code: {code}")
    damage = _file_changes(stage.folder, old["files"], verify) if finished else []
    if changes:
        return State("stale", (*changes, *damage), code)
    if damage:
        return State("damaged", tuple(damage), code)
    return State("done" if finished else "started", (), code)


def key_changes(stage: StagePlan, old: dict[str, Any], key: dict[str, Any]) -> list[str]:
    """Return what of a recorded key differs from today's; settings that came or went with an update do not count."""
    passed_over = {"parallel", *stage.stage.judged_again}
    today = {k: v for k, v in key["config"].items() if k not in passed_over}
    recorded_keys = {k: v for k, v in (old.get("config") or {}).items() if k not in passed_over}
    changes = difference(recorded_keys, today, "config")
    if changes:
        refilled = refill(stage.stage.config_class(), old.get("config") or {}, stage.name)
        changes = difference({k: v for k, v in refilled.items() if k not in passed_over}, today, "config")
    changes += difference(old.get("seed"), key["seed"], "seed")
    for name, digest in key.get("sources", {}).items():
        # Earlier versions recorded none: what is unknown cannot differ.
        if old.get("sources", {}).get(name, digest) != digest:
            changes.append(f"sources.{name}: its files have changed")
    changes += difference(old.get("inputs"), key["inputs"], "inputs")
    return changes + other_contract(old.get("contract", {}), key["contract"])


def _file_changes(folder: Path, files: dict[str, Any], verify: bool) -> list[str]:
    changes = []
    for name, record in files.items():
        path = folder / name
        if not path.exists() or path.stat().st_size != record["bytes"]:
            changes.append(f"{path}: missing or of another size")
        elif verify and artifact.sha256_file(path) != record["sha256"]:
            changes.append(f"{path}: its hash differs")
    return changes


def check_stage(stage: StagePlan, options: Options) -> Literal["done", "resume", "make"]:
    """Return what to do for a stage; remove what must be made again.

    What is damaged is made again from what is whole. Raises ArtifactError, showing the differences, when finished or
    resumable work was made by another recipe (with `strict_code`: or other code) and `--clean` was not given, and when
    the folder holds files that are not the run's.
    """
    state = state_of(stage, verify=options.clean, strict_code=options.strict_code)
    if state.what == "done" and not (options.clean and not options.parent):
        return "done"
    if state.what == "damaged":
        shown = "; ".join(state.changes[:MOST_CHANGES])
        Log(quiet=options.quiet).warn(f"{stage.name} is damaged and is made again from what is whole: {shown}")
        if stage.stage.trains and not options.clean and repair.prepare(stage, _record(stage)):
            return "resume"
    if state.what == "started" and stage.stage.resumes:
        removal.remove_leftovers(stage.stage, stage.folder, _records(stage))
        return "resume"
    if state.what == "stale" and not options.clean and lengthen(stage, _record(stage)):
        return "resume"
    worth_keeping = stage.run.finished(stage.name) or (stage.stage.resumes and finished_parts(stage.folder) > 0)
    # Damaged training that cannot be repaired keeps its whole checkpoints until someone decides.
    refused = state.what == "stale" or (state.what == "damaged" and stage.stage.trains)
    if refused and worth_keeping and not options.clean:
        raise _made_otherwise(stage, state)
    begun = stage.run.finished(stage.name) or stage.run.key(stage.name).exists()
    removal.remove_stage(stage.stage, stage.folder, _records(stage), begun=begun)
    return "make"


def _records(stage: StagePlan) -> list[dict[str, Any]]:
    """Return what a stage recorded of itself, as far as it can be read, and the settings of today."""
    found = [{"config": recorded_config(stage.config)}]
    for path in (stage.run.manifest(stage.name), stage.run.key(stage.name)):
        with contextlib.suppress(ArtifactError, OSError):
            found.append(read_json(path))
    return found


def _record(stage: StagePlan) -> dict[str, Any]:
    """Return what a stage was made or started with; empty when that is damaged."""
    with contextlib.suppress(ArtifactError):
        return read_manifest(stage.folder) if stage.run.finished(stage.name) else read_json(stage.run.key(stage.name))
    return {}


def _made_otherwise(stage: StagePlan, state: State) -> ArtifactError:
    changes = list(state.changes) or [f"{stage.run.key(stage.name)}: missing"]
    more = len(changes) - MOST_CHANGES
    shown = changes[:MOST_CHANGES] + ([f"... and {more} more"] if more > 0 else [])
    todo = "--clean makes it again here, --fork NAME keeps this run and makes another next to it, or undo the change"
    if command := branch_command(stage, _record(stage)):
        todo = f"to train the changed phases from the checkpoint before them: {command}; or {todo}"
    other = "was made by another recipe, other inputs or other code"
    return ArtifactError(
        f"{stage.name} {'is damaged' if state.what == 'damaged' else other}",
        where=stage.folder,
        found="\n            ".join(shown),
        todo=todo,
    )


def run_stage(plan: Plan, name: str, options: Options) -> dict[str, Any]:
    """Make one stage in this process, or as ranks started here; return its manifest. Does nothing when it is done."""
    stage = plan.stages[name]
    if not launch.leads():
        return _follow(stage, plan, options)
    what = check_stage(stage, options)
    if what == "done":
        return read_manifest(stage.folder)
    if launch.place() is None and stage.parallel is not None and stage.parallel.nproc:
        with anchored(stage, plan.stages[RELEASE].config.keys):
            supervise(stage, plan, options)
        return read_manifest(stage.folder)
    key = stage.key()
    for folder in stage.inputs.values():
        artifact.verify_files(folder, read_manifest(folder))
    policies = [plan.stages[source].config.policy for source in (GATHER, REPHRASE)]
    reservations = plan.stages[GATHER].config.reservations
    policy_check.before_stage(plan.run_folder, name, policies[0], key["config"], policies[1], reservations)
    log = Log(stage.folder, quiet=options.quiet)
    log.say(f"== {name}" + (" (resuming)" if what == "resume" else ""))
    artifact.write_atomic(stage.run.resolved(name), to_yaml(stage.config))
    spans = _record_start(stage, key, log)
    ancestry.write(stage.run, name, key["config"])
    started = time.monotonic()
    try:
        with machine_limits(stage.folder), anchored(stage, plan.stages[RELEASE].config.keys):
            counts = _work(stage, _workspace(stage, log), key)
    finally:
        log.live("")  # the next message begins on a new line
    return _finish(stage, key, spans, counts, time.monotonic() - started, log)


def _record_start(stage: StagePlan, key: dict[str, Any], log: Log) -> list[dict[str, Any]]:
    """Write the key file, with a new code span when other code began the stage; return the spans."""
    key_file = stage.run.key(stage.name)
    old = read_spans(read_json(key_file)) if key_file.exists() else ()
    first = finished_parts(stage.folder)
    spans = add_span(old, first, stage.code_sha256())
    if spans[:-1]:
        earlier = ", ".join(map(str, spans[:-1]))
        log.warn(f"{stage.name} was begun by other code: {earlier}; from {first} on it is {spans[-1]}")
    record = [span.to_dict() for span in spans]
    lengthened = recorded(stage.run, stage.name)
    write_json(key_file, {**key, "code": record, **({"lengthened": lengthened} if lengthened else {})})
    return record


def _finish(
    stage: StagePlan, key: dict[str, Any], spans: list[dict[str, Any]], counts: dict[str, Any], seconds: float, log: Log
) -> dict[str, Any]:
    """Write timing and manifest of a stage whose work is done."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    timing = stage.run.timing(stage.name)
    earlier = read_json(timing) if timing.exists() else {}
    write_json(timing, {**earlier, "total_s": round(seconds, 1), "peak_memory_bytes": peak})
    lengthened = recorded(stage.run, stage.name)
    record: dict[str, Any] = {**key, **({"lengthened": lengthened} if lengthened else {})}
    if stage.stage.trains and stage.head.origin != Origin():
        record["origin"] = stage.head.origin.model_dump()
    manifest = write_manifest(
        stage.folder,
        kind=stage.name,
        counts=counts,
        config_sha256=artifact.sha256_json(key["config"]),
        **record,
        code=spans,
        run=stage.head.name,
        seconds=round(seconds, 1),
        peak_memory_bytes=peak,
        machine={"system": platform.platform(), "cpu": cpu_name(), "cores": os.cpu_count()},
    )
    log.say(f"   {stage.name} done in {seconds:.0f} s, {peak / 1e9:.1f} GB at most")
    log.close()
    return manifest


def _workspace(stage: StagePlan, log: Log, leads: bool = True) -> Workspace:
    return Workspace(
        folder=stage.folder,
        stage=stage.name,
        run_name=stage.head.name,
        seed=stage.head.seed,
        log=log,
        inputs=stage.inputs,
        leads=leads,
        lengthened=recorded(stage.run, stage.name),
        documents_of_step=functools.partial(documents_of_step, stage.folder),
    )


def _follow(stage: StagePlan, plan: Plan, options: Options) -> dict[str, Any]:
    """Take part in a stage as a rank other than the first: it writes its own files and prints only errors."""
    if not options.clean and state_of(stage, strict_code=options.strict_code).what == "done":
        return read_manifest(stage.folder)
    if stage.parallel is None:  # one process does it all
        return {"counts": {}}
    if launch.place() is None:  # not a rank: another machine, whose ranks are started and watched there
        supervise(stage, plan, options)
        return {"counts": {}}
    with machine_limits(stage.folder):
        return {"counts": _work(stage, _workspace(stage, Log(quiet=True), leads=False), stage.key())}


def _work(stage: StagePlan, work: Workspace, key: dict[str, Any]) -> dict[str, Any]:
    """Do a stage's work in this process: alone, or with the other ranks once all agree on what it is."""
    config = stage.config
    is_rank = stage.parallel is not None and launch.place() is not None
    if is_rank:
        from freehold.parallel import join

        config_sha256 = artifact.sha256_json(config.model_dump(mode="json"))
        recipe_sha256 = artifact.sha256_json([config_sha256, stage.head.seed, stage.head.name])
        inputs_sha256 = artifact.sha256_json(key["inputs"])
        join.join(config.parallel, {"recipe": recipe_sha256, "code": stage.code_sha256(), "input": inputs_sha256})
    counts: dict[str, Any] = importlib.import_module(stage.entry).run(config, work)
    if is_rank:
        join.leave()
    return counts


def run_walk(plan: Plan, options: Options, lock: int) -> dict[str, str]:
    """Run every stage that is not done, in order, each in its own process; return what was done with each.

    `lock` is the descriptor that `processes.locked` gave: each stage's process holds it too, so that a killed walk's
    last stage has gone before another walk starts.
    """
    result: dict[str, str] = {}
    others: dict[str, str] = {}
    for name in filter(plan.wanted, until(plan.head.until)):
        stage = plan.stages[name]
        with contextlib.suppress(ArtifactError):
            state = state_of(stage, verify=options.clean, strict_code=options.strict_code)
            if state.what == "done":
                result[name] = "up to date"
                if state.other_code:
                    others.setdefault(state.other_code, "")
                    others[state.other_code] += f"{', ' * bool(others[state.other_code])}{name}"
                continue
        if options.fork and reuse_stage(plan, name, options):
            result[name] = "reused"
            continue
        ended = run_process(stage_command(plan, name, options), lock)
        if ended.code:
            raise StageFailed(name, 130 if ended.asked and not ended.answer else ended.code, ended.answer.get("error"))
        result[name] = "made"
        if ended.asked and name != plan.head.until:
            raise KeyboardInterrupt
    for code, names in others.items():
        Log(quiet=options.quiet).warn(f"{names}: made by other code, {code}; --strict-code refuses that")
    return result


def reuse_before(plan: Plan, name: str, options: Options) -> None:
    """With --fork, link the stages before `name` into the new run, as far as they are the same."""
    for earlier in filter(plan.wanted, before(name)):
        if not plan.stages[earlier].folder.exists() and not reuse_stage(plan, earlier, options):
            return


def reuse_stage(plan: Plan, name: str, options: Options) -> bool:
    """With --fork, hard-link a stage from the run that the recipe names; return whether it is the same one."""
    original = resolve(plan.path, [o for o in plan.overrides if not o.startswith("name=")])
    source, target = original.run.stage(name), plan.run.stage(name)
    if target.exists() or not original.run.finished(name):
        return False
    stage, old = plan.stages[name], read_manifest(source, kind=name)
    if key_changes(stage, old, stage.key()) or (options.strict_code and other_code(old, stage.code_sha256())):
        return False
    artifact.verify_files(source, old)
    temporary = target.with_name(target.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.copytree(source, temporary, copy_function=os.link)
    temporary.rename(target)
    return True
