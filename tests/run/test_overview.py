"""Runs listed, and one watched: also while it trains, when it is damaged, and when there is nothing yet."""

import json

import pytest
from run_fixture import build_run

from freehold import cli
from freehold.core.artifact import write_json
from freehold.run.overview import watch, watch_text

ROWS = [
    {"step": 1, "phase": "stable", "loss/mean": 5.0, "perf/tokens_per_s": 100.0, "moe/load/1": [3, 1], "tokens": 8},
    {"step": 2, "val/bpb": 2.5},
    {"step": 3, "moe/alarm": [1]},
    {"step": 4, "phase": "anneal", "loss/mean": 4.0, "perf/memory_bytes": 2e9, "moe/load/1": [2, 2], "moe/dead": 0},
]


@pytest.fixture
def run(tmp_path):
    run = build_run(tmp_path / "runs/tiny")
    metrics = "".join(json.dumps(row) + "\n" for row in ROWS)
    (run / "pretrain/metrics.jsonl").write_text(metrics + '{"step": 5, "loss')  # as cut off by a kill
    (run / "pretrain/log").mkdir()
    (run / "pretrain/log/attempt_1.txt").write_text("10:00:00 warning: slow \x1b[2J\n10:00:01 step 4\n")
    return run


def test_runs_are_listed_with_stage_age_size_and_figures(run, capsys):
    (run.parent / "notes").mkdir()
    begun = run.parent / "begun/pretrain/checkpoints/step_00000008"
    write_json(begun / "manifest.json", {})
    write_json(begun.parents[1] / "key.json", {})
    assert cli.main(["runs", str(run.parent), "--json"]) == 0
    lines = {line["run"].rpartition("/")[2]: line for line in json.loads(capsys.readouterr().out)}
    assert set(lines) == {"tiny", "begun"}
    assert (lines["tiny"]["stage"], lines["tiny"]["state"]) == ("export", "finished")
    assert lines["tiny"]["figures"] == {"loss": 4.0, "bits per byte": 2.5}
    assert lines["tiny"]["bytes"] > 1_000
    assert lines["tiny"]["age_s"] < 600
    assert (lines["begun"]["stage"], lines["begun"]["state"]) == ("pretrain", "step 8")
    assert cli.main(["runs", str(run.parent)]) == 0
    assert "bits per byte" in capsys.readouterr().out
    assert cli.main(["runs", str(run.parent / "nowhere")]) == 2


def test_watch_shows_a_finished_run(run, capsys):
    found = watch(run)
    assert (found.stage, found.step, found.phase, found.finished) == ("pretrain", 4, "anneal", True)
    assert found.load == {"1": [1.0, 1.0]}
    assert found.curve == [5.0, 4.0]
    assert found.events == ["step 3: collapse alarm in layer 1", "10:00:00 warning: slow \x1b[2J"]
    assert cli.main(["watch", str(run)]) == 0  # it is finished: shown once
    text = capsys.readouterr().out
    for part in ("step 4", "loss          4.0000", "bits per byte 2.5000", "memory GB     2.00", "load layer 1"):
        assert part in text
    assert "\x1b" not in text
    assert cli.main(["watch", str(run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["figures"]["val/bpb"] == 2.5


def test_watch_of_a_run_that_trains_and_of_none(run, capsys):
    (run / "pretrain/manifest.json").unlink()
    assert "training" in watch_text(watch(run))
    assert cli.main(["watch", str(run), "--once"]) == 0
    assert cli.main(["watch", str(run), "--once", "--every", "0"]) == 2
    (run / "pretrain/metrics.jsonl").unlink()
    assert cli.main(["watch", str(run)]) == 2
    assert "no figures yet" in capsys.readouterr().err
