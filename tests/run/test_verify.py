"""What `verify-resume` calls equal and what not; that it does so for a real run is in walk/test_walk.py."""

import copy
from pathlib import Path

import pytest
import torch

from freehold.checkpoint import dcp
from freehold.core.errors import ConfigError
from freehold.model.config import ModelConfig
from freehold.parallel.config import ParallelConfig
from freehold.run import verify
from freehold.run.recipe import resolve

MODEL = ModelConfig.model_validate({"preset": "laptop"})
FACTS = {"step": 4, "tokens": 64, "phase": "stable", "skipped_steps": [], "data_sum": "0123456789abcdef"}
STATE = {
    "model": {"w": torch.arange(12.0), "gain": torch.ones(3)},
    "optimizer": {"w.momentum": torch.tensor([0.0, float("nan")])},
    "rng": {"torch": torch.get_rng_state()},
}


@pytest.fixture
def against(tmp_path):
    """Return a function that compares STATE with a changed copy."""

    def compare(change=lambda state: None, **facts):
        state = copy.deepcopy(STATE)
        change(state)
        for name, held, facts_of in (("one", STATE, FACTS), ("other", state, FACTS | facts)):
            dcp.save(dcp.step_folder(tmp_path / name / "checkpoints", 4), held, MODEL, facts_of)
        return verify.compare(tmp_path / "one", tmp_path / "other", 4)

    return compare


def test_equal_states_with_nan_are_equal(against):
    found = against()
    assert found["facts"] == {}
    assert not any(part["differing"] for part in found["parts"].values())
    assert verify._equal_enough(found["parts"], True, 0.0)


def test_one_bit_in_any_part_is_found(against):
    def flip(state):
        state["optimizer"]["w.momentum"][0] = -0.0

    found = against(flip)
    assert found["parts"]["optimizer"]["differing"] == ["w.momentum"]
    assert not verify._equal_enough(found["parts"], True, 0.0)
    assert verify._equal_enough(found["parts"], False, 0.02)


def test_a_difference_is_measured_by_the_tensors_norm(against):
    found = against(lambda state: state["model"]["gain"].mul_(1.1))
    assert found["parts"]["model"]["largest"] == pytest.approx(0.1, rel=1e-3)
    assert not verify._equal_enough(found["parts"], False, 0.02)
    assert verify._equal_enough(found["parts"], False, 0.2)


def test_missing_tensor_and_other_rng_are_not_tolerated(against):
    missing = against(lambda state: state["model"].pop("gain"))
    assert missing["parts"]["model"]["missing"] == ["gain"]
    assert not verify._equal_enough(missing["parts"], False, 1.0)
    other = against(lambda state: state["rng"].update(torch=state["rng"]["torch"] + 1))
    assert not verify._equal_enough(other["parts"], False, 1.0)


def test_other_rows_are_found(against):
    assert against(data_sum="f" * 16)["facts"] == {"data_sum": ["0123456789abcdef", "f" * 16]}


def test_phases_are_shortened_in_proportion_and_none_vanishes():
    recipe = resolve(Path("recipes/tiny.yaml"))
    assert recipe.stages["pretrain"].config.phases["stable"].steps == 24
    settings = verify._shortened(recipe, 6, 6)
    assert {"pretrain.phases.stable.steps=8", "pretrain.phases.anneal.steps=4"} <= set(settings)
    short = resolve(Path("recipes/tiny.yaml"), verify._shortened(recipe, 1, 1)).stages["pretrain"].config.phases
    assert [phase.steps for phase in short.values()] == [1, 1]


def test_the_recipes_degrees_are_kept_where_they_fit():
    own = ParallelConfig(shard=2, expert=2, context=2, nproc=4)

    def degrees(processes):
        return {o.split(".")[-1].partition("=")[0]: int(o.split("=")[1]) for o in verify._degrees(own, processes)}

    assert degrees(4) == {}
    assert degrees(8) == {"pipeline": 1, "context": 2, "replicate": 1, "shard": 4, "expert": 2, "nproc": 8}
    assert degrees(3) == {"pipeline": 1, "context": 1, "replicate": 1, "shard": 3, "expert": 1, "nproc": 3}
    assert degrees(1) == {"pipeline": 1, "context": 1, "replicate": 1, "shard": 1, "expert": 1, "nproc": 0}


def test_rows_that_cannot_be_divided_are_refused_first(tmp_path):
    with pytest.raises(ConfigError, match="rows of a step"):
        verify.verify_resume(
            Path("recipes/tiny.yaml"), [f"runs_dir={tmp_path}"], first=2, more=2, worlds=[3], tolerance=0.1, keep=False
        )
    assert not list(tmp_path.iterdir())


def test_a_world_of_no_processes_is_refused():
    with pytest.raises(ConfigError, match=r"(?s)--world.*found: +0"):
        verify.verify_resume(Path("recipes/tiny.yaml"), [], first=2, more=2, worlds=[2, 0], tolerance=0.1, keep=False)
