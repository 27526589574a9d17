"""Which steps saw which document, as a table: computed from the order, never logged."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa

from freehold.core.document import write_table
from freehold.data.loader import Order

ROW_BYTES = 200
"""What a row of a batch takes in memory, roughly: its place in the order, then its documents in the trace."""


def trace_rows(order: Order, steps: range, phase_of: Mapping[int, str]) -> list[dict[str, Any]]:
    """Return one row per (document, phase): the steps that saw it, and the tokens: `trace.parquet`.

    Sorted by source, then document, so that a question about one source reads its part of the table alone.
    """
    # By phase: the same document may weigh differently in each, and a take-down may concern one phase only.
    found: dict[tuple[str, str, str], dict[int, int]] = {}
    for step in steps:
        for piece in order.documents(step):
            if not piece.document_id:  # written by this program for the step: no document of the run
                continue
            seen = found.setdefault((piece.source, piece.document_id, phase_of[step]), {})
            # A step may read two pieces of one document.
            seen[step] = seen.get(step, 0) + piece.tokens
    return [
        {
            "document_id": document,
            "source": source,
            "phase": phase,
            "first_step": min(seen),
            "last_step": max(seen),
            "steps": sorted(seen),
            "step_tokens": [seen[step] for step in sorted(seen)],
            "tokens": sum(seen.values()),
        }
        for (source, document, phase), seen in sorted(found.items())
    ]


def write_trace(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write which steps saw which document, as parquet; the same run gives the same bytes."""
    schema = pa.schema(
        [
            ("document_id", pa.string()),
            ("source", pa.string()),
            ("phase", pa.string()),
            ("first_step", pa.int32()),
            ("last_step", pa.int32()),
            ("steps", pa.list_(pa.int32())),
            ("step_tokens", pa.list_(pa.int32())),
            ("tokens", pa.int64()),
        ]
    )
    write_table(path, pa.Table.from_pylist(rows, schema=schema))
