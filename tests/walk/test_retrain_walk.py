"""Retraining from text to comparison; what is replayed is tested in tests/run."""

import json

import pytest
import tiny

from freehold.cli.main import main
from freehold.core.artifact import read_json
from freehold.run.retrain import report


@pytest.fixture
def recipe(tmp_path):
    """A recipe of one new source."""
    return tiny.law_recipe(tmp_path)


@pytest.mark.slow
def test_retrain_verb_walks_and_compares(walked, recipe, tmp_path, capsys):
    call = ["retrain", str(walked / "tiny"), "--with", str(recipe), "--steps", "8", "--json"]
    assert main(call) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["tokens"] == 8 * 512
    before, after = (found["bits_per_byte"][which] for which in ("before", "after"))
    assert set(before) == set(after) == {"old/code", "old/generated", "new/law"}
    assert after["new/law"] < before["new/law"]
    assert read_json(tmp_path / "runs/lawful/retrain.json")["parent"] == found["parent"]
    assert "new/law" in report(found, 1.0).text()
