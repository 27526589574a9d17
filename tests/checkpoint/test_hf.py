"""HF form: transformers reads what we write and we read what it writes; nothing is lost or made up on the way."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from freehold.checkpoint.hf import key_table, load_hf, save_hf
from freehold.core.errors import CheckpointError, ConfigError
from freehold.model.afmoe import Afmoe
from freehold.model.config import ModelConfig


def config() -> ModelConfig:
    return ModelConfig(
        vocab_size=96, hidden_size=32, intermediate_size=48, moe_intermediate_size=24, num_hidden_layers=3,
        num_dense_layers=1, num_attention_heads=6, num_key_value_heads=2, head_dim=16, num_experts=4,
        num_experts_per_tok=2, num_shared_experts=2, route_scale=1.7, sliding_window=5, max_position_embeddings=64,
        layer_types=("full_attention", "sliding_attention", "full_attention"),
    )  # fmt: skip


def model() -> Afmoe:
    result = Afmoe(config())
    generator = torch.Generator().manual_seed(3)
    result.init_weights(generator)
    with torch.no_grad():
        for moe in result.moe_layers().values():
            moe.expert_bias.normal_(0, 0.3, generator=generator)
        for parameter in result.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return result.eval()


IDS = torch.arange(40).view(2, 20) * 7 % 96


@pytest.mark.parametrize("shard_bytes", [10**9, 20_000])
def test_transformers_reads_what_we_write(tmp_path: Path, shard_bytes: int) -> None:
    ours = model()
    save_hf(tmp_path, ours.config, ours.state_dict(), torch.float32, shard_bytes)
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, output_loading_info=True
    )
    assert type(theirs).__module__.startswith("transformers.")
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        torch.testing.assert_close(ours(IDS), theirs.eval()(IDS).logits, rtol=1e-5, atol=1e-6)
    shards = sorted(tmp_path.glob("*.safetensors"))
    if shard_bytes > 10**6:
        assert [s.name for s in shards] == ["model.safetensors"]
        assert not (tmp_path / "model.safetensors.index.json").exists()
    else:
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        assert {name for s in shards for name in load_file(s)} == set(index["weight_map"])
        assert index["metadata"]["total_size"] == sum(t.nbytes for s in shards for t in load_file(s).values())
        assert all(sum(t.nbytes for t in load_file(s).values()) <= shard_bytes for s in shards)


def test_we_read_what_transformers_writes(tmp_path: Path) -> None:
    ours = model()
    save_hf(tmp_path / "a", ours.config, ours.state_dict(), torch.float32)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "a", dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.mul_(1.1)
    theirs.save_pretrained(tmp_path / "b")
    read, state = load_hf(tmp_path / "b")
    assert read.model_dump(exclude={"initializer_range"}) == ours.config.model_dump(exclude={"initializer_range"})
    again = Afmoe(read).eval()
    again.load_state_dict(state)
    with torch.no_grad():
        torch.testing.assert_close(again(IDS), theirs(IDS).logits, rtol=1e-5, atol=1e-6)


def test_round_trip_and_sharding_change_no_bit(tmp_path: Path) -> None:
    state = model().to_compute(torch.bfloat16).state_dict()
    save_hf(tmp_path / "a", config(), state)
    save_hf(tmp_path / "b", config(), state, max_shard_bytes=1)
    for folder in ("a", "b"):
        read, again = load_hf(tmp_path / folder)
        assert read == config()
        assert list(again) == list(state)
        for name, tensor in state.items():
            assert again[name].dtype == tensor.dtype, name
            assert torch.equal(again[name], tensor), name


def test_disk_has_a_tensor_per_expert_and_vectors_in_fp32(tmp_path: Path) -> None:
    ours = model()
    save_hf(tmp_path, ours.config, ours.state_dict())
    disk = load_file(tmp_path / "model.safetensors")
    assert not any("gate_up" in name for name in disk)
    gate_up = ours.model.layers["1"].mlp.experts.gate_up_proj
    stem = "model.layers.1.mlp.experts.2"
    assert torch.equal(disk[f"{stem}.gate_proj.weight"], gate_up[2, :24].bfloat16())
    assert torch.equal(disk[f"{stem}.up_proj.weight"], gate_up[2, 24:].bfloat16())
    assert torch.equal(disk[f"{stem}.down_proj.weight"], ours.model.layers["1"].mlp.experts.down_proj[2].bfloat16())
    for name, tensor in disk.items():
        exact = "norm" in name or name.endswith("expert_bias")
        assert tensor.dtype == (torch.float32 if exact else torch.bfloat16), name
    written = json.loads((tmp_path / "config.json").read_text())
    assert (written["architectures"], written["model_type"]) == (["AfmoeForCausalLM"], "afmoe")
    assert written["dtype"] == "bfloat16"
    assert [written[f"{kind}_token_id"] for kind in ("bos", "eos", "pad")] == [0, 3, 12]


def test_bf16_files_give_the_same_model_in_transformers(tmp_path: Path) -> None:
    ours = model()
    save_hf(tmp_path, ours.config, ours.state_dict())
    read, state = load_hf(tmp_path)
    again = Afmoe(read).eval()
    again.load_state_dict(state)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    with torch.no_grad():
        torch.testing.assert_close(again(IDS), theirs(IDS).logits, rtol=1e-5, atol=1e-6)


def test_every_entry_can_be_undone() -> None:
    state = model().state_dict()
    table = key_table(config())
    assert [entry.ours for entry in table] == list(state)
    for entry in table:
        parts = entry.to_disk(state[entry.ours])
        assert {name: part.shape for name, part in parts.items()} == entry.shapes()
        assert torch.equal(entry.from_disk(parts), state[entry.ours])


NAME = "model.layers.1.mlp.experts.3.up_proj.weight"


@pytest.mark.parametrize("damage", ["missing", "extra", "shape"])
def test_folder_that_differs_from_the_model_is_refused_by_name(tmp_path: Path, damage: str) -> None:
    save_hf(tmp_path, config(), model().state_dict())
    tensors = load_file(tmp_path / "model.safetensors")
    if damage == "missing":
        del tensors[NAME]
    elif damage == "extra":
        tensors[NAME + "_extra"] = torch.zeros(3)
    else:
        tensors[NAME] = tensors[NAME][:-1].clone()
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        load_hf(tmp_path)
    assert NAME in str(caught.value)


@pytest.mark.parametrize("damage", ["missing", "extra", "shape"])
def test_state_that_differs_from_the_model_is_refused_by_name(tmp_path: Path, damage: str) -> None:
    state = dict(model().state_dict())
    name = "model.layers.2.mlp.expert_bias"
    if damage == "missing":
        del state[name]
    elif damage == "extra":
        state[name + "_extra"] = torch.zeros(3)
    else:
        state[name] = torch.zeros(5)
    with pytest.raises(CheckpointError, match=name):
        save_hf(tmp_path / "x", config(), state)
    assert not (tmp_path / "x").exists()


def test_damaged_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load_hf(tmp_path)
    save_hf(tmp_path, config(), model().state_dict(), max_shard_bytes=20_000)
    shard = sorted(tmp_path.glob("model-0000*"))[1]
    good = shard.read_bytes()
    shard.unlink()
    with pytest.raises(CheckpointError, match=shard.name):
        load_hf(tmp_path)
    shard.write_bytes(good[:100])
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        load_hf(tmp_path)
    shard.write_bytes(good)
    index = tmp_path / "model.safetensors.index.json"
    names = json.loads(index.read_text())["weight_map"]
    (tmp_path / "y.safetensors").mkdir()
    outside = [dict.fromkeys(names, file) for file in ("../../x", "../x.safetensors", "..", "", "/etc/passwd", 3)]
    for weight_map in (None, [], {}, *outside):
        index.write_text("{}" if weight_map is None else json.dumps({"weight_map": weight_map}))
        with pytest.raises(CheckpointError, match=r"(?s)not an index of weights.*index\.json"):
            load_hf(tmp_path)
    index.write_text(json.dumps({"weight_map": dict.fromkeys(names, "y.safetensors")}))
    with pytest.raises(CheckpointError, match="weights is missing"):
        load_hf(tmp_path)
    index.write_text("[]")
    with pytest.raises(CheckpointError, match="not a JSON object"):
        load_hf(tmp_path)
    index.write_text(json.dumps({"weight_map": names}))
    data = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(data | {"attention_sinks": True}))
    with pytest.raises(ConfigError, match="attention_sinks"):
        load_hf(tmp_path)
