"""The page of a run: it loads nothing, runs nothing, and text from outside never becomes markup."""

import json
import threading
import urllib.request
from html.parser import HTMLParser

import numpy as np
import pytest
from run_fixture import build_run

from freehold.cli.main import main
from freehold.core.errors import ArtifactError
from freehold.run import dashboard, page
from freehold.run.layout import RunFolder
from freehold.run.series import Series, thin

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'&"


class Reader(HTMLParser):
    """Counts tags, and keeps what could load something."""

    def __init__(self):
        super().__init__()
        self.tags, self.loads, self.handlers = {}, [], []

    def handle_starttag(self, tag, attrs):
        self.tags[tag] = self.tags.get(tag, 0) + 1
        for name, value in attrs:
            if name in ("src", "href", "action", "data", "srcset", "xlink:href"):
                self.loads.append(value)
            if name.startswith("on"):
                self.handlers.append(name)


def read(text):
    reader = Reader()
    reader.feed(text)
    return reader


def write_metrics(run, rows, stage="pretrain"):
    (run / stage).mkdir(parents=True, exist_ok=True)
    with (run / stage / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


@pytest.fixture
def run(tmp_path):
    folder = build_run(tmp_path / "run")
    rows = [
        {"step": n, "phase": "stable" if n < 20 else "anneal", "loss/mean": 5 - n / 10, "val/bpb/code": 3.0}
        | {"moe/load/1": [n + 1, 2, 3, 4], "moe/max_vio": 0.5, HOSTILE: 1.0}
        for n in range(30)
    ]
    write_metrics(folder, rows)
    return folder


def test_page_loads_and_runs_nothing(run):
    text = dashboard.Dashboard(RunFolder(run)).render()
    reader = read(text)
    assert "script" not in reader.tags
    assert not reader.handlers
    assert all(value.startswith(("#", "data:image/png;base64,")) for value in reader.loads)
    assert page.POLICY in text
    assert "default-src 'none'" in page.POLICY


def test_page_shows_what_the_run_recorded(run):
    text = dashboard.Dashboard(RunFolder(run)).render()
    for part in (
        "Training loss",
        "bits per byte",
        "Expert load, layer 1",
        "anneal begins",
        "Lineage",
        "near_duplicate",
    ):
        assert part in text, part
    assert read(text).tags["polyline"] >= 4


def test_text_from_outside_never_becomes_markup(run):
    text = dashboard.Dashboard(RunFolder(run)).render()
    assert HOSTILE not in text
    assert "&lt;script&gt;alert(1)" in text


def test_broken_run_has_a_page_that_says_so(run, tmp_path):
    (run / "export" / "manifest.json").write_text("{")
    with (run / "pretrain" / "metrics.jsonl").open("a") as file:
        file.write('not json\n{"step": 31, "loss/mean": NaN}\n{"step": 32, "loss/me')
    text = dashboard.Dashboard(RunFolder(run)).render()
    assert "Cannot be shown" in text
    assert "1 lines of the metrics could not be read" in text
    with pytest.raises(ArtifactError, match="no stage"):
        dashboard.Dashboard(RunFolder(tmp_path / "none")).render()


def test_long_metrics_make_a_small_page(tmp_path):
    """100,000 steps of 8 columns; a column costs the same whatever its length."""
    rng = np.random.default_rng(0)
    values = rng.random((100_000, 8))
    run = tmp_path / "long"
    (run / "pretrain").mkdir(parents=True)
    lines = [
        f'{{"step": {step}, ' + ", ".join(f'"m/{n}": {v:.5f}' for n, v in enumerate(row)) + "}\n"
        for step, row in enumerate(values)
    ]
    (run / "pretrain" / "metrics.jsonl").write_text("".join(lines))
    text = dashboard.Dashboard(RunFolder(run)).render()
    assert len(text) < 8 * 25_000, "so that 200 columns stay below 5 MB"


def test_thinning_keeps_spikes():
    values = np.zeros(10_000)
    values[4321] = 7.0
    steps, kept = thin(np.arange(10_000), values, 600)
    assert len(kept) <= 600
    assert steps[kept.argmax()] == 4321


def test_series_read_only_what_is_new(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "a": 1}\n{"step": 2, "a"')
    series = Series(path)
    assert series.update() == 20
    with path.open("a") as file:
        file.write(': 2.5}\n{"step": 3, "phase": "x", "a": 3}\n')
    assert series.update() == len('{"step": 2, "a": 2.5}\n{"step": 3, "phase": "x", "a": 3}\n')
    assert series.update() == 0
    steps, values = series.column("a")
    assert (steps.tolist(), values.tolist()) == ([1, 2, 3], [1.0, 2.5, 3.0])
    path.write_text('{"step": 1, "a": 9}\n')
    series.update()
    assert series.column("a")[1].tolist() == [9.0]


def test_live_page_follows_the_run(run):
    said = []
    ready = threading.Event()

    def say(text):
        said.append(text)
        ready.set()

    threading.Thread(target=dashboard.serve, args=(run, 0, say), daemon=True).start()
    assert ready.wait(20)
    url = said[0].split()[0]
    first = urllib.request.urlopen(url, timeout=20).read().decode()
    assert 'http-equiv="refresh"' in first
    write_metrics(run, [{"step": 99, "phase": "late", "loss/mean": 0.125}])
    assert "0.125" in urllib.request.urlopen(url, timeout=20).read().decode()
    with pytest.raises(urllib.error.HTTPError):
        urllib.request.urlopen(url + "etc/passwd", timeout=20)


def test_command_writes_the_page(run, capsys):
    assert main(["dashboard", str(run), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["bytes"] == len((run / "dashboard.html").read_bytes())


def test_long_metrics_keep_spikes_and_rare_lines(tmp_path, monkeypatch):
    monkeypatch.setattr("freehold.run.series.THIN_BYTES", 2000)
    path = tmp_path / "metrics.jsonl"
    rows = [{"step": n, "loss/mean": 9.0 if n == 123 else 2 - n / 1000, "optim/lr": 0.1} for n in range(1, 401)]
    rows.insert(200, {"step": 200, "val/bpb": 1.5})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 401, "loss/me')
    series = Series(path)
    series.update()
    steps, losses = series.column("loss/mean")
    assert losses.max() == 9.0
    assert (np.diff(steps) > 0).all()
    assert len(steps) + series.passed_over == 400
    assert series.column("val/bpb")[1].tolist() == [1.5]
    assert series.update() == 0
