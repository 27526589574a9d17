"""From a document to the steps, checkpoints and exports that saw it, and from a step, checkpoint or export back.

Everything is read from the run's own tables with DuckDB: rights and drops of `gather` and `curate`, the
shards' document index, and `trace.parquet` of `pretrain` and `align`. Steps count from 0; a checkpoint
made after S steps saw the steps 0 to S - 1. What an unfinished run cannot answer is listed as missing.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from freehold.core.artifact import MANIFEST, read_json, read_manifest
from freehold.core.errors import DataError
from freehold.run.layout import EXPORTED, RunFolder, training

if TYPE_CHECKING:
    import duckdb

RIGHTS = (
    "id, source, source_version, path, sha256, wrapper_licence, licence, licence_evidence, acquired, kind,"
    " synthetic_from, teacher"
)
ID = re.compile("[0-9a-f]{16}")
"""What `document_id` returns."""
# Ways to read a question, tried in this order; the first that matches anything is taken.
MATCHES = {
    "id": "id = $query",
    "source": "source = $query or source_version = $query",
    # A million rows have few licences: each is taken apart once.
    "licence": "licence in (select licence from (select distinct licence from rights)"
    " where lower(licence) = lower($query) or lower($query) not in ('and', 'or', 'with')"
    " and list_contains(string_split(replace(replace(lower(licence), '(', ''), ')', ''), ' '), lower($query)))",
    "origin": "synthetic_from = $query",
    "path": "contains(lower(path), lower($query))",
}
TRAINING = training()


def trace_document(run_folder: Path, query: str, *, limit: int | None = 50) -> dict[str, Any]:
    """Answer where documents went, by id, source, licence expression, what they were made from, or part of a path.

    `documents` details the first `limit`; all counts are over every match. Raises DataError, with the
    nearest name there is, when nothing matches.
    """
    with readable(run_folder), Tables(run_folder) as tables:
        matched_by = tables.match(query)
        tables.add_fates()
        answer: dict[str, Any] = {
            "query": query,
            "matched_by": matched_by,
            "run": run_folder.name,
            "found": tables.value("select count(*) from matched"),
            "rights": tables.rows(
                "select source, source_version, kind, wrapper_licence, licence, min(licence_evidence) licence_evidence,"
                " count(*) documents from matched group by all order by all"
            ),
            "fate": tables.rows(
                "select source, fate, reason, count(*) documents from matched group by all order by all"
            ),
            "documents": tables.details(limit),
            "seen": tables.seen(),
            "checkpoints": tables.checkpoints_that_saw(),
        }
        answer["exports"] = tables.exports(answer["checkpoints"])
        answer["missing"] = tables.missing
    return answer


def trace_step(run_folder: Path, step: int, stage: str = "pretrain") -> dict[str, Any]:
    """Answer which documents one optimizer step saw, with their licences and token counts.

    Raises DataError when the stage has not finished or has no such step.
    """
    with readable(run_folder), Tables(run_folder) as tables:
        if stage not in tables.traced:
            raise DataError(
                f"{stage} has not finished: which documents its steps saw is written at its end",
                where=run_folder / stage,
                expected="trace.parquet",
                todo="go on with `freehold run`",
            )
        first, last = tables.first_row(
            "select min(first_step), max(last_step) from trace where stage = $stage", stage=stage
        )
        if first is None or not first <= step <= last:
            found = f"steps {first} to {last}" if first is not None else "no steps"
            raise DataError(f"{stage} has no step {step}", where=run_folder / stage, found=found)
        documents = tables.rows(
            "select document_id id, trace.source, phase, path, source_version, licence,"
            " coalesce(step_tokens[list_position(steps, $step)], round(tokens / len(steps))::bigint) tokens,"
            " step_tokens is not null or len(steps) = 1 tokens_exact"
            " from trace left join rights on rights.id = document_id"
            " where stage = $stage and list_contains(steps, $step) order by trace.source, path, document_id",
            stage=stage,
            step=step,
        )
        saw = [c for c in tables.checkpoints if any(s == stage and step < end for s, end in c["bounds"])]
        return {
            "run": run_folder.name,
            "stage": stage,
            "step": step,
            "steps": [first, last],
            "phase": documents[0]["phase"],
            "tokens": sum(d["tokens"] for d in documents),
            "tokens_exact": all(d["tokens_exact"] for d in documents),
            "changed_nothing": any(step in c["skipped_steps"] for c in tables.checkpoints if c["stage"] == stage),
            "sources": _sums(documents, "source"),
            "licences": _sums(documents, "licence"),
            "documents": documents,
            "checkpoints": [c["path"] for c in saw],
            "missing": tables.missing,
        }


def find_checkpoint(run_folder: Path, query: str) -> str | None:
    """Return the path (in the run) of the checkpoint that a question names, or None when it names none.

    It may be named by its path or its last part, what it is (Base), the beginning of its hash (8 digits or more), or
    by an exported file made from it.
    """
    checkpoints = read_checkpoints(run_folder)
    wanted = query.rstrip("/").removeprefix(run_folder.as_posix().rstrip("/") + "/")
    if wanted.partition("/")[0] == "export" and (run_folder / "export" / MANIFEST).exists():
        manifest = read_manifest(run_folder / "export")
        files = [name for name in manifest["files"] if f"export/{name}".startswith(wanted)]
        wanted = manifest.get("config", {}).get("checkpoint", EXPORTED) if files else wanted
    for checkpoint in reversed(checkpoints):
        named = (checkpoint["path"], checkpoint["path"].rpartition("/")[2], checkpoint["stage_type"])
        if wanted in named or (len(wanted) >= 8 and checkpoint["content_sha256"].startswith(wanted)):
            return str(checkpoint["path"])
    return None


def trace_checkpoint(run_folder: Path, path: str, *, limit: int | None = 50) -> dict[str, Any]:
    """Answer what a checkpoint (or an export made from it) learned from: sources, licences, documents, tokens.

    `path` is as `find_checkpoint` returns it. Tokens are those of the steps before it was made, its parents' included;
    `documents` details the `limit` it read most of. Raises DataError when the run has no such checkpoint.
    """
    with readable(run_folder), Tables(run_folder) as tables:
        found = learned_from(tables, path)
        missing = [line for line in tables.missing if line.partition(":")[0] in {"gather", *dict(found["bounds"])}]
        grouped = (
            " count(*) documents, sum(tokens)::bigint tokens from learned left join rights using (id)"
            " group by all order by tokens desc, 1, 2"
        )
        keys = ("path", "stage", "stage_type", "phase", "step", "content_sha256")
        return {
            "run": run_folder.name,
            "checkpoint": {key: found[key] for key in keys},
            "found": tables.value("select count(*) from learned"),
            "tokens": tables.value("select coalesce(sum(tokens), 0)::bigint from learned"),
            "sources": tables.rows("select source, source_version, kind," + grouped),
            "licences": tables.rows("select licence, wrapper_licence," + grouped),
            "documents": tables.rows(
                "select id, source, path, licence, tokens from learned left join rights using (id)"
                " order by tokens desc, id" + (f" limit {int(limit)}" if limit is not None else "")
            ),
            "exports": tables.exports([{**found, "documents": 0}]),
            "missing": missing,
        }


def learned_from(tables: Tables, path: str) -> dict[str, Any]:
    """Fill `learned` (id, tokens) with what a checkpoint learned from, its parents' steps included; return it.

    Raises DataError when the run has no such checkpoint.
    """
    found = next((c for c in tables.checkpoints if c["path"] == path), None)
    if found is None:
        raise DataError(
            "no such checkpoint",
            where=tables.folder,
            found=path,
            expected=", ".join(c["path"] for c in tables.checkpoints) or None,
        )
    parts: list[str] = []
    values: dict[str, Any] = {}
    for number, (stage, end) in enumerate(found["bounds"]):
        parts.append(f"(stage = $stage{number} and first_step < $end{number})")
        values |= {f"stage{number}": stage, f"end{number}": end}
    ends = " ".join(f"when stage = $stage{n} then $end{n}" for n in range(len(parts)))
    tables.connection.execute(
        "create table learned as with part as"
        f" (select *, case {ends} end past from trace where {' or '.join(parts)})"
        " select document_id id, sum(case when last_step < past then tokens else coalesce("
        "  list_sum(list_transform(list_zip(steps, step_tokens),"
        "   lambda x: case when x[1] < past then x[2] else 0 end)),"
        "  round(tokens * len(list_filter(steps, lambda x: x < past)) / len(steps))) end)::bigint tokens"
        " from part group by document_id",
        values,
    )
    return found


def render(answer: dict[str, Any], width: int = 120) -> str:
    """Return an answer of `trace_document`, `trace_step` or `trace_checkpoint` as text for a terminal."""
    from freehold.run.trace_text import render_checkpoint, render_document, render_step

    if "checkpoint" in answer:
        return render_checkpoint(answer, width)
    return render_step(answer, width) if "step" in answer else render_document(answer, width)


def ranges(steps: Iterable[int]) -> list[list[int]]:
    """Return sorted steps as [first, last] runs."""
    runs: list[list[int]] = []
    for step in steps:
        if runs and step == runs[-1][1] + 1:
            runs[-1][1] = step
        else:
            runs.append([step, step])
    return runs


def _quoted(path: Path) -> str:
    return path.as_posix().replace("'", "''")


def listed(names: Iterable[str]) -> str:
    """Return names as a list for `in`: written out, so that whole files and row groups can be passed over."""
    return "(" + ", ".join("'" + name.replace("'", "''") + "'" for name in [*names, ""]) + ")"


def _sums(documents: list[dict[str, Any]], key: str) -> dict[str, dict[str, int]]:
    sums: dict[str, dict[str, int]] = {}
    for row in documents:
        entry = sums.setdefault(row[key] or "unknown", {"documents": 0, "tokens": 0})
        entry["documents"] += 1
        entry["tokens"] += row["tokens"]
    return dict(sorted(sums.items()))


def read_checkpoints(run_folder: Path) -> list[dict[str, Any]]:
    """Return every finished checkpoint of a run, oldest first, named ones before step ones of the same step.

    `bounds` are the (stage, steps) it is made of: an align checkpoint has its parent's too. `outside` is
    the parent's hash when the parent is not in this run.
    """
    found: list[dict[str, Any]] = []
    for stage in TRAINING:
        here = []
        for path in RunFolder(run_folder).trainer_facts(stage):
            if not (path.parent / MANIFEST).exists():
                continue
            facts = read_json(path)
            manifest = read_manifest(path.parent)
            here.append(
                {
                    "path": path.parent.relative_to(run_folder).as_posix(),
                    "stage": stage,
                    "stage_type": facts.get("stage_type") or "",
                    "step": int(facts["step"]),
                    "phase": facts.get("phase", ""),
                    "content_sha256": manifest["content_sha256"],
                    "created": manifest.get("created", ""),
                    "parent": facts.get("parent") or "",
                    "skipped_steps": facts.get("skipped_steps", []),
                }
            )
        found += sorted(here, key=lambda c: (c["step"], c["path"].count("/"), c["path"]))
    by_hash = {c["content_sha256"]: c for c in found}
    for checkpoint in found:
        bounds, parent = [(checkpoint["stage"], checkpoint["step"])], checkpoint["parent"]
        while parent in by_hash:
            bounds.append((by_hash[parent]["stage"], by_hash[parent]["step"]))
            parent = by_hash[parent]["parent"]
        checkpoint["bounds"], checkpoint["outside"] = bounds, parent
    return found


@contextlib.contextmanager
def readable(run_folder: Path) -> Iterator[None]:
    """Turn what DuckDB says of a damaged table into one DataError."""
    import duckdb

    try:
        yield
    except duckdb.Error as error:
        raise DataError(
            "a table of the run cannot be read: it is damaged",
            where=run_folder,
            found=str(error).splitlines()[0],
            todo="make the stage again with --clean",
        ) from error


class Tables:
    """A run's tables as DuckDB views: `rights` (every row gathered or rewritten), `rewritten`, `fate`, `trace`,
    `shards`, `matched`."""

    def __init__(self, run_folder: Path) -> None:
        import duckdb

        self.folder = run_folder
        self.gaps: list[str] = []
        self.connection: duckdb.DuckDBPyConnection = duckdb.connect(":memory:")
        kept = self._files("curate", "documents/*.parquet", "conversations/*.parquet")
        gathered = self._files("gather", "documents/*.parquet", "conversations/*.parquet")
        if not kept and not gathered:
            raise DataError(
                "nothing to trace: the run has no documents",
                where=run_folder,
                expected="gather/documents or curate/documents",
                todo="run `freehold run RECIPE` first, or name the run folder with --run",
            )
        rewritten = self._files("rephrase", "documents/*.parquet")
        if rewritten:
            self._view("rewritten", "id, source, synthetic_from", rewritten)
        else:
            self._empty("rewritten", "id varchar, source varchar, synthetic_from varchar")
        kept, gathered = ([*files, *rewritten] if files else [] for files in (kept, gathered))
        self._view("rights", RIGHTS, gathered or kept)
        if kept:
            self._view("kept", "id, source, split", kept)
        else:
            self.gaps.append("curate: not finished, so splits and drops are not known")
            self._empty("kept", "id varchar, source varchar, split varchar")
        drops = run_folder / "curate" / "drops.parquet"
        if drops.exists():
            self._view("drops", "id, source, reason, detail", [drops])
        else:
            self._empty("drops", "id varchar, source varchar, reason varchar, detail varchar")
        self._load_shards()
        self._load_trace()

    @functools.cached_property
    def checkpoints(self) -> list[dict[str, Any]]:
        """Every finished checkpoint; read when asked for: a question about rows need not stop at a damaged one."""
        return read_checkpoints(self.folder)

    @property
    def missing(self) -> list[str]:
        """What is not known, in sentences."""
        outside = sorted({c["stage"] for c in self.checkpoints if c["outside"]})
        told = "its parent checkpoint lies outside this run; what that saw is in its own run"
        return [*self.gaps, *(f"{stage}: {told}" for stage in outside)]

    def __enter__(self) -> Tables:
        return self

    def __exit__(self, *_: object) -> None:
        self.connection.close()

    def _files(self, stage: str, *patterns: str) -> list[Path]:
        return [path for pattern in patterns for path in sorted((self.folder / stage).glob(pattern))]

    def _view(self, name: str, columns: str, paths: list[Path]) -> None:
        files = ", ".join(f"'{_quoted(path)}'" for path in paths)
        self.connection.execute(
            f"create view {name} as select {columns} from read_parquet([{files}], union_by_name = true)"
        )

    def _empty(self, name: str, columns: str) -> None:
        self.connection.execute(f"create table {name} ({columns})")

    def with_all_columns(self) -> None:
        """Add the views `all_rights` and `kept_rights`, with the columns that files of earlier versions do not have."""
        patterns = ("documents/*.parquet", "conversations/*.parquet")
        kept, gathered = (self._files(stage, *patterns) for stage in ("curate", "gather"))
        rewritten = self._files("rephrase", patterns[0])
        kept, gathered = ([*files, *rewritten] if files else [] for files in (kept, gathered))
        self._view("all_rights", "*", gathered or kept)
        self._view("kept_rights", "*", kept or gathered)

    def column_names(self, table: str) -> list[str]:
        """Return the columns of one of the views."""
        return [row["column_name"] for row in self.rows(f"describe {table}")]

    def _load_shards(self) -> None:
        paths = self._files("tokenize", "tokens/*.parquet")
        if not paths:
            self.gaps.append("tokenize: not finished, so token shards and offsets are not known")
            self._empty(
                "shards", "id varchar, shard varchar, source varchar, start bigint, tokens bigint, bytes bigint"
            )
            return
        files = ", ".join(f"'{_quoted(path)}'" for path in paths)
        self.connection.execute(
            "create view shards as select id, regexp_replace(parse_filename(filename), '[.]parquet$', '.bin') shard,"
            " regexp_replace(parse_filename(filename), '[.][a-z]+[.]parquet$', '') source,"
            f" start, tokens, bytes from read_parquet([{files}], filename = true)"
        )

    def _load_trace(self) -> None:
        # Views, not copies: a question about one source reads the row groups that can hold it, not the table.
        parts = [
            "select null::varchar stage, null::varchar document_id, null::varchar source, null::varchar phase,"
            " null::integer first_step, null::integer last_step, null::integer[] steps, null::integer[] step_tokens,"
            " null::bigint tokens where false"
        ]
        self.traced = []
        for stage in TRAINING:
            path = self.folder / stage / "trace.parquet"
            if not path.exists():
                self.gaps.append(f"{stage}: not finished, so what its steps saw is not known")
                continue
            self.traced.append(stage)
            parts.append(f"select '{stage}' stage, * from read_parquet('{_quoted(path)}')")
        self.connection.execute("create view trace as " + " union all by name ".join(parts))

    def rows(self, sql: str, **values: Any) -> list[dict[str, Any]]:
        """Return the rows of a query as dictionaries."""
        result = self.connection.execute(sql, values or None)
        names = [column[0] for column in result.description or []]
        return [dict(zip(names, row, strict=True)) for row in result.fetchall()]

    def first_row(self, sql: str, **values: Any) -> tuple[Any, ...]:
        """Return the first row of a query that always has one."""
        return self.connection.execute(sql, values or None).fetchall()[0]  # type: ignore[no-any-return]

    def value(self, sql: str, **values: Any) -> Any:
        """Return the single value of a query."""
        return self.first_row(sql, **values)[0]

    def match(self, query: str, columns: str = RIGHTS) -> str:
        """Fill `matched` with the rows a question means; returns how it was read. DataError when nothing matches."""
        for name, condition in MATCHES.items() if query.strip() else ():  # nothing is a part of every path
            if name == "id" and not ID.fullmatch(query):
                continue  # a million ids need not be read for it
            if self.add_matched(condition, {"query": query}, columns, new=True):
                return name
        raise self._unknown(query)

    def add_matched(self, condition: str, values: dict[str, Any], columns: str = RIGHTS, *, new: bool = False) -> int:
        """Add the rows of `rights` for which a condition holds to `matched`, or begin it; returns how many they are."""
        into = "create or replace table matched as" if new else "insert into matched"
        return int(self.first_row(f"{into} select {columns} from rights where {condition}", **values)[0])

    def add_fates(self) -> None:
        """Add to `matched` what became of each row: `split`, `fate`, `reason` and `detail`."""
        # A source is a file or a few: naming them here spares the reading of all others.
        among = listed(row["source"] for row in self.rows("select distinct source from matched"))
        self.connection.execute(
            "create or replace table matched as select matched.*, coalesce(split, '') split,"
            " case when drops.id is not null then 'dropped' else coalesce(split, 'unknown') end fate,"
            " coalesce(reason, '') reason, coalesce(detail, '') detail from matched"
            f" left join (select id, split from kept where source in {among}) kept on kept.id = matched.id"
            f" left join (select id, reason, detail from drops where source in {among}) drops on drops.id = matched.id"
        )

    def _unknown(self, query: str) -> DataError:
        names = [
            row["name"]
            for row in self.rows(
                "select distinct unnest([source, licence, id, path, parse_filename(path)]) name from rights"
            )
        ]
        lower = {name.lower(): name for name in sorted(names)}
        near = difflib.get_close_matches(query.lower(), lower, n=1, cutoff=0.5)
        sources = ", ".join(row["source"] for row in self.rows("select distinct source from rights order by source"))
        return DataError(
            "no document has this id, source, licence or path",
            where=self.folder,
            found=query,
            expected=f"for instance a source: {sources}",
            todo=f"did you mean {lower[near[0]]}?" if near else None,
        )

    def details(self, limit: int | None) -> list[dict[str, Any]]:
        """Return the matched documents one by one: rights, fate, place in the shards, steps by stage and phase."""
        documents = self.rows(
            "select * from matched order by source, path, id" + (f" limit {int(limit)}" if limit is not None else "")
        )
        ids = [row["id"] for row in documents]
        places = {
            row["id"]: row
            for row in self.rows("select * from shards where id in (select unnest($ids::varchar[]))", ids=ids)
        }
        seen: dict[str, list[dict[str, Any]]] = {}
        for row in self.rows(
            "select * from trace where source in (select unnest($sources::varchar[]))"  # by which the files are sorted
            " and document_id in (select unnest($ids::varchar[])) order by stage desc, first_step",
            ids=ids,
            sources=sorted({row["source"] for row in documents}),
        ):
            entry = {key: row[key] for key in ("stage", "phase", "first_step", "last_step", "steps", "tokens")}
            seen.setdefault(row["document_id"], []).append(entry)
        for row in documents:
            place = places.get(row["id"])
            row["shard"] = {key: place[key] for key in ("shard", "start", "tokens")} if place else None
            row["seen"] = seen.get(row["id"], [])
        return documents

    def seen(self) -> list[dict[str, Any]]:
        """Return, by stage and phase, how many matched documents were seen, their tokens, and in which steps."""
        rows = self.rows(
            "select stage, phase, count(distinct document_id) documents, sum(tokens)::bigint tokens,"
            " list_sort(list_distinct(flatten(list(steps)))) steps"
            " from trace where document_id in (select id from matched) group by stage, phase"
            " order by stage desc, min(first_step)"
        )
        return [{**row, "steps": len(row["steps"]), "ranges": ranges(row["steps"])} for row in rows]

    def checkpoints_that_saw(self) -> list[dict[str, Any]]:
        """Return the checkpoints that learned from a matched document, with how many of them they saw."""
        first = self.rows(
            "select stage, document_id, min(first_step) first_step from trace"
            " where document_id in (select id from matched) group by stage, document_id"
        )
        answer = []
        for checkpoint in self.checkpoints:
            ends = checkpoint["bounds"]
            saw = {
                row["document_id"]
                for row in first
                if any(row["stage"] == stage and row["first_step"] < end for stage, end in ends)
            }
            if saw:
                keys = ("path", "stage", "stage_type", "phase", "step", "content_sha256")
                answer.append({**{key: checkpoint[key] for key in keys}, "documents": len(saw)})
        return answer

    def exports(self, checkpoints: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return the exported files made from a checkpoint that saw a matched document."""
        if not (self.folder / "export" / MANIFEST).exists():
            self.gaps.append("export: not finished")
            return []
        manifest = read_manifest(self.folder / "export")
        for stage, recorded in sorted(manifest.get("inputs", {}).items()):
            folder = self.folder / stage
            if not (folder / MANIFEST).exists() or read_manifest(folder)["content_sha256"] != recorded:
                self.gaps.append(f"export: made from another {stage} than the one in this run")
                return []
        exported = manifest.get("config", {}).get("checkpoint", EXPORTED)
        named = [c for c in checkpoints if c["path"] == exported]
        if not named:
            return []
        files = sorted(name for name in manifest["files"] if name.endswith((".safetensors", ".gguf")))
        return [{"path": f"export/{name}", "documents": named[0]["documents"]} for name in files]
