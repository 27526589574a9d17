"""A recipe, resolved once into a typed plan: of each stage its declaration, key, folder and inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, Field

from freehold.core.artifact import read_manifest
from freehold.core.code import code_sha256, contract_versions
from freehold.core.config import Config, fill, load_recipe, merge, override, unknown_key
from freehold.core.errors import ConfigError
from freehold.ledger.policy import Origin
from freehold.run.layout import GATHER, SERVE, WALK, RunFolder, Stage
from freehold.run.source_files import digests


class Head(Config):
    """The part of a recipe that is about the run as such."""

    model_config = ConfigDict(coerce_numbers_to_str=True)  # a run may be called 2024

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="name of the run folder below runs_dir")
    seed: int = Field(0, ge=0, lt=2**63, description="the one seed every random choice follows from")
    runs_dir: Path = Field(Path("runs"), description="folder of the run folders")
    origin: Origin = Field(Origin(), description="who trains, and where: recorded with what training makes")
    until: str = Field(SERVE, description="last stage of the walk to run")


@dataclass(frozen=True)
class StagePlan:
    """One stage of a resolved recipe."""

    stage: Stage
    config: Any
    """Its filled declaration."""
    head: Head
    run: RunFolder
    typed: tuple[str, ...] = ()
    """The recipe and the overrides, as words of a command."""

    @property
    def name(self) -> str:
        """Return the stage's name."""
        return self.stage.name

    @property
    def folder(self) -> Path:
        """Return the folder the stage writes to."""
        return self.run.stage(self.name)

    @property
    def inputs(self) -> dict[str, Path]:
        """Return the folders of the stages it reads."""
        return {name: self.run.stage(name) for name in self.stage.inputs}

    @property
    def parallel(self) -> Any:
        """Return the declared degrees of parallelism; None for a stage that one process does."""
        return getattr(self.config, "parallel", None)

    @property
    def entry(self) -> str:
        """Return the module whose `run` does the stage's work."""
        return f"{self.stage.module}.run"

    def code_sha256(self) -> str:
        """Return one hash over the source of everything the stage can run."""
        return code_sha256(self.entry)

    def key(self) -> dict[str, Any]:
        """Return all that decides the stage's bytes by contract: config, seed, contract versions, inputs' content.

        Degrees of parallelism do not belong to it: they change the order of sums only, a run may continue with other
        ones, and each checkpoint records its own. Raises ArtifactError when an input is not finished.
        """
        own = digests(self.config.sources, self.run.log(self.name)) if self.name == GATHER else {}
        return {
            **({"sources": own} if own else {}),
            "config": recorded_config(self.config),
            "seed": self.head.seed,
            "contract": contract_versions(self.entry),
            "inputs": {n: read_manifest(folder, kind=n)["content_sha256"] for n, folder in self.inputs.items()},
        }


@dataclass(frozen=True)
class Plan:
    """A resolved recipe."""

    head: Head
    stages: dict[str, StagePlan]
    path: Path
    overrides: tuple[str, ...]
    declared: frozenset[str] = frozenset()
    """Stages that the recipe has a section of."""

    def wanted(self, name: str) -> bool:
        """Return whether a walk of this recipe runs a stage: some only when asked for."""
        return not WALK[name].on_request or name in self.declared or name == self.head.until

    @property
    def run(self) -> RunFolder:
        """Return the paths of the run."""
        return RunFolder(self.run_folder)

    @property
    def run_folder(self) -> Path:
        """Return the folder of the run."""
        return self.head.runs_dir / self.head.name


def recorded_config(config: Config) -> dict[str, Any]:
    """Return a filled declaration as a manifest keeps it."""
    return {key: value for key, value in config.model_dump(mode="json").items() if key != "parallel"}


def resolve(path: Path, overrides: Sequence[str] = (), stage: str = "", fork: str = "") -> Plan:
    """Resolve a recipe: its base, itself, then dotted overrides (relative to `stage` when one is given).

    Raises ConfigError naming the key, its neighbour, what was found and what was expected.
    """
    absolute = [_absolute(item, stage) for item in overrides]
    data = override(load_recipe(path), absolute)
    if fork:
        data = merge(data, {"name": fork})
    known = [*Head.model_fields, *WALK]
    for key in data:
        if key not in known:
            raise unknown_key(path, str(key), known)
    head = fill(Head, {key: value for key, value in data.items() if key not in WALK}, "")
    if head.until not in WALK:
        raise ConfigError("no such stage", where="until", found=head.until, expected=", ".join(WALK))
    run = RunFolder(head.runs_dir / head.name)
    typed = (str(path), *absolute)
    stages = {
        name: StagePlan(each, _filled(each, data.get(name) or {}), head, run, typed) for name, each in WALK.items()
    }
    return Plan(head, stages, path, tuple(absolute), frozenset(data) & WALK.keys())


def _absolute(item: str, stage: str) -> str:
    """Return an override by its full key; one whose first part is no stage and no head key is the stage's own."""
    first = item.removeprefix("--").partition("=")[0].partition(".")[0]
    is_absolute = first in WALK or first in Head.model_fields
    return item if is_absolute or not stage else f"{stage}.{item.removeprefix('--')}"


def _filled(stage: Stage, section: Any) -> Config:
    if not isinstance(section, dict):
        raise ConfigError("a stage's section is not a mapping", where=stage.name, found=type(section).__name__)
    return fill(stage.config_class(), section, stage.name)
