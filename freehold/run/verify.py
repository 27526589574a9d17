"""`freehold verify-resume`: kill a recipe's training, resume it, and compare everything with a run that was left alone.

The recipe's own model, data, optimizer and phases are used, with the phases shortened to the steps asked for. One run
goes straight through. Another is killed with SIGKILL, all its processes together, as soon as its checkpoint of step N
is there. Copies of what it left then continue, each with another number of processes, to the same last step.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from freehold.core.artifact import MANIFEST
from freehold.core.errors import ConfigError, FreeholdError
from freehold.core.table import Table
from freehold.parallel.config import ParallelConfig
from freehold.run.layout import METRICS, before, newest_step
from freehold.run.layout import PRETRAIN as STAGE
from freehold.run.recipe import Plan, resolve

SAME = ("step", "tokens", "phase", "skipped_steps", "data_sum")
"""What a checkpoint records of its run that has to be the same with any number of processes."""


class VerifyFailed(FreeholdError):
    """A step of the check itself that did not work."""


def verify_resume(
    path: Path, overrides: Sequence[str], *, first: int, more: int, worlds: Sequence[int], tolerance: float, keep: bool
) -> dict[str, Any]:
    """Return what was compared and whether it `passed`; see `table` for people.

    `worlds` are the numbers of processes to resume with, in addition to the recipe's own. With the same
    number every tensor must have the same bits; with others sums are taken in another order, and no tensor may
    differ by more than `tolerance` of its norm. Raises ConfigError when the batch cannot be divided over a world, and
    VerifyFailed when a run does not end.
    """
    if more < 2 or first < 1:
        raise ConfigError("too few steps to kill a run between", where="--first, --more", expected="at least 1 and 2")
    if min(worlds, default=1) < 1:
        raise ConfigError("no such number of processes", where="--world", found=min(worlds), expected="at least 1")
    recipe = resolve(path, overrides, stage=STAGE)
    own = recipe.stages[STAGE].config.parallel
    settings = [*recipe.overrides, *_shortened(recipe, first, more)]
    variants = {n: _degrees(own, n) for n in [own.devices, *(w for w in worlds if w != own.devices)]}
    for degrees in variants.values():
        resolve(path, [*settings, *degrees])  # refused here, before anything starts
    _freehold("run", str(path), *recipe.overrides, f"name={json.dumps(recipe.head.name)}", f"until={before(STAGE)[-1]}")
    scratch = recipe.run.resume_check
    shutil.rmtree(scratch, ignore_errors=True)

    def command(name: str, processes: int) -> list[str]:
        place = [f"runs_dir={scratch}", f"name={name}"]
        return [STAGE, str(path), *settings, *variants[processes], *place, "--quiet"]

    def prepare(name: str) -> Path:
        for stage in before(STAGE):
            shutil.copytree(recipe.run_folder / stage, scratch / name / stage, copy_function=os.link)
        return scratch / name / STAGE

    straight = prepare("straight")
    _freehold(*command("straight", own.devices))
    killed = prepare("killed")
    kill_after(command("killed", own.devices), killed, first)
    left_at = newest_step(killed)
    results = []
    for processes in variants:
        folder = prepare(f"on_{processes}")
        shutil.copytree(killed, folder)
        _freehold(*command(f"on_{processes}", processes))
        found = compare(straight, folder, first + more)
        exact = processes == own.devices
        found |= {
            "processes": processes,
            "check_exact": exact,
            "loss_difference": _loss_difference(straight, folder, left_at),
            "passed": not found["facts"] and _equal_enough(found["parts"], exact, tolerance),
        }
        results.append(found)
    answer = {
        "recipe": str(path),
        "first_steps": first,
        "more_steps": more,
        "killed_at_checkpoint": left_at,
        "processes": own.devices,
        "tolerance": tolerance,
        "worlds": results,
        "passed": all(result["passed"] for result in results),
    }
    if not keep:
        shutil.rmtree(scratch)
    return answer


def compare(one: Path, other: Path, step: int) -> dict[str, Any]:
    """Compare two runs' checkpoints after `step` steps.

    Returns `parts` (of each part of the state the tensors, the names of those whose bits differ, and the largest
    difference relative to the tensor's norm) and `facts` (those that differ, as [one, other]).
    """
    import torch

    from freehold.checkpoint import dcp

    folders = [dcp.step_folder(stage / "checkpoints", step) for stage in (one, other)]
    facts = [dcp.check(folder) for folder in folders]
    states = [dcp.load(folder, verify=False) for folder in folders]
    parts = {}
    for part in sorted({*states[0], *states[1]}):
        a, b = (state.get(part, {}) for state in states)
        differing, largest = sorted(a.keys() ^ b.keys()), 0.0
        for name in sorted(a.keys() & b.keys()):
            if a[name].shape != b[name].shape or not torch.equal(_bits(a[name]), _bits(b[name])):
                differing.append(name)
                if a[name].shape == b[name].shape:
                    x, y = a[name].double().nan_to_num(), b[name].double().nan_to_num()
                    largest = max(largest, float((x - y).norm() / x.norm().clamp_min(1e-30)))
        missing = sorted(a.keys() ^ b.keys())
        parts[part] = {
            "tensors": len(a.keys() | b.keys()),
            "differing": differing,
            "missing": missing,
            "largest": largest,
        }
    return {"parts": parts, "facts": {k: [f.get(k) for f in facts] for k in SAME if facts[0].get(k) != facts[1].get(k)}}


def table(answer: dict[str, Any]) -> str:
    """Return the answer for people: one table, and one sentence."""
    rows = []
    for world in answer["worlds"]:
        for part, found in world["parts"].items():
            same = (
                "same bits" if not found["differing"] else f"{len(found['differing'])} differ, {found['largest']:.1e}"
            )
            rows.append([str(world["processes"]), part, str(found["tensors"]), same])
        order = "same rows" if "data_sum" not in world["facts"] else "OTHER ROWS"
        rows.append([str(world["processes"]), "data order", "", order])
        other = [name for name in world["facts"] if name != "data_sum"]
        rows.append([str(world["processes"]), "steps, tokens, phase", "", ", ".join(other) or "same"])
        rows.append([str(world["processes"]), "loss of each step", "", f"within {world['loss_difference']:.1e} nats"])
    what = (
        f"{answer['recipe']}: killed after its checkpoint of step {answer['killed_at_checkpoint']} with "
        f"{answer['processes']} process{'es' * (answer['processes'] > 1)}, resumed to step "
        f"{answer['first_steps'] + answer['more_steps']}, compared with a run that was left alone"
    )
    failed = [str(world["processes"]) for world in answer["worlds"] if not world["passed"]]
    verdict = (
        f"FAILED with {', '.join(failed)} processes"
        if failed
        else "passed: exact with as many processes"
        + (f", within {answer['tolerance']:g} of each tensor's norm with others" if len(answer["worlds"]) > 1 else "")
    )
    return Table(what, ["processes", "part", "tensors", "against the straight run"], rows, verdict, left=(1, 3)).text()


def _bits(tensor: Any) -> Any:
    """Return a float tensor's bits as integers, so that not-a-number equals itself and -0 differs from 0."""
    import torch

    widths = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.contiguous().view(widths[tensor.element_size()]) if tensor.is_floating_point() else tensor


def _equal_enough(parts: dict[str, Any], exact: bool, tolerance: float) -> bool:
    if any(part["missing"] for part in parts.values()):
        return False
    if exact:
        return not any(part["differing"] for part in parts.values())
    return parts["model"]["largest"] <= tolerance and not parts["rng"]["differing"]


def _loss_difference(one: Path, other: Path, first: int) -> float:
    """Return the largest difference of the losses of the steps after `first`, in nats."""
    from freehold.core.log import read_metrics

    losses = [
        {r["step"]: r["loss/mean"] for r in read_metrics(f / METRICS) if r.get("loss/mean")} for f in (one, other)
    ]
    both = [step for step in losses[0] if step > first and step in losses[1]]
    return max((abs(losses[0][step] - losses[1][step]) for step in both), default=0.0)


def _shortened(recipe: Plan, first: int, more: int) -> list[str]:
    """Return overrides that shorten the phases to `first + more` steps in proportion, each to one step at least."""
    phases, total = recipe.stages[STAGE].config.phases, first + more
    if len(phases) > total:
        raise ConfigError("fewer steps than phases", where="--first, --more", found=total, expected=len(phases))
    whole = sum(phase.steps for phase in phases.values())
    ends = [round(total * sum(p.steps for p in list(phases.values())[: i + 1]) / whole) for i in range(len(phases))]
    for i in range(len(ends)):  # a phase of no steps is none
        ends[i] = max(ends[i], (ends[i - 1] if i else 0) + 1)
    for i in reversed(range(len(ends) - 1)):
        ends[i] = min(ends[i], ends[i + 1] - 1)
    found = [f"{STAGE}.trainer.checkpoint_every_steps={first}", f"{STAGE}.trainer.log_every_steps=1"]
    found.append(f"{STAGE}.trainer.validate_every_steps=0")
    for (name, phase), start, end in zip(phases.items(), [0, *ends], ends, strict=False):
        found.append(f"{STAGE}.phases.{name}.steps={end - start}")
        if phase.warmup_steps:
            found.append(f"{STAGE}.phases.{name}.warmup_steps={min(phase.warmup_steps, max((end - start) // 2, 0))}")
    return found


def _degrees(own: ParallelConfig, processes: int) -> list[str]:
    """Return overrides that shard a run over that many processes: the recipe's degrees where they fit, data else."""
    if processes == own.devices:
        return []
    rest, degrees = processes, {}
    for axis in ("pipeline", "context", "replicate"):
        degrees[axis] = getattr(own, axis) if rest % getattr(own, axis) == 0 else 1
        rest //= degrees[axis]
    group = rest * degrees["context"]
    degrees |= {"shard": rest, "expert": own.expert if group % own.expert == 0 else 1}
    degrees["nproc"] = processes if processes > 1 else 0
    return [f"{STAGE}.parallel.{axis}={degree}" for axis, degree in degrees.items()]


def _freehold(*arguments: str) -> None:
    """Run a command of ours to its end; VerifyFailed with what it said when it fails."""
    command = [sys.executable, "-m", "freehold.cli", *arguments, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        error: dict[str, Any] = {}
        with contextlib.suppress(ValueError, KeyError, IndexError):
            error = json.loads(done.stdout.splitlines()[-1])["error"]
        raise VerifyFailed(
            f"a run did not end well (exit code {done.returncode})",
            where=" ".join(["freehold", *arguments]),
            found=error.get("what") or "\n".join(done.stderr.splitlines()[-5:]),
            todo=error.get("todo"),
        )


def kill_after(arguments: Sequence[str], stage: Path, step: int) -> None:
    """Start a run and kill all its processes once its checkpoint of `step` is there; VerifyFailed if it ends before."""
    from freehold.checkpoint.dcp import step_folder

    with (stage.parent / "killed.txt").open("wb") as said:
        process = subprocess.Popen(
            [sys.executable, "-m", "freehold.cli", *arguments], stdout=said, stderr=said, start_new_session=True
        )
        while process.poll() is None and not (step_folder(stage / "checkpoints", step) / MANIFEST).exists():
            time.sleep(0.005)
        with contextlib.suppress(psutil.NoSuchProcess):
            parent = psutil.Process(process.pid)
            for victim in [parent, *parent.children(recursive=True)]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    victim.kill()
        process.wait()
    if process.returncode != -9 or (stage / MANIFEST).exists():
        raise VerifyFailed(
            "the run was over before it could be killed",
            where=stage,
            found="\n".join((stage.parent / "killed.txt").read_text(errors="replace").splitlines()[-5:]) or None,
            todo="raise --more",
        )
