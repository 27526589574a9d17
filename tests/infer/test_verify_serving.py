"""What `verify-serving` reports, where answers are exact and where they are not."""

from __future__ import annotations

import json

import pytest
import tiny
import torch

from freehold.checkpoint import hf
from freehold.cli.main import main
from freehold.infer.engine import Engine
from freehold.infer.verify import table, verify_serving
from freehold.kernels import cpu
from freehold.model.afmoe import Afmoe

SHAPE = {"hidden_size": 32, "head_dim": 32, "vocab_size": 512, "max_position_embeddings": 256, "sliding_window": 70}


@pytest.fixture
def model():
    if not cpu.available(torch.empty(0)):
        pytest.skip(cpu.describe(torch.float32))
    return tiny.disturb(Afmoe(tiny.config(**SHAPE)))


def test_every_check_holds_where_the_kernels_compute(model):
    engine = Engine(model)
    checks = verify_serving(engine)
    assert [check.difference for check in checks] == [None] * 6
    assert all(check.compared == 8 * 8 for check in checks)
    assert ", bit-invariant;" in table(engine, checks)
    assert engine.pool.free == engine.pool.pages


def test_first_difference_is_named(model):
    engine = Engine(model)
    # A stale pack: what answering reads is no longer what training reads.
    engine.score([[1, 2, 3]])
    model.lm_head.weight.data.mul_(1.01)
    found = {check.name: check.difference for check in verify_serving(engine)}
    assert found["batch: alone = together with others"] is None
    assert "prompt 0, token 0" in found["training = answering"]


def test_fallback_is_labelled(tiny_model):
    assert "not bit-invariant (row widths that are no multiples of 16)" in Engine(tiny_model).describe()


def test_command_answers_in_json(model, tiny_tokenizer, tmp_path, capsys):
    hf.save_hf(tmp_path, model.config, model.state_dict(), torch.float32)
    tiny_tokenizer.save(tmp_path)
    assert main(["verify-serving", str(tmp_path), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["passed"]
    assert len(answer["checks"]) == 6
