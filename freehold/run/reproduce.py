"""`freehold reproduce`: make a release again from its own recipe, and compare the content of each stage.

The data stages give the same bytes on any machine with the same packages. Training does so on one class of machine:
other processors take sums in another order. What cannot be compared is named, with what differs; it is not a failure.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from freehold.core.artifact import package_versions, read_json, read_manifest, write_atomic
from freehold.core.config import load_yaml, to_yaml
from freehold.core.errors import FreeholdError, ProofError
from freehold.core.machine import cpu_name
from freehold.core.version import VERSION
from freehold.run.code_spans import other_contract, read_spans
from freehold.run.layout import EXPORT, TOKENIZE, WALK, until
from freehold.run.recipe import Plan, resolve

RECIPE = "recipe.yaml"


class NotReproduced(FreeholdError):
    """A stage that came out with other content although nothing that decides its bytes differs."""

    code = 6


@dataclass(frozen=True)
class Outcome:
    """How one stage compares with the released one."""

    stage: str
    verdict: Literal["equal", "not comparable bitwise", "different", "not replayed"]
    released: str
    made: str
    why: str = ""
    """What decides bytes and differs here; empty when nothing does."""


def write_recipe(pack: Path, work: Path) -> Plan:
    """Write the recipe of a release's run, to be walked below `work`; return its plan.

    Raises ProofError when the release has no recipe of its data stages.
    """
    manifests = read_manifests(pack)
    if TOKENIZE not in manifests:
        raise ProofError("the release does not hold its whole recipe", where=pack / "recipe", expected=TOKENIZE)
    some = manifests[TOKENIZE]
    head = {"name": str(some["run"]), "seed": some["seed"], "runs_dir": str(work.resolve())}
    stages = {stage: load_yaml(pack / "recipe" / f"{stage}.yaml") for stage in manifests}
    write_atomic(work / RECIPE, to_yaml(head | stages))
    return resolve(work / RECIPE)


def reproduce(pack: Path, work: Path, *, everything: bool, quiet: bool = False) -> list[Outcome]:
    """Walk the recipe of a verified release below `work` and compare; an interrupted walk is resumed.

    `everything` includes training and export; otherwise it ends with the token shards. Raises NotReproduced when a
    stage differs and nothing that decides its bytes does, FreeholdError when the walk itself fails.
    """
    plan = write_recipe(pack, work)
    last = EXPORT if everything else TOKENIZE
    # Its own output goes to stderr (2): the answer of this command is on stdout.
    command = [sys.executable, "-m", "freehold.cli", "run", str(work / RECIPE), f"until={last}"]
    if subprocess.run([*command, *(["--quiet"] if quiet else [])], stdout=2).returncode:
        raise FreeholdError("the walk did not end", where=work, todo="see the message above, then run the same again")
    released = read_manifests(pack)
    outcomes = [
        _compare(stage, released[stage], read_manifest(plan.run.stage(stage)))
        for stage in until(last)
        if stage in released
    ]
    bad = [outcome for outcome in outcomes if outcome.verdict == "different"]
    if bad:
        raise NotReproduced(
            "a stage came out with other content",
            where=plan.run.stage(bad[0].stage),
            found=bad[0].made[:16],
            expected=bad[0].released[:16],
            todo="nothing that decides its bytes differs here: ask the maker of the release",
        )
    return outcomes


def _compare(stage: str, released: dict[str, Any], made: dict[str, Any]) -> Outcome:
    """Return the verdict on one stage; other inputs, code, packages or processors make it not comparable."""
    hashes = (str(released["content_sha256"]), str(made["content_sha256"]))
    if hashes[0] == hashes[1]:
        return Outcome(stage, "equal", *hashes)
    why = other_contract(released.get("contract", {}), made.get("contract", {}))
    here = package_versions()
    why += [f"{name} {v} / {here.get(name)}" for name, v in released["versions"].items() if here.get(name) != v]
    if read_spans(released)[-1].sha256 != read_spans(made)[-1].sha256:
        why.append(f"code {released['freehold_version']} / {VERSION}, other sources")
    if WALK[stage].trains and released["machine"]["cpu"] != cpu_name():
        why.append(f"processor {released['machine']['cpu']} / {cpu_name()}")
    if released["inputs"] != made["inputs"]:
        why.append("its inputs differ: see the stage before it")
    return Outcome(stage, "not comparable bitwise" if why else "different", *hashes, "; ".join(why))


def read_manifests(pack: Path) -> dict[str, dict[str, Any]]:
    """Return the manifests of stages in a release, by name."""
    paths = {stage: pack / "manifests" / f"{stage}.json" for stage in WALK}
    return {stage: read_json(path, ProofError) for stage, path in paths.items() if path.exists()}
