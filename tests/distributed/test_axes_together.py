"""Chunks of rows, pipeline stages, experts and shards at once: three steps of the real loop are those of one process."""

from __future__ import annotations

import pytest
import toy
from test_parallel_exactness import alone, assert_one_process, error


def run(parallel, dtype="float64", changes=None):
    """Train on a rank; the first rank of each pipeline stage returns what its layers became."""
    trainer = toy.make(parallel, dtype, **(changes or {}))
    report = toy.train(trainer)
    report["biases"] = {n: v for n, v in report["model"].items() if n.endswith("expert_bias")}
    if trainer.world.rank % (trainer.world.size // trainer.job.parallel.pipeline):
        for name in ("gradients", "model", "optimizer"):
            report[name] = {}
    return report


def joined(reports):
    """Return the reports with all stages' tensors in the first; no tensor may be on two stages."""
    first = reports[0]
    for other in reports[1:]:
        for name in ("gradients", "model", "optimizer"):
            assert not first[name].keys() & other[name].keys()
            first[name] |= other[name]
    return reports


CONTEXT = {
    "cp2": {"context": 2},
    "cp4": {"context": 4},
    "cp2-ep2": {"context": 2, "expert": 2},
    "cp2-dp2-ep2": {"context": 2, "shard": 2, "expert": 2},
    "cp2-dp2-ep4": {"context": 2, "shard": 2, "expert": 4},
    "cp2-replicate2": {"context": 2, "replicate": 2},
}
PIPELINE = {
    "pp2": {"pipeline": 2},
    "pp2-interleaved": {"pipeline": 2, "schedule": "interleaved"},
    "pp4": {"pipeline": 4},
    "pp2-fsdp2": {"pipeline": 2, "shard": 2},
    "pp2-ep2-fsdp2": {"pipeline": 2, "shard": 2, "expert": 2},
    "pp2-interleaved-ep2": {"pipeline": 2, "schedule": "interleaved", "shard": 2, "expert": 2},
    "pp2-cp2-ep2": {"pipeline": 2, "context": 2, "expert": 2},
}
DEGREES = CONTEXT | PIPELINE


@pytest.mark.parametrize("name", DEGREES)
def test_three_steps_are_those_of_one_process(ranks, name):
    degrees = DEGREES[name]
    size = 1
    for axis in ("replicate", "shard", "context", "pipeline"):
        size *= degrees.get(axis, 1)
    micro = {"micro": 1} if size == 4 and "shard" in degrees else {}
    assert_one_process(joined(ranks(size).run(run, degrees, "float64", micro)), alone("float64", tuple(micro.items())))
