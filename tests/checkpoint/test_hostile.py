"""Checkpoints and weights from outside: no code of theirs runs, and nothing is allocated that is not on the disk."""

from __future__ import annotations

import json
import pickle
import shutil
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from freehold.checkpoint import dcp, metadata
from freehold.checkpoint.hf import load_hf, save_hf
from freehold.core.artifact import MANIFEST, read_manifest, write_json, write_manifest
from freehold.core.errors import CheckpointError
from freehold.model.afmoe import Afmoe

CONFIG = tiny.config(num_hidden_layers=2)
VERSION_1 = Path(__file__).parent / "fixtures" / "version_1"


def weights() -> dict[str, torch.Tensor]:
    return tiny.disturb(Afmoe(CONFIG)).state_dict()


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    dcp.save(tmp_path / "x", {"model": weights()}, CONFIG, {"step": 1})
    return tmp_path / "x"


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A checkpoint of the first version, whose metadata are a pickle."""
    shutil.copytree(VERSION_1, tmp_path / "old")
    return tmp_path / "old"


def sign(folder: Path) -> None:
    """Write the manifest again, as whoever made the folder can."""
    write_manifest(folder, kind="checkpoint")


def refused(folder: Path, match: str = "damaged or hostile") -> CheckpointError:
    sign(folder)
    with pytest.raises(CheckpointError, match=match) as caught:
        dcp.load(folder)
    return caught.value


def test_metadata_are_json_in_the_order_of_the_state(checkpoint: Path) -> None:
    assert {path.name for path in (checkpoint / "state").iterdir()} == {"metadata.json", "__0_0.distcp"}
    assert read_manifest(checkpoint)["format_version"] == 2
    assert list(metadata.read_metadata(checkpoint)) == [f"model/{name}" for name in weights()]


def test_pickle_that_runs_code_is_refused(old: Path, tmp_path: Path) -> None:
    real = (old / "state" / ".metadata").read_bytes()
    proof = tmp_path / "pwned"

    class Evil:
        def __reduce__(self) -> Any:
            code = f"(open({str(proof)!r}, 'w'), __import__('pickle').loads({real!r}))[1]"
            return eval, (code,)

    (old / "state" / ".metadata").write_bytes(pickle.dumps(Evil()))
    assert "builtins.eval" in str(refused(old))
    assert not proof.exists()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"not a pickle",
        b"\x80\x04N.",  # None
        b"\x80\x02}q\x00r\xff\xff\xff\x7f.",  # a memo index that takes 32 GB in the unpickler of C
        b"\x80\x04ctorch\nSize\n}\x8c\x01a\x8c\x01bsb.",  # sets an attribute of an allowed name
        b"\x80\x04cbuiltins\ngetattr\n.",
        b"\x80\x04ctorch\nload\n.",
        b"\x80\x04" + b"]" * 200_000 + b"a" * 199_999 + b".",  # nested 200,000 deep
    ],
)
def test_damaged_and_hostile_pickles_are_refused(old: Path, data: bytes) -> None:
    (old / "state" / ".metadata").write_bytes(data)
    refused(old)


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = folder / "state" / "metadata.json"
    data = json.loads(path.read_text())
    change(data["tensors"][0])
    path.write_text(json.dumps(data))


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.update(shape=[2**20, 2**20]),
        lambda t: (t.update(shape=[2**20, 2**20]), t["chunks"][0].update(sizes=[2**20, 2**20])),
        lambda t: t["chunks"][0].update(file="../../x"),
        lambda t: t["chunks"][0].update(file="/etc/passwd"),
        lambda t: t["chunks"][0].update(start=-1),
        lambda t: t["chunks"][0].update(start=10**9),
        lambda t: t["chunks"][0].update(length="many"),
        lambda t: t["chunks"].append(t["chunks"][0]),
        lambda t: t.update(chunks=[]),
        lambda t: t.update(chunks=None),
        lambda t: t.update(dtype="object"),
        lambda t: t.update(dtype=["float32"]),
        lambda t: t.update(dtype="int32"),
        lambda t: t.update(shape="12"),
        lambda t: t.pop("name"),
    ],
)
def test_metadata_of_other_files_are_refused(checkpoint: Path, change: Callable[[dict[str, Any]], object]) -> None:
    edit(checkpoint, change)
    refused(checkpoint)


def test_small_file_cannot_stand_for_many_tensors(checkpoint: Path) -> None:
    path = checkpoint / "state" / "metadata.json"
    data = json.loads(path.read_text())
    data["tensors"] += [{**data["tensors"][0], "name": f"model/x{n}"} for n in range(1000)]
    path.write_text(json.dumps(data))
    assert "share byte" in str(refused(checkpoint))


def test_metadata_that_are_not_json_are_refused(checkpoint: Path) -> None:
    for text in ("{", "[]", "[" * 100_000, '{"tensors": 3}'):
        (checkpoint / "state" / "metadata.json").write_text(text)
        refused(checkpoint, "JSON|hostile")


def test_data_that_is_no_plain_tensor_is_refused(checkpoint: Path) -> None:
    path = checkpoint / "state" / "__0_0.distcp"
    good = path.read_bytes()
    path.write_bytes(bytes(len(good)))
    refused(checkpoint)
    first = metadata.read_metadata(checkpoint)["model/model.embed_tokens.weight"].chunks[0]
    for change in ("bomb", "code"):
        with zipfile.ZipFile(checkpoint / "y", "w", zipfile.ZIP_DEFLATED if change == "bomb" else 0) as archive:
            head = b"\x80\x02cos\nsystem\nX\x04\x00\x00\x00true\x85R." if change == "code" else b""
            archive.writestr("archive/data.pkl", head)
            archive.writestr("archive/data/0", bytes(4096))
        made = (checkpoint / "y").read_bytes()
        (checkpoint / "y").unlink()
        data = bytearray(good)
        at = first.start + first.length - len(made)
        data[first.start : first.start + first.length] = bytes(at - first.start) + made
        path.write_bytes(data)
        refused(checkpoint)


def test_data_file_may_be_no_link(checkpoint: Path) -> None:
    path = checkpoint / "state" / "__0_0.distcp"
    path.rename(checkpoint / "elsewhere")
    path.symlink_to(checkpoint / "elsewhere")
    refused(checkpoint, "missing")


@pytest.mark.parametrize(
    ("key", "value"), [("num_experts", 10**9), ("num_hidden_layers", 10**6), ("vocab_size", 10**9)]
)
def test_config_larger_than_the_weights_is_refused(checkpoint: Path, tmp_path: Path, key: str, value: int) -> None:
    save_hf(tmp_path / "hf", CONFIG, weights())
    for folder, load in ((checkpoint, dcp.read_model), (tmp_path / "hf", load_hf)):
        data = json.loads((folder / "config.json").read_text())
        write_json(folder / "config.json", {k: v for k, v in data.items() if k != "layer_types"} | {key: value})
        if folder == checkpoint:
            sign(folder)
        start = time.monotonic()
        with pytest.raises(CheckpointError, match="larger model than the weights"):
            load(folder)
        assert time.monotonic() - start < 2


def test_config_of_another_shape_is_refused(checkpoint: Path) -> None:
    data = json.loads((checkpoint / "config.json").read_text())
    for change, said in (({"num_experts": 8}, "another shape"), ({"num_dense_layers": 2}, "does not have|missing")):
        write_json(checkpoint / "config.json", data | change)
        sign(checkpoint)
        with pytest.raises(CheckpointError, match=said):
            dcp.read_model(checkpoint)
    for text in ("{", "[]", "\xff", "[" * 100_000):
        (checkpoint / "config.json").write_text(text, encoding="latin-1")
        sign(checkpoint)
        with pytest.raises(CheckpointError, match="JSON"):
            dcp.read_model(checkpoint)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(tmp_path: Path, value: float) -> None:
    state = weights()
    state["model.layers.1.mlp.experts.down_proj"][1, 2, 3] = value
    dcp.save(tmp_path / "x", {"model": state}, CONFIG, {})
    save_hf(tmp_path / "hf", CONFIG, state)
    for load, folder in ((dcp.read_model, "x"), (load_hf, "hf")):
        with pytest.raises(CheckpointError, match=r"(?s)not finite.*layers\.1\.mlp\.experts\.down_proj"):
            load(tmp_path / folder)


def test_flipped_bit_in_an_exported_body_is_refused(tmp_path: Path) -> None:
    save_hf(tmp_path / "hf", CONFIG, weights())
    write_manifest(tmp_path, kind="export")
    load_hf(tmp_path / "hf")
    path = tmp_path / "hf" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-7] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="(?s)damaged export.*hash differs"):
        load_hf(tmp_path / "hf")
    (tmp_path / MANIFEST).unlink()
    load_hf(tmp_path / "hf")  # without a manifest nothing says that a bit was flipped


def test_dtypes_and_strides_are_kept(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    kinds = [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int64, torch.uint8, torch.bool]
    state = {str(kind): (torch.randn(5, 3, generator=generator) * 3).to(kind) for kind in kinds}
    state |= {
        "turned": torch.randn(4, 6, generator=generator).T,
        "scalar": torch.tensor(2.5),
        "empty": torch.ones(0, 3),
    }
    dcp.save(tmp_path / "x", {"model": state}, CONFIG, {})
    again = dcp.load(tmp_path / "x")["model"]
    for name, tensor in state.items():
        assert again[name].dtype == tensor.dtype
        assert torch.equal(again[name], tensor), name


def test_safetensors_of_another_count_are_refused(tmp_path: Path) -> None:
    save_hf(tmp_path, CONFIG, weights())
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(dict(list(tensors.items())[:3]), tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError):
        load_hf(tmp_path)
