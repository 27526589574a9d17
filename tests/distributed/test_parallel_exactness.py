"""A sharded model is the model of one process: losses, gradients, norm, weights, biases and moments after three steps.

Float64, so that a wrong factor shows as 0.5 and a right one as 1e-15. Biases follow from integer counts and agree to
the bit.
"""

import functools
from unittest import mock

import numpy as np
import pytest
import torch
import toy
from torch.distributed.fsdp import FSDPModule

from freehold.model import ops
from freehold.parallel.config import ParallelConfig


def spread_run(parallel, dtype, changes, break_it=None):
    """Run on a rank; the first of each pipeline stage returns all it has, the others what must be the same."""
    trainer = toy.make(parallel, dtype, **changes)
    if break_it:
        break_it(trainer)
    report = toy.train(trainer)
    if not any(trainer.world.place[1:]):
        return report
    biases = {n: v for n, v in report["model"].items() if n.endswith("expert_bias")}
    return {"loss": report["loss"], "norm": report["norm"], "biases": biases}


@functools.cache
def alone(dtype="float64", changes=()):
    return toy.train(toy.make({}, dtype, **{name: dict(v) if isinstance(v, tuple) else v for name, v in changes}))


def error(found, expected):
    """Return the largest difference between tensors by name, each relative to its largest value."""
    assert found.keys() == expected.keys()
    return max(
        float(np.abs(found[n] - expected[n]).max() / max(np.abs(expected[n]).max(), 1e-30))
        for n in expected
        if expected[n].size
    )


def assert_one_process(reports, expected, gradients=1e-12, after=1e-9):
    first = reports[0]
    assert np.allclose(first["loss"], expected["loss"], rtol=gradients)
    assert np.allclose(first["norm"], expected["norm"], rtol=gradients)
    assert first["tokens"] == expected["tokens"] == toy.STEPS * toy.ROWS * toy.TOKENS
    assert error(first["gradients"], expected["gradients"]) < gradients
    for name, values in expected["model"].items():
        if name.endswith("expert_bias"):
            assert np.array_equal(first["model"][name], values), name
    for name, values in expected["balance"].items():
        assert np.array_equal(first["balance"][name], values), name
    for part in ("model", "optimizer"):
        assert error(first[part], expected[part]) < after, part
    for name, values in expected["counts"].items():
        assert np.array_equal(first["counts"][name], values), name
    for other in reports[1:]:
        assert (other["loss"], other["norm"]) == (first["loss"], first["norm"])
        for name, values in other["biases"].items():
            assert np.array_equal(values, first["model"][name])


DEGREES = {
    "fsdp2": {"shard": 2},
    "replicate2": {"replicate": 2},
    "ep2": {"shard": 2, "expert": 2},
    "fsdp4": {"shard": 4},
    "hsdp2x2": {"replicate": 2, "shard": 2},
    "ep4": {"shard": 4, "expert": 4},
    "ep2-fsdp2": {"shard": 4, "expert": 2},
    "hsdp2-ep2": {"replicate": 2, "shard": 2, "expert": 2},
}
CHUNKS = {
    "cp2": {"context": 2},
    "cp4": {"context": 4},
    "cp2-ep2": {"context": 2, "expert": 2},
    "cp2-dp2-ep2": {"context": 2, "shard": 2, "expert": 2},
    "cp2-dp2-ep4": {"context": 2, "shard": 2, "expert": 4},
}
STAGES = {
    "pp2": {"pipeline": 2},
    "pp2-interleaved": {"pipeline": 2, "schedule": "interleaved"},
    "pp2-fsdp2": {"pipeline": 2, "shard": 2},
    "pp2-ep2-fsdp2": {"pipeline": 2, "shard": 2, "expert": 2},
    "pp2-ep2-fsdp2-interleaved": {"pipeline": 2, "shard": 2, "expert": 2, "schedule": "interleaved"},
    "pp2-cp2-ep2": {"pipeline": 2, "context": 2, "expert": 2},
}
DEGREES |= CHUNKS | STAGES


def run(ranks, degrees, dtype="float64", changes=None, break_it=None):
    parallel, changes = ParallelConfig(**degrees), changes or {}
    if parallel.data == parallel.pipeline == 1:
        changes = {"micro": 4} | changes  # two passes a step here, too
    reports = ranks(parallel.devices).run(spread_run, degrees, dtype, changes, break_it)
    for other in [report for report in reports[1:] if "model" in report]:  # of another pipeline stage
        for part in ("gradients", "model", "optimizer"):
            assert not reports[0][part].keys() & other[part].keys()
            reports[0][part] |= other.pop(part)
        other["biases"] = {}
    return reports


@pytest.mark.parametrize("name", DEGREES)
def test_a_spread_model_is_that_of_one_process(ranks, name):
    assert_one_process(run(ranks, DEGREES[name]), alone())


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("ep2-fsdp2", {"recompute": True}),
        ("hsdp2x2", {"recompute": True}),
        ("fsdp4", {"model": {"num_experts": 3, "num_experts_per_tok": 2}}),  # one rank holds no expert
        ("ep2-fsdp2", {"model": {"num_experts": 2, "num_experts_per_tok": 2}}),
        ("ep4", {"model": {"num_dense_layers": 4}}),  # no experts at all
        ("ep2", {"optim": {"matrices": "adamw"}}),
        ("hsdp2-ep2", {"optim": {"muon_weight_decay": 0.1}}),
    ],
)
def test_other_models_and_optimizers(ranks, name, changes):
    frozen = tuple((k, tuple(v.items()) if isinstance(v, dict) else v) for k, v in changes.items())
    assert_one_process(run(ranks, DEGREES[name], changes=changes), alone("float64", frozen))


def test_bfloat16_is_that_of_one_process_in_bfloat16(ranks):
    found, expected = run(ranks, DEGREES["ep2-fsdp2"], "bfloat16")[0], alone("bfloat16")
    assert np.allclose(found["loss"][0], expected["loss"][0], rtol=1e-3)
    assert np.allclose(found["norm"][0], expected["norm"][0], rtol=5e-3)
    for name, gradient in expected["gradients"].items():
        difference = np.linalg.norm(found["gradients"][name] - gradient)
        assert difference < 0.02 * np.linalg.norm(gradient), name


def test_parts_of_no_rows_are_stepped_by_the_kernels_too(ranks):
    model = {"num_experts": 3, "num_experts_per_tok": 2}  # over four ranks
    found = run(ranks, DEGREES["fsdp4"], "float32", {"model": model})[0]
    expected = alone("float32", (("model", tuple(model.items())),))
    assert error(found["gradients"], expected["gradients"]) < 1e-4
    assert error(found["optimizer"], expected["optimizer"]) < 0.02


def grouped_run(parallel):
    """Run with the experts' matrix products as a CUDA device would do them."""
    with mock.patch.object(ops, "grouped_swiglu", lambda *tensors: ops.grouped_swiglu_gemm(*tensors[:4])):
        return toy.train(toy.make(parallel, "float32"))


def test_grouped_gemm_is_that_of_one_process(ranks):
    expected, found = grouped_run({}), ranks(4).run(grouped_run, DEGREES["ep4"])[0]
    assert error(found["gradients"], expected["gradients"]) < 1e-4
    assert error(found["gradients"], alone("float32")["gradients"]) < 1e-4
    assert np.allclose(found["norm"][0], expected["norm"][0], rtol=1e-5)


def compile_layers(trainer):
    trainer.model.compile_layers("aot_eager")


@pytest.mark.slow
def test_compiled_layers_are_those_of_one_process(ranks):
    assert_one_process(run(ranks, DEGREES["ep2"], break_it=compile_layers), alone())


# -- what must fail ------------------------------------------------------------------------------------------------


def divide_as_fsdp_does(trainer):
    for module in trainer.model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(None)


def test_fsdps_own_division_is_wrong_for_experts(ranks):
    found = run(ranks, DEGREES["ep2"], break_it=divide_as_fsdp_does)[0]["gradients"]
    expected = alone()["gradients"]
    matrices = {n for n, g in expected.items() if g.ndim == 2}
    experts = {n for n in expected if ".experts." in n}
    doubled = {n: 2 * found[n] for n in found}  # a mean over two ranks, of a loss that was divided by all tokens
    assert error({n: doubled[n] for n in matrices}, {n: expected[n] for n in matrices}) < 1e-12
    assert error({n: doubled[n] for n in experts}, {n: expected[n] for n in experts}) == pytest.approx(1.0)


def orthogonalise_parts(trainer):
    trainer.state.optimizers.optimizers[0][0].sharded = None


def test_a_part_orthogonalised_alone_is_another_update(ranks):
    found, expected = run(ranks, DEGREES["fsdp2"], break_it=orthogonalise_parts)[0], alone()
    assert error(found["gradients"], expected["gradients"]) < 1e-12
    assert error(found["model"], expected["model"]) > 0.01


def count_own_tokens_only(trainer):
    trainer.update.share_routing = lambda logit_max: None


def test_counts_of_one_rank_alone_move_biases_apart(ranks):
    reports = run(ranks, DEGREES["fsdp2"], break_it=count_own_tokens_only)
    expected = alone()
    biases = [n for n in expected["model"] if n.endswith("expert_bias")]
    assert not any(np.array_equal(reports[0]["model"][n], expected["model"][n]) for n in biases)
    assert not any(np.array_equal(reports[0]["model"][n], reports[1]["biases"][n]) for n in biases)


# -- what is no step -----------------------------------------------------------------------------------------------


def one_rank_has_no_number(poisoned):
    trainer = toy.make({"shard": 2, "expert": 2})
    before = {n: m.detach().clone() for n, m in trainer.state.masters.items()}
    trainer._skip = lambda step, why: trainer.progress.skipped.append(trainer.step)
    if trainer.world.rank == poisoned:
        with torch.no_grad():
            trainer.state.masters["model.embed_tokens.weight"].fill_(float("nan"))
            before["model.embed_tokens.weight"].fill_(float("nan"))
    trainer.train_step(toy.part(trainer, toy.batches()[0]))
    return trainer.progress.skipped, all(
        torch.equal(m.nan_to_num(), before[n].nan_to_num()) for n, m in trainer.state.masters.items()
    )


@pytest.mark.parametrize("poisoned", [0, 1])
def test_step_not_finite_on_one_rank_is_skipped_on_all(ranks, poisoned):
    assert ranks(2).run(one_rank_has_no_number, poisoned) == [([0], True), ([0], True)]
