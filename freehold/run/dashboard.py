"""`freehold dashboard RUN`: everything a run recorded on one page, a file that needs no network and runs no script."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from html import escape
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from freehold.core.artifact import read_json
from freehold.core.errors import ArtifactError, FreeholdError
from freehold.core.table import Table
from freehold.run import lineage, page, report
from freehold.run.layout import GATHER, WALK, RunFolder, training
from freehold.run.page import Curve
from freehold.run.series import Series

HEAT_COLUMNS = 120
"""Of an expert load picture."""
REFRESH_S = 5
DATA_TABLES = ("Sources and licences", "What pre-training read")
"""Tables of the report that are about data."""
CHARTS = (
    # title, names of columns (a prefix ends in /), whether the axis begins at 0
    ("Training loss, nats per token", ("loss/mean",), False),
    ("Held-out text, bits per byte", ("val/bpb", "val/bpb/"), False),
    ("Learning rate, share of the peak", ("optim/lr",), True),
    ("Gradient norm", ("optim/grad_norm",), True),
    ("Tokens per second", ("perf/tokens_per_s",), True),
    ("Memory, bytes", ("perf/memory_bytes", "perf/device_memory_bytes"), True),
    ("MaxVio: the fullest expert over an equal share, less 1", ("moe/max_vio",), True),
    ("Entropy of the expert load, 1 is even", ("moe/entropy",), False),
    ("Dead experts", ("moe/dead",), True),
    ("Largest router logit", ("moe/router_logit_max",), True),
)


@dataclass
class Dashboard:
    """What a page is made of; `render` reads what is new and returns the page."""

    run: RunFolder
    series: dict[str, Series] = field(default_factory=dict)

    def render(self, refresh_s: int = 0) -> str:
        """Return the page. Parts of a run that cannot be read are named in it, and the others shown.

        Raises ArtifactError when the folder holds no stage at all.
        """
        for stage in training():
            self.series.setdefault(stage, Series(self.run.metrics(stage))).update()
        if not any(self.run.stage(stage).is_dir() for stage in WALK):
            raise ArtifactError("not a run folder: it holds no stage", where=self.run.root, todo="see `freehold runs`")
        note = f"Run {self.run.root.name}. This page is a file: it loads nothing and runs nothing."
        return page.document(f"Freehold: {self.run.root.name}", list(self._sections()), note=note, refresh_s=refresh_s)

    def _sections(self) -> Iterator[tuple[str, str, str]]:
        yield "stages", "Stages", self._stages()
        for stage in training():
            yield stage, f"Training: {stage}", self._training(stage)
        yield "events", "Events and alarms", _guarded(self._events)
        yield "data", "Data and licences", _guarded(self._drops) + _guarded(self._data)
        yield "results", "Results", _guarded(self._results)
        yield "lineage", "Lineage", _guarded(self._lineage)

    def _stages(self) -> str:
        rows = []
        for stage in WALK:
            if not self.run.stage(stage).is_dir():
                continue
            finished = self.run.finished(stage)
            facts = _manifest(self.run.manifest(stage)) if finished else {}
            rows.append(
                [
                    stage,
                    "done" if finished else "not finished",
                    f"{facts.get('seconds', 0):,.1f}" if facts else "",
                    f"{facts.get('peak_memory_bytes', 0) / 1e9:.2f}" if facts else "",
                    str(facts.get("content_sha256", ""))[:16],
                    str(facts.get("created", "")),
                ]
            )
        return page.table(Table("", ["stage", "state", "seconds", "GB at most", "content", "finished"], rows))

    def _training(self, stage: str) -> str:
        series = self.series[stage]
        marks = [(step, f"{name} begins") for step, name in series.phases[1:]]
        charts = []
        for title, names, zero in CHARTS:
            found = [n for name in names for n in (series.names(name) if name.endswith("/") else [name])]
            curves = [Curve(name, *series.column(name)) for name in found if len(series.column(name)[0])]
            charts.append(page.chart(title, curves, zero=zero, marks=marks))
        shown = {name for _, names, _ in CHARTS for name in names}
        rest = [
            page.chart(name, [Curve(name, *series.column(name))], marks=marks)
            for name in series.names()
            if name not in shown and not name.startswith("val/bpb/")
        ]
        body = f'<div class="charts">{"".join(charts)}</div>' if any(charts) else ""
        body += "".join(self._loads(series))
        if rest:
            more = f"<summary>{len(rest)} more curves</summary>"
            body += f'<details>{more}<div class="charts">{"".join(rest)}</div></details>'
        if series.passed_over:
            body += f'<p class="note">Of a long file, {series.passed_over:,} lines are not drawn: '
            body += "of each stretch those with the least and the greatest loss are.</p>"
        if series.unreadable:
            body += f'<p class="bad">{series.unreadable:,} lines of the metrics could not be read.</p>'
        return body

    def _loads(self, series: Series) -> Iterator[str]:
        names = sorted((n for n in series.values if n.startswith("moe/load/")), key=_layer)
        for name in names:
            _, loads = series.column(name)  # [rows, E]
            if loads.ndim != 2 or not len(loads):
                continue
            starts = np.unique(np.linspace(0, len(loads), min(HEAT_COLUMNS, len(loads)) + 1).astype(int))[:-1]
            binned = np.add.reduceat(loads, starts, axis=0)
            relative = binned / np.maximum(binned.mean(axis=1, keepdims=True), 1e-9)
            yield page.heat(f"Expert load, layer {_layer(name)} (green: an equal share, red: too much)", relative)

    def _events(self) -> str:
        rows = []
        for stage in training():
            for path in self.run.trainer_facts(stage):
                facts = read_json(path)
                for alarm in facts.get("alarms", []):
                    rows.append(
                        [stage, str(alarm.get("step")), "alarm", f"layer {alarm.get('layer')}: {alarm.get('reason')}"]
                    )
                rows += [[stage, str(back), "rolled back", ""] for back in facts.get("rollbacks", [])]
                rows += [[stage, str(step), "skipped", ""] for step in facts.get("skipped_steps", [])]
        unique = [list(row) for row in dict.fromkeys(tuple(row) for row in rows)]
        return page.table(Table("", ["stage", "step", "event", "reason"], unique, left=(0, 2, 3))) if unique else ""

    def _data(self) -> str:
        if not self.run.finished(GATHER):
            return ""
        return "".join(page.table(t) for t in self._tables() if t.title in DATA_TABLES)

    def _tables(self) -> list[Table]:
        return report.tables(self.run.root, of_metrics=False)  # the curves show those, and read them faster

    def _drops(self) -> str:
        """Return what curate dropped, by source and reason."""
        if not self.run.drops.exists():
            return ""
        drops = pq.read_table(self.run.drops, columns=["source", "reason"])
        counted = drops.group_by(["source", "reason"]).aggregate([("reason", "count")]).to_pylist()
        rows = [[row["source"], row["reason"], f"{row['reason_count']:,}"] for row in counted]
        return page.table(Table("Dropped by curate", ["source", "reason", "rows"], sorted(rows), left=(0, 1)))

    def _results(self) -> str:
        return "".join(page.table(t) for t in self._tables() if t.title not in DATA_TABLES)

    def _lineage(self) -> str:
        graph = lineage.lineage(self.run.root)
        sound = "" if graph.sound else '<p class="bad">A recorded hash is not that of what is there.</p>'
        return f"{sound}<pre>{escape(lineage.draw(graph))}</pre>"


def write(run_folder: Path, output: Path) -> int:
    """Write the page of a run; return its bytes."""
    from freehold.core.artifact import write_atomic

    text = Dashboard(RunFolder(run_folder)).render()
    write_atomic(output, text)
    return len(text.encode())


def serve(run_folder: Path, port: int, say: Any = print) -> None:
    """Serve the page of a run on this machine until stopped; it loads itself again while the run trains.

    Each request reads only what was written since the one before. Raises ArtifactError for a folder without a stage.
    """
    dashboard = Dashboard(RunFolder(run_folder))
    dashboard.render()
    rendering = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        """Answers with the page, and nothing else."""

        timeout = 10  # a client that says nothing does not hold its thread for ever

        def do_GET(self) -> None:
            """Send the page; 404 for any other path."""
            if self.path != "/":
                self.send_error(404)
                return
            with rendering:  # the columns grow while they are read
                data = dashboard.render(REFRESH_S).encode()
            self.send_response(200)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.send_header("Content-Security-Policy", page.POLICY)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: Any) -> None:
            """Print nothing for a request: the page asks again every few seconds."""

    with ThreadingHTTPServer(("127.0.0.1", port), Handler) as server:
        say(f"http://127.0.0.1:{server.server_port}/  (Ctrl-C stops it)")
        server.serve_forever()


def _guarded(part: Any) -> str:
    """Return a part of the page, or why it cannot be shown: a broken run has a page too."""
    try:
        return str(part())
    except (FreeholdError, KeyError, ValueError, TypeError) as error:
        return f'<p class="bad">Cannot be shown: {escape(str(error))}</p>'


def _manifest(path: Path) -> dict[str, Any]:
    try:
        return read_json(path)
    except FreeholdError:
        return {}


def _layer(name: str) -> int:
    last = name.rpartition("/")[2]
    return int(last) if last.isdecimal() else 0
