"""A step on the device: the CPU's numbers, no wait between log points, and the same bits after a resume."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch

from freehold.checkpoint import dcp
from freehold.core.log import read_metrics
from freehold.model.config import ModelConfig
from freehold.parallel.config import ParallelConfig
from freehold.trainer.config import SpikeConfig, TrainerConfig

SHAPE = {"hidden_size": 64, "moe_intermediate_size": 32, "intermediate_size": 64, "head_dim": 32}


def run_settings(dtype="float32", **changes):
    return TrainerConfig(dtype=dtype, threads=1, checkpoint_every_steps=2, **{"log_every_steps": 4, **changes})


def trainer(folder: Path, kind: str, **changes):
    """Return the tiny run on cpu or cuda, in rows that grouped products can take."""
    settings = {"trainer": run_settings(), "model": tiny.config(**SHAPE)} | changes
    return tiny.trainer(folder, parallel=ParallelConfig(device=kind), **settings)


def test_three_steps_are_those_of_the_cpu(device, tmp_path):
    mine, cpu = trainer(tmp_path / "a", device.type), trainer(tmp_path / "b", "cpu")
    for number in range(3):
        found, expected = (each.train_step(each.next_batch()) for each in (mine, cpu))
        # The first step starts from the same weights; later ones from weights that differ by roundings of Muon.
        assert found.loss == pytest.approx(expected.loss, rel=1e-2 if number else 1e-5)
        assert found["optim/grad_norm"] == pytest.approx(expected["optim/grad_norm"], rel=5e-2 if number else 1e-3)
    mine.catch_up() if mine.deferred else None
    for name, master in cpu.state.masters.items():
        # Muon rounds to bfloat16 in its iterations: what differs there is one rounding of an update of size lr.
        torch.testing.assert_close(mine.state.masters[name].cpu(), master, rtol=0, atol=5e-3, msg=name)


@pytest.mark.usefixtures("only_cuda")
@pytest.mark.parametrize("matrices", ["muon", "adamw"])
def test_no_step_waits_between_log_points(tmp_path, matrices):
    # In bfloat16, what a GPU trains in: PyTorch may read the sizes of grouped products of float32 on the host.
    optim = tiny.job(tmp_path).optim.model_copy(update={"matrices": matrices, "weight_decay": 0.1})
    run = trainer(tmp_path, "cuda", trainer=run_settings("bfloat16"), optim=optim)
    assert run.deferred
    run.train_step(run.next_batch())  # libraries load, memory is taken
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            run.train_step(run.next_batch())
    finally:
        torch.cuda.set_sync_debug_mode("default")
    run.catch_up()
    assert run.progress.skipped == []


@pytest.mark.usefixtures("only_cuda")
def test_acting_guard_waits_once_a_step(tmp_path):
    run = trainer(tmp_path, "cuda", trainer=run_settings("bfloat16", spike=SpikeConfig(action="skip")))
    assert not run.deferred
    run.train_step(run.next_batch())
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with pytest.warns(UserWarning, match="synchronizing") as waits:
            run.train_step(run.next_batch())
    finally:
        torch.cuda.set_sync_debug_mode("default")
    places = [str(wait.message) for wait in waits if "synchronizing" in str(wait.message)]
    assert len(places) == 1, places


def weights_of(folder: Path) -> str:
    """Return a hash of every tensor of the newest checkpoint below a folder."""
    newest = max(folder.glob("checkpoints/step_*"))
    digest = hashlib.sha256()
    for name, tensor in sorted(dcp.read_model(newest)[1].items()):
        digest.update(name.encode() + tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def test_resume_has_the_same_bits(device, tmp_path):
    settings = run_settings(deterministic=True)
    trainer(tmp_path / "straight", device.type, trainer=settings).run()
    run, count = trainer(tmp_path / "killed", device.type, trainer=settings), 0
    step = run.train_step

    class Killed(Exception):
        pass

    def dies(batch):
        nonlocal count
        count += 1
        if count == 6:
            raise Killed
        return step(batch)

    run.train_step = dies
    with pytest.raises(Killed):
        run.run()
    trainer(tmp_path / "killed", device.type, trainer=settings).run()
    assert weights_of(tmp_path / "killed") == weights_of(tmp_path / "straight")
    rows = [read_metrics(tmp_path / name / "metrics.jsonl") for name in ("straight", "killed")]
    assert [r["loss/mean"] for r in rows[0]] == [r["loss/mean"] for r in rows[1]]


def test_checkpoint_states_determinism_and_tf32(device, tmp_path):
    trainer(tmp_path, device.type, trainer=run_settings(tf32=True)).run()
    facts = json.loads((max(tmp_path.glob("checkpoints/step_*")) / "trainer.json").read_text())
    spans = json.dumps(facts)
    assert f'"device": "{device.type}"' in spans
    assert f'"tf32": {str(device.type == "cuda").lower()}' in spans
    assert f'"deterministic": {str(device.type == "cpu").lower()}' in spans


def test_loss_in_chunks_is_that_of_the_batch(device):
    from freehold.losses.cross_entropy import chunked_loss

    generator = torch.Generator().manual_seed(0)
    hidden, head = (torch.randn(n, 64, generator=generator).to(device).requires_grad_() for n in (300, 512))
    targets = torch.from_numpy(np.random.default_rng(0).integers(0, 512, 300)).to(device)
    scale = torch.tensor(1 / 300, dtype=torch.float64, device=device)
    losses = [chunked_loss(hidden, head, targets, scale=scale, z_loss=1e-4, chunk_tokens=n).total for n in (300, 64)]
    plain = torch.nn.functional.cross_entropy(hidden @ head.T, targets)
    z = 1e-4 * torch.logsumexp(hidden @ head.T, 1).square().mean()
    torch.testing.assert_close(losses[0].float(), (plain + z).float(), rtol=1e-5, atol=1e-6)
    gradients = [torch.autograd.grad(loss, (hidden, head)) for loss in (*losses, plain + z)]
    for one, two, exact in zip(*gradients, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(one, exact, rtol=1e-3, atol=1e-6)


@pytest.mark.usefixtures("only_cuda")
def test_planned_memory_is_what_a_step_takes(tmp_path):
    from freehold.planner.config import PlanConfig
    from freehold.planner.estimate import estimate

    shape = ModelConfig.model_validate({"preset": "laptop"})
    plan = PlanConfig(model=shape, batch={"context_tokens": 512, "sequences": 16, "micro_sequences": 16})
    planned = estimate(plan)["figures"]["memory/peak"].value
    run = trainer(tmp_path, "cuda", model=shape, trainer=run_settings("bfloat16"), micro_sequences=16)
    batch = tiny.order(sequences=16, context_tokens=512).batch(0)
    torch.cuda.reset_peak_memory_stats()
    for _ in range(2):
        run.train_step(batch)
    assert torch.cuda.max_memory_allocated() < 1.3 * planned
