"""`freehold reproduce PACK --segments k --nonce S`: replay some intervals of a training, chosen by the auditor.

The log in a release holds the content hash of every checkpoint that training made. The nonce orders the intervals
between them in a way that the maker could not foresee; the first k whose start was kept are replayed from it and must
end in the hash that was anchored. m bad of N intervals are missed with chance C(N-m, k)/C(N, k).
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from freehold.core.artifact import KEY, read_manifest
from freehold.core.errors import ArtifactError, DataError, ProofError
from freehold.core.machine import cpu_name
from freehold.proof.verify import LOG_ENTRIES
from freehold.run.code_spans import read_spans
from freehold.run.layout import RunFolder, before, training
from freehold.run.reproduce import NotReproduced, Outcome, read_manifests, write_recipe
from freehold.run.verify import kill_after

ROLLBACKS = "rollbacks" + ".json"


@dataclass(frozen=True)
class Interval:
    """Steps of one training stage between two anchored checkpoints."""

    stage: str
    start: int
    """0: from the values that the seed gives."""
    end: int
    starts: tuple[tuple[str, str], ...]
    """Path and content hash of each checkpoint with the state that it starts from; a phase's end has a name too."""
    end_sha256: str

    @property
    def name(self) -> str:
        """Return what it is called in answers."""
        return f"{self.stage} {self.start}..{self.end}"


def intervals(pack: Path) -> list[Interval]:
    """Return the anchored intervals of a release's training stages, in order; of a path the last entry counts."""
    run = str(next(iter(read_manifests(pack).values()))["run"])
    found: dict[str, dict[int, dict[str, str]]] = {stage: {} for stage in training()}
    for line in (pack / LOG_ENTRIES).read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        stage = str(entry.get("path", "")).partition("/")[0]
        if entry.get("kind") == "checkpoint" and entry.get("run") == run and stage in found:
            found[stage].setdefault(int(entry["step"]), {})[str(entry["path"])] = str(entry["content_sha256"])
    made = []
    for stage, steps in found.items():
        # Only the checkpoint of a step has the hash that a replay ends in; a named one records its name as well.
        ends = {s: sha for s, paths in sorted(steps.items()) for path, sha in paths.items() if path.count("/") > 1}
        for start, end in itertools.pairwise([0, *ends]):
            made.append(Interval(stage, start, end, tuple(steps.get(start, {}).items()), ends[end]))
    return made


def chosen(found: list[Interval], nonce: str) -> list[Interval]:
    """Return the intervals in the order that a nonce gives them.

    >>> chosen([], "x")
    []
    """
    return sorted(found, key=lambda i: hashlib.sha256(f"{nonce}\0{i.name}\0{i.end_sha256}".encode()).digest())


def replay(pack: Path, run_folder: Path, work: Path, k: int, nonce: str) -> list[Outcome]:
    """Replay k intervals and compare; those whose start was not kept are named and passed over.

    Raises DataError when the run is not the release's, NotReproduced when an interval ends elsewhere though nothing
    that decides its bits differs.
    """
    released, run = read_manifests(pack), RunFolder(run_folder)
    found = intervals(pack)
    if not found:
        raise ProofError("the release's log holds no checkpoint of its training", where=pack / LOG_ENTRIES)
    for stage in before(training()[0]):
        if stage in released and read_manifest(run.stage(stage))["content_sha256"] != released[stage]["content_sha256"]:
            raise DataError("this is not the run of the release", where=run.stage(stage), todo="name the run folder")
    outcomes: list[Outcome] = []
    replayed = 0
    for interval in chosen(found, nonce):
        if replayed == k:
            break
        start = _kept(run, interval)
        if start is None:
            outcomes.append(Outcome(interval.name, "not replayed", interval.end_sha256, "", "its start was not kept"))
            continue
        outcomes.append(_replay(interval, start, pack, run, work / f"interval_{replayed}", released[interval.stage]))
        replayed += 1
    bad = [outcome for outcome in outcomes if outcome.verdict == "different"]
    if bad:
        raise NotReproduced(
            "an interval of the training ended in another checkpoint",
            where=bad[0].stage,
            found=bad[0].made[:16],
            expected=bad[0].released[:16],
            todo="nothing that decides its bits differs here: ask the maker of the release",
        )
    return outcomes


def _kept(run: RunFolder, interval: Interval) -> str | None:
    """Return the path of a checkpoint that the interval starts from, if the run still holds one as it was anchored."""
    if interval.start == 0:
        return ""
    for path, sha256 in interval.starts:
        with contextlib.suppress(ArtifactError):
            if read_manifest(run.root / path, verify=True)["content_sha256"] == sha256:
                return path
    return None


def _replay(
    interval: Interval, start: str, pack: Path, run: RunFolder, work: Path, released: dict[str, Any]
) -> Outcome:
    """Train one interval in a run folder of its own and compare its last checkpoint."""
    from freehold.checkpoint.dcp import step_folder

    shutil.rmtree(work, ignore_errors=True)
    plan = write_recipe(pack, work)
    for stage in before(interval.stage):
        if run.finished(stage):
            shutil.copytree(run.stage(stage), plan.run.stage(stage), copy_function=os.link)
    folder = plan.run.stage(interval.stage)
    if interval.start:
        folder.mkdir(parents=True)
        for name in (KEY, ROLLBACKS):
            if (run.stage(interval.stage) / name).exists():
                shutil.copyfile(run.stage(interval.stage) / name, folder / name)
        shutil.copytree(run.root / start, step_folder(folder / "checkpoints", interval.start))
    command = [interval.stage, str(plan.path), "--quiet"]
    kill_after(command, folder, interval.end)
    made = str(read_manifest(step_folder(folder / "checkpoints", interval.end))["content_sha256"])
    if made == interval.end_sha256:
        return Outcome(interval.name, "equal", interval.end_sha256, made)
    why = "; ".join(_reasons(interval, released, plan.stages[interval.stage].code_sha256()))
    return Outcome(interval.name, "not comparable bitwise" if why else "different", interval.end_sha256, made, why)


def _reasons(interval: Interval, released: dict[str, Any], code: str) -> Iterator[str]:
    """Yield what decides the bits of an interval and differs here."""
    spans = [span for span in read_spans(released) if span.first < interval.end]
    if spans and spans[-1].sha256 != code:
        yield f"code {spans[-1].sha256[:12]} / {code[:12]}"
    if released["machine"]["cpu"] != cpu_name():
        yield f"processor {released['machine']['cpu']} / {cpu_name()}"
