"""The export of a folder: one read, bounded memory, resumable, and every kind of bad input named."""

from __future__ import annotations

import fcntl
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from freehold.checkpoint import dcp, hf
from freehold.cli.main import main
from freehold.core.artifact import sha256_file, write_json
from freehold.core.errors import CheckpointError, ExportError, FreeholdError
from freehold.core.log import Log
from freehold.model.afmoe import Afmoe
from freehold.stages.export import samples, stream
from freehold.stages.export.folder import Request, export_folder, parse_types
from freehold.stages.export.masters import Masters
from freehold.stages.export.shards import Shards
from freehold.stages.export.source import open_source
from freehold.tokenizer import bpe

# Wide enough for K blocks, and a stack of experts that takes several slabs.
CONFIG = tiny.config(vocab_size=608, hidden_size=256, moe_intermediate_size=256, intermediate_size=512, num_experts=12)
TYPES = ("Q4_K_M", "Q8_0", "BF16")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model as `native` checkpoint and as sharded `hf` folder."""
    root = tmp_path_factory.mktemp("models")
    texts = [*samples.KINDS.values(), *samples.SCRIPTS.values()]
    tokenizer = bpe.train(texts * 2, CONFIG.vocab_size - 8, Log(quiet=True))
    tokenizer.save(root / "tokenizer")
    files = sorted((root / "tokenizer").iterdir())
    state = tiny.disturb(Afmoe(CONFIG)).state_dict()
    dcp.save(root / "native", {"model": state}, CONFIG, {"step": 1}, files)
    hf.save_hf(root / "hf", CONFIG, state, torch.bfloat16, max_shard_bytes=3_000_000)
    for file in files:
        shutil.copy(file, root / "hf")
    (root / "hf" / "LICENSE").write_text("Apache License, Version 2.0")
    return root


def request(output: Path, types: tuple[str, ...] = TYPES, **changes: Any) -> Request:
    return Request(types, output, "Tiny", **changes)


@pytest.fixture(scope="module")
def hashes(models: Path) -> dict[str, str]:
    export_folder(models / "hf", request(models / "out"))
    return read_hashes(models / "out")


def read_hashes(folder: Path) -> dict[str, str]:
    return {path.name: sha256_file(path) for path in sorted(folder.glob("*.gguf*"))}


def test_checkpoint_and_hf_folder_give_the_same_bytes(models: Path, hashes: dict[str, str], tmp_path: Path) -> None:
    assert hashes.keys() == {f"Tiny-{kind}.gguf" for kind in TYPES}
    figures = export_folder(models / "native", request(tmp_path, workers=3))
    assert read_hashes(tmp_path) == hashes
    assert figures["bytes"]["Q8_0"] == (tmp_path / "Tiny-Q8_0.gguf").stat().st_size


def test_weights_of_a_checkpoint_are_those_of_its_hf_form(models: Path) -> None:
    ours, theirs = Masters(models / "native"), Shards(models / "hf")
    assert {n: t.shape for n, t in ours.tensors.items()} == {n: t.shape for n, t in theirs.tensors.items()}
    for name in theirs.tensors:
        np.testing.assert_array_equal(ours.read(name), theirs.read(name), err_msg=name)
    exact = Masters(models / "native", exact=True)
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    state = dcp.load(models / "native")["model"]["model.layers.1.mlp.experts.gate_up_proj"]
    np.testing.assert_array_equal(exact.read(name), state[3, 256:].numpy())


def test_files_follow_the_umask_and_have_company(models: Path, hashes: dict[str, str]) -> None:
    out = models / "out"
    other = {path.name for path in out.iterdir()} - hashes.keys()
    assert {"README.md", "LICENSE", "Tiny-Q8_0.Modelfile"} <= other
    assert not [name for name in other if name.endswith((".partial", ".jsonl"))]
    (out / "plain").touch()
    assert {path.stat().st_mode for path in out.iterdir()} == {(out / "plain").stat().st_mode}
    assert (out / "LICENSE").read_text() == "Apache License, Version 2.0"
    readme = (out / "README.md").read_text()
    assert readme.startswith("---\nlicense: other\n")
    assert f"at most {CONFIG.max_position_embeddings} tokens" in readme


SCRIPT = """
import os, sys
from pathlib import Path
from freehold.stages.export import stream
stream.SYNC_S = 0.0
if sys.argv[3] == "kill":
    note = stream.Writer._note
    def noted(self, tensor, hashes):
        if tensor is self.tensors[-1]:
            os.kill(os.getpid(), 9)
        note(self, tensor, hashes)
    stream.Writer._note = noted
from freehold.cli.main import main
code = main(["export", sys.argv[1], "--types", "Q4_K_M,Q8_0,BF16", "--output", sys.argv[2], "--name", "Tiny", "--json"])
heavy = [name for name in ("torch", "transformers", "pandas") if name in sys.modules]
peak = int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
assert not heavy, heavy
assert peak < 500_000, peak
sys.exit(code)
"""


def run_script(models: Path, output: Path, how: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", SCRIPT, str(models / "hf"), str(output), how]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture
def killed(models: Path, tmp_path: Path) -> Path:
    """An export that was killed at its last tensor."""
    if not (models / "killed").exists():
        assert run_script(models, models / "killed", "kill").returncode == -9
    return Path(shutil.copytree(models / "killed", tmp_path / "killed"))


def test_killed_at_the_last_tensor_it_resumes(models: Path, hashes: dict[str, str], killed: Path) -> None:
    """Also shows that the command imports no torch and stays below 0.5 GB."""
    recorded = (killed / stream.PROGRESS).read_text().splitlines()
    assert len(recorded) > 20
    assert not list(killed.glob("*.gguf"))
    done = run_script(models, killed, "finish")
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert read_hashes(killed) == hashes
    assert 0 < answer["bytes_read"] < 0.2 * sum(t.bytes for t in Shards(models / "hf").tensors.values())


def test_bytes_damaged_while_it_was_stopped_are_written_again(
    models: Path, hashes: dict[str, str], killed: Path
) -> None:
    with (killed / "Tiny-Q8_0.gguf.partial").open("r+b") as file:
        file.seek(100_000)
        file.write(b"damaged")
    export_folder(models / "hf", request(killed))
    assert read_hashes(killed) == hashes


def test_full_disk_stops_and_the_same_command_resumes(
    models: Path, hashes: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written, write = [0], stream.write_at
    whole = sum(path.stat().st_size for path in (models / "out").glob("*.gguf"))

    def full(handle: int, data: bytes, start: int) -> None:
        written[0] += len(data)
        if written[0] > 0.9 * whole:
            raise OSError(28, "No space left on device")
        write(handle, data, start)

    monkeypatch.setattr(stream, "write_at", full)
    with pytest.raises(ExportError, match=r"(?s)the disk is full.*it resumes"):
        export_folder(models / "hf", request(tmp_path))
    monkeypatch.undo()
    lines: list[str] = []
    export_folder(models / "hf", request(tmp_path), lines.append)
    assert any(line.startswith("resumed:") for line in lines)
    assert read_hashes(tmp_path) == hashes
    monkeypatch.setattr(stream.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(0, 0, 10))
    with pytest.raises(ExportError, match="the disk is too small"):
        export_folder(models / "hf", request(tmp_path / "y"))


def test_two_exports_into_one_folder_are_refused(
    models: Path, hashes: dict[str, str], killed: Path, tmp_path: Path
) -> None:
    with pytest.raises(ExportError, match="a file of this name exists"):
        export_folder(models / "hf", request(models / "out"))
    with (tmp_path / stream.PROGRESS).open("a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(ExportError, match="another export is writing"):
            export_folder(models / "hf", request(tmp_path))
    with pytest.raises(ExportError, match="unfinished export of something else"):
        export_folder(models / "hf", request(killed, ("Q6_K",)))


# --- bad input ---


def cut_in_the_middle(folder: Path) -> None:
    shard = sorted(folder.glob("model-*.safetensors"))[2]
    shard.write_bytes(shard.read_bytes()[:-1000])


def change_tensor(change: Callable[[dict[str, torch.Tensor]], object], number: int = 1) -> Callable[[Path], None]:
    def do(folder: Path) -> None:
        shard = sorted(folder.glob("model-*.safetensors"))[number]
        tensors = load_file(shard)
        change(tensors)
        save_file(tensors, shard)

    return do


def change_config(**changes: Any) -> Callable[[Path], None]:
    def do(folder: Path) -> None:
        data = json.loads((folder / "config.json").read_text())
        write_json(folder / "config.json", data | changes)

    return do


def first_matrix(tensors: dict[str, torch.Tensor]) -> str:
    return next(name for name in sorted(tensors) if ".experts.7." in name)


def set_value(value: float) -> Callable[[dict[str, torch.Tensor]], object]:
    def do(tensors: dict[str, torch.Tensor]) -> None:
        tensors[first_matrix(tensors)][5, 3] = value

    return do


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (cut_in_the_middle, r"truncated.*model-00003-of"),
        (change_tensor(lambda t: t.pop(first_matrix(t))), r"experts\.7.*is missing"),
        (change_tensor(lambda t: t.update({"model.extra": torch.zeros(3)})), "model.extra"),
        (change_tensor(lambda t: t.update({first_matrix(t): torch.zeros(256, 256, dtype=torch.int8)})), "dtype.*I8"),
        (change_tensor(lambda t: t.update({first_matrix(t): torch.zeros(256, 128)})), "another shape"),
        (change_tensor(set_value(float("nan"))), r"not a finite.*experts\.7\..*expert 7.*row 5"),
        (change_tensor(set_value(float("-inf"))), r"not a finite.*expert 7.*row 5"),
        (change_config(model_type="llama"), "not an AFMoE model"),
        (change_config(num_experts=10**6), "larger model than the weights"),
        (change_config(mup_enabled=False), "mup_enabled is off"),
        (change_config(global_attn_every_n_layers=2, layer_types=None), "layer 1 is full_attention"),
        (lambda folder: (folder / "tokenizer.json").unlink(), r"tokenizer\.json"),
        (lambda folder: (folder / "config.json").unlink(), "not a model folder"),
        (lambda folder: (folder / "model.safetensors.index.json").unlink(), "has no weights"),
        (lambda folder: sorted(folder.glob("*.safetensors"))[1].unlink(), "model-00002-of"),
    ],
)
def test_bad_model_is_named(models: Path, tmp_path: Path, damage: Callable[[Path], object], said: str) -> None:
    shutil.copytree(models / "hf", tmp_path / "hf")
    damage(tmp_path / "hf")
    with pytest.raises(FreeholdError, match=f"(?s){said}"):
        export_folder(tmp_path / "hf", request(tmp_path / "out", ("Q4_K_M",)))
    assert not list((tmp_path / "out").glob("*.gguf"))


def test_damaged_checkpoint_is_refused(models: Path, tmp_path: Path) -> None:
    shutil.copytree(models / "native", tmp_path / "x")
    config = (tmp_path / "x" / "config.json").read_bytes()
    (tmp_path / "x" / "config.json").write_bytes(config.replace(b"true", b"null"))
    with pytest.raises(CheckpointError, match="damaged or unfinished"):
        open_source(tmp_path / "x")
    (tmp_path / "x" / "config.json").write_bytes(config)
    data = tmp_path / "x" / "state" / "__0_0.distcp"
    data.write_bytes(data.read_bytes()[:-5])
    with pytest.raises(CheckpointError, match=r"truncated.*\n.*__0_0\.distcp"):
        open_source(tmp_path / "x")


def write_imatrix(path: Path, entries: dict[str, tuple[int, int]], value: float = 1.0) -> Path:
    writer = gguf.GGUFWriter(path, "imatrix")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["test"])
    writer.add_uint32("imatrix.chunk_count", 1)
    for name, (experts, width) in entries.items():
        writer.add_tensor(f"{name}.in_sum2", np.full((experts, width), value, np.float32))
        writer.add_tensor(f"{name}.counts", np.ones((experts, 1), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(
    ("entries", "value", "said"),
    [
        ({"blk.9.attn_q.weight": (1, 256)}, 1.0, "of another model"),
        ({"blk.1.ffn_up_exps.weight": (4, 256)}, 1.0, "of another model"),
        ({"blk.1.attn_q.weight": (1, 256)}, float("nan"), "cannot be mean squares"),
    ],
)
def test_imatrix_of_another_model_is_refused(
    models: Path, tmp_path: Path, entries: dict[str, tuple[int, int]], value: float, said: str
) -> None:
    imatrix = write_imatrix(tmp_path / "x.gguf", entries, value)
    with pytest.raises(ExportError, match=said):
        export_folder(models / "hf", request(tmp_path / "out", ("Q4_K_M",), imatrix=imatrix))


def test_types_are_a_list_of_known_ones() -> None:
    assert parse_types("q4_k_m, Q8_0") == ("Q4_K_M", "Q8_0")
    for text in ("", "Q4_K_S", "Q8_0,Q8_0"):
        with pytest.raises(ExportError, match="not a list of file types"):
            parse_types(text)


def test_rows_no_type_holds_fall_back_and_are_reported(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(models / "hf"), "--types", "Q4_K_M", "--output", str(tmp_path), "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "hf-Q4_K_M.gguf" in shown
    assert "4 tensors Q4_K -> F16" in shown
    assert not list(tmp_path.iterdir())
    main(["export", str(models / "hf"), "--types", "Q4_K_M", "--dry-run", "--json"])
    assert json.loads(capsys.readouterr().out)["files"]["Q4_K_M"]["fallbacks"] == {"Q4_K -> F16": 4}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["recipes/tiny.yaml", "--types", "Q8_0"], "belong to the export of a folder"),
        (["MODEL"], "a folder for the files is missing"),
        (["MODEL", "--output", "x", "name=y"], "takes no settings"),
        (["EMPTY", "--output", "x"], "neither a run nor a model folder"),
        (["MODEL", "--output", "OUT", "--name", "../x"], "not a name for files"),
    ],
)
def test_wrong_arguments_are_refused(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    places = {"MODEL": models / "hf", "EMPTY": tmp_path, "OUT": tmp_path / "out"}
    assert main(["export", *(str(places.get(part, part)) for part in arguments)]) == 2
    assert said in capsys.readouterr().err
