"""Runs at a glance: `freehold runs` lists them, `freehold watch RUN` follows the one that trains. Read only."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from freehold.core.artifact import read_json
from freehold.core.errors import ArtifactError
from freehold.core.log import printable, read_metrics
from freehold.core.table import Table
from freehold.run.layout import IMPORT, WALK, RunFolder, finished_parts, training

BARS = "▁▂▃▄▅▆▇█"
WIDTH = 60
"""Columns of a curve."""
MOST_EVENTS = 5
OLD_S = 600
"""A stage that is not finished and wrote nothing for this long is not running, or hangs."""


@dataclass(frozen=True)
class RunLine:
    """One run in the list."""

    run: str
    stage: str
    """The last stage that is finished or begun."""
    state: str
    """`finished`, `step 120`, `begun`."""
    age_s: float
    """Since something was written."""
    bytes: int
    figures: dict[str, float] = field(default_factory=dict)
    """Loss and bits per byte of training, as last written."""


def list_runs(folder: Path) -> list[RunLine]:
    """Return the runs below a folder, the one written last first; ArtifactError when there is no such folder."""
    if not folder.is_dir():
        raise ArtifactError("no such folder of runs", where=folder, todo="freehold run recipes/laptop.yaml")
    found = []
    for path in folder.iterdir():
        run = RunFolder(path)
        begun = [name for name in (*WALK, IMPORT) if run.finished(name) or run.key(name).exists()]
        if path.is_dir() and begun:
            found.append(_line(run, begun[-1]))
    return sorted(found, key=lambda line: line.age_s)


def _line(run: RunFolder, stage: str) -> RunLine:
    size, newest = 0, 0.0
    for place, _, files in os.walk(run.root):
        for name in files:
            status = os.lstat(os.path.join(place, name))
            size, newest = size + status.st_size, max(newest, status.st_mtime)
    parts = finished_parts(run.stage(stage))
    state = "finished" if run.finished(stage) else f"step {parts:,}" if WALK[stage].trains and parts else "begun"
    return RunLine(run.root.as_posix(), stage, state, max(time.time() - newest, 0.0), size, _figures(run))


def _figures(run: RunFolder) -> dict[str, float]:
    found = {}
    for stage in training():
        for row in _rows(run, stage):
            for key, name in (("loss/mean", "loss"), ("val/bpb", "bits per byte")):
                if row.get(key) is not None:
                    found[name] = float(row[key])
    return found


def _rows(run: RunFolder, stage: str) -> list[dict[str, Any]]:
    try:
        return read_metrics(run.metrics(stage))
    except ArtifactError:  # a damaged curve is no reason to list nothing
        return []


def runs_text(lines: Sequence[RunLine]) -> str:
    """Return the list for a terminal."""
    rows = [
        [
            line.run,
            line.stage,
            line.state,
            _age(line.age_s),
            f"{line.bytes / 1e6:,.1f}",
            *(f"{line.figures[name]:.3f}" if name in line.figures else "" for name in ("loss", "bits per byte")),
        ]
        for line in lines
    ]
    header = ["run", "stage", "state", "written", "MB", "loss", "bits per byte"]
    return printable(Table("Runs", header, rows, left=(0, 1, 2)).text()) if rows else "no runs yet"


def _age(seconds: float) -> str:
    for unit, length in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit} ago"
    return f"{seconds:.0f} s ago"


@dataclass(frozen=True)
class Watched:
    """What a training stage shows of itself now."""

    run: str
    stage: str
    finished: bool
    step: int
    steps: int
    """Of the whole stage, as configured; 0 when that is not known."""
    phase: str
    figures: dict[str, float]
    """The newest value of each metric that is one number."""
    load: dict[str, list[float]]
    """Tokens that each expert of a layer got since the last line, over their mean."""
    curve: list[float]
    """The loss over the run."""
    events: list[str]
    age_s: float


def watch(run_folder: Path) -> Watched:
    """Return what the newest training stage of a run shows; ArtifactError when none wrote a figure yet."""
    run = RunFolder(run_folder)
    stage = next((name for name in reversed(training()) if _rows(run, name)), None)
    if stage is None:
        raise ArtifactError(
            "no figures yet: no training stage of this run has written any",
            where=run_folder,
            expected=f"{training()[0]}/{run.metrics(training()[0]).name}",
            todo="start it with `freehold run RECIPE`, then watch",
        )
    rows = _rows(run, stage)
    figures: dict[str, float] = {}
    load: dict[str, list[float]] = {}
    for row in rows:
        for key, value in row.items():
            if key.startswith("moe/load/") and isinstance(value, list) and sum(value):
                load[key.rpartition("/")[2]] = [len(value) * tokens / sum(value) for tokens in value]
            elif isinstance(value, int | float) and key != "step":
                figures[key] = value
    return Watched(
        run=run_folder.as_posix(),
        stage=stage,
        finished=run.finished(stage),
        step=max(row["step"] for row in rows),
        steps=_steps(run, stage),
        phase=next((row["phase"] for row in reversed(rows) if "phase" in row), ""),
        figures=figures,
        load=dict(sorted(load.items(), key=lambda item: int(item[0]) if item[0].isdecimal() else -1)),
        curve=[row["loss/mean"] for row in rows if row.get("loss/mean") is not None],
        events=list(_events(run, stage, rows))[-MOST_EVENTS:],
        age_s=max(time.time() - run.metrics(stage).stat().st_mtime, 0.0),
    )


def _steps(run: RunFolder, stage: str) -> int:
    for path in (run.manifest(stage), run.key(stage)):
        try:
            record = read_json(path)
        except ArtifactError:
            continue
        if "steps" in record.get("counts", {}):
            return int(record["counts"]["steps"])
        return sum(int(phase["steps"]) for phase in (record.get("config") or {}).get("phases", {}).values())
    return 0


def _events(run: RunFolder, stage: str, rows: list[dict[str, Any]]) -> Iterator[str]:
    """Yield alarms of the metrics, then warnings and restarts of the newest log."""
    for row in rows:
        if "moe/alarm" in row:
            yield f"step {row['step']:,}: collapse alarm in layer {', '.join(map(str, row['moe/alarm']))}"
    logs = sorted(run.log(stage).glob("attempt_*.txt"), key=lambda path: path.stat().st_mtime)
    for line in logs[-1].read_text(encoding="utf-8", errors="replace").splitlines() if logs else ():
        if any(word in line for word in ("warning:", "rolling back", "resumed from", "saved ")):
            yield line


def watch_text(found: Watched) -> str:
    """Return the view for a terminal."""
    f = found.figures
    of = f" of {found.steps:,}" if found.steps else ""
    state = "finished" if found.finished else "training" if found.age_s < OLD_S else "nothing written"
    lines = [
        f"{found.run} {found.stage}: step {found.step:,}{of}, phase {found.phase or '-'} ({state}, {_age(found.age_s)})"
    ]
    if found.curve:
        lines.append(f"  loss          {found.curve[-1]:.4f}  {_bars(found.curve)}")
    shown = [
        ("bits per byte", "val/bpb", "{:.4f}", 1.0),
        ("tokens/s", "perf/tokens_per_s", "{:,.0f}", 1.0),
        ("memory GB", "perf/memory_bytes", "{:.2f}", 1e-9),
        ("device GB", "perf/device_memory_bytes", "{:.2f}", 1e-9),
        ("left min", "perf/eta_s", "{:,.1f}", 1 / 60),
        ("grad norm", "optim/grad_norm", "{:.3f}", 1.0),
        ("rate", "optim/lr", "{:.3f} of the peak", 1.0),
        ("MaxVio", "moe/max_vio", "{:.3f}", 1.0),
        ("dead experts", "moe/dead", "{:.0f}", 1.0),
    ]
    lines += [f"  {name:<13} {form.format(f[key] * scale)}" for name, key, form, scale in shown if key in f]
    for layer, load in found.load.items():
        bars = _bars(load, low=0.0, high=max(2.0, *load))
        lines.append(f"  load layer {layer:<3}{bars}  {min(load):.2f} to {max(load):.2f} of the mean")
    lines += [f"  {event}" for event in found.events]
    return printable("\n".join(lines))


def _bars(values: Sequence[float], low: float | None = None, high: float | None = None) -> str:
    """Return values as a line of bars; more than fit are averaged."""
    columns = min(len(values), WIDTH)
    cuts = [round(number * len(values) / columns) for number in range(columns + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in zip(cuts, cuts[1:], strict=False)]
    bottom = min(means) if low is None else low
    span = (max(means) if high is None else high) - bottom
    return "".join(
        BARS[min(int((value - bottom) / span * len(BARS)), len(BARS) - 1) if span > 0 else 0] for value in means
    )
