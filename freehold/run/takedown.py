"""The answer to a take-down: what a source, document or licence reached, what is still clean, and the way back.

The order of the data is a function of seed and step, and `trace.parquet` is that function written out, so the answer
is exact: a checkpoint is clean when no step it is made of learned from a row in question, and unknown (never clean)
when what its steps saw is not recorded. Forks and children next to the run are answered too. Nothing is deleted here:
`takedown_recipe` writes a recipe that does without the rows, and names the command that makes it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from freehold.core.artifact import read_manifest
from freehold.ledger.reservations import Reservations
from freehold.run.checkpoints import WEIGHTS, Checkpoint, exported_checkpoint, read_checkpoints
from freehold.run.layout import ALIGN, CURATE, EXPORT, GATHER, PRETRAIN, RunFolder, training
from freehold.run.steps import phases_left, step_seconds, total_steps
from freehold.run.tables import MATCHES, Tables, listed, readable
from freehold.run.takedown_answer import (
    Excluded,
    FateSum,
    Judged,
    Origin,
    Restart,
    RightsSum,
    RunAnswer,
    ShardSum,
    StageSum,
    Takedown,
    Twin,
)
from freehold.run.trace import ranges

RESERVED = "reserved"
"""The question for what sites reserve by now."""
COLUMNS = "id, source, source_version, licence, kind"


def takedown(
    run_folder: Path, query: str, *, widen: bool = False, reservations: Reservations | None = None
) -> Takedown:
    """Answer what a source, document (id or part of its path) or licence reached, in the run and in those next to it.

    Rows that were certainly made from what is asked for belong to it. Two kinds of rows are only named, unless
    `widen` takes them in: twins (kept rows of which a row asked for was dropped as a copy) and rows made from a
    source of which only a part is asked for. The question `reserved` means the documents that their sites reserve by
    now, as `reservations` has it. Raises DataError when nothing matches or a table is damaged.
    """
    snapshot = reservations.open() if reservations and query == RESERVED else None
    if run_folder.name in ("", ".."):
        run_folder = run_folder.resolve()  # its parent holds the others
    with readable(run_folder), Tables(run_folder) as tables:
        if snapshot:
            tables.reserve(snapshot)
        matched_by = tables.match(query, COLUMNS)
        asked = tables.value("select count(*) from matched")
        family = _Family(run_folder, tables)
        named = family.read(run_folder, tables, widen)
        for other in family.others():
            with readable(other), Tables(other) as neighbour:
                if snapshot:
                    neighbour.reserve(snapshot)
                neighbour.add_matched(MATCHES[matched_by], {"query": query}, COLUMNS, new=True)
                family.read(other, neighbour, widen)
        runs = family.answers()
        missing = tables.missing
        if not runs[0].unknown:  # a parent next to the run was looked into here
            missing = [line for line in missing if "parent checkpoint is outside" not in line]
        return Takedown(
            query=query,
            matched_by=matched_by,
            run=run_folder.name,
            asked=asked,
            derived=named.derived,
            twins=named.twins,
            perhaps_derived=named.perhaps,
            widened=widen,
            rows=tables.value("select count(*) from matched"),
            rights=tables.read(
                RightsSum,
                "select source, source_version, kind, licence, count(*) documents from matched"
                " group by all order by all",
            ),
            fate=_fates(tables, named.whole),
            excluded=_exclusion(tables, named.whole),
            runs=runs,
            missing=missing,
        )


@dataclass
class _Named:
    """Rows in addition to those asked for."""

    derived: int = 0
    twins: tuple[Twin, ...] = ()
    perhaps: list[Origin] = field(default_factory=list)
    whole: list[str] = field(default_factory=list)
    """Sources of which every row is in question."""


@dataclass
class _Run:
    """What one run's tables say of the rows in question."""

    folder: Path
    checkpoints: list[Checkpoint]
    traced: set[str] = field(default_factory=set)
    shards: tuple[ShardSum, ...] = ()
    seen: list[StageSum] = field(default_factory=list)
    rows: int = 0


class _Family:
    """A run and the runs next to it: forks share its stages, children start from its checkpoints."""

    def __init__(self, run_folder: Path, tables: Tables) -> None:
        self.main, self.tables = run_folder, tables
        others = sorted(
            path for path in run_folder.parent.iterdir() if path != run_folder and RunFolder(path).any_finished()
        )
        self.runs = {path: _Run(path, read_checkpoints(path)) for path in [run_folder, *others]}
        self.by_hash: dict[str, tuple[_Run, Checkpoint]] = {}
        for run in reversed(self.runs.values()):
            for checkpoint in run.checkpoints:
                self.by_hash[checkpoint.content_sha256] = (run, checkpoint)
        tables.connection.execute(
            "create table firsts (run varchar, stage varchar, document_id varchar, first_step integer)"
        )

    def others(self) -> Iterable[Path]:
        """Return the runs next to the main one that hold documents."""
        return [
            path
            for path in self.runs
            if path != self.main and any(RunFolder(path).tables(stage) for stage in (GATHER, CURATE))
        ]

    def read(self, folder: Path, tables: Tables, widen: bool) -> _Named:
        """Read a run whose `matched` is filled: add what was made from it, note shards, steps and first steps."""
        named = _widen(tables, widen)
        run = self.runs[folder]
        run.traced = set(tables.traced)
        run.rows = tables.value("select count(*) from matched")
        named.whole = _whole_sources(tables)
        which, values = _is_matched(tables, "id", named.whole)
        run.shards = tables.read(
            ShardSum,
            "select shard, count(*) documents, sum(tokens)::bigint tokens from shards"
            f" where {which} group by shard order by shard",
            **values,
        )
        which, values = _is_matched(tables, "document_id", named.whole)
        steps: dict[str, list[int]] = {}
        for row in tables.rows(
            f"select distinct stage, unnest(steps) step from trace where {which} order by stage, step", **values
        ):
            steps.setdefault(row["stage"], []).append(row["step"])
        tables.connection.execute(
            "create table firsts_here as select stage, document_id, min(first_step)::integer first_step,"
            f" sum(tokens)::bigint tokens from trace where {which} group by stage, document_id",
            values or None,
        )
        for row in tables.rows(
            "select stage, count(*) documents, sum(tokens)::bigint tokens from firsts_here"
            " group by stage order by stage desc"
        ):
            seen = steps[row["stage"]]
            run.seen.append(StageSum(**row, steps=len(seen), ranges=ranges(seen)))
        self._add_firsts(folder, tables)
        return named

    def _add_firsts(self, folder: Path, tables: Tables) -> None:
        insert = "insert into firsts select $run, stage, document_id, first_step from"
        name, main = {"run": folder.as_posix()}, self.tables.connection
        if tables is self.tables:
            main.execute(f"{insert} firsts_here", name)
            return
        firsts = tables.connection.sql("select stage, document_id, first_step from firsts_here")
        main.register("of_run", firsts.to_arrow_table())
        main.execute(f"{insert} of_run", name)
        main.unregister("of_run")

    def bounds(self, run: _Run, checkpoint: Checkpoint) -> tuple[list[tuple[_Run, str, int]], bool]:
        """Return the (run, stage, end step) a checkpoint is made of, and whether all its ancestry is known."""
        found = [(run, stage, step) for stage, step in checkpoint.bounds]
        outside, seen = checkpoint.outside, set()
        while outside and outside not in seen:
            seen.add(outside)
            if outside not in self.by_hash:
                return found, False
            run, parent = self.by_hash[outside]
            found += [(run, stage, step) for stage, step in parent.bounds]
            outside = parent.outside
        return found, True

    def judge(self, run: _Run, checkpoint: Checkpoint) -> Judged:
        """Return the state of a checkpoint and how many of the rows it learned from."""
        parts, known = self.bounds(run, checkpoint)
        documents = self.tables.value(
            "select count(distinct document_id) from firsts join"
            " (select unnest($runs::varchar[]) run, unnest($stages::varchar[]) stage, unnest($ends::bigint[]) past)"
            " using (run, stage) where first_step < past",
            runs=[of.folder.as_posix() for of, _, _ in parts],
            stages=[stage for _, stage, _ in parts],
            ends=[end for _, _, end in parts],
        )
        known = known and all(stage in of.traced for of, stage, _ in parts)
        c = checkpoint
        return Judged(
            c.path,
            c.stage,
            c.stage_type,
            c.phase,
            c.step,
            c.content_sha256,
            "affected" if documents else "clean" if known else "unknown",
            documents,
        )

    def answers(self) -> list[RunAnswer]:
        """Return one entry for each run that the rows reached, the run asked about first."""
        entries = []
        for run in self.runs.values():
            checkpoints = [self.judge(run, checkpoint) for checkpoint in run.checkpoints]
            reached = [c for c in checkpoints if c.state == "affected"]
            if run.folder != self.main and not reached and not run.shards:
                continue
            clean = [c for c in checkpoints if c.state == "clean"]
            entries.append(
                RunAnswer(
                    run=run.folder.as_posix(),
                    rows=run.rows,
                    shards=run.shards,
                    seen=tuple(run.seen),
                    checkpoints=reached,
                    unknown=[c.path for c in checkpoints if c.state == "unknown"],
                    exports=_exports(run.folder, reached),
                    last_clean=max(clean, key=lambda c: c.age).path if clean else None,
                    restart=self._restart(run, checkpoints),
                )
            )
        return entries

    def _restart(self, run: _Run, checkpoints: list[Judged]) -> Restart | None:
        """Return the cheapest way to the run's last checkpoints, or None when none learned from the rows."""
        states = {c.path: c.state for c in checkpoints}
        if all(state == "clean" for state in states.values()):
            return None
        totals = {stage: total_steps(run.folder, run.checkpoints, stage) for stage in training()}
        origin, step, blocked = self._origin(run, checkpoints, totals[PRETRAIN])
        steps = {PRETRAIN: max(totals[PRETRAIN] - step, 0), ALIGN: totals[ALIGN]}
        speeds = {stage: step_seconds(run.folder, stage) for stage in training()}
        costs = [(n, speeds[stage]) for stage, n in steps.items() if n]
        seconds = None if any(s is None for _, s in costs) else sum(n * s for n, s in costs if s is not None)
        return Restart(
            origin=origin,
            from_step=step,
            steps=steps,
            step_s={stage: speed for stage, speed in speeds.items() if speed is not None},
            hours=None if seconds is None else seconds / 3600,
            blocked=blocked,
            certain="affected" in states.values(),
        )

    def _origin(self, run: _Run, checkpoints: list[Judged], steps: int) -> tuple[str, int, str]:
        """Return the newest clean checkpoint to continue from, its step, and why there is none."""
        judged = {c.path: c for c in checkpoints}
        started = next((c for c in run.checkpoints if c.stage == ALIGN and c.parent), None)
        base = next((c for c in run.checkpoints if started and c.content_sha256 == started.parent), None)
        pretrained = [c for c in run.checkpoints if c.stage == PRETRAIN]
        needed = base or (pretrained[-1] if pretrained else None)
        if needed is not None and judged[needed.path].state == "clean":
            return f"{run.folder.as_posix()}/{needed.path}", steps, ""
        usable = [
            judged[c.path]
            for c in pretrained
            if judged[c.path].state == "clean" and phases_left(run.folder, c.step) is not None
        ]
        if usable:
            best = max(usable, key=lambda c: c.age)
            return f"{run.folder.as_posix()}/{best.path}", best.step, ""
        parent = next((c.outside for c in pretrained if c.outside), "")
        if not parent:
            return "", 0, ""
        if parent not in self.by_hash:
            return "", 0, "whether its parent is clean is not known: the run that made it is not next to this one"
        owner, above = self.by_hash[parent]
        path = f"{owner.folder.as_posix()}/{above.path}"
        if self.judge(owner, above).state == "clean":
            return path, above.step, ""
        return "", above.step, f"its parent {path} is not clean: restart that run first"


def _widen(tables: Tables, widen: bool) -> _Named:
    """Add to `matched` the rows made from it; with `widen` also twins and rows perhaps made from it."""
    named = _Named()
    while True:
        made = _made_from(tables)
        twins = _twins(tables)
        certain = [row for row in made if row.certain or widen]
        named.perhaps = [row for row in made if not row.certain]
        named.twins = twins
        sources = [row.synthetic_from for row in certain]
        ids = [row.id for row in twins] if widen else []
        if not sources and not ids:
            return named
        added = tables.add_matched(
            "(list_contains($sources::varchar[], synthetic_from) or list_contains($ids::varchar[], id))"
            " and id not in (select id from matched)",
            {"sources": sources, "ids": ids},
            COLUMNS,
        )
        named.derived += added - len(ids)


def _made_from(tables: Tables) -> list[Origin]:
    """Return what rows outside `matched` say they were made from, when that is in it: `certain` if all is."""
    if not tables.rows("select 1 from rights where synthetic_from <> '' limit 1"):
        return []
    stated = tables.rows(
        "select synthetic_from, count(*) documents from rights where synthetic_from <> ''"
        " and id not in (select id from matched) group by synthetic_from order by synthetic_from"
    )
    if not stated:
        return []
    words = sorted({word for row in stated for word in re.split(r"[ ,;]+", row["synthetic_from"]) if word})
    whole = {
        row["name"]: row["whole"]
        for row in tables.rows(
            "with parts as (select unnest([id, source, source_version]) name, id from rights)"
            " select name, count(*) = count(matched.id) whole from parts left join matched using (id)"
            " where list_contains($words::varchar[], name) group by name having count(matched.id) > 0",
            words=words,
        )
    }
    found = []
    for row in stated:
        origins = [word for word in re.split(r"[ ,;]+", row["synthetic_from"]) if word in whole]
        if origins:
            found.append(Origin(**row, certain=any(whole[origin] for origin in origins)))
    return found


def _twins(tables: Tables) -> tuple[Twin, ...]:
    """Return the kept rows of which a matched row was dropped as an exact or near copy."""
    originals = tables.rows(
        "with recursive copies as (select id, regexp_extract(detail, '[0-9a-f]{16}') original from drops"
        "  where reason in ('exact_duplicate', 'near_duplicate')),"
        " chain as (select original id from copies where id in (select id from matched)"
        "  union select copies.original id from copies join chain using (id))"
        " select id from chain"
    )
    if not originals:
        return ()
    return tables.read(
        Twin,
        "select id, source, path, licence from rights where list_contains($ids::varchar[], id)"
        " and id in (select id from kept) and id not in (select id from matched) order by id",
        ids=[row["id"] for row in originals],
    )


def _fates(tables: Tables, whole: list[str]) -> tuple[FateSum, ...]:
    """Return how many rows of `matched` each source kept for training and validation and dropped; the rest: unknown.

    No row is both kept and dropped, so nothing has to be joined.
    """
    which, values = _is_matched(tables, "id", whole)
    return tables.read(
        FateSum,
        "with known as (select source, split fate, count(*) documents from kept"
        f" where {which} group by all union all select source, 'dropped', count(distinct id) from drops"
        f" where {which} group by all), every as (select source, count(*) documents from matched group by source),"
        " rest as (select source, 'unknown', every.documents - coalesce(sum(known.documents), 0)::bigint documents"
        " from every left join known using (source) group by source, every.documents)"
        " select * from known union all select * from rest where documents > 0 order by all",
        **values,
    )


def _exclusion(tables: Tables, whole: list[str]) -> Excluded:
    """Return `matched` as curate and rephrase take it.

    A rewrite whose seed goes too need not be named: it is not made again.
    """
    made = {row["source"] for row in tables.rows("select distinct source from rewritten")}
    sources = [source for source in whole if source not in made]
    ids = tables.rows("select id, source from matched where source not in $whole order by id", whole=listed(sources))
    rewritten = (
        tables.rows(
            "select id, source from rewritten where id in (select id from matched)"
            " and synthetic_from not in (select id from matched) order by id"
        )
        if made
        else []
    )
    return Excluded(
        sources=sources,
        documents=[row["id"] for row in ids if row["source"] not in made],
        rewritten=sorted({row["source"] if row["source"] in whole else row["id"] for row in rewritten}),
    )


def _whole_sources(tables: Tables) -> list[str]:
    """Return the sources of which every row is in `matched`."""
    return [
        row["source"]
        for row in tables.rows(
            "select source from (select source, count(*) rows from rights group by source)"
            " join (select source, count(*) rows from matched group by source) using (source, rows) order by source"
        )
    ]


def _is_matched(tables: Tables, column: str, whole: list[str]) -> tuple[str, dict[str, list[str]]]:
    """Return the condition that a row of a table with `source` and an id is in `matched`, and its parameters.

    Sources of which every row is in question go by name: their files need no look at ids.
    """
    rest = [
        row["source"]
        for row in tables.rows("select distinct source from matched where source not in $whole", whole=listed(whole))
    ]
    parts, values = [], {}
    if whole:
        parts.append("source in $whole")
        values["whole"] = listed(whole)
    if rest or not whole:
        parts.append(f"(source in $rest and {column} in (select id from matched where source in $rest))")
        values["rest"] = listed(rest)
    return f"({' or '.join(parts)})", values


def _exports(folder: Path, reached: list[Judged]) -> list[str]:
    """Return the exported files that were made from an affected checkpoint."""
    run = RunFolder(folder)
    if not run.finished(EXPORT):
        return []
    manifest = read_manifest(run.stage(EXPORT))
    if exported_checkpoint(manifest) not in {c.path for c in reached}:
        return []
    return sorted(f"{EXPORT}/{name}" for name in manifest["files"] if name.endswith(WEIGHTS))
