import json
import shutil
from pathlib import Path

import pytest
import tiny
import torch

from freehold.checkpoint import dcp
from freehold.core.errors import ArtifactError, CheckpointError
from freehold.model.afmoe import Afmoe
from freehold.model.config import ModelConfig

MODEL = ModelConfig.model_validate({"preset": "laptop"})
TINY = tiny.config(num_hidden_layers=2)
STATE = {"model": {"a.b": torch.arange(12.0).view(3, 4), "c": torch.ones(2)}, "balance": {"a.b": torch.zeros(3)}}


def save(folder, **facts):
    return dcp.save(folder, STATE, MODEL, {"step": 1, **facts})


def test_round_trip_of_all_and_of_some_parts(tmp_path):
    save(tmp_path / "x")
    state = dcp.load(tmp_path / "x")
    assert torch.equal(state["model"]["a.b"], STATE["model"]["a.b"])
    assert set(dcp.load(tmp_path / "x", ["balance"])) == {"balance"}
    weights = tiny.disturb(Afmoe(TINY)).state_dict()
    dcp.save(tmp_path / "y", {"model": weights}, TINY, {})
    config, tensors = dcp.read_model(tmp_path / "y")
    assert config == TINY
    assert set(tensors) == set(weights)


def test_same_state_gives_the_same_bytes(tmp_path):
    one, two = save(tmp_path / "x"), save(tmp_path / "y")
    assert one["content_sha256"] == two["content_sha256"]


@pytest.mark.parametrize(
    ("damage", "says"),
    [("flip", "hash differs"), ("cut", "truncated"), ("remove", "missing"), ("manifest", "manifest")],
)
def test_damage_is_named(tmp_path, damage, says):
    save(tmp_path / "x")
    shard = tmp_path / "x" / "state" / "__0_0.distcp"
    data = bytearray(shard.read_bytes())
    if damage == "flip":
        data[200] ^= 4
        shard.write_bytes(data)
    elif damage == "cut":
        shard.write_bytes(data[:-10])
    elif damage == "remove":
        shard.unlink()
    else:
        shard = tmp_path / "x" / "manifest.json"
        shard.unlink()
    with pytest.raises(CheckpointError, match=says) as error:
        dcp.load(tmp_path / "x")
    assert ("x" if damage == "manifest" else str(shard)) in str(error.value)


def test_keys_are_compared_both_ways(tmp_path):
    dcp.match_keys(["a"], ["a"], tmp_path)
    with pytest.raises(CheckpointError, match="missing"):
        dcp.match_keys(["a"], ["a", "b"], tmp_path)
    with pytest.raises(CheckpointError, match="does not have"):
        dcp.match_keys(["a", "b"], ["a"], tmp_path)


def test_checkpoint_without_a_model(tmp_path):
    dcp.save(tmp_path / "x", {"balance": {"a": torch.zeros(1)}}, MODEL, {})
    with pytest.raises(CheckpointError, match="no model"):
        dcp.load(tmp_path / "x")


def test_full_disk_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    first = save(tmp_path / "x")

    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(dcp.shutil, "copyfile", full)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ArtifactError, match="No space left"):
        dcp.save(tmp_path / "x", STATE, MODEL, {}, [tmp_path / "tokenizer.json"])
    assert json.loads((tmp_path / "x" / "manifest.json").read_text()) == first
    assert not (tmp_path / "x.tmp").exists()


def test_prune_keeps_the_grid(tmp_path):
    for step in (2, 3, 4, 6, 8):
        save(dcp.step_folder(tmp_path, step))
    dcp.prune(tmp_path, keep_last=2, keep_every_steps=4, every_steps=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_00000004", "step_00000006", "step_00000008"]


def test_prune_keeps_the_checkpoint_to_roll_back_to(tmp_path):
    for step in (2, 3, 4, 6, 8):
        save(dcp.step_folder(tmp_path, step))
    dcp.prune(tmp_path, keep_last=1, keep_every_steps=0, every_steps=2, needed_step=3)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_00000003", "step_00000008"]
    dcp.prune(tmp_path, keep_last=1, keep_every_steps=0, every_steps=2, needed_step=1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_00000008"]


def test_last_good(tmp_path):
    assert dcp.last_good(tmp_path, print) is None
    save(dcp.step_folder(tmp_path, 2))
    save(dcp.step_folder(tmp_path, 4))
    (dcp.step_folder(tmp_path, 4) / "config.json").write_text("{}")
    warnings = []
    assert dcp.last_good(tmp_path, warnings.append) == dcp.step_folder(tmp_path, 2)
    assert "step_00000004" in warnings[0]


@pytest.mark.parametrize(
    ("word", "flipped"), [('"bytes"', '"byte{"'), ('"sha256"', '"sha25>"'), ('"files"', '"fileq"'), ("{", ":")]
)
def test_a_manifest_with_a_flipped_bit_is_a_damaged_checkpoint(tmp_path, word, flipped):
    save(dcp.step_folder(tmp_path, 2))
    save(dcp.step_folder(tmp_path, 4))
    manifest = dcp.step_folder(tmp_path, 4) / "manifest.json"
    manifest.write_text(manifest.read_text().replace(word, flipped, 1))
    assert dcp.last_good(tmp_path, lambda _: None) == dcp.step_folder(tmp_path, 2)


def test_full_disk_reported_by_torch_is_an_artifact_error(tmp_path, monkeypatch):
    def full(*_args, **_kwargs):
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos")

    monkeypatch.setattr(dcp.dcp, "save", full)
    with pytest.raises(RuntimeError, match="unexpected pos"):
        save(tmp_path / "x")
    monkeypatch.setattr(dcp.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 0})())
    with pytest.raises(ArtifactError, match="No space left"):
        save(tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_of_the_first_version_stays_readable(tmp_path):
    """Written by the code before a run could use several processes; must always load."""
    folder = Path(__file__).parent / "fixtures" / "version_1"
    facts, state = dcp.check(folder), dcp.load(folder)
    assert facts["step"] == 2
    assert set(state) == {"model", "optimizer", "balance", "collapse", "rng"}
    config, model = dcp.read_model(folder)
    assert config.num_hidden_layers == 2
    assert all(torch.isfinite(tensor).all() for tensor in model.values())
    assert float(state["optimizer"]["lm_head.weight.step"]) == 2
    shutil.copytree(folder, tmp_path / "checkpoints" / "step_00000002")
    assert dcp.last_good(tmp_path / "checkpoints", print) == tmp_path / "checkpoints" / "step_00000002"
