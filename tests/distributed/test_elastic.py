"""One run on four processes, then two, then three: the same rows in the same order, the same state at each change."""

import numpy as np
import pytest
import torch

from freehold.checkpoint import dcp
from freehold.core.errors import CheckpointError
from freehold.core.log import Log
from freehold.data.loader import PhaseRows, Source, TextOrder
from freehold.model.config import ModelConfig
from freehold.optim.config import OptimConfig, PhaseConfig, SmebuConfig
from freehold.optim.schedule import Schedule
from freehold.parallel.config import ParallelConfig
from freehold.trainer.config import TrainerConfig
from freehold.trainer.job import Job
from freehold.trainer.loop import Trainer

STEPS = 6
MODEL = ModelConfig(
    vocab_size=64, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=2,
    num_dense_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=16, num_experts=4,
    num_experts_per_tok=2, sliding_window=8, max_position_embeddings=64,
)  # fmt: skip


def make(folder, parallel, hidden=32):
    g = np.random.default_rng(0)
    lengths = g.integers(5, 40, 60)
    tokens = np.concatenate([np.append(g.integers(32, 64, n - 1), 1) for n in lengths]).astype(np.uint16)
    source = Source("a", tokens, np.concatenate([[0], np.cumsum(lengths)[:-1]]), lengths, [f"a{i}" for i in range(60)])
    phases = {"stable": PhaseConfig(steps=STEPS, warmup_steps=2)}
    job = Job(
        folder=folder,
        model=MODEL.model_copy(update={"hidden_size": hidden}),
        trainer=TrainerConfig(dtype="float32", threads=1, checkpoint_every_steps=100),
        optim=OptimConfig(muon_lr=0.02, lr=1e-2),
        balance=SmebuConfig(),
        schedule=Schedule(phases),
        order=TextOrder(
            {"a": source}, [PhaseRows("stable", STEPS, {})], context_tokens=16, sequences=12, seed=0, separator=1
        ),
        micro_sequences=12 // ParallelConfig(**parallel).data,
        stage="pretrain",
        parent="",
        parallel=ParallelConfig(**parallel),
        facts={"tokenizer_sha256": "x"},
    )
    return Trainer(job, Log(quiet=True), seed=0)


def go_on(folder, parallel, until):
    """Go on from what is there to step `until`, save; return the losses of the steps taken."""
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
    straight, losses = go_on(tmp_path / "one", {}, STEPS), []
    for size, parallel, until in worlds:
        losses += ranks(size).run(go_on, tmp_path / "many", parallel, until)[0]
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
    ranks(4).run(go_on, tmp_path, {"shard": 2, "replicate": 2, "expert": 2}, 2)
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
    go_on(tmp_path, {}, 1)
    for told in ranks(2).run(refused, tmp_path, {"shard": 2}, 48):
        assert "another shape" in told
