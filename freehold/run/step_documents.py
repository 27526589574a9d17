"""The documents of one step by name, source and licence, also of a run that is not finished: for what went wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from freehold.run.layout import CURATE, RunFolder
from freehold.run.tables import readable


def documents_of_step(stage_folder: Path, step: int) -> list[dict[str, Any]]:
    """Return id, source, licence and tokens of each document of a step, sorted; none when the step is not known.

    Licences are those of the run's `curate`; null where that says nothing. Raises DataError for a damaged table.
    """
    import duckdb

    run = RunFolder(stage_folder.parent)
    traced = run.preview(stage_folder.name)
    if not traced.exists():
        return []
    kept = run.tables(CURATE)
    with readable(run.root), duckdb.connect(":memory:") as connection:
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
