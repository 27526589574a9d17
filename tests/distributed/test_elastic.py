"""One run on four processes, then two, then three: the same rows in the same order, the same state at each change."""

import pytest
import tiny
import torch

from freehold.checkpoint import dcp
from freehold.core.errors import CheckpointError
from freehold.core.log import Log
from freehold.parallel.config import ParallelConfig
from freehold.trainer.config import TrainerConfig
from freehold.trainer.loop import Trainer

STEPS = 6


def make(folder, parallel, hidden=16):
    degrees, plan = ParallelConfig(**parallel), tiny.phases(stable=STEPS)
    job = tiny.job(
        folder,
        plan,
        model=tiny.config(num_hidden_layers=2, hidden_size=hidden),
        trainer=TrainerConfig(**tiny.TRAINER, checkpoint_every_steps=100),
        order=tiny.order(plan, sequences=12),
        micro_sequences=12 // degrees.data,
        parallel=degrees,
    )
    return Trainer(job, Log(quiet=True), seed=0)


def resume(folder, parallel, until):
    """Resume from what is there to step `until`, save; return the losses of the steps taken."""
    trainer = make(folder, parallel)
    trainer.restore()
    losses = []
    while trainer.step < until:
        losses.append(trainer.train_step(trainer.next_batch())["loss/mean"])
    trainer.checkpoints.save_step()
    return losses


def write_again(folder, parallel, step):
    """Read the newest checkpoint and write it as this world does, without a step between."""
    trainer = make(folder, parallel)
    assert trainer.restore()
    assert trainer.step == step
    trainer.checkpoints.save(folder / "again")


def equal(a, b, without=()):
    """Return the names of all tensors of two checkpoints whose bits differ; some parts may be `without` an equal."""
    one, two = ({part: t for part, t in dcp.load(folder).items() if part not in without} for folder in (a, b))
    assert one.keys() == two.keys()
    assert all(one[part].keys() == two[part].keys() for part in one)
    return [f"{p}/{n}" for p in one for n in one[p] if not torch.equal(one[p][n].nan_to_num(), two[p][n].nan_to_num())]


def test_four_then_two_then_three_processes(ranks, tmp_path):
    worlds = [(4, {"shard": 4, "expert": 2}, 2), (2, {"shard": 2, "expert": 2}, 4), (3, {"shard": 3}, 6)]
    straight, losses = resume(tmp_path / "one", {}, STEPS), []
    for size, parallel, until in worlds:
        losses += ranks(size).run(resume, tmp_path / "many", parallel, until)[0]
    here, there = (dcp.step_folder(tmp_path / name / "checkpoints", STEPS) for name in ("one", "many"))
    one, many = dcp.check(here), dcp.check(there)
    assert many["data_sum"] == one["data_sum"] != "0" * 16  # no row lost, repeated or moved to another step
    assert (many["step"], many["tokens"]) == (one["step"], one["tokens"])
    assert many["processes"] == [[0, 4], [2, 2], [4, 3]]
    assert losses == pytest.approx(straight, rel=1e-4)
    a, b = dcp.load(here)["model"], dcp.load(there)["model"]
    assert a.keys() == b.keys()
    assert max(float((a[n] - b[n]).norm() / a[n].norm().clamp_min(1e-6)) for n in a) < 0.05


def test_what_one_world_wrote_another_reads_to_the_bit(ranks, tmp_path):
    ranks(4).run(resume, tmp_path, {"shard": 2, "replicate": 2, "expert": 2}, 2)
    written = dcp.step_folder(tmp_path / "checkpoints", 2)
    for size, parallel in ((2, {"shard": 2}), (3, {"shard": 3}), (4, {"shard": 2, "pipeline": 2})):
        ranks(size).run(write_again, tmp_path, parallel, 2)
        # The stages of a pipeline do not watch for a collapse.
        without = ["collapse"] if "pipeline" in parallel else []
        assert equal(written, tmp_path / "again", without) == [], parallel
    write_again(tmp_path, {}, 2)
    assert equal(written, tmp_path / "again") == []


def refused(folder, parallel, hidden):
    try:
        make(folder, parallel, hidden).restore()
    except CheckpointError as error:
        return str(error)
    return "taken"


def test_a_checkpoint_of_another_model_is_refused_by_every_rank(ranks, tmp_path):
    resume(tmp_path, {}, 1)
    for reported in ranks(2).run(refused, tmp_path, {"shard": 2}, 48):
        assert "another shape" in reported
