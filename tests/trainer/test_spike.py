"""A loss that jumps: the batch is named and skipped, or broken weights are rolled back; the rest is untouched."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
import torch

from freehold.core.log import Log
from freehold.data.loader import PhaseRows, Source, TextOrder
from freehold.model.config import ModelConfig
from freehold.optim.config import OptimConfig, PhaseConfig, SmebuConfig
from freehold.optim.schedule import Schedule
from freehold.trainer import guards, spike
from freehold.trainer.config import SpikeConfig, TrainerConfig
from freehold.trainer.errors import TrainingError
from freehold.trainer.job import Job
from freehold.trainer.loop import Trainer
from freehold.trainer.quarantine import QUARANTINE
from freehold.trainer.spike import SpikeDetector

STEPS = 40


@pytest.fixture(autouse=True)
def short_patience(monkeypatch):
    """Let a roll-back fit into a short run."""
    monkeypatch.setattr(guards, "PATIENCE_STEPS", 3)
    monkeypatch.setattr(spike, "BLAME_STEPS", 2)


def watch(losses, phases=(0,), **config):
    """Return the steps whose loss stands out."""
    detector = SpikeDetector(SpikeConfig(warmup_steps=0, window_steps=16, **config), 0)
    return [
        step for step, loss in enumerate(losses) if detector.stands_out(step, max(p for p in phases if p <= step), loss)
    ]


def noisy(steps, level=5.0, seed=0):
    return list(level + np.random.default_rng(seed).normal(0, 0.02, steps))


def test_falling_noisy_loss_is_no_spike():
    losses = np.linspace(9, 3, 400) + np.random.default_rng(0).normal(0, 0.05, 400)
    assert watch(losses) == []


def test_jump_and_not_finite_loss_are_spikes():
    losses = noisy(60)
    losses[30], losses[45], losses[2] = 7.0, math.inf, math.nan
    assert watch(losses) == [2, 30, 45]
    assert watch(losses, rise_nats=2.5) == [2, 45]


def test_phases_are_not_compared_with_each_other():
    losses = noisy(40) + noisy(40, level=8.0)
    assert watch(losses, phases=(0, 40)) == []
    assert watch(losses)[0] == 40


class PoisonedOrder(TextOrder):
    """Rows of one token over and over in some steps: text that no step before it was like."""

    poisoned = ()

    def batch(self, step, *part):
        batch = super().batch(step, *part)
        if step in self.poisoned:
            batch.targets[:] = np.random.default_rng(step).integers(0, 32, batch.targets.shape)
        return batch


def make(folder, action="skip", poisoned=(), **settings):
    g = np.random.default_rng(0)
    lengths = g.integers(5, 40, 30)
    tokens = np.concatenate([np.append(g.integers(60, 64, n - 1), 1) for n in lengths]).astype(np.uint16)
    source = Source("a", tokens, np.concatenate([[0], np.cumsum(lengths)[:-1]]), lengths, [f"a{i}" for i in range(30)])
    phases = {"stable": PhaseConfig(steps=STEPS, warmup_steps=2, checkpoint="base", stage_type="Base")}
    order = PoisonedOrder(
        {"a": source}, [PhaseRows("stable", STEPS, {})], context_tokens=16, sequences=4, seed=0, separator=1
    )
    order.poisoned = poisoned
    config = SpikeConfig(action=action, warmup_steps=8, window_steps=8, rise_nats=0.7, **settings)
    trainer = TrainerConfig(dtype="float32", threads=1, checkpoint_every_steps=4, log_every_steps=1, spike=config)
    job = Job(
        folder=folder,
        model=ModelConfig(
            vocab_size=64, hidden_size=16, intermediate_size=32, moe_intermediate_size=16, num_hidden_layers=2,
            num_dense_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=8, num_experts=4,
            num_experts_per_tok=2, sliding_window=8, max_position_embeddings=64,
        ),
        trainer=trainer,
        optim=OptimConfig(muon_lr=0.02, lr=1e-2),
        balance=SmebuConfig(),
        schedule=Schedule(phases),
        order=order,
        micro_sequences=4,
        stage="pretrain",
        parent="",
        facts={"tokenizer_sha256": "x"},
        documents_of=lambda step: [{"id": "a7", "source": "a", "licence": "CC0-1.0"}],
    )  # fmt: skip
    return Trainer(job, Log(folder, quiet=True), seed=0)


def test_spike_changes_nothing_and_is_named_with_licence(tmp_path):
    trainer = make(tmp_path, poisoned=(20,))
    trainer.run()
    assert trainer.progress.skipped == [20]
    rows = [json.loads(line) for line in (tmp_path / QUARANTINE).read_text().splitlines()]
    assert [(r["step"], r["id"], r["source"], r["licence"]) for r in rows] == [(20, "a7", "a", "CC0-1.0")]
    # The same bits as a run in which someone decided beforehand to skip that step.
    other = make(tmp_path / "other", action="none", poisoned=(20,))
    other.progress.rollbacks = [{"first_step": 20, "end_step": 21, "layers": []}]
    other.restore = lambda: False
    other.run()
    assert all(torch.equal(m, other.state.masters[n]) for n, m in trainer.state.masters.items())


def test_spike_without_action_is_learnt_from(tmp_path):
    trainer = make(tmp_path, action="none", poisoned=(20,))
    trainer.run()
    assert trainer.progress.skipped == []


@pytest.mark.parametrize("killed_at", [None, 24])
def test_broken_weights_are_rolled_back(tmp_path, killed_at):
    def run(folder, killed_at=None):
        trainer = make(folder, action="roll_back")
        whole = trainer.train_step

        def step(batch):
            if trainer.step == killed_at:
                raise KeyboardInterrupt
            values = whole(batch)
            if trainer.step == 21 and not trainer.progress.rollbacks:  # the update of step 20 breaks the head
                with torch.no_grad():
                    trainer.state.masters["lm_head.weight"].normal_()
                    trainer.state.publish()
            return values

        trainer.train_step = step
        trainer.run()
        return trainer

    if killed_at:
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "a", killed_at)
        assert (tmp_path / "a" / "rollbacks.json").exists()
    trainer = run(tmp_path / "a")
    assert trainer.progress.rollbacks == [{"first_step": 19, "end_step": 24, "layers": []}]
    assert trainer.progress.skipped == [19, 20, 21, 22, 23]
    if killed_at:
        straight = run(tmp_path / "b")
        assert all(torch.equal(m, straight.state.masters[n]) for n, m in trainer.state.masters.items())


def test_gives_up_when_rolling_back_does_not_help(tmp_path, monkeypatch):
    monkeypatch.setattr(guards, "MAX_ROLLBACKS", 1)
    trainer = make(tmp_path, action="roll_back", poisoned=range(20, STEPS))
    with pytest.raises(TrainingError, match="the loss has stood out for 3 steps again after 1 roll-backs"):
        trainer.run()


def test_lasting_level_becomes_the_usual_one(tmp_path):
    trainer = make(tmp_path, action="skip", poisoned=range(20, STEPS))
    trainer.run()
    assert trainer.progress.skipped == [20, 21, 22]


def test_checkpoint_holds_the_window_of_losses(tmp_path):
    trainer = make(tmp_path)
    for step in range(8):
        trainer.train_step(trainer.job.order.batch(step))
    trainer.checkpoints.save_step()
    again = make(tmp_path)
    assert again.restore()
    assert np.array_equal(again.guards.spikes.losses, trainer.guards.spikes.losses)
    assert not np.isnan(again.guards.spikes.losses).any()


def test_failed_save_warns_but_ends_the_run_at_a_phase_end(tmp_path, monkeypatch):
    from freehold.checkpoint import dcp
    from freehold.core.errors import ArtifactError

    trainer = make(tmp_path)
    full = {8, STEPS}
    real = dcp.save

    def save(folder, state, config, facts, *args):
        if facts["step"] in full:
            raise ArtifactError("No space left on device", where=folder)
        return real(folder, state, config, facts, *args)

    monkeypatch.setattr(dcp, "save", save)
    with pytest.raises(ArtifactError, match="No space left"):
        trainer.run()
    assert trainer.step == STEPS
    saved = sorted(int(p.name[5:]) for p in (tmp_path / "checkpoints").iterdir())
    assert saved == [STEPS - 8, STEPS - 4]
    full.clear()
    again = make(tmp_path)
    again.run()
    assert (tmp_path / "base" / "manifest.json").exists()


def test_change_of_processes_is_recorded(tmp_path):
    trainer = make(tmp_path)
    trainer.progress.processes = [[0, 4]]
    trainer.train_step(trainer.job.order.batch(0))
    trainer.checkpoints.save_step()
    again = make(tmp_path)
    assert again.restore()
    assert again.progress.processes == [[0, 4], [1, 1]]


def test_data_digest_notices_moved_rows_only(tmp_path):
    def digest_of(order, steps):
        trainer = make(tmp_path / "x")
        for step in steps:
            trainer.progress.digest.add(step, order.batch(step))
        return trainer.checkpoints.data_digest()

    order = make(tmp_path / "y").job.order
    straight = digest_of(order, range(4))
    assert straight == digest_of(order, [2, 0, 3, 1])
    assert len({straight, digest_of(order, range(3)), digest_of(order, [0, 1, 2, 2, 3])}) == 3
    swapped = dataclasses.replace(order.batch(0))
    swapped.input_ids[[0, 1]] = swapped.input_ids[[1, 0]]
    a, b = make(tmp_path / "z"), make(tmp_path / "w")
    a.progress.digest.add(0, order.batch(0))
    b.progress.digest.add(0, swapped)
    assert a.checkpoints.data_digest() != b.checkpoints.data_digest()
