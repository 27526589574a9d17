"""A checkpoint written by some ranks is read by others bit for bit, and fails on all of them when it fails on one."""

import json
import resource
import signal

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from freehold.checkpoint import dcp
from freehold.checkpoint.background import Saver
from freehold.core.errors import ArtifactError, CheckpointError
from freehold.model.config import ModelConfig

MODEL = ModelConfig.model_validate({"preset": "laptop"})
SHAPES = {"matrix": (6, 4), "experts": (4, 3, 5), "gain": (7,), "replicated": (5,)}


def whole():
    """Return what one process would hold: weights, Muon momentum, AdamW moments, SMEBU, RNG."""
    g = torch.Generator().manual_seed(0)
    model = {name: torch.randn(shape, generator=g) for name, shape in SHAPES.items()}
    optimizer = {"matrix.momentum": torch.randn(6, 4, generator=g), "gain.step": torch.tensor(3.0)}
    optimizer |= {f"experts.{slot}": torch.randn(4, 3, 5, generator=g) for slot in ("exp_avg", "exp_avg_sq")}
    return {
        "model": model,
        "optimizer": optimizer,
        "balance": {"model.layers.1.mlp": torch.randn(4, generator=g)},
        "rng": {"torch": g.get_state()},
    }


def shard(tensor, mesh):
    """Shard a tensor as a plan would: stacks over both axes, matrices over one, small things everywhere."""
    if tensor.ndim == 3:
        return distribute_tensor(tensor, mesh, [Shard(0), Shard(0)])
    if tensor.ndim == 2:
        return distribute_tensor(tensor, mesh, [Replicate(), Shard(0)])
    return tensor.clone()


def mesh():
    size = torch.distributed.get_world_size()
    return init_device_mesh("cpu", (2, size // 2) if size % 2 == 0 else (1, size), mesh_dim_names=("a", "b"))


def save(folder, background=False, room=None):
    """Save, and zero the state immediately; rank 1 may be left little room, as on a full disk."""
    grid = mesh()
    state = {part: {n: shard(t, grid) for n, t in tensors.items()} for part, tensors in whole().items()}
    saver = Saver(background=background)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    if room is not None and torch.distributed.get_rank() == 1:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, limit[1]))
    try:
        saver.save(folder, state, MODEL, {"step": 3})
        for tensors in state.values():
            for tensor in tensors.values():
                tensor.zero_()  # training continues
        saver.wait()
    except (ArtifactError, CheckpointError) as error:
        return str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    return "saved"


def differing(folder):
    """Read a checkpoint sharded for this world; return the names whose bits differ from what one process held."""
    grid, expected = mesh(), whole()
    sizes = {f"{part}/{name}": t for part, tensors in expected.items() for name, t in tensors.items()}
    dcp.check(folder, shared=True)
    found = dcp.load(folder, verify=False, empty=lambda key, size, dtype: shard(torch.zeros(size, dtype=dtype), grid))
    flat = {f"{part}/{name}": t for part, tensors in found.items() for name, t in tensors.items()}
    assert flat.keys() == sizes.keys()
    assert isinstance(flat["model/experts"], DTensor)
    bits = {key: t.full_tensor() if isinstance(t, DTensor) else t for key, t in flat.items()}
    return [key for key, tensor in bits.items() if not torch.equal(tensor, sizes[key])]


@pytest.mark.parametrize(("writers", "background"), [(2, False), (4, True)])
def test_any_number_of_ranks_reads_what_any_other_wrote(ranks, tmp_path, writers, background):
    ranks(writers).run(save, tmp_path / "x", background)
    assert len(list((tmp_path / "x" / "state").glob("*.distcp"))) == writers
    for readers in {2, 3, 4} - {writers}:
        assert ranks(readers).run(differing, tmp_path / "x") == [[]] * readers
    alone = dcp.load(tmp_path / "x")
    for part, tensors in whole().items():
        assert all(torch.equal(tensor, alone[part][name]) for name, tensor in tensors.items()), part


def test_ranks_read_what_one_process_wrote(ranks, tmp_path):
    dcp.save(tmp_path / "x", whole(), MODEL, {"step": 3})
    assert ranks(2).run(differing, tmp_path / "x") == [[], []]


def test_the_same_state_gives_the_same_bytes(ranks, tmp_path):
    for name in "xy":
        ranks(2).run(save, tmp_path / name)
    first, second = (json.loads((tmp_path / n / "manifest.json").read_text())["content_sha256"] for n in "xy")
    assert first == second


def test_full_disk_of_one_rank_stops_all_and_keeps_the_old(ranks, tmp_path):
    ranks(2).run(save, tmp_path / "x")
    before = (tmp_path / "x" / "manifest.json").read_bytes()
    reported = ranks(2).run(save, tmp_path / "x", False, 64)
    assert all("could not" in text for text in reported), reported
    assert (tmp_path / "x" / "manifest.json").read_bytes() == before
    assert not (tmp_path / "x.tmp").exists()
    assert ranks(2).run(differing, tmp_path / "x") == [[], []]  # and the ranks still talk


def newest(folder):
    reported = []
    found = dcp.last_good(folder, reported.append)
    return found and found.name, reported


def test_ranks_agree_on_the_newest_undamaged_checkpoint(ranks, tmp_path):
    for step in (1, 2, 3):
        ranks(2).run(save, dcp.step_folder(tmp_path, step))
    for step, file in ((3, "__1_0.distcp"), (2, "__0_0.distcp")):
        path = dcp.step_folder(tmp_path, step) / "state" / file
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data if step == 3 else data[:-100])
    (a, reported), (b, _) = ranks(2).run(newest, tmp_path)
    assert a == b == "step_00000001"
    assert ["__1_0.distcp" in reported[0], "__0_0.distcp" in reported[1]] == [True, True]
