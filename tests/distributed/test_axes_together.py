"""What the loop does between its steps on chunks of rows and stages of layers: validate, adopt, watch."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import toy
from test_parallel_exactness import alone, assert_one_process

from freehold.core.errors import ConfigError
from freehold.optim.config import SmebuConfig
from freehold.parallel.config import ParallelConfig
from freehold.trainer.config import CollapseConfig, check_guards
from freehold.trainer.validate import HeldOut, bits_per_byte

DEGREES = {
    "cp2": {"context": 2},
    "pp2-interleaved": {"pipeline": 2, "schedule": "interleaved"},
    "pp2-ep2-fsdp2": {"pipeline": 2, "shard": 2, "expert": 2},
    "pp2-interleaved-ep2-cp2": {"pipeline": 2, "schedule": "interleaved", "context": 2, "expert": 2},
}


def run(parallel, changes, dtype="float64"):
    """Train on a rank; the first of each pipeline stage returns what its layers became."""
    trainer = toy.make(parallel, dtype, **changes)
    report = toy.train(trainer)
    report["biases"] = {name: layer.expert_bias.numpy() for name, layer in trainer.state.moe_layers.items()}
    report["bits"] = bits_per_byte(trainer.model, held_out(), trainer.world, rows=2)
    if any(trainer.world.place[1:]):
        for name in ("gradients", "model", "optimizer"):
            report[name] = {}
    return report


def held_out():
    """Rows to validate on; those of the first source do not come out even over the ranks."""
    batch = toy.batches()[0]
    return {"a": HeldOut(batch.rows(0, 5), 100), "b": HeldOut(batch.rows(1, 8), 100)}


@cache
def bits_alone():
    trainer = toy.make({})
    toy.train(trainer)
    return bits_per_byte(trainer.model, held_out(), trainer.world, rows=2)


@pytest.mark.parametrize(
    ("name", "changes"),
    [*((name, {}) for name in DEGREES), ("pp2-interleaved", {"recompute": True, "optim": {"matrices": "adamw"}})],
)
def test_every_process_knows_all_routing(ranks, name, changes):
    size = ParallelConfig(**DEGREES[name]).devices
    reports = ranks(size).run(run, DEGREES[name], changes)
    first = reports[0]
    for other in reports[1:]:
        for part in ("gradients", "model", "optimizer"):
            assert not first[part].keys() & other[part].keys()
            first[part] |= other[part]
    expected = alone("float64", tuple((k, tuple(v.items()) if isinstance(v, dict) else v) for k, v in changes.items()))
    for report in reports:
        assert report["bits"] == first["bits"]
        for counts, right in zip(report["counts"].values(), expected["counts"].values(), strict=True):
            assert np.array_equal(counts, right)
        for layer, bias in report.pop("biases").items():
            assert np.array_equal(bias, expected["model"][f"{layer}.expert_bias"])
        report["biases"] = {}
    assert_one_process(reports, expected)
    if not changes:
        assert first["bits"] == {key: pytest.approx(value, rel=1e-5) for key, value in bits_alone().items()}


def test_stages_hand_on_bfloat16(ranks):
    reports, expected = ranks(2).run(run, DEGREES["pp2-interleaved"], {}, "bfloat16"), alone("bfloat16")
    assert np.allclose(reports[0]["loss"][0], expected["loss"][0], rtol=1e-3)
    assert np.allclose(reports[0]["norm"][0], expected["norm"][0], rtol=5e-3)
    for report in reports:
        for parameter, gradient in report["gradients"].items():
            right = expected["gradients"][parameter]
            assert np.linalg.norm(gradient - right) < 0.02 * np.linalg.norm(right), parameter


def resume(parallel, state, steps):
    """Adopt the state of one process after some steps, and take the next."""
    trainer = toy.make(parallel)
    state = {part: {n: torch.from_numpy(t) for n, t in tensors.items()} for part, tensors in state.items()}
    trainer.checkpoints.adopt(state, Path())
    trainer.progress.step = steps
    trainer.train_step(toy.part(trainer, toy.batches()[steps]))
    biases = {name: layer.expert_bias.numpy() for name, layer in trainer.state.moe_layers.items()}
    return {n: toy.whole(trainer, n, m) for n, m in trainer.state.masters.items()}, biases


@pytest.mark.parametrize("name", ["pp2-interleaved", "cp2"])
def test_many_processes_resume_the_state_of_one(ranks, name):
    trainer = toy.make({})
    for batch in toy.batches()[:2]:
        trainer.train_step(batch)
    state = {
        p: {n: t.numpy().copy() for n, t in tensors.items()} for p, tensors in trainer.checkpoints.tensors().items()
    }
    trainer.train_step(toy.batches()[2])
    found: dict[str, np.ndarray] = {}
    for masters, biases in ranks(2).run(resume, DEGREES[name], state, 2):
        found |= masters
        for layer, bias in biases.items():
            assert np.array_equal(bias, trainer.state.moe_layers[layer].expert_bias.numpy())
    for parameter, master in trainer.state.masters.items():
        np.testing.assert_allclose(found[parameter], master.detach().numpy(), rtol=1e-9, atol=1e-12)


def test_what_stages_cannot_do_is_refused_before_anything_starts():
    with pytest.raises(ConfigError, match="another pipeline stage holds"):
        check_guards(CollapseConfig(action="reinitialise"), SmebuConfig(), ParallelConfig(pipeline=2), "pretrain")
