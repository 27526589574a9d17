"""Retraining: what is replayed, what never is, where the branch starts, and what the comparison says."""

import json
import shutil

import pytest
import yaml

from freehold.cli.main import main
from freehold.core.artifact import read_json
from freehold.core.document import Document, read_rows
from freehold.core.errors import ArtifactError, ConfigError, DataError
from freehold.run import pending
from freehold.run.recipe import resolve
from freehold.run.retrain import Request, compare, report, taken_down, write_recipe


@pytest.fixture
def recipe(tmp_path):
    """A recipe of one new source."""
    (tmp_path / "law").mkdir()
    for number in range(40):
        text = f"Article {number}. " + f"Whoever owns a field of class {number} must keep its fence. " * 30
        (tmp_path / "law" / f"{number}.txt").write_text(text, encoding="utf-8")
    source = {"kind": "folder", "path": str(tmp_path / "law"), "licence": "LicenseRef-Own", "acquired": "2026-11-29",
              "licence_evidence": {"rule": "own work"}}  # fmt: skip
    data = {"name": "lawful", "runs_dir": str(tmp_path / "runs"), "gather": {"sources": {"law": source}}}
    path = tmp_path / "law.yaml"
    path.write_text(yaml.safe_dump(data), encoding="utf-8")
    return path


def rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_replay_is_drawn_from_the_training_split_with_its_own_rights(walked, recipe):
    written = write_recipe(Request(walked / "tiny", recipe, steps=20, replay=0.25))
    documents = {
        row.id: row
        for path in (walked / "tiny/curate/documents").glob("*.parquet")
        for row in read_rows(path, Document)
    }
    drawn = [row for path in (recipe.parent / "lawful-replay").glob("*.jsonl") for row in rows(path)]
    assert drawn
    for row in drawn:
        original = documents[row["document"]]
        assert (original.split, original.text) == ("train", row["text"])
        assert (original.licence, original.licence_evidence) == (row["licence"], row["licence_evidence"])
    plan = resolve(written)
    config = plan.stages["pretrain"].config
    assert config.parent == (walked / "tiny/pretrain/truebase").as_posix()
    assert list(config.phases) == ["stable", "anneal"]
    for phase in config.phases.values():
        replayed = [weight for name, weight in phase.mixture.items() if name.startswith("replay_")]
        assert sum(replayed) == pytest.approx(0.25, abs=1e-4)
        assert phase.mixture["law"] == pytest.approx(0.75)
    assert not config.fresh_optimizer
    again = write_recipe(Request(walked / "tiny", recipe, start="final", steps=20))
    config = resolve(again).stages["pretrain"].config
    assert (list(config.phases), config.fresh_optimizer) == (["rewarmed"], True)
    assert config.phases["rewarmed"].warmup_steps == 2


def test_what_was_taken_down_is_never_replayed(walked, recipe, tmp_path):
    """By the recipe, by a later run without it, and by a request that is still pending."""
    run = tmp_path / "runs" / "tiny"
    shutil.copytree(walked / "tiny", run, copy_function=shutil.copyfile)
    given = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    assert taken_down(run, given) == (set(), set())
    later = run.parent / "tiny-without-code" / "curate"
    later.mkdir(parents=True)
    (later / "resolved.yaml").write_text(yaml.safe_dump({"exclude": {"sources": ["code"]}}), encoding="utf-8")
    with pytest.raises(DataError, match="was taken down"):
        write_recipe(Request(run, recipe, sources=("code",), steps=20))
    write_recipe(Request(run, recipe, steps=20))
    assert [path.stem for path in (recipe.parent / "lawful-replay").glob("*.jsonl")] == ["generated"]
    shutil.rmtree(later.parent)
    one = rows(recipe.parent / "lawful-replay" / "generated.jsonl")[0]["document"]
    pending.note(run, one, False)
    assert one in taken_down(run, given)[1]
    shutil.rmtree(recipe.parent / "lawful-replay")
    write_recipe(Request(run, recipe, steps=20, sources=("generated",)))
    assert one not in {row["document"] for row in rows(recipe.parent / "lawful-replay" / "generated.jsonl")}


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"sources": ("zzz",)}, DataError, "no such source"),
        ({"replay": 1.0}, ConfigError, "share from 0"),
        ({"steps": 1}, ConfigError, "at least 2 steps"),
    ],
)
def test_retraining_mistakes(walked, recipe, change, error, says):
    with pytest.raises(error, match=says):
        write_recipe(Request(**{"run": walked / "tiny", "recipe": recipe, "steps": 20} | change))


def test_retraining_needs_a_run_and_a_source(walked, recipe, tmp_path):
    with pytest.raises(ArtifactError, match="no checkpoint to start from"):
        write_recipe(Request(tmp_path / "runs" / "none", recipe))
    (tmp_path / "empty.yaml").write_text("name: lawful\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="no new source"):
        write_recipe(Request(walked / "tiny", tmp_path / "empty.yaml", steps=20))


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
    same = compare(walked / "tiny", tmp_path / "runs/lawful", tokens=2000)
    assert set(same["bits_per_byte"]["after"]) == set(after)
