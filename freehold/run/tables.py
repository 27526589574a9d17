"""A run's parquet tables as DuckDB views: values reach a query as parameters, files as lists."""

from __future__ import annotations

import contextlib
import difflib
import functools
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from freehold.core.errors import DataError
from freehold.run.checkpoints import Checkpoint, read_checkpoints
from freehold.run.layout import CURATE, GATHER, REPHRASE, TOKENIZE, WALK, RunFolder, training

if TYPE_CHECKING:
    import duckdb

    from freehold.ledger.reservations import Snapshot

R = TypeVar("R")

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
    "address": "address = $query or (address <> '' and host = lower($query))",
    "reserved": "$query = 'reserved' and address in (select address from reserved)",
    "path": "contains(lower(path), lower($query))",
}
HOST = "lower(regexp_extract(address, '^[A-Za-z]+://(?:[^/?#@]*@)?([^/:?#]*)', 1)) host"
NO_REWRITTEN = "id varchar, source varchar, synthetic_from varchar"
NO_KEPT = "id varchar, source varchar, split varchar"
NO_DROPS = "id varchar, source varchar, reason varchar, detail varchar"
NO_SHARDS = "id varchar, shard varchar, source varchar, start bigint, tokens bigint, bytes bigint"
NO_TRACE = (
    "stage varchar, document_id varchar, source varchar, phase varchar, first_step integer, last_step integer,"
    " steps integer[], step_tokens integer[], tokens bigint"
)


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


def listed(names: Iterable[str]) -> list[str]:
    """Return names as the parameter of `in`: never empty, for DuckDB cannot type an empty list."""
    return [*names, ""]


class Tables:
    """A run's tables as DuckDB views.

    `rights` (every row gathered or rewritten), `kept`, `drops`, `rewritten`, `shards`, `trace`, and `matched`, which a
    question fills.
    """

    def __init__(self, run_folder: Path) -> None:
        import duckdb

        self.folder, self.run = run_folder, RunFolder(run_folder)
        self.gaps: list[str] = []
        self.traced: list[str] = []
        self.connection: duckdb.DuckDBPyConnection = duckdb.connect(":memory:")
        rewritten = self.run.documents(REPHRASE)
        kept, gathered = self._corpus()
        if not kept and not gathered:
            raise DataError(
                "nothing to trace: the run has no documents",
                where=run_folder,
                expected=f"documents in {GATHER} or {CURATE}",
                todo="run `freehold run RECIPE` first, or name the run folder with --run",
            )
        self._view("rewritten", "id, source, synthetic_from", rewritten, NO_REWRITTEN)
        self._view("rows_with_rights", f"{RIGHTS}, {self._address(gathered or kept)}", gathered or kept)
        self.connection.execute(f"create view rights as select *, {HOST} from rows_with_rights")
        self.connection.execute("create table reserved (address varchar)")
        self._view("kept", "id, source, split", kept, NO_KEPT)
        if not kept:
            self.gaps.append(f"{CURATE}: not finished, so splits and drops are not known")
        drops = [self.run.drops] if self.run.drops.exists() else []
        self._view("drops", "id, source, reason, detail", drops, NO_DROPS)
        self._load_shards()
        self._load_trace()

    def _corpus(self) -> tuple[list[Path], list[Path]]:
        """Return the files of what curate kept and of what gather wrote, each with the rewrites."""
        rewritten = self.run.documents(REPHRASE)
        kept, gathered = (self.run.tables(stage) for stage in (CURATE, GATHER))
        return ([*kept, *rewritten] if kept else [], [*gathered, *rewritten] if gathered else [])

    @functools.cached_property
    def checkpoints(self) -> list[Checkpoint]:
        """Every finished checkpoint; read when asked for: a question about rows need not stop at a damaged one."""
        return read_checkpoints(self.folder)

    @property
    def missing(self) -> list[str]:
        """What is not known, in sentences."""
        outside = sorted({c.stage for c in self.checkpoints if c.outside})
        reason = "its parent checkpoint is outside this run; what that saw is in its own run"
        return [*self.gaps, *(f"{stage}: {reason}" for stage in outside)]

    def __enter__(self) -> Tables:
        return self

    def __exit__(self, *_: object) -> None:
        self.connection.close()

    def _view(self, name: str, columns: str, paths: Sequence[Path], otherwise: str = "") -> None:
        """Make a view of parquet files; without a file, an empty table of the columns `otherwise`."""
        if paths:
            files = self.connection.read_parquet([str(path) for path in paths], union_by_name=True, filename=True)
            files.project(columns).create_view(name)
        else:
            self.connection.execute(f"create table {name} ({otherwise})")

    def _address(self, paths: Sequence[Path]) -> str:
        """Return the column of web addresses, which few files have."""
        files = self.connection.read_parquet([str(path) for path in paths], union_by_name=True)
        return "coalesce(address, '') address" if "address" in files.columns else "'' address"

    def reserve(self, snapshot: Snapshot) -> None:
        """Note the addresses that their sites reserve by a snapshot, for the question `reserved`."""
        found = self.rows("select distinct address from rights where address <> '' order by address")
        names = [row["address"] for row in found if snapshot.rule(row["address"])]
        self.connection.execute(
            "create or replace table reserved as select unnest($names::varchar[]) address", {"names": names}
        )

    def with_all_columns(self) -> None:
        """Add the views `all_rights` and `kept_rights`, with the columns that files of earlier versions do not have."""
        kept, gathered = self._corpus()
        self._view("all_rights", "* exclude (filename)", gathered or kept)
        self._view("kept_rights", "* exclude (filename)", kept or gathered)

    def column_names(self, table: str) -> list[str]:
        """Return the columns of one of the views."""
        return list(self.connection.table(table).columns)

    def _load_shards(self) -> None:
        paths = self.run.shard_tables
        if not paths:
            self.gaps.append(f"{TOKENIZE}: not finished, so token shards and offsets are not known")
        self._view(
            "shards",
            "id, regexp_replace(parse_filename(filename), '[.]parquet$', '.bin') shard,"
            " regexp_replace(parse_filename(filename), '[.][a-z]+[.]parquet$', '') source, start, tokens, bytes",
            paths,
            NO_SHARDS,
        )

    def _load_trace(self) -> None:
        # Views, not copies: a question about one source reads the row groups that can hold it, not the table.
        self.connection.execute(f"create table trace_of_none ({NO_TRACE})")
        parts = ["from trace_of_none"]
        for stage in training():
            path = self.run.trace(stage)
            if not path.exists() and WALK[stage].on_request and not self.run.stage(stage).exists():
                continue  # a stage that this run never asked for
            if not path.exists():
                self.gaps.append(f"{stage}: not finished, so what its steps saw is not known")
                continue
            self.traced.append(stage)
            self._view(f"trace_of_{stage}", f"'{stage}' stage, * exclude (filename)", [path])
            parts.append(f"from trace_of_{stage}")
        self.connection.execute("create view trace as " + " union all by name ".join(parts))

    def rows(self, sql: str, **values: Any) -> list[dict[str, Any]]:
        """Return the rows of a query as dictionaries."""
        result = self.connection.execute(sql, values or None)
        names = [column[0] for column in result.description or []]
        return [dict(zip(names, row, strict=True)) for row in result.fetchall()]

    def read(self, row: type[R], sql: str, /, **values: Any) -> tuple[R, ...]:
        """Return the rows of a query as a frozen dataclass whose fields are its columns."""
        return tuple(row(**found) for found in self.rows(sql, **values))

    def first_row(self, sql: str, **values: Any) -> tuple[Any, ...]:
        """Return the first row of a query that always has one."""
        return self.connection.execute(sql, values or None).fetchall()[0]  # type: ignore[no-any-return]

    def value(self, sql: str, **values: Any) -> Any:
        """Return the single value of a query."""
        return self.first_row(sql, **values)[0]

    def match(self, query: str, columns: str = RIGHTS) -> str:
        """Fill `matched` with the rows a question means; return how it was read. DataError when nothing matches."""
        for name, condition in MATCHES.items() if query.strip() else ():  # nothing is a part of every path
            if name == "id" and not ID.fullmatch(query):
                continue  # a million ids need not be read for it
            if self.add_matched(condition, {"query": query}, columns, new=True):
                return name
        raise self._unknown(query)

    def add_matched(self, condition: str, values: dict[str, Any], columns: str = RIGHTS, *, new: bool = False) -> int:
        """Add the rows of `rights` for which a condition holds to `matched`, or begin it; return their number."""
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
            " left join (select id, split from kept where source in $among) kept on kept.id = matched.id"
            " left join (select id, reason, detail from drops where source in $among) drops on drops.id = matched.id",
            {"among": among},
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
