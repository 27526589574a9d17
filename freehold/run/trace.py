"""From a document to the steps, checkpoints and exports that saw it, and from a step, checkpoint or export back.

Everything is read from the run's own tables with DuckDB: rights and drops of `gather` and `curate`, the
shards' document index, and `trace.parquet` of `pretrain` and `align`. Steps count from 0; a checkpoint
made after S steps saw the steps 0 to S - 1. What an unfinished run cannot answer is listed as missing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from freehold.core.artifact import read_manifest
from freehold.core.errors import DataError
from freehold.run.checkpoints import WEIGHTS, Checkpoint, exported_checkpoint
from freehold.run.layout import EXPORT, GATHER, PRETRAIN
from freehold.run.tables import Tables, readable


@dataclass(frozen=True)
class RightsSum:
    """Rows of one source under one licence."""

    source: str
    source_version: str
    kind: str
    wrapper_licence: str
    licence: str
    licence_evidence: str
    documents: int


@dataclass(frozen=True)
class FateSum:
    """Rows of one source that ended in the same way: train, validation, dropped or unknown."""

    source: str
    fate: str
    reason: str
    documents: int


@dataclass(frozen=True)
class Place:
    """Where a document is in the token shards."""

    shard: str
    start: int
    tokens: int


@dataclass(frozen=True)
class Seen:
    """The steps of one phase that saw a document."""

    stage: str
    phase: str
    first_step: int
    last_step: int
    steps: list[int]
    tokens: int


@dataclass(frozen=True)
class TracedDocument:
    """One document: rights, fate, place in the shards, steps by stage and phase."""

    id: str
    source: str
    source_version: str
    path: str
    sha256: str
    wrapper_licence: str
    licence: str
    licence_evidence: str
    acquired: str
    kind: str
    synthetic_from: str
    teacher: str
    split: str
    fate: str
    reason: str
    detail: str
    shard: Place | None
    seen: tuple[Seen, ...]


@dataclass(frozen=True)
class SeenSum:
    """How many documents a phase saw, their tokens, and in which steps."""

    stage: str
    phase: str
    documents: int
    tokens: int
    steps: int
    ranges: list[list[int]]


@dataclass(frozen=True)
class Reached:
    """A checkpoint that learned from some of the documents."""

    path: str
    stage: str
    stage_type: str
    phase: str
    step: int
    content_sha256: str
    documents: int

    @classmethod
    def of(cls, checkpoint: Checkpoint, documents: int) -> Reached:
        """Return what an answer shows of a checkpoint."""
        c = checkpoint
        return cls(c.path, c.stage, c.stage_type, c.phase, c.step, c.content_sha256, documents)


@dataclass(frozen=True)
class Exported:
    """An exported file made from a checkpoint that saw the documents."""

    path: str
    documents: int


@dataclass(frozen=True)
class DocumentTrace:
    """Where documents went; `documents` details the first of them, all counts are over every match."""

    query: str
    matched_by: str
    run: str
    found: int
    rights: tuple[RightsSum, ...]
    fate: tuple[FateSum, ...]
    documents: tuple[TracedDocument, ...]
    seen: tuple[SeenSum, ...]
    checkpoints: tuple[Reached, ...]
    exports: tuple[Exported, ...]
    missing: list[str]


@dataclass(frozen=True)
class StepDocument:
    """A document in one step; its tokens are a share of all its steps' unless exact."""

    id: str
    source: str
    phase: str
    path: str | None
    source_version: str | None
    licence: str | None
    tokens: int
    tokens_exact: bool


@dataclass(frozen=True)
class Sum:
    """How many documents, and tokens of them."""

    documents: int
    tokens: int


@dataclass(frozen=True)
class StepTrace:
    """What one optimizer step saw."""

    run: str
    stage: str
    step: int
    steps: list[int]
    """First and last step of the stage."""
    phase: str
    tokens: int
    tokens_exact: bool
    changed_nothing: bool
    """Whether the step was skipped: the weights did not change."""
    sources: dict[str, Sum]
    licences: dict[str, Sum]
    documents: tuple[StepDocument, ...]
    checkpoints: list[str]
    missing: list[str]


@dataclass(frozen=True)
class CheckpointAbout:
    """What an answer says of the checkpoint it is about."""

    path: str
    stage: str
    stage_type: str
    phase: str
    step: int
    content_sha256: str


@dataclass(frozen=True)
class SourceSum:
    """What a checkpoint learned from one source."""

    source: str | None
    source_version: str | None
    kind: str | None
    documents: int
    tokens: int


@dataclass(frozen=True)
class LicenceSum:
    """What a checkpoint learned under one licence."""

    licence: str | None
    wrapper_licence: str | None
    documents: int
    tokens: int


@dataclass(frozen=True)
class LearnedDocument:
    """A document that a checkpoint learned from."""

    id: str
    source: str | None
    path: str | None
    licence: str | None
    tokens: int


@dataclass(frozen=True)
class CheckpointTrace:
    """What a checkpoint learned from, its parents' steps included."""

    run: str
    checkpoint: CheckpointAbout
    found: int
    tokens: int
    sources: tuple[SourceSum, ...]
    licences: tuple[LicenceSum, ...]
    documents: tuple[LearnedDocument, ...]
    exports: tuple[Exported, ...]
    missing: list[str]


def trace_document(run_folder: Path, query: str, *, limit: int | None = 50) -> DocumentTrace:
    """Answer where documents went, by id, source, licence expression, what they were made from, or part of a path.

    Details the first `limit`. Raises DataError, with the nearest name there is, when nothing matches.
    """
    with readable(run_folder), Tables(run_folder) as tables:
        matched_by = tables.match(query)
        tables.add_fates()
        reached = _checkpoints_that_saw(tables)
        return DocumentTrace(
            query=query,
            matched_by=matched_by,
            run=run_folder.name,
            found=tables.value("select count(*) from matched"),
            rights=tables.read(
                RightsSum,
                "select source, source_version, kind, wrapper_licence, licence, min(licence_evidence) licence_evidence,"
                " count(*) documents from matched group by all order by all",
            ),
            fate=tables.read(
                FateSum, "select source, fate, reason, count(*) documents from matched group by all order by all"
            ),
            documents=_details(tables, limit),
            seen=_seen(tables),
            checkpoints=reached,
            exports=exports_of(tables, {c.path: c.documents for c in reached}),
            missing=tables.missing,
        )


def trace_step(run_folder: Path, step: int, stage: str = PRETRAIN) -> StepTrace:
    """Answer which documents one optimizer step saw, with their licences and token counts.

    Raises DataError when the stage has not finished or has no such step.
    """
    with readable(run_folder), Tables(run_folder) as tables:
        if stage not in tables.traced:
            raise DataError(
                f"{stage} has not finished: which documents its steps saw is written at its end",
                where=tables.run.stage(stage),
                expected=tables.run.trace(stage).name,
                todo="continue it with `freehold run`",
            )
        first, last = tables.first_row(
            "select min(first_step), max(last_step) from trace where stage = $stage", stage=stage
        )
        if first is None or not first <= step <= last:
            found = f"steps {first} to {last}" if first is not None else "no steps"
            raise DataError(f"{stage} has no step {step}", where=tables.run.stage(stage), found=found)
        documents = tables.read(
            StepDocument,
            "select document_id id, trace.source, phase, path, source_version, licence,"
            " coalesce(step_tokens[list_position(steps, $step)], round(tokens / len(steps))::bigint) tokens,"
            " step_tokens is not null or len(steps) = 1 tokens_exact"
            " from trace left join rights on rights.id = document_id"
            " where stage = $stage and list_contains(steps, $step) order by trace.source, path, document_id",
            stage=stage,
            step=step,
        )
        return StepTrace(
            run=run_folder.name,
            stage=stage,
            step=step,
            steps=[first, last],
            phase=documents[0].phase,
            tokens=sum(d.tokens for d in documents),
            tokens_exact=all(d.tokens_exact for d in documents),
            changed_nothing=any(step in c.skipped_steps for c in tables.checkpoints if c.stage == stage),
            sources=_sums([(d.source, d.tokens) for d in documents]),
            licences=_sums([(d.licence, d.tokens) for d in documents]),
            documents=documents,
            checkpoints=[c.path for c in tables.checkpoints if any(s == stage and step < end for s, end in c.bounds)],
            missing=tables.missing,
        )


def trace_checkpoint(run_folder: Path, path: str, *, limit: int | None = 50) -> CheckpointTrace:
    """Answer what a checkpoint (or an export made from it) learned from: sources, licences, documents, tokens.

    `path` is as `find_checkpoint` returns it. Tokens are those of the steps before it was made, its parents' included;
    `documents` details the `limit` it read most of. Raises DataError when the run has no such checkpoint.
    """
    with readable(run_folder), Tables(run_folder) as tables:
        found = learned_from(tables, path)
        asked = {GATHER, *dict(found.bounds)}
        grouped = (
            " count(*) documents, sum(tokens)::bigint tokens from learned left join rights using (id)"
            " group by all order by tokens desc, 1, 2"
        )
        most = {} if limit is None else {"most": limit}
        return CheckpointTrace(
            run=run_folder.name,
            checkpoint=CheckpointAbout(
                found.path, found.stage, found.stage_type, found.phase, found.step, found.content_sha256
            ),
            found=tables.value("select count(*) from learned"),
            tokens=tables.value("select coalesce(sum(tokens), 0)::bigint from learned"),
            sources=tables.read(SourceSum, "select source, source_version, kind," + grouped),
            licences=tables.read(LicenceSum, "select licence, wrapper_licence," + grouped),
            documents=tables.read(
                LearnedDocument,
                "select id, source, path, licence, tokens from learned left join rights using (id)"
                " order by tokens desc, id" + (" limit $most" if most else ""),
                **most,
            ),
            exports=exports_of(tables, {found.path: 0}),
            missing=[line for line in tables.missing if line.partition(":")[0] in asked],
        )


def learned_from(tables: Tables, path: str) -> Checkpoint:
    """Fill `learned` (id, tokens) with what a checkpoint learned from, its parents' steps included; return it.

    Raises DataError when the run has no such checkpoint.
    """
    found = next((c for c in tables.checkpoints if c.path == path), None)
    if found is None:
        raise DataError(
            "no such checkpoint",
            where=tables.folder,
            found=path,
            expected=", ".join(c.path for c in tables.checkpoints) or None,
        )
    tables.connection.execute(
        "create table learned as with bounds as"
        " (select stage, max(past) past from"
        "  (select unnest($stages::varchar[]) stage, unnest($ends::bigint[]) past) group by stage),"
        " part as (select trace.*, past from trace join bounds using (stage) where first_step < past)"
        " select document_id id, sum(case when last_step < past then tokens else coalesce("
        "  list_sum(list_transform(list_zip(steps, step_tokens),"
        "   lambda x: case when x[1] < past then x[2] else 0 end)),"
        "  round(tokens * len(list_filter(steps, lambda x: x < past)) / len(steps))) end)::bigint tokens"
        " from part group by document_id",
        {"stages": [stage for stage, _ in found.bounds], "ends": [end for _, end in found.bounds]},
    )
    return found


def exports_of(tables: Tables, documents: dict[str, int]) -> tuple[Exported, ...]:
    """Return the exported files made from one of the checkpoints, with the number of documents given for it."""
    if not tables.run.finished(EXPORT):
        tables.gaps.append(f"{EXPORT}: not finished")
        return ()
    manifest = read_manifest(tables.run.stage(EXPORT))
    for stage, recorded in sorted(manifest.get("inputs", {}).items()):
        finished = tables.run.finished(stage)
        if not finished or read_manifest(tables.run.stage(stage))["content_sha256"] != recorded:
            tables.gaps.append(f"{EXPORT}: made from another {stage} than the one in this run")
            return ()
    exported = exported_checkpoint(manifest)
    if exported not in documents:
        return ()
    files = sorted(name for name in manifest["files"] if name.endswith(WEIGHTS))
    return tuple(Exported(f"{EXPORT}/{name}", documents[exported]) for name in files)


def _details(tables: Tables, limit: int | None) -> tuple[TracedDocument, ...]:
    most = {} if limit is None else {"most": limit}
    documents = tables.rows(
        "select * from matched order by source, path, id" + (" limit $most" if most else ""), **most
    )
    ids = [row["id"] for row in documents]
    places = {
        row["id"]: Place(row["shard"], row["start"], row["tokens"])
        for row in tables.rows("select * from shards where id in (select unnest($ids::varchar[]))", ids=ids)
    }
    seen: dict[str, list[Seen]] = {}
    for row in tables.rows(
        "select document_id, stage, phase, first_step, last_step, steps, tokens from trace"
        " where source in (select unnest($sources::varchar[]))"  # by which the files are sorted
        " and document_id in (select unnest($ids::varchar[])) order by stage desc, first_step",
        ids=ids,
        sources=sorted({row["source"] for row in documents}),
    ):
        seen.setdefault(row.pop("document_id"), []).append(Seen(**row))
    return tuple(
        TracedDocument(**row, shard=places.get(row["id"]), seen=tuple(seen.get(row["id"], ()))) for row in documents
    )


def _seen(tables: Tables) -> tuple[SeenSum, ...]:
    rows = tables.rows(
        "select stage, phase, count(distinct document_id) documents, sum(tokens)::bigint tokens,"
        " list_sort(list_distinct(flatten(list(steps)))) steps"
        " from trace where document_id in (select id from matched) group by stage, phase"
        " order by stage desc, min(first_step)"
    )
    return tuple(SeenSum(**{**row, "steps": len(row["steps"]), "ranges": ranges(row["steps"])}) for row in rows)


def _checkpoints_that_saw(tables: Tables) -> tuple[Reached, ...]:
    first = tables.rows(
        "select stage, document_id, min(first_step) first_step from trace"
        " where document_id in (select id from matched) group by stage, document_id"
    )
    answer = []
    for checkpoint in tables.checkpoints:
        ends = checkpoint.bounds
        saw = {
            row["document_id"]
            for row in first
            if any(row["stage"] == stage and row["first_step"] < end for stage, end in ends)
        }
        if saw:
            answer.append(Reached.of(checkpoint, len(saw)))
    return tuple(answer)


def ranges(steps: Iterable[int]) -> list[list[int]]:
    """Return sorted steps as [first, last] runs."""
    runs: list[list[int]] = []
    for step in steps:
        if runs and step == runs[-1][1] + 1:
            runs[-1][1] = step
        else:
            runs.append([step, step])
    return runs


def _sums(rows: Sequence[tuple[str | None, int]]) -> dict[str, Sum]:
    sums: dict[str, list[int]] = {}
    for name, tokens in rows:
        sums.setdefault(name or "unknown", []).append(tokens)
    return {name: Sum(len(tokens), sum(tokens)) for name, tokens in sorted(sums.items())}
