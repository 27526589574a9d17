"""Metrics of a training as columns: read once, and then only what was written since."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.json as pj

STEP = "step"
THIN_BYTES = 16 << 20
"""What is drawn line by line; of a longer file about as much: parsing is what takes the time."""
LOSS = b'"loss/mean": '
BLOCK_BYTES = 16 << 20
"""What pyarrow parses at a time; longer than any line: 1,000 layers with 1,000 experts are 8 MB."""


@dataclass
class Series:
    """The columns of one `metrics.jsonl`; `update` reads what is new."""

    path: Path
    offset: int = 0
    """Bytes that were read."""
    unreadable: int = 0
    """Lines that are no metrics: cut by a kill, or damaged."""
    passed_over: int = 0
    """Lines of a long file that are not drawn."""
    steps: dict[str, list[np.ndarray]] = field(default_factory=dict)
    values: dict[str, list[np.ndarray]] = field(default_factory=dict)
    phases: list[tuple[int, str]] = field(default_factory=list)
    """(first step, name) of each phase."""

    def update(self) -> int:
        """Read the lines that were written since the last call; return their bytes.

        A line without its end is left for the next call: training may be writing it.
        """
        if not self.path.exists():
            return 0
        if self.path.stat().st_size < self.offset:  # the stage was made again
            self.__init__(self.path)  # type: ignore[misc]
        start = self.offset
        # A file that is read as it grows never has this much that is new: it is drawn line by line.
        every = -(-(self.path.stat().st_size - start) // THIN_BYTES)
        with self.path.open("rb", buffering=1 << 20) as file:
            file.seek(start)
            data = b"".join(self._chosen(file, every)) if every > 1 else file.read()
        if every <= 1:
            data = data[: data.rfind(b"\n") + 1]
            self.offset += len(data)
        if data:
            self._take(data)
        return self.offset - start

    def _chosen(self, lines: Iterable[bytes], every: int) -> Iterator[bytes]:
        """Yield of each stretch of ordinary lines those with the least and the greatest loss, and every other line.

        What is logged now and then (validation, alarms) has no loss, so it stays.
        """
        stretch: list[tuple[float, bytes]] = []
        for line in lines:
            if not line.endswith(b"\n"):
                break
            self.offset += len(line)
            at = line.find(LOSS)
            try:
                stretch.append((float(line[at + len(LOSS) : line.find(b",", at)]), line))
            except ValueError:
                yield line
            if len(stretch) == 2 * every:
                yield from (min(stretch)[1], max(stretch)[1])
                self.passed_over += len(stretch) - 2
                stretch = []
        yield from (line for _, line in stretch)

    def names(self, prefix: str = "") -> list[str]:
        """Return the names of the columns that hold numbers."""
        return sorted(name for name in self.values if name.startswith(prefix) and self.values[name][0].ndim == 1)

    def column(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Return steps [n] and values [n] (or [n, E] for a load) of a column; empty when there is none."""
        if name not in self.values:
            return np.zeros(0), np.zeros(0)
        steps, values = np.concatenate(self.steps[name]), np.concatenate(self.values[name])
        if len(steps) > 1 and self.passed_over and (steps[1:] < steps[:-1]).any():
            order = np.argsort(steps, kind="stable")  # of a stretch, the least loss may come after the greatest
            return steps[order], values[order]
        return steps, values

    def _take(self, data: bytes) -> None:
        try:
            options = pj.ReadOptions(block_size=BLOCK_BYTES)
            table = pj.read_json(io.BytesIO(data), read_options=options)
        except pa.ArrowInvalid:  # NaN, a damaged line, a column of two types: slower, and line by line
            table = self._line_by_line(data)
        if STEP not in table.column_names:
            return
        steps = table[STEP].to_numpy(zero_copy_only=False)
        for name in table.column_names:
            if name != STEP:
                self._add(name, steps, table[name])

    def _line_by_line(self, data: bytes) -> pa.Table:
        rows = []
        for line in data.splitlines():
            try:
                row = json.loads(line)
                rows.append({key: _number(value) for key, value in row.items() if row["step"] >= 0})
            except (ValueError, TypeError, KeyError, AttributeError):
                self.unreadable += 1
        names = sorted({name for row in rows for name in row})
        return pa.table({name: [row.get(name) for row in rows] for name in names}) if rows else pa.table({})

    def _add(self, name: str, steps: np.ndarray, column: pa.ChunkedArray) -> None:
        there = column.is_valid().to_numpy(zero_copy_only=False)
        kind = column.type
        if pa.types.is_string(kind):
            if name == "phase":
                self.phases += _changes(self.phases, steps[there], column.drop_null().to_pylist())
            return
        if pa.types.is_list(kind):
            rows = column.drop_null().combine_chunks()
            lengths = np.diff(rows.offsets.to_numpy())
            if len(lengths) and (lengths == lengths[0]).all() and lengths[0]:
                values = rows.flatten().to_numpy(zero_copy_only=False).astype(np.float64).reshape(len(lengths), -1)
                self._append(name, steps[there], values)
        elif pa.types.is_integer(kind) or pa.types.is_floating(kind):
            self._append(name, steps[there], column.drop_null().to_numpy().astype(np.float64))

    def _append(self, name: str, steps: np.ndarray, values: np.ndarray) -> None:
        before = self.values.get(name)
        if len(values) and (before is None or before[0].shape[1:] == values.shape[1:]):
            self.steps.setdefault(name, []).append(steps)
            self.values.setdefault(name, []).append(values)


def thin(steps: np.ndarray, values: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Return at most `most` points of a curve: of each stretch its least and greatest, so that no spike is lost."""
    if len(values) <= most:
        return steps, values
    edges = np.linspace(0, len(values), most // 2 + 1).astype(int)
    filled = np.nan_to_num(values, nan=0.0, posinf=np.finfo(float).max, neginf=np.finfo(float).min)
    chosen = []
    for first, end in zip(edges[:-1], edges[1:], strict=True):
        stretch = filled[first:end]
        chosen += sorted({first + int(stretch.argmin()), first + int(stretch.argmax())})
    return steps[chosen], values[chosen]


def _changes(before: list[tuple[int, str]], steps: np.ndarray, names: list[str]) -> Iterator[tuple[int, str]]:
    last = before[-1][1] if before else None
    for step, name in zip(steps.tolist(), names, strict=True):
        if name != last:
            yield int(step), str(name)
        last = name


def _number(value: Any) -> Any:
    """Return a value as a column can hold it: booleans and whole numbers become floats."""
    if isinstance(value, list):
        return [float(v) for v in value]
    return value if isinstance(value, str) else float(value)
