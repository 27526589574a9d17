"""The stages, their order and inputs, and every path inside a run folder: the one file that names them.

A new stage is one entry in `WALK` and a package with `config.py` (the declaration) and `run.py` (the entry).
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from freehold.core.artifact import KEY, MANIFEST, PREVIEW

if TYPE_CHECKING:  # pydantic takes longer than all of `freehold --help`
    from freehold.core.config import Config

GATHER, CURATE, REPHRASE, TOKENIZE = "gather", "curate", "rephrase", "tokenize"
PRETRAIN, ALIGN, EVALUATE, EXPORT = "pretrain", "align", "evaluate", "export"
AUDIT, RELEASE, SERVE = "audit", "release", "serve"
CHAT, IMPORT, ADAPT = "chat", "import", "adapt"
METRICS = "metrics.jsonl"
"""A stage's figures by step."""
TRAINER_FACTS = "trainer.json"
"""What a checkpoint says of its training."""

Gate = Literal["", "mixture", "alignment set", "export"]


@dataclass(frozen=True)
class Stage:
    """What the walk and the readers of run folders know of a stage."""

    name: str
    summary: str
    """One line for `freehold --help`."""
    inputs: tuple[str, ...] = ()
    """The stages it reads."""
    resumes: bool = False
    """Whether it continues from its own finished parts; the others start again, each takes under a minute."""
    trains: bool = False
    """Whether it writes checkpoints, metrics by step, and `trace.parquet`."""
    optional: bool = False
    """Whether a run without it lacks nothing."""
    on_request: bool = False
    """Whether a walk runs it only where the recipe has its section, or ends with it."""
    gate: Gate = ""
    """What the rights policy is asked for before the stage starts."""
    writes: tuple[str, ...] = ()
    """Globs of the files it may leave in its folder (`*` also matches /): what the run may delete there."""
    lengthens: bool = False
    """Whether more steps may be added to it: what a step reads does not depend on the steps after it."""
    judged_again: tuple[str, ...] = ()
    """Settings that later gates judge again: another value of theirs does not make a finished stage stale."""
    package: str = ""
    """Python package, when it is not `freehold.stages.<name>`."""

    @property
    def module(self) -> str:
        """Return the package that declares and runs the stage."""
        return self.package or f"freehold.stages.{self.name}"

    def config_class(self) -> type[Config]:
        """Return the declaration of the stage, without importing torch."""
        module = importlib.import_module(f"{self.module}.config")
        return getattr(module, f"{self.name.capitalize()}Config")  # type: ignore[no-any-return]

    def plan(self, config: Config) -> list[str]:
        """Return what a filled declaration implies, one line each, for a dry run."""
        return list(importlib.import_module(f"{self.module}.config").plan(config))


ROWS = ("documents/*.parquet", "conversations/*.parquet", "tasks/*.jsonl")
TRAINED = (
    "checkpoints/step_*",
    "phases/*",
    "tensorboard/*",
    "trace.parquet",
    "rollbacks.json",
    "forgetting.json",
    "rollouts/*",
    "held_out.json",
    "ancestry.json",
    "killed.txt",
)


def _table(*stages: Stage) -> dict[str, Stage]:
    return {stage.name: stage for stage in stages}


WALK: dict[str, Stage] = _table(
    Stage(
        GATHER,
        "sources -> documents with licence evidence; the policy refuses what may not be used",
        writes=(*ROWS, "sources.json"),
        judged_again=("reservations",),
    ),
    Stage(
        CURATE,
        "documents -> clean, de-duplicated documents; every drop has a reason",
        inputs=(GATHER,),
        resumes=True,
        writes=(*ROWS, "drops.parquet", "report.json", "shards/*"),
    ),
    Stage(
        REPHRASE,
        "documents -> documents that a teacher model rewrote; nothing without a teacher",
        inputs=(CURATE,),
        optional=True,
        writes=("documents/rephrased_*.parquet", "rewrites.parquet", "report.json", "ancestry.json"),
    ),
    Stage(
        TOKENIZE,
        "documents -> tokenizer and token shards",
        inputs=(CURATE, REPHRASE),
        writes=("tokenizer/*", "tokens/*"),
    ),
    Stage(
        ADAPT,
        "a finished model and new text -> an adapter (LoRA, 4-bit experts), proven in the tools of others",
        inputs=(TOKENIZE, CURATE),
        resumes=True,
        trains=True,
        optional=True,
        on_request=True,
        gate="mixture",
        writes=(*TRAINED, "adapter/*", "adapter.gguf", "merged/*", "coverage.json", "proof.json", "drift*"),
    ),
    Stage(
        PRETRAIN,
        "tokens -> TrueBase and Base",
        inputs=(TOKENIZE,),
        resumes=True,
        trains=True,
        lengthens=True,
        writes=TRAINED,
        gate="mixture",
    ),
    Stage(
        ALIGN,
        "Base and conversations -> Preview",
        inputs=(PRETRAIN, TOKENIZE, CURATE),
        resumes=True,
        trains=True,
        gate="alignment set",
        writes=TRAINED,
    ),
    Stage(
        EVALUATE,
        "bits per byte and tasks, before and after alignment",
        inputs=(PRETRAIN, ALIGN, TOKENIZE, CURATE),
        writes=("results.json", "results.md", "tables.json", "answers/*", "lm_eval/*"),
    ),
    Stage(
        EXPORT,
        "Preview -> HF folder and GGUF files, proven equal or refused",
        inputs=(ALIGN, TOKENIZE),
        gate="export",
        writes=("hf/*", "gguf/*", "parity.json", "calibration.json", "*.imatrix.gguf"),
    ),
    Stage(
        AUDIT,
        "checkpoints and ledger -> memorisation, leaks, bias, what alignment changed, experts; gates",
        inputs=(PRETRAIN, ALIGN, TOKENIZE, CURATE),
        writes=("results.json", "results.md", "pictures/*"),
    ),
    Stage(
        RELEASE,
        "everything the walk made -> one signed folder that a stranger can check",
        inputs=(EVALUATE, EXPORT, AUDIT),
        writes=("pack/*", "root.txt"),
        package="freehold.run.releasing",
    ),
    Stage(
        SERVE,
        "serve a checkpoint, an HF folder or a GGUF over an OpenAI-compatible API",
        inputs=(ALIGN,),
        writes=("answer.json",),
    ),
)
"""Each stage of the walk, in order."""
TALK = Stage(CHAT, "talk to a model in the terminal")
"""Declared like a stage, but no part of the walk."""
PUBLISHED = Stage(
    IMPORT, "a published AFMoE folder -> a checkpoint that every stage takes", package="freehold.stages.importing"
)
"""The root of another lineage: a run folder of its own, no part of a walk."""
DECLARED: dict[str, Stage] = {**WALK, CHAT: TALK, IMPORT: PUBLISHED}
"""Everything that has settings, by its verb."""
KEPT_WHEN_MADE_AGAIN = {"log", "answers.jsonl"}
"""Names that stay when a stage is made again: what was said, and what a teacher answered, by its request."""
EXPORTED = "align/preview"
"""The checkpoint that a manifest of an export means when it names none."""
NAMED = ("pretrain/truebase", "pretrain/base", "align/preview", "align/thinking")
"""Checkpoints that people look for by name."""

IMPORTED = "import/base"
"""The checkpoint of a run folder that an imported model is."""


def training() -> tuple[str, ...]:
    """Return the stages that train, in order."""
    return tuple(name for name, stage in WALK.items() if stage.trains)


def before(name: str) -> list[str]:
    """Return the stages before one, in order."""
    names = list(WALK)
    return names[: names.index(name)]


def until(name: str) -> list[str]:
    """Return the stages up to one, in order, that one included."""
    return [*before(name), name]


@dataclass(frozen=True)
class RunFolder:
    """The paths of one run; nothing is created or checked."""

    root: Path

    def stage(self, name: str) -> Path:
        """Return the folder of a stage."""
        return self.root / name

    def manifest(self, name: str) -> Path:
        """Return the file that says that a stage is finished."""
        return self.root / name / MANIFEST

    def finished(self, name: str) -> bool:
        """Return whether a stage is finished."""
        return self.manifest(name).exists()

    def any_finished(self) -> bool:
        """Return whether a stage is finished: what makes a folder a run."""
        return any(self.finished(name) for name in (*WALK, IMPORT))

    def key(self, name: str) -> Path:
        """Return what a started stage was started with."""
        return self.root / name / KEY

    def resolved(self, name: str) -> Path:
        """Return a stage's filled settings."""
        return self.root / name / "resolved.yaml"

    def metrics(self, name: str) -> Path:
        """Return a stage's figures by step."""
        return self.root / name / METRICS

    def checkpoint_of(self, file: str) -> str:
        """Return the checkpoint, relative to its training stage, that a file of the stage is in; empty for others."""
        parts = file.split("/")
        depth = 2 if parts[0] == "checkpoints" else 1
        return "/".join(parts[:depth]) if len(parts) > depth else ""

    def log(self, name: str) -> Path:
        """Return the folder of what a stage said."""
        return self.root / name / "log"

    def timing(self, name: str) -> Path:
        """Return how long a stage took."""
        return self.root / name / "timing.json"

    def trace(self, name: str) -> Path:
        """Return which steps of a training stage saw which document."""
        return self.root / name / "trace.parquet"

    def preview(self, name: str) -> Path:
        """Return the same table while the stage is not finished."""
        return self.root / name / PREVIEW

    def tables(self, name: str) -> list[Path]:
        """Return a stage's tables of rows with rights: documents, then conversations."""
        return [*self.documents(name), *sorted((self.root / name / "conversations").glob("*.parquet"))]

    def documents(self, name: str) -> list[Path]:
        """Return a stage's tables of documents."""
        return sorted((self.root / name / "documents").glob("*.parquet"))

    def ancestry(self, name: str) -> Path:
        """Return the records of the parents and teachers of a stage that are in other runs."""
        return self.root / name / "ancestry.json"

    def step_checkpoints(self, name: str) -> Path:
        """Return the folder of a training stage's checkpoints of every few steps."""
        return self.root / name / "checkpoints"

    def trainer_facts(self, name: str) -> list[Path]:
        """Return the facts of every checkpoint of a training stage: named ones, then those of a step."""
        folder = self.root / name
        return [*folder.glob(f"*/{TRAINER_FACTS}"), *folder.glob(f"checkpoints/*/{TRAINER_FACTS}")]

    @property
    def sources(self) -> Path:
        """Return what gather says of its sources."""
        return self.root / GATHER / "sources.json"

    @property
    def drops(self) -> Path:
        """Return what curate dropped, and why."""
        return self.root / CURATE / "drops.parquet"

    @property
    def curate_report(self) -> Path:
        """Return what curate did, step by step."""
        return self.root / CURATE / "report.json"

    @property
    def teacher_answers(self) -> Path:
        """Return what a teacher answered."""
        return self.root / REPHRASE / "answers.jsonl"

    @property
    def tokenizer(self) -> Path:
        """Return the tokenizer's folder."""
        return self.root / TOKENIZE / "tokenizer"

    @property
    def shard_tables(self) -> list[Path]:
        """Return the document index of each token shard."""
        return sorted((self.root / TOKENIZE / "tokens").glob("*.parquet"))

    def shard(self, source: str, split: str = "train") -> Path:
        """Return the tokens of one source."""
        return self.root / TOKENIZE / "tokens" / f"{source}.{split}.bin"

    @property
    def evaluation(self) -> Path:
        """Return the figures of evaluate."""
        return self.root / EVALUATE / "results.json"

    @property
    def evaluation_tables(self) -> Path:
        """Return the tables that evaluate shows."""
        return self.root / EVALUATE / "tables.json"

    @property
    def audits(self) -> Path:
        """Return what the audits found, and the verdicts of their gates."""
        return self.root / AUDIT / "results.json"

    @property
    def parity(self) -> Path:
        """Return the proof of the exports."""
        return self.root / EXPORT / "parity.json"

    def gguf(self, kind: str = "") -> list[Path]:
        """Return the GGUF files, of one type when it is given."""
        return sorted((self.root / EXPORT / "gguf").glob(f"*{kind}.gguf"))

    @property
    def answer(self) -> Path:
        """Return what the served model answered."""
        return self.root / SERVE / "answer.json"

    @property
    def report(self) -> Path:
        """Return the report's text."""
        return self.root / "report.md"

    @property
    def picture(self) -> Path:
        """Return the report's picture."""
        return self.root / "report.png"

    @property
    def card(self) -> Path:
        """Return the folder of documents about the data."""
        return self.root / "card"

    @property
    def dashboard(self) -> Path:
        """Return the page that shows the run."""
        return self.root / "dashboard.html"

    @property
    def release(self) -> Path:
        """Return the folder of the signed release."""
        return self.root / RELEASE / "pack"

    @property
    def release_root(self) -> Path:
        """Return the fingerprint of the root key that the release is signed under."""
        return self.root / RELEASE / "root.txt"

    @property
    def keys(self) -> Path:
        """Return the keys made on the spot for a run that was given none; they stay when a release is made again."""
        return self.root / "keys"

    @property
    def promotion(self) -> Path:
        """Return the signed decision that the run's model keeps its gates."""
        return self.root / "promotion.dsse.json"

    @property
    def pending_takedowns(self) -> Path:
        """Return what was asked to be removed from this run and is still in it."""
        return self.root / "takedowns.json"

    @property
    def lock(self) -> Path:
        """Return the file that a running walk holds."""
        return self.root / ".lock"

    @property
    def resume_check(self) -> Path:
        """Return the scratch folder of `verify-resume`."""
        return self.root / "verify-resume"


def newest_step(stage_folder: Path) -> int:
    """Return the step of the newest finished checkpoint of a training stage; -1 without one."""
    # Phases of several kinds each have checkpoints of their own.
    found = (p for start in ("", "phases/*/") for p in stage_folder.glob(f"{start}checkpoints/step_*/{MANIFEST}"))
    return max((step_of(p.parent) for p in found), default=-1)


def step_of(folder: Path) -> int:
    """Return the step in the name of a step checkpoint; -1 for another name."""
    digits = folder.name.removeprefix("step_")
    return int(digits) if digits.isdecimal() else -1


def finished_parts(stage_folder: Path) -> int:
    """Return how far a started stage came: steps with a checkpoint, or shards; 0 for one that keeps no parts."""
    shards = sum(1 for _ in (stage_folder / "shards").glob("[0-9]*[0-9]/tally.json"))
    return max(newest_step(stage_folder), shards, 0)
