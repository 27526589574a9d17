"""The documents of one step by name, source and licence, also of a run that is not finished: for what went wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from freehold.core.artifact import PREVIEW
from freehold.run.trace import readable


def documents_of_step(stage_folder: Path, step: int) -> list[dict[str, Any]]:
    """Return id, source, licence and tokens of each document of a step, sorted; none when the step is not known.

    Licences are those of the run's `curate`; null where that says nothing. Raises DataError for a damaged table.
    """
    import duckdb

    traced = stage_folder / PREVIEW
    if not traced.exists():
        return []
    kept = sorted(path for kind in ("documents", "conversations") for path in _tables(stage_folder, kind))
    with readable(stage_folder.parent), duckdb.connect(":memory:") as connection:
        rights = "select null::varchar id, null::varchar licence where false"
        if kept:
            rights = "select id, licence from read_parquet($kept, union_by_name = true)"
        result = connection.execute(
            f"with rights as ({rights}), seen as (select document_id id, source,"
            " step_tokens[list_position(steps, $step)] tokens from read_parquet($traced)"
            " where first_step <= $step and last_step >= $step and list_contains(steps, $step))"
            " select seen.id, source, licence, tokens from seen left join rights using (id) order by source, seen.id",
            {"step": step, "traced": str(traced)} | ({"kept": [str(path) for path in kept]} if kept else {}),
        )
        names = [column[0] for column in result.description or []]
        return [dict(zip(names, row, strict=True)) for row in result.fetchall()]


def _tables(stage_folder: Path, kind: str) -> list[Path]:
    return list((stage_folder.parent / "curate" / kind).glob("*.parquet"))
