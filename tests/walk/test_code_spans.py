"""A run survives an update of the program: code spans, contract versions, settings that became constants."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from freehold.core import code, config
from freehold.core.artifact import read_json, read_manifest, write_json
from freehold.core.errors import ArtifactError
from freehold.core.version import VERSION
from freehold.run import walk
from freehold.run.code_spans import Span, add_span, other_code, other_contract, read_spans
from freehold.run.layout import WALK, RunFolder, newest_step
from freehold.run.processes import Options
from freehold.run.recipe import resolve

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "recipes" / "tiny.yaml"
OURS, THEIRS = "a" * 64, "b" * 64


def freehold(program: Path, *args: str, check: bool = True) -> subprocess.CompletedProcess:
    """Run the copy of the package in `program`."""
    command = [sys.executable, "-m", "freehold.cli", *args]
    result = subprocess.run(command, capture_output=True, text=True, cwd=program, env={**os.environ, "PYTHONPATH": "."})
    assert not check or result.returncode == 0, result.stderr
    return result


@pytest.fixture
def program(tmp_path) -> Path:
    """A copy of the package whose source a test may change."""
    folder = tmp_path / "program"
    shutil.copytree(ROOT / "freehold", folder / "freehold", ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def change_source(program: Path, version: str, file: str = "trainer/loop.py") -> None:
    path = program / "freehold" / file
    path.write_text(path.read_text() + "\n# changed\n")
    path = program / "freehold/core/version.py"
    path.write_text(path.read_text().replace(VERSION, version))


@pytest.mark.slow
def test_half_done_training_resumes_under_other_code(program, tmp_path):
    arguments = [str(RECIPE), f"runs_dir={tmp_path / 'runs'}"]
    freehold(program, "run", *arguments, "until=tokenize", "--quiet")
    run = RunFolder(tmp_path / "runs" / "tiny")
    command = [sys.executable, "-m", "freehold.cli", "pretrain", *arguments, "--quiet"]
    process = subprocess.Popen(command, cwd=program, env={**os.environ, "PYTHONPATH": "."}, start_new_session=True)
    while newest_step(run.stage("pretrain")) < 0:
        assert process.poll() is None
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    first, begun = newest_step(run.stage("pretrain")), read_spans(read_json(run.key("pretrain")))
    change_source(program, "9.9.9")

    refused = freehold(program, "pretrain", *arguments, "--strict-code", check=False)
    assert refused.returncode == 2
    assert f"code: freehold {VERSION}" in refused.stderr
    assert "-> freehold 9.9.9" in refused.stderr

    warned = freehold(program, "pretrain", *arguments)
    assert f"begun by other code: freehold {VERSION}" in warned.stderr
    spans = read_spans(read_manifest(run.stage("pretrain")))
    assert spans[0] == begun[0]
    assert [(span.first, span.version) for span in spans] == [(0, VERSION), (first, "9.9.9")]

    change_source(program, "9.9.9")
    done = freehold(program, "run", *arguments, "until=pretrain")
    assert "made by other code" in done.stderr
    assert "--strict-code" in done.stderr
    assert read_spans(read_manifest(run.stage("pretrain"))) == spans


def test_manifest_with_a_single_code_hash_still_opens(tmp_path):
    plan = resolve(RECIPE, [f"runs_dir={tmp_path}"])
    stage = plan.stages["gather"]
    stage.folder.mkdir(parents=True)
    record = {k: v for k, v in stage.key().items() if k != "contract"}
    old = {"kind": "gather", "format_version": 1, "files": {}, "content_sha256": THEIRS, "freehold_version": "0.0.9"}
    write_json(stage.folder / "manifest.json", {**old, **record, "code_sha256": THEIRS})
    state = walk.state_of(stage)
    assert state.what == "done"
    assert state.other_code.startswith("freehold 0.0.9 (bbbbbbbb) -> ")
    assert walk.state_of(stage, strict_code=True).what == "stale"
    with pytest.raises(ArtifactError, match="code: freehold 0.0.9"):
        walk.run_stage(plan, "gather", Options(quiet=True, strict_code=True))


def test_span_is_added_only_for_other_code():
    one = add_span((), 0, THEIRS)
    assert one == (Span(0, THEIRS, VERSION),)
    assert add_span(one, 7, THEIRS) == one
    assert add_span(one, 7, OURS) == (*one, Span(7, OURS, VERSION))
    assert add_span(one, 0, OURS) == (Span(0, OURS, VERSION),)  # the other code finished nothing
    assert not other_code({"code": [s.to_dict() for s in one]}, THEIRS)
    assert read_spans({}) == ()


def test_contract_version_that_rises_is_a_change(tmp_path, monkeypatch):
    assert other_contract({}, {"data": 1}) == []
    assert other_contract({"data": 1}, {"data": 2}) == ["contract.data: 1 -> 2"]
    assert other_contract({"old": 3}, {}) == ["contract.old: 3 -> 1"]
    monkeypatch.setattr(code, "PACKAGE", tmp_path / "freehold")
    (tmp_path / "freehold" / "room").mkdir(parents=True)
    (tmp_path / "freehold" / "room" / "__init__.py").write_text("CONTRACT = 12\n")
    (tmp_path / "freehold" / "room" / "a.py").write_text("x = 1\n")
    assert code.contract_versions("freehold.room.a") == {"room": 12}


@pytest.mark.parametrize("name", WALK)
def test_every_stage_declares_its_contract(name):
    module = WALK[name].module
    assert code.contract_versions(f"{module}.run")[module.removeprefix("freehold.")] >= 1


def recorded(stage, **more):
    """Return a stage's key as an earlier version would have written it."""
    key = json.loads(json.dumps(stage.key()))
    for dotted, value in more.items():
        *path, last = dotted.split("__")
        at = key["config"]
        for part in path:
            at = at[part]
        if value is None:
            del at[last]
        else:
            at[last] = value
    return key


@pytest.mark.parametrize(("value", "changes"), [(7, []), (8, ["config.optim.old: 8 -> (absent)"])])
def test_removed_setting_counts_only_when_its_value_changed(tmp_path, monkeypatch, value, changes):
    monkeypatch.setitem(config.REMOVED, "*.optim.old", "optim/x.py: OLD = 7")
    stage = resolve(RECIPE, [f"runs_dir={tmp_path}"]).stages["pretrain"]
    monkeypatch.setattr(type(stage), "inputs", {})
    assert walk.key_changes(stage, recorded(stage, optim__old=value), stage.key()) == changes


def test_setting_that_is_new_has_its_default_in_an_old_run(tmp_path, monkeypatch):
    stage = resolve(RECIPE, [f"runs_dir={tmp_path}"]).stages["pretrain"]
    monkeypatch.setattr(type(stage), "inputs", {})
    assert walk.key_changes(stage, recorded(stage, quarantine=None), stage.key()) == []
