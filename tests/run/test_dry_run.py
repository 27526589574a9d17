"""A dry run says what matters first, and what will really happen."""

import json

import pytest
import tiny

from freehold.cli import main
from freehold.core.artifact import write_manifest
from freehold.run import dry_run
from freehold.run.recipe import resolve
from freehold.run.walk import state_of


def test_thirty_lines_come_first(tmp_path, capsys):
    assert main(["run", "recipes/laptop.yaml", f"runs_dir={tmp_path}", "--dry-run"]) == 0
    first = capsys.readouterr().out.partition("\nevery setting")[0].splitlines()
    assert len(first) <= 30
    assert any(line.startswith("  training: ") for line in first)


def test_stage_is_stale_when_its_input_is(tmp_path):
    own = tmp_path / "own"
    own.mkdir()
    (own / "a.txt").write_text("one")
    source = "{kind: folder, path: " + str(own) + ", licence: MIT, licence_evidence: {rule: mine}}"
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"name: r\nruns_dir: {tmp_path / 'runs'}\ngather:\n  sources:\n    mine: {source}\n")
    plan = resolve(recipe)
    for name in ("gather", "curate"):
        stage = plan.stages[name]
        stage.folder.mkdir(parents=True)
        stage.run.log(name).mkdir()
        write_manifest(stage.folder, kind=name, **stage.key())
    assert {n: v.state for n, v in dry_run.look(plan, ["gather", "curate"]).items()} == {
        "gather": "done",
        "curate": "done",
    }
    (own / "a.txt").write_text("two")  # of the same size: only its bytes differ
    assert state_of(plan.stages["gather"]).changes == ("sources.mine: its files have changed",)
    views = dry_run.look(plan, ["gather", "curate"])
    assert views["curate"].state == "stale"
    assert views["curate"].changes == ["inputs.gather: stale, so it is made again"]


@pytest.mark.parametrize("command", [["run", "--dry-run"], ["pretrain", "--dry-run"], ["run"]])
def test_vocabularies_that_differ_are_refused_first(command, tmp_path, capsys):
    words = [command[0], str(tiny.RECIPE), f"runs_dir={tmp_path}", "tokenize.vocab_size=2048", *command[1:], "--json"]
    assert main(words) == 2
    error = json.loads(capsys.readouterr().out)["error"]
    assert (error["where"], error["found"]) == ("pretrain.model.vocab_size", "1024")
    assert not (tmp_path / "tiny/gather").exists()
