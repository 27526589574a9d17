"""Retraining: what is replayed, what never is, and where the branch starts."""

import dataclasses
import json

import pytest
import tiny
import yaml
from run_fixture import build_run

from freehold.cli.main import main
from freehold.core.artifact import write_manifest
from freehold.core.document import Document, document_id, read_rows, write_rows
from freehold.core.errors import ArtifactError, ConfigError, DataError
from freehold.run import pending
from freehold.run.recipe import resolve
from freehold.run.retrain import Request, report, taken_down, write_recipe


@pytest.fixture
def run(tmp_path):
    """A finished run of two sources, thirty documents each, every sixth held out."""
    folder = build_run(tmp_path / "runs" / "tiny", "pretrain")
    counts = {}
    for path in sorted((folder / "curate/documents").glob("*.parquet")):
        first = next(iter(read_rows(path, Document)))
        made = [
            dataclasses.replace(
                first, id=document_id(path.stem, str(n)), path=str(n), licence_evidence=f"LICENSE, line {n}",
                text=f"{path.stem} {n} " + "words and more " * 20, split="train" if n % 6 else "validation",
            )
            for n in range(30)
        ]  # fmt: skip
        write_rows(path, made, Document)
        write_rows(folder / "gather/documents" / path.name, made, Document)
        size = sum(len(row.text) for row in made if row.split == "train")
        counts[path.stem] = {"train": {"tokens": size // 4, "bytes": size, "documents": 25}}
    write_manifest(folder / "tokenize", kind="tokenize", counts={"sources": counts})
    settings = {
        "curate": {"split": {}},
        "tokenize": {"vocab_size": 1024},
        "pretrain": {"model": {"preset": "laptop", "vocab_size": 1024}, "optim": {}, "balance": {"kind": "smebu"},
                     "batch": {"context_tokens": 128, "sequences": 4}, "trainer": {}},
    }  # fmt: skip
    for stage, section in settings.items():
        (folder / stage / "resolved.yaml").write_text(yaml.safe_dump(section), encoding="utf-8")
    return folder


@pytest.fixture
def recipe(tmp_path):
    """A recipe of one new source."""
    return tiny.law_recipe(tmp_path)


def rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_replay_has_the_training_split_and_its_own_rights(run, recipe):
    written = write_recipe(Request(run, recipe, steps=20, replay=0.25))
    documents = {
        row.id: row for path in (run / "curate/documents").glob("*.parquet") for row in read_rows(path, Document)
    }
    drawn = [row for path in (recipe.parent / "lawful-replay").glob("*.jsonl") for row in rows(path)]
    assert drawn
    for row in drawn:
        original = documents[row["document"]]
        assert (original.split, original.text) == ("train", row["text"])
        assert (original.licence, original.licence_evidence) == (row["licence"], row["licence_evidence"])
    plan = resolve(written)
    config = plan.stages["pretrain"].config
    assert config.parent == (run / "pretrain/truebase").as_posix()
    assert list(config.phases) == ["stable", "anneal"]
    for phase in config.phases.values():
        replayed = [weight for name, weight in phase.mixture.items() if name.startswith("replay_")]
        assert sum(replayed) == pytest.approx(0.25, abs=1e-4)
        assert phase.mixture["law"] == pytest.approx(0.75)
    assert not config.fresh_optimizer
    again = write_recipe(Request(run, recipe, start="final", steps=20))
    config = resolve(again).stages["pretrain"].config
    assert (list(config.phases), config.fresh_optimizer) == (["rewarmed"], True)
    assert config.phases["rewarmed"].warmup_steps == 2


def test_what_was_taken_down_is_never_replayed(run, recipe, tmp_path):
    """By the recipe, by a later run without it, and by a request that is still pending."""
    given = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    assert taken_down(run, given) == (set(), set())
    later = run.parent / "tiny-without-code" / "curate"
    later.mkdir(parents=True)
    (later / "resolved.yaml").write_text(yaml.safe_dump({"exclude": {"sources": ["code"]}}), encoding="utf-8")
    with pytest.raises(DataError, match="was taken down"):
        write_recipe(Request(run, recipe, sources=("code",), steps=20))
    write_recipe(Request(run, recipe, steps=20))
    assert [path.stem for path in (recipe.parent / "lawful-replay").glob("*.jsonl")] == ["speeches"]
    (later / "resolved.yaml").write_text("{}", encoding="utf-8")
    one = rows(recipe.parent / "lawful-replay" / "speeches.jsonl")[0]["document"]
    pending.note(run, one, False)
    assert one in taken_down(run, given)[1]
    write_recipe(Request(run, recipe, steps=20, sources=("speeches",)))
    assert one not in {row["document"] for row in rows(recipe.parent / "lawful-replay" / "speeches.jsonl")}


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"sources": ("zzz",)}, DataError, "no such source"),
        ({"replay": 1.0}, ConfigError, "share from 0"),
        ({"steps": 1}, ConfigError, "at least 2 steps"),
    ],
)
def test_retraining_mistakes(run, recipe, change, error, says):
    with pytest.raises(error, match=says):
        write_recipe(Request(**{"run": run, "recipe": recipe, "steps": 20} | change))


def test_retraining_needs_a_run_and_a_source(run, recipe, tmp_path):
    with pytest.raises(ArtifactError, match="no checkpoint to start from"):
        write_recipe(Request(tmp_path / "runs" / "none", recipe))
    (tmp_path / "empty.yaml").write_text("name: lawful\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="no new source"):
        write_recipe(Request(run, tmp_path / "empty.yaml", steps=20))


def test_verb_writes_the_recipe_and_the_table_says_all(run, recipe, capsys):
    assert main(["retrain", str(run), "--with", str(recipe), "--steps", "20", "--dry-run"]) == 0
    assert "lawful.retrain.yaml" in capsys.readouterr().out
    found = {
        "bits_per_byte": {"before": {"new/law": 3.0, "old/code": 2.0}, "after": {"new/law": 2.0, "old/code": 2.02}},
        "tokens": 4096, "seconds": 36.0, "parent": "a" * 64, "before": "b" * 64, "after": "c" * 64,
    }  # fmt: skip
    table = report(found, usd_hour=2.0)
    assert [row[0] for row in table.rows] == ["old/code", "new/law"]
    assert table.rows[0][3:] == ["+0.0200", "+1.0 %"]
    assert all(part in table.note for part in ("4,096 tokens", "36 s", "0.02 USD", "aaaa", "bbbb", "cccc"))
