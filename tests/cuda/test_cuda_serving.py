"""The engine and the server on the device give the CPU's answers."""

from __future__ import annotations

import pytest
import torch

from freehold import api
from freehold.infer.sampler import Sampling

PROMPTS = [[5, 9, 77, 300], [20] * 17, [400, 3]]


def close(mine: list[float], theirs: list[float]) -> bool:
    return all(a == pytest.approx(b, abs=2e-3) for a, b in zip(mine, theirs, strict=True))


def test_engine_gives_the_tokens_of_the_cpu(device, tiny_checkpoint):
    here, there = api.load(tiny_checkpoint, device=device.type), api.load(tiny_checkpoint, device="cpu")
    sampling = Sampling(temperature=0.0, max_tokens=12)
    found, expected = (loaded.engine.generate(PROMPTS, sampling) for loaded in (here, there))
    assert [g.ids for g in found] == [g.ids for g in expected]
    for mine, theirs in zip(found, expected, strict=True):
        assert close(mine.logprobs, theirs.logprobs)
    for mine, theirs in zip(here.engine.score(PROMPTS), there.engine.score(PROMPTS), strict=True):
        assert close(mine, theirs)


def test_same_seed_samples_the_same_tokens(device, tiny_checkpoint):
    engine = api.load(tiny_checkpoint, device=device.type).engine
    sampling = Sampling(temperature=1.0, max_tokens=12, seed=3)
    assert [engine.generate(PROMPTS, sampling)[0].ids for _ in range(2)][0] == engine.generate(PROMPTS, sampling)[0].ids


def test_server_answers_from_the_device(device, tiny_checkpoint):
    testclient = pytest.importorskip("fastapi.testclient")
    from freehold.stages.serve.app import create_app
    from freehold.stages.serve.backends import open_model
    from freehold.stages.serve.config import ServeConfig

    config = ServeConfig(device=device.type, model_name="tiny")
    served = open_model(config, tiny_checkpoint)
    assert next(served.backend.model.parameters()).device.type == device.type
    with testclient.TestClient(create_app(served, config), base_url="http://127.0.0.1") as client:
        asked = {"model": "tiny", "prompt": PROMPTS[0], "max_tokens": 8, "temperature": 0}
        answer = client.post("/v1/completions", json=asked).json()
        assert "choices" in answer, answer
    sampling = Sampling(temperature=0.0, max_tokens=8)
    expected = api.load(tiny_checkpoint, device="cpu").engine.generate([PROMPTS[0]], sampling)[0]
    assert answer["choices"][0]["text"] == served.tokenizer.decode(expected.ids)


@pytest.mark.usefixtures("only_cuda")
def test_weights_are_on_the_device_alone(tiny_checkpoint):
    loaded = api.load(tiny_checkpoint, "bfloat16", device="cuda")
    assert {tensor.device.type for tensor in loaded.model.state_dict().values()} == {"cuda"}
    assert loaded.engine.generate([[1, 2, 3]], Sampling(max_tokens=2, temperature=0.0))[0].ids
    torch.cuda.synchronize()
