"""The answer to a take-down: what a source, document or licence reached, what is still clean, and the way back.

The order of the data is a function of seed and step, and `trace.parquet` is that function written out, so the answer
is exact: a checkpoint is clean when no step it is made of learned from a row in question, and unknown (never clean)
when what its steps saw is not recorded. Forks and children beside the run are answered too. Nothing is deleted here:
`write_recipe` writes a recipe that does without the rows, and names the command that makes it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from freehold.core.artifact import MANIFEST, read_json, read_manifest, sha256_file, write_atomic
from freehold.core.errors import ArtifactError, DataError
from freehold.core.log import read_metrics
from freehold.run.layout import EXPORTED, WALK, RunFolder
from freehold.run.trace import MATCHES, TRAINING, Tables, listed, ranges, read_checkpoints, readable

STAGES = tuple(WALK)
COLUMNS = "id, source, source_version, licence, kind"
MOST_IDS_IN_RECIPE = 200
"""More excluded ids than this go into a file beside the recipe."""


def takedown(run_folder: Path, query: str, *, widen: bool = False) -> dict[str, Any]:
    """Answer what a source, document (id or part of its path) or licence reached, in the run and in those beside it.

    Rows that were certainly made from what is asked for are part of it. Two kinds of rows are only named, unless
    `widen` takes them in: twins (kept rows of which a row asked for was dropped as a copy) and rows made from a
    source of which only a part is asked for. Raises DataError when nothing matches or a table is damaged.
    """
    run_folder = (
        run_folder if run_folder.name not in ("", "..") else run_folder.resolve()
    )  # its parent holds the others
    with readable(run_folder), Tables(run_folder) as tables:
        matched_by = tables.match(query, COLUMNS)
        asked = tables.value("select count(*) from matched")
        family = _Family(run_folder, tables)
        named = family.read(run_folder, tables, widen)
        answer: dict[str, Any] = {
            "query": query,
            "matched_by": matched_by,
            "run": run_folder.name,
            "asked": asked,
            "derived": named.derived,
            "twins": named.twins,
            "perhaps_derived": named.perhaps,
            "widened": widen,
            "rows": tables.value("select count(*) from matched"),
            "rights": tables.rows(
                "select source, source_version, kind, licence, count(*) documents from matched"
                " group by all order by all"
            ),
            "fate": _fates(tables, named.whole),
            "excluded": _exclusion(tables, named.whole),
        }
        for other in family.others():
            with readable(other), Tables(other) as beside:
                beside.add_matched(MATCHES[matched_by], {"query": query}, COLUMNS, new=True)
                family.read(other, beside, widen)
        answer["runs"] = family.answers()
        # A parent beside the run was looked into here.
        known = not answer["runs"][0]["unknown"]
        answer["missing"] = [
            line for line in tables.missing if not (known and "parent checkpoint lies outside" in line)
        ]
    return answer


@dataclass
class _Named:
    """Rows beside those asked for."""

    derived: int = 0
    twins: list[dict[str, Any]] = field(default_factory=list)
    perhaps: list[dict[str, Any]] = field(default_factory=list)
    whole: list[str] = field(default_factory=list)
    """Sources of which every row is in question."""


@dataclass
class _Run:
    """What one run's tables say of the rows in question."""

    folder: Path
    checkpoints: list[dict[str, Any]]
    traced: set[str] = field(default_factory=set)
    shards: list[dict[str, Any]] = field(default_factory=list)
    seen: list[dict[str, Any]] = field(default_factory=list)
    rows: int = 0


class _Family:
    """A run and the runs beside it: forks share its stages, children start from its checkpoints."""

    def __init__(self, run_folder: Path, tables: Tables) -> None:
        self.main, self.tables = run_folder, tables
        beside = sorted(
            path for path in run_folder.parent.iterdir() if path != run_folder and RunFolder(path).any_finished()
        )
        folders = [run_folder, *beside]
        self.runs = {path: _Run(path, read_checkpoints(path)) for path in folders}
        self.by_hash: dict[str, tuple[_Run, dict[str, Any]]] = {}
        for run in reversed(self.runs.values()):
            for checkpoint in run.checkpoints:
                self.by_hash[checkpoint["content_sha256"]] = (run, checkpoint)
        tables.connection.execute(
            "create table firsts (run varchar, stage varchar, document_id varchar, first_step integer)"
        )

    def others(self) -> Iterable[Path]:
        """Return the runs beside the main one that hold documents."""
        return [
            path
            for path in self.runs
            if path != self.main
            and any(next(path.glob(f"{stage}/*/*.parquet"), None) for stage in ("gather", "curate"))
        ]

    def read(self, folder: Path, tables: Tables, widen: bool) -> _Named:
        """Take in a run whose `matched` is filled: add what was made of it, then note shards, steps and first steps."""
        named = _widen(tables, widen)
        run = self.runs[folder]
        run.traced = set(tables.traced)
        run.rows = tables.value("select count(*) from matched")
        named.whole = whole = _whole_sources(tables)
        run.shards = tables.rows(
            "select shard, count(*) documents, sum(tokens)::bigint tokens from shards"
            f" where {_is_matched(tables, 'id', whole)} group by shard order by shard"
        )
        here = _is_matched(tables, "document_id", whole)
        steps: dict[str, list[int]] = {}
        for row in tables.rows(
            f"select distinct stage, unnest(steps) step from trace where {here} order by stage, step"
        ):
            steps.setdefault(row["stage"], []).append(row["step"])
        tables.connection.execute(
            "create table firsts_here as select stage, document_id, min(first_step)::integer first_step,"
            f" sum(tokens)::bigint tokens from trace where {here} group by stage, document_id"
        )
        for row in tables.rows(
            "select stage, count(*) documents, sum(tokens)::bigint tokens from firsts_here"
            " group by stage order by stage desc"
        ):
            seen = steps[row["stage"]]
            run.seen.append({**row, "steps": len(seen), "ranges": ranges(seen)})
        firsts = "select stage, document_id, first_step from firsts_here"
        insert, name = "insert into firsts select $run, stage, document_id, first_step from", {"run": folder.as_posix()}
        if tables is self.tables:
            self.tables.connection.execute(f"{insert} firsts_here", name)
        else:
            self.tables.connection.register("of_run", tables.connection.sql(firsts).to_arrow_table())
            self.tables.connection.execute(f"{insert} of_run", name)
            self.tables.connection.unregister("of_run")
        return named

    def bounds(self, run: _Run, checkpoint: dict[str, Any]) -> tuple[list[tuple[_Run, str, int]], bool]:
        """Return the (run, stage, end step) a checkpoint is made of, and whether its whole ancestry is known."""
        found = [(run, stage, step) for stage, step in checkpoint["bounds"]]
        outside, seen = checkpoint["outside"], set()
        while outside and outside not in seen:
            seen.add(outside)
            if outside not in self.by_hash:
                return found, False
            run, parent = self.by_hash[outside]
            found += [(run, stage, step) for stage, step in parent["bounds"]]
            outside = parent["outside"]
        return found, True

    def judge(self, run: _Run, checkpoint: dict[str, Any]) -> dict[str, Any]:
        """Return a checkpoint as a row of the answer: its state and how many of the rows it learned from."""
        parts, known = self.bounds(run, checkpoint)
        values: dict[str, Any] = {}
        conditions = []
        for number, (of, stage, end) in enumerate(parts):
            known = known and stage in of.traced
            conditions.append(f"(run = $run{number} and stage = $stage{number} and first_step < $end{number})")
            values |= {f"run{number}": of.folder.as_posix(), f"stage{number}": stage, f"end{number}": end}
        # A document has one row for each run and stage.
        count = "count(*)" if len(parts) == 1 else "count(distinct document_id)"
        documents = self.tables.value(f"select {count} from firsts where " + " or ".join(conditions), **values)
        keys = ("path", "stage", "stage_type", "phase", "step", "content_sha256")
        state = "affected" if documents else "clean" if known else "unknown"
        return {**{key: checkpoint[key] for key in keys}, "state": state, "documents": documents}

    def answers(self) -> list[dict[str, Any]]:
        """Return one entry for each run that the rows reached, the run asked about first."""
        entries = []
        for run in self.runs.values():
            checkpoints = [self.judge(run, checkpoint) for checkpoint in run.checkpoints]
            reached = [c for c in checkpoints if c["state"] == "affected"]
            if run.folder != self.main and not reached and not run.shards:
                continue
            clean = [c for c in checkpoints if c["state"] == "clean"]
            entries.append(
                {
                    "run": run.folder.as_posix(),
                    "rows": run.rows,
                    "shards": run.shards,
                    "seen": run.seen,
                    "checkpoints": reached,
                    "unknown": [c["path"] for c in checkpoints if c["state"] == "unknown"],
                    "exports": _exports(run.folder, reached),
                    "last_clean": max(clean, key=_age)["path"] if clean else None,
                    "restart": self._restart(run, checkpoints),
                }
            )
        return entries

    def _restart(self, run: _Run, checkpoints: list[dict[str, Any]]) -> dict[str, Any] | None:
        """Return the cheapest way to the run's last checkpoints without the rows, or None when none learned from them.

        `from` is empty for a start from nothing, `blocked` says why there is no way, and `certain` is false when no
        checkpoint is known to have learned from them but of some it is unknown.
        """
        states = {c["path"]: c["state"] for c in checkpoints}
        if all(state == "clean" for state in states.values()):
            return None
        totals = {stage: _total_steps(run, stage) for stage in TRAINING}
        started = next((c for c in run.checkpoints if c["stage"] == "align" and c["parent"]), None)
        base = next((c for c in run.checkpoints if started and c["content_sha256"] == started["parent"]), None)
        pretrained = [c for c in run.checkpoints if c["stage"] == "pretrain"]
        needed = base or (pretrained[-1] if pretrained else None)
        origin, step, blocked = "", 0, ""
        if needed is not None and states[needed["path"]] == "clean":
            origin, step = f"{run.folder.as_posix()}/{needed['path']}", totals["pretrain"]
        else:
            usable = [
                c for c in pretrained if states[c["path"]] == "clean" and _phases_left(run, c["step"]) is not None
            ]
            parent = next((c["outside"] for c in pretrained if c["outside"]), "")
            if usable:
                best = max(usable, key=_age)
                origin, step = f"{run.folder.as_posix()}/{best['path']}", best["step"]
            elif parent and parent not in self.by_hash:
                blocked = "whether its parent is clean is not known: the run that made it is not beside this one"
            elif parent:
                owner, above = self.by_hash[parent]
                step = above["step"]
                if self.judge(owner, above)["state"] == "clean":
                    origin = f"{owner.folder.as_posix()}/{above['path']}"
                else:
                    blocked = (
                        f"its parent {owner.folder.as_posix()}/{above['path']} is not clean: restart that run first"
                    )
        steps = {"pretrain": max(totals["pretrain"] - step, 0), "align": totals["align"]}
        speeds = {stage: step_seconds(run.folder, stage) for stage in TRAINING}
        costs = [(n, speeds[stage]) for stage, n in steps.items() if n]
        seconds = None if any(s is None for _, s in costs) else sum(n * s for n, s in costs if s is not None)
        return {
            "from": origin,
            "from_step": step,
            "steps": steps,
            "step_s": {stage: speed for stage, speed in speeds.items() if speed is not None},
            "hours": None if seconds is None else seconds / 3600,
            "blocked": blocked,
            "certain": "affected" in states.values(),
        }


def _age(checkpoint: dict[str, Any]) -> tuple[int, int, int]:
    # Of two checkpoints of one step the named one, which is kept for good.
    return (TRAINING.index(checkpoint["stage"]), checkpoint["step"], -checkpoint["path"].count("/"))


def _widen(tables: Tables, widen: bool) -> _Named:
    """Add to `matched` the rows made from it; with `widen` also twins and rows perhaps made from it."""
    named = _Named()
    while True:
        made = _made_from(tables)
        twins = _twins(tables)
        certain = [row for row in made if row["certain"] or widen]
        named.perhaps = [row for row in made if not row["certain"]]
        named.twins = twins
        sources = [row["synthetic_from"] for row in certain]
        ids = [row["id"] for row in twins] if widen else []
        if not sources and not ids:
            return named
        added = tables.add_matched(
            "(list_contains($sources::varchar[], synthetic_from) or list_contains($ids::varchar[], id))"
            " and id not in (select id from matched)",
            {"sources": sources, "ids": ids},
            COLUMNS,
        )
        named.derived += added - len(ids)


def _made_from(tables: Tables) -> list[dict[str, Any]]:
    """Return what rows outside `matched` say they were made from, when that is in it: `certain` if all of it is."""
    if not tables.rows("select 1 from rights where synthetic_from <> '' limit 1"):
        return []
    told = tables.rows(
        "select synthetic_from, count(*) documents from rights where synthetic_from <> ''"
        " and id not in (select id from matched) group by synthetic_from order by synthetic_from"
    )
    if not told:
        return []
    words = sorted({word for row in told for word in re.split(r"[ ,;]+", row["synthetic_from"]) if word})
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
    for row in told:
        origins = [word for word in re.split(r"[ ,;]+", row["synthetic_from"]) if word in whole]
        if origins:
            found.append({**row, "certain": any(whole[origin] for origin in origins)})
    return found


def _twins(tables: Tables) -> list[dict[str, Any]]:
    """Return the kept rows of which a matched row was dropped as an exact or near copy."""
    originals = tables.rows(
        "with recursive copies as (select id, regexp_extract(detail, '[0-9a-f]{16}') original from drops"
        "  where reason in ('exact_duplicate', 'near_duplicate')),"
        " chain as (select original id from copies where id in (select id from matched)"
        "  union select copies.original id from copies join chain using (id))"
        " select id from chain"
    )
    if not originals:
        return []
    return tables.rows(
        "select id, source, path, licence from rights where list_contains($ids::varchar[], id)"
        " and id in (select id from kept) and id not in (select id from matched) order by id",
        ids=[row["id"] for row in originals],
    )


def _fates(tables: Tables, whole: list[str]) -> list[dict[str, Any]]:
    """Return how many rows of `matched` each source kept for training and validation and dropped; the rest: unknown.

    No row is both kept and dropped, so nothing has to be joined.
    """
    here = _is_matched(tables, "id", whole)
    return tables.rows(
        "with known as (select source, split fate, count(*) documents from kept"
        f" where {here} group by all union all select source, 'dropped', count(distinct id) from drops"
        f" where {here} group by all), every as (select source, count(*) documents from matched group by source),"
        " rest as (select source, 'unknown', every.documents - coalesce(sum(known.documents), 0)::bigint documents"
        " from every left join known using (source) group by source, every.documents)"
        " select * from known union all select * from rest where documents > 0 order by all"
    )


def _exclusion(tables: Tables, whole: list[str]) -> dict[str, list[str]]:
    """Return `matched` as what curate and rephrase take: whole sources by name, the rest by id.

    A rewrite whose seed goes too need not be named: it is not made again.
    """
    made = {row["source"] for row in tables.rows("select distinct source from rewritten")}
    sources = [source for source in whole if source not in made]
    ids = tables.rows(f"select id, source from matched where source not in {listed(sources)} order by id")
    rewritten = (
        tables.rows(
            "select id, source from rewritten where id in (select id from matched)"
            " and synthetic_from not in (select id from matched) order by id"
        )
        if made
        else []
    )
    return {
        "sources": sources,
        "documents": [row["id"] for row in ids if row["source"] not in made],
        "rewritten": sorted({row["source"] if row["source"] in whole else row["id"] for row in rewritten}),
    }


def _whole_sources(tables: Tables) -> list[str]:
    """Return the sources of which every row is in `matched`."""
    return [
        row["source"]
        for row in tables.rows(
            "select source from (select source, count(*) rows from rights group by source)"
            " join (select source, count(*) rows from matched group by source) using (source, rows) order by source"
        )
    ]


def _is_matched(tables: Tables, column: str, whole: list[str]) -> str:
    """Return the condition that a row of a table with `source` and an id is in `matched`; whole sources go by name."""
    rest = [
        row["source"] for row in tables.rows(f"select distinct source from matched where source not in {listed(whole)}")
    ]
    part = f"source in {listed(rest)} and {column} in (select id from matched where source in {listed(rest)})"
    return (
        f"(source in {listed(whole)} or ({part}))"
        if whole and rest
        else f"source in {listed(whole)}"
        if whole
        else part
    )


def _exports(folder: Path, reached: list[dict[str, Any]]) -> list[str]:
    """Return the exported files that were made from an affected checkpoint."""
    if not (folder / "export" / MANIFEST).exists():
        return []
    manifest = read_manifest(folder / "export")
    exported = manifest.get("config", {}).get("checkpoint", EXPORTED)
    if exported not in {c["path"] for c in reached}:
        return []
    return sorted(f"export/{name}" for name in manifest["files"] if name.endswith((".safetensors", ".gguf")))


def _resolved(folder: Path, stage: str) -> dict[str, Any]:
    """Return a stage's filled section, its keys in the order of the recipe; empty when it never began."""
    path = folder / stage / "resolved.yaml"
    data = yaml.safe_load(path.read_text(encoding="utf-8")) if path.exists() else {}
    return data if isinstance(data, dict) else {}


def _total_steps(run: _Run, stage: str) -> int:
    """Return the steps done once a stage is finished, its parent's included: as configured, or as far as it came."""
    if (run.folder / stage / MANIFEST).exists():
        counts = read_manifest(run.folder / stage)["counts"]
        if "steps" in counts:
            return int(counts["steps"])
    here = [c["step"] for c in run.checkpoints if c["stage"] == stage]
    phases = _resolved(run.folder, stage).get("phases", {})
    return max([*here, _first_step(run) * (stage == "pretrain") + sum(phase["steps"] for phase in phases.values())])


def _first_step(run: _Run) -> int:
    """Return the step at which the run's pre-training began: its parent's."""
    parent = _resolved(run.folder, "pretrain").get("parent") or ""
    facts = Path(parent) / "trainer.json"
    return int(read_json(facts)["step"]) if parent and facts.exists() else 0


def _phases_left(run: _Run, step: int) -> dict[str, Any] | None:
    """Return the phases that are left after `step` steps of pre-training, the one it lies in cut; None when that
    cannot be said as a phase (inside a warm-up or a cosine)."""
    left: dict[str, Any] = {}
    begin = _first_step(run)
    for name, phase in _resolved(run.folder, "pretrain").get("phases", {}).items():
        done = min(max(step - begin, 0), phase["steps"])
        begin += phase["steps"]
        if done == phase["steps"]:
            continue
        if done == 0:
            left[name] = phase
            continue
        warm = phase.get("warmup_steps", 0)
        if done < warm or phase.get("shape", "constant") == "cosine":
            return None
        cut = {**phase, "steps": phase["steps"] - done, "warmup_steps": 0}
        if phase.get("shape") == "linear":
            cut["start"] = phase["start"] + (phase["end"] - phase["start"]) * (done - warm) / (phase["steps"] - warm)
        left[name] = cut
    return left


def step_seconds(run_folder: Path, stage: str) -> float | None:
    """Return the seconds of one optimizer step as the run itself measured them (median of its metrics), if it did."""
    rows = [row for row in read_metrics(run_folder / stage / "metrics.jsonl") if row.get("perf/tokens_per_s")]
    found = []
    for before, row in zip([{}, *rows], rows, strict=False):
        steps, tokens = row["step"] - before.get("step", 0), row["tokens"] - before.get("tokens", 0)
        # The first line of a stage with a parent counts the parent's tokens and steps from 0 alike or not at all.
        if steps > 0 and tokens > 0 and (before or len(rows) == 1):
            found.append(tokens / row["perf/tokens_per_s"] / steps)
    return sorted(found)[len(found) // 2] if found else None


def write_recipe(run_folder: Path, answer: dict[str, Any], folder: Path = Path()) -> dict[str, Any]:
    """Write the recipe of the run without the rows of a take-down; returns its path and the command that makes it.

    The recipe is the run's own, as it was filled, with the rows under `curate.exclude`, the tokenizer kept, and
    pre-training going on from the cheapest clean checkpoint. Raises ArtifactError when the run did not keep what its
    stages were told, DataError when its parent must be made clean first.
    """
    entry = answer["runs"][0]
    restart = entry["restart"]
    data: dict[str, Any] = {stage: _resolved(run_folder, stage) for stage in STAGES}
    data = {stage: section for stage, section in data.items() if section}
    if not {"gather", "curate"} <= data.keys():
        raise ArtifactError(
            "the run does not say how it was made",
            where=run_folder,
            expected="gather/resolved.yaml and curate/resolved.yaml",
            todo="put the ids under curate.exclude in its recipe by hand",
        )
    if restart and restart["blocked"]:
        raise DataError("there is no clean place to go on from", where=run_folder, found=restart["blocked"])
    slug = re.sub(r"[^A-Za-z0-9]+", "-", answer["query"]).strip("-").lower()[:40] or "rows"
    name = f"{run_folder.name}-without-{slug}"
    data["curate"] = {
        **data["curate"],
        "exclude": _merged(data["curate"].get("exclude"), answer["excluded"], folder, name),
    }
    if data.get("rephrase", {}).get("teacher"):
        rephrase, answers = data["rephrase"], (run_folder / "rephrase" / "answers.jsonl").as_posix()
        data["rephrase"] = {
            **rephrase,
            "exclude": sorted({*rephrase["exclude"], *answer["excluded"]["rewritten"]}),
            "reuse": [*dict.fromkeys([*rephrase["reuse"], answers])],  # nothing is asked twice
        }
    last = [stage for stage in STAGES if stage in data][-1]
    gone = {*answer["excluded"]["sources"], *answer["excluded"]["rewritten"]}
    if restart is None:
        last = "tokenize" if "tokenize" in data else "curate"
        data = {stage: section for stage, section in data.items() if STAGES.index(stage) <= STAGES.index(last)}
    elif restart["from"]:
        origin = Path(restart["from"])
        data["tokenize"] = {**data["tokenize"], "tokenizer": (run_folder / "tokenize" / "tokenizer").as_posix()}
        run = _Run(run_folder, read_checkpoints(run_folder))
        left = _phases_left(run, restart["from_step"]) or {}
        data["pretrain"] = {**data["pretrain"], "parent": origin.as_posix(), "phases": left}
        made = {phase["checkpoint"] for phase in left.values()} or {origin.name}
        for key in ("checkpoints", "task_checkpoints"):
            if key in data.get("evaluate", {}):
                data["evaluate"][key] = [c for c in data["evaluate"][key] if c in made or c == "preview"]
    for stage in TRAINING:
        for phase in data.get(stage, {}).get("phases", {}).values():
            phase["mixture"] = {source: w for source, w in (phase.get("mixture") or {}).items() if source not in gone}
    manifest = read_manifest(run_folder / "gather")
    head = {
        "name": run_folder.name,
        "seed": manifest.get("seed", 0),
        "runs_dir": run_folder.parent.as_posix(),
        "until": last,
    }
    path = folder / f"{name}.yaml"
    about = (
        f"# {run_folder.name} without {answer['query']} ({answer['matched_by']}, {answer['rows']:,} rows).\n"
        f"# Made by `freehold takedown`; run it as a fork, which keeps the run it came from:\n"
        f"#   freehold run {path} --fork {name}\n"
    )
    write_atomic(path, about + yaml.safe_dump({**head, **data}, sort_keys=False, allow_unicode=True))
    return {"recipe": path.as_posix(), "command": f"freehold run {path} --fork {name}"}


def _merged(before: dict[str, Any] | None, rows: dict[str, list[str]], folder: Path, name: str) -> dict[str, Any]:
    """Return curate's `exclude` with the rows of an earlier take-down and of this one."""
    before = before or {}
    sources = sorted({*before.get("sources", ()), *rows["sources"]})
    ids = {*before.get("documents", ()), *rows["documents"]}
    if before.get("file"):
        ids |= set(Path(before["file"]).read_text(encoding="utf-8").split())
    if len(ids) <= MOST_IDS_IN_RECIPE:
        return {"sources": sources, "documents": sorted(ids)}
    path = folder / f"{name}.ids.txt"
    write_atomic(path, "".join(f"{identity}\n" for identity in sorted(ids)))
    return {"sources": sources, "documents": [], "file": path.as_posix(), "file_sha256": sha256_file(path)}
