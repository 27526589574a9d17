"""A run deletes what it wrote and nothing else, and what is damaged is said to be damaged."""

import shutil

import pytest
import tiny

from freehold.cli import main
from freehold.core.artifact import read_manifest
from freehold.core.errors import ArtifactError
from freehold.run import removal
from freehold.run.layout import WALK, RunFolder

GATHER = ["gather", str(tiny.RECIPE), "--quiet"]
PRETRAIN = ["pretrain", str(tiny.RECIPE), "--quiet"]


def test_foreign_files_stop_a_stage_by_name(tmp_path, capsys):
    folder = tmp_path / "tiny/gather"
    (folder / "photos").mkdir(parents=True)
    (folder / "thesis.txt").write_text("mine")
    (folder / "photos/a.jpg").write_text("mine")
    for more in ([], ["--clean"]):
        assert main([*GATHER, f"runs_dir={tmp_path}", *more]) == 2
        said = capsys.readouterr().err
        assert "files that the run did not write" in said
        assert "thesis.txt" in said
    assert sorted(p.name for p in folder.rglob("*")) == ["a.jpg", "photos", "thesis.txt"]


def test_links_are_not_followed(tmp_path, capsys):
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("mine")
    folder = tmp_path / "tiny/gather"
    folder.parent.mkdir()
    folder.symlink_to(precious)
    assert main([*GATHER, f"runs_dir={tmp_path}"]) == 2
    assert "a stage's folder is a link" in capsys.readouterr().err
    folder.unlink()
    folder.mkdir()
    (folder / "key.json").write_text("{}")
    (folder / "documents").symlink_to(precious)
    assert main([*GATHER, f"runs_dir={tmp_path}"]) == 2
    assert "documents" in capsys.readouterr().err
    assert (precious / "thesis.txt").read_text() == "mine"


def test_every_file_of_a_walk_is_known_as_its_own(walked, tmp_path):
    for name, stage in WALK.items():
        if not (walked / "tiny" / name / "manifest.json").exists():
            continue
        folder, copy = walked / "tiny" / name, tmp_path / name
        record = {"config": read_manifest(folder)["config"]}  # without the list of files: as of a killed stage
        shutil.copytree(folder, copy)
        removal.remove_stage(stage, copy, [record], begun=True)
        assert {path.name for path in copy.iterdir()} <= {"log", "answers.jsonl"}
        shutil.copytree(folder, copy, dirs_exist_ok=True)
        (copy / "mine.txt").touch()
        with pytest.raises(ArtifactError, match="mine.txt"):
            removal.remove_stage(stage, copy, [record], begun=True)
        assert (copy / "manifest.json").exists()


@pytest.fixture
def trained(walked, tmp_path):
    """A copy of the run as far as pre-training."""
    for stage in ("gather", "curate", "rephrase", "tokenize", "pretrain"):
        shutil.copytree(walked / "tiny" / stage, tmp_path / "tiny" / stage)
    return tmp_path


def same_training(one, other):
    """Return whether two runs ended with the same bytes."""
    return len({read_manifest(runs / "tiny/pretrain")["content_sha256"] for runs in (one, other)}) == 1


def test_damaged_key_keeps_whole_checkpoints(trained, walked):
    run = RunFolder(trained / "tiny")
    run.manifest("pretrain").unlink()  # as killed after the last checkpoint
    run.key("pretrain").write_bytes(bytes(900))
    kept = {path: path.stat().st_ino for path in run.step_checkpoints("pretrain").iterdir()}
    assert kept
    assert main([*PRETRAIN, f"runs_dir={trained}"]) == 0
    assert {path: path.stat().st_ino for path in run.step_checkpoints("pretrain").iterdir()} == kept
    assert same_training(trained, walked)


@pytest.mark.parametrize("damaged", ["base/state/__0_0.distcp", "trace.parquet"])
def test_damaged_training_is_repaired_from_what_is_whole(trained, walked, damaged):
    (trained / "tiny/pretrain" / damaged).write_bytes(b"")
    assert main([*PRETRAIN, f"runs_dir={trained}"]) == 0
    assert same_training(trained, walked)


def test_damage_that_costs_all_training_is_for_a_person(trained, capsys):
    run = RunFolder(trained / "tiny")
    (run.stage("pretrain") / "truebase/state/__0_0.distcp").write_bytes(b"")
    for path in run.step_checkpoints("pretrain").iterdir():
        if path.name < "step_00000024":
            shutil.rmtree(path)
    assert main([*PRETRAIN, f"runs_dir={trained}"]) == 2
    assert "pretrain is damaged" in capsys.readouterr().err
    assert (run.stage("pretrain") / "base/trainer.json").exists()
