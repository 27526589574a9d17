"""`freehold retrain RUN --with RECIPE`: a model learns new sources, and keeps what it knew by replay of the old ones.

The branch starts at the last checkpoint of the stable phase, with its optimizer, or warms up again from the final one.
Replay is drawn by the ledger: documents of the old run's training split, with their own rights, without anything that
was taken down. They become sources of the new run, so that its trace, cards and take-downs know them.

Sources: Ibrahim et al. (arXiv:2403.08763) for replay and re-warming; WSD branches as in the Trinity Large report.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from freehold.core.artifact import read_json, read_manifest, write_atomic, write_json
from freehold.core.config import load_recipe
from freehold.core.document import Document, read_rows
from freehold.core.errors import ArtifactError, ConfigError, DataError
from freehold.core.table import Table
from freehold.run import pending
from freehold.run.layout import CURATE, GATHER, PRETRAIN, TOKENIZE, TRAINER_FACTS, RunFolder
from freehold.run.steps import resolved

PREFIX = "replay_"
"""Names of the old sources in the new run."""
KINDS = ("prose", "code", "docstring", "reference")
"""What a source of rows may say that its documents are."""
LEAST_DOCUMENTS = 8
"""Of each source: of fewer, the new run might hold out all."""
START = {"stable": "truebase", "final": "base"}
"""The checkpoint that each way starts from."""


@dataclass(frozen=True)
class Request:
    """What is asked for."""

    run: Path
    recipe: Path
    start: Literal["stable", "final"] = "stable"
    replay: float = 0.05
    """Share of the tokens that are of old sources."""
    sources: tuple[str, ...] = ()
    """Old sources to replay; all when empty."""
    steps: int = 200
    """Optimizer steps in all; the second half decays."""

    def __post_init__(self) -> None:
        if not 0 <= self.replay < 1 or self.steps < 2:
            raise ConfigError(
                "not a retraining", where="--replay, --steps", found=f"{self.replay:g}, {self.steps}",
                expected="a share from 0 to below 1, at least 2 steps",
            )  # fmt: skip


@dataclass(frozen=True)
class Drawn:
    """Replay that was drawn from one old source."""

    source: str
    documents: int
    text_bytes: int
    first: Document


def taken_down(run: Path, recipe: Mapping[str, Any]) -> tuple[set[str], set[str]]:
    """Return the sources and the ids that were taken down: in the run, in a later run without them, in the recipe.

    A take-down makes a run of its own (`NAME-without-...`); what it excludes must not come back by replay of the first.
    """
    sections = [resolved(run, CURATE), dict(recipe.get(CURATE) or {})]
    sections += [resolved(later, CURATE) for later in sorted(run.parent.glob(f"{run.name}-without-*"))]
    # The recipe of a take-down that was written and not yet run counts as well: the decision was made.
    for path in sorted({*Path().glob(f"{run.name}-without-*.yaml"), *run.parent.glob(f"{run.name}-without-*.yaml")}):
        sections.append(dict((yaml.safe_load(path.read_text(encoding="utf-8")) or {}).get(CURATE) or {}))
    sources, ids = set[str](), set[str]()
    for _, found in pending.answers(run):
        sources |= set(found.excluded.sources)
        ids |= set(found.excluded.documents)
    for section in sections:
        exclude = section.get("exclude") or {}
        sources |= set(exclude.get("sources") or ())
        ids |= set(exclude.get("documents") or ())
        if exclude.get("file"):
            ids |= set(Path(exclude["file"]).read_text(encoding="utf-8").split())
    return sources, ids


def write_recipe(request: Request) -> Path:
    """Draw the replay, write the recipe of the new run next to the given one, and return it.

    Raises DataError when replay is asked of a source that was taken down or is not there, ArtifactError when the run
    has no checkpoint to start from.
    """
    run, given = RunFolder(request.run), load_recipe(request.recipe)
    parent = parent_of(request)
    sources, ids = taken_down(request.run, given)
    for name in request.sources:
        if (
            name in sources
            or not run.finished(CURATE)
            or not (run.stage(CURATE) / "documents" / f"{name}.parquet").exists()
        ):
            raise DataError(
                "a source was taken down" if name in sources else "no such source to replay",
                where=f"--sources {name}", found="its take-down" if name in sources else "",
                expected=", ".join(p.stem for p in run.documents(CURATE) if p.stem not in sources),
                todo="replay other sources",
            )  # fmt: skip
    name = str(given.get("name") or f"{request.run.name}-retrained")
    folder = request.recipe.parent / f"{name}-replay"
    settings = resolved(request.run, PRETRAIN)
    tokens = request.steps * settings["batch"]["context_tokens"] * settings["batch"]["sequences"]
    drawn = draw_replay(request, sources, ids, math.ceil(tokens * request.replay), folder)
    data = sections(request, given, parent, settings, drawn, folder)
    path = request.recipe.parent / f"{name}.retrain.yaml"
    about = (
        f"# {request.run.name} retrained on {request.recipe.name}, from its {START[request.start]}, "
        f"{request.replay:.0%} replay.\n# Made by `freehold retrain`.\n"
    )
    write_atomic(path, about + yaml.safe_dump({"name": name, **data}, sort_keys=False, allow_unicode=True))
    return path


def parent_of(request: Request) -> Path:
    """Return the checkpoint that the branch starts from; ArtifactError when the run has none."""
    folder = RunFolder(request.run).stage(PRETRAIN) / START[request.start]
    if not (folder / TRAINER_FACTS).exists():
        raise ArtifactError(
            "the run has no checkpoint to start from", where=folder,
            expected=f"the checkpoint {START[request.start]} of a finished pre-training",
            todo="--from final, or train the run to its end" if request.start == "stable" else "train the run first",
        )  # fmt: skip
    return folder


def draw_replay(request: Request, gone: set[str], ids: set[str], tokens: int, folder: Path) -> list[Drawn]:
    """Write the old documents to replay, one file a source, in proportion to what each source has.

    Documents come in the order of a hash of their id: the same run gives the same replay.
    """
    run = RunFolder(request.run)
    counts = read_manifest(run.stage(TOKENIZE))["counts"]
    wanted = [
        p for p in run.documents(CURATE) if p.stem not in gone and (not request.sources or p.stem in request.sources)
    ]
    train = {name: of["train"] for name, of in counts["sources"].items()}
    total = sum(train.get(path.stem, {}).get("tokens", 0) for path in wanted)
    found = []
    for path in wanted if tokens and total else ():
        part = train.get(path.stem, {"tokens": 0, "bytes": 0})
        rows = [row for row in read_rows(path, Document) if replayable(row, ids)]
        # Half as much again: curation of the new run may drop some, and a source is then read less than once.
        limit = 1.5 * part["bytes"] * min(1.0, tokens / total)
        taken = list(_up_to(sorted(rows, key=lambda row: hashlib.sha256(row.id.encode()).digest()), limit))
        if taken:
            lines = [json.dumps(_row(row), ensure_ascii=False, sort_keys=True) + "\n" for row in taken]
            write_atomic(folder / f"{path.stem}.jsonl", "".join(lines))
            found.append(Drawn(path.stem, len(taken), sum(len(row.text.encode()) for row in taken), taken[0]))
    return found


def replayable(row: Document, ids: set[str]) -> bool:
    """Return whether a document may be replayed: of the training split, not taken down, and not by a teacher.

    A source of rows cannot say who wrote each of them, and a teacher's terms must not be lost.
    """
    return row.split == "train" and row.id not in ids and not row.teacher


def _up_to(rows: list[Document], limit_bytes: float) -> Iterator[Document]:
    done = 0
    for number, row in enumerate(rows):
        if done >= limit_bytes and number >= LEAST_DOCUMENTS:
            return
        done += len(row.text.encode())
        yield row


def _row(row: Document) -> dict[str, Any]:
    """Return a line that gather reads: the text with its own rights, and which document it was."""
    return {"text": row.text, "licence": row.licence, "licence_evidence": row.licence_evidence, "document": row.id}


def sections(
    request: Request, given: dict[str, Any], parent: Path, settings: dict[str, Any], drawn: list[Drawn], folder: Path
) -> dict[str, Any]:
    """Return the stages of the new recipe: new and replayed sources, the old tokenizer and shape, a branch."""
    # What the run's policy let in may be replayed under it; the new recipe may be stricter.
    policy = resolved(request.run, GATHER).get("policy")
    gather = ({"policy": policy} if policy else {}) | dict(given.get(GATHER) or {})
    new = list(gather.get("sources") or {})
    if not new:
        raise ConfigError("the recipe names no new source", where=request.recipe, expected="gather.sources")
    version = read_manifest(RunFolder(request.run).stage(CURATE))["content_sha256"][:16]
    replay = {
        f"{PREFIX}{one.source}": {
            "kind": "jsonl", "path": (folder / f"{one.source}.jsonl").as_posix(), "acquired": one.first.acquired,
            "origin": f"{request.run.name} {version}", "licence": one.first.licence,
            "content": one.first.kind if one.first.kind in KINDS else "prose",
            "licence_evidence": {"rule": f"as recorded in {request.run.name}, row by row"},
            "settled": f"its rights were judged when {request.run.name} gathered it",
        }
        for one in drawn
    }  # fmt: skip
    model = dict(settings["model"])
    phases = phases_of(request, new, drawn)
    return {
        **{key: value for key, value in given.items() if key != "name"},
        "seed": given.get("seed", 0),
        "until": given.get("until", PRETRAIN),
        "runs_dir": given.get("runs_dir", request.run.parent.as_posix()),
        GATHER: {**gather, "sources": {**gather["sources"], **replay}},
        CURATE: given.get(CURATE) or {"split": resolved(request.run, CURATE).get("split", {})},
        TOKENIZE: {
            "tokenizer": RunFolder(request.run).tokenizer.as_posix(),
            "vocab_size": resolved(request.run, TOKENIZE)["vocab_size"],
        },
        PRETRAIN: {
            **{key: settings[key] for key in ("batch", "optim", "balance", "trainer")},
            **(given.get(PRETRAIN) or {}),
            "model": model,
            "parent": parent.as_posix(),
            "fresh_optimizer": request.start == "final",
            "phases": phases,
        },
    }


def phases_of(request: Request, new: list[str], drawn: list[Drawn]) -> dict[str, Any]:
    """Return the phases: constant then decay from the stable phase; warm up again then decay from the final one."""
    share = request.replay if drawn else 0.0
    whole = sum(one.text_bytes for one in drawn)
    mixture = {name: (1 - share) / len(new) for name in new}
    mixture |= {f"{PREFIX}{one.source}": share * one.text_bytes / whole for one in drawn}
    mixture = {name: round(weight, 6) for name, weight in mixture.items()}
    decay = {"shape": "linear", "end": 0.0, "checkpoint": "base", "stage_type": "Base", "mixture": mixture}
    if request.start == "final":
        return {"rewarmed": {"steps": request.steps, "warmup_steps": max(1, request.steps // 10), **decay}}
    half = request.steps // 2
    stable = {"steps": half, "checkpoint": "truebase", "stage_type": "TrueBase", "mixture": mixture}
    return {"stable": stable, "anneal": {"steps": request.steps - half, **decay}}


def compare(old: Path, new: Path, tokens: int = 65_536) -> dict[str, Any]:
    """Return bits per byte of held-out text before and after: every old source, and every new one.

    `old` and `new` are run folders; `tokens` bounds what is read of each source.
    """
    import torch

    from freehold.checkpoint import dcp
    from freehold.data.shards import ShardSet
    from freehold.model.afmoe import Afmoe
    from freehold.trainer.validate import bits_per_byte, held_out

    texts = {}
    checkpoints = {name: RunFolder(run).stage(PRETRAIN) / "base" for name, run in (("before", old), ("after", new))}
    facts = {name: read_json(folder / TRAINER_FACTS) for name, folder in checkpoints.items()}
    for run, kind in ((old, "old"), (new, "new")):
        shards = ShardSet.load(RunFolder(run).stage(TOKENIZE) / "tokens")
        for name, source in shards.sources("validation").items():
            if source.total_tokens and not name.startswith(PREFIX):
                size, begin = facts["before"]["context_tokens"], int(facts["before"]["begins_with"][0])
                texts[f"{kind}/{name}"] = held_out(
                    source, shards.document_bytes("validation", name), size, tokens, begin
                )
    bits: dict[str, dict[str, float]] = {}
    for which, folder in checkpoints.items():
        config, state = dcp.read_model(folder)
        model = Afmoe(config)
        model.load_state_dict(state)
        with torch.no_grad():
            found = bits_per_byte(model, texts)
        bits[which] = {name.removeprefix("val/bpb/"): round(v, 5) for name, v in found.items() if name != "val/bpb"}
    timing = RunFolder(new).timing(PRETRAIN)
    return {
        "bits_per_byte": bits,
        "tokens": facts["after"]["tokens"] - parent_tokens(new),
        "seconds": read_json(timing).get("seconds") if timing.exists() else None,
        "parent": facts["after"]["parent"],
        "before": read_manifest(checkpoints["before"])["content_sha256"],
        "after": read_manifest(checkpoints["after"])["content_sha256"],
        "phases": facts["after"]["phases"],
    }


def parent_tokens(run: Path) -> int:
    """Return the tokens that the parent of a branch had seen."""
    facts = Path(resolved(run, PRETRAIN)["parent"]) / TRAINER_FACTS
    return int(read_json(facts)["tokens"])


def write_report(run: Path, found: dict[str, Any], usd_hour: float = 0.0) -> Table:
    """Write the comparison next to the run's report, as JSON and Markdown; return the table."""
    table = report(found, usd_hour)
    write_json(run / "retrain.json", found)
    write_atomic(run / "retrain.md", f"# Retraining\n\n{table.markdown()}")
    return table


def report(found: dict[str, Any], usd_hour: float = 0.0) -> Table:
    """Return the table of a retraining: old sources, then new ones; tokens, seconds, money and lineage below."""
    before, after = found["bits_per_byte"]["before"], found["bits_per_byte"]["after"]
    rows = [
        [name, f"{before[name]:.4f}", f"{after[name]:.4f}", f"{after[name] - before[name]:+.4f}",
         f"{100 * (after[name] / before[name] - 1):+.1f} %"]
        for name in sorted(before, key=lambda name: (not name.startswith("old/"), name))
    ]  # fmt: skip
    seconds = found["seconds"]
    cost = f", {seconds:,.0f} s" if seconds else ""
    cost += f", {seconds / 3600 * usd_hour:,.2f} USD" if seconds and usd_hour else ""
    note = (
        f"{found['tokens']:,} tokens{cost}. {found['before'][:12]} (before) and {found['after'][:12]} (after), which "
        f"branched off {found['parent'][:12]}. Bits per byte of held-out text."
    )
    return Table("Retrained", ["source", "before", "after", "difference", "relative"], rows, note)
