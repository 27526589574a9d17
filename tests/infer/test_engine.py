"""The engine against the plain model: greedy choices, log-probabilities, batches, limits."""

from __future__ import annotations

import pytest
import torch

from freehold.core.errors import RequestError
from freehold.infer import engine as engine_module
from freehold.infer import scoring
from freehold.infer.engine import Engine
from freehold.infer.limits import ContextOverflow
from freehold.infer.sampler import Sampling

PROMPTS = [[5, 9, 3], [40] * 17, [7], [11, 12, 13, 14, 15], [100, 3, 200, 77, 8, 9, 10, 11, 12, 13, 14]]


@pytest.fixture(scope="module")
def engine(tiny_model):
    return Engine(tiny_model)


def plain_greedy(model, prompt, count):
    """Generate without cache or batch."""
    ids = list(prompt)
    for _ in range(count):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt) :]


def test_greedy_equals_the_plain_model(engine, tiny_model):
    found = engine.generate(PROMPTS, Sampling(temperature=0, max_tokens=24))
    for prompt, generation in zip(PROMPTS, found, strict=True):
        assert generation.ids == plain_greedy(tiny_model, prompt, 24)
        assert generation.finish_reason == "length"
        assert generation.prompt_tokens == len(prompt)


def test_batches_and_chunked_prefill_change_nothing(engine, tiny_model, monkeypatch):
    sampling = [Sampling(seed=i, max_tokens=5 + 3 * i, temperature=0.9, top_p=0.9) for i in range(5)]
    expected = [engine.generate([p], s)[0].ids for p, s in zip(PROMPTS, sampling, strict=True)]
    assert [g.ids for g in engine.generate(PROMPTS, sampling)] == expected
    assert [g.ids for g in Engine(tiny_model, max_batch=2).generate(PROMPTS, sampling)] == expected
    monkeypatch.setattr(engine_module, "STEP_TOKENS", 8)
    engine = Engine(tiny_model)
    assert [g.ids for g in engine.generate(PROMPTS, sampling)] == expected
    assert [t.id for t in engine.stream(PROMPTS[4], sampling[4])] == expected[4]


def test_stop_ids_end_a_row_and_not_its_neighbours(engine):
    free = engine.generate(PROMPTS, Sampling(temperature=0, max_tokens=12))
    stop = free[0].ids[3]
    cut = free[0].ids[: free[0].ids.index(stop) + 1]
    settings = [Sampling(temperature=0, max_tokens=12, stop_ids=(stop,) if i == 0 else ()) for i in range(5)]
    found = engine.generate(PROMPTS, settings)
    assert found[0].ids == cut
    assert found[0].finish_reason == "stop"
    assert [g.ids for g in found[1:]] == [g.ids for g in free[1:]]


def test_stream_reports_its_end_once(engine):
    tokens = list(engine.stream(PROMPTS[0], Sampling(temperature=0, max_tokens=4)))
    assert [t.finish_reason for t in tokens] == [None, None, None, "length"]
    assert list(engine.stream(PROMPTS[0], Sampling(max_tokens=0))) == []
    assert engine.generate([PROMPTS[0]], Sampling(max_tokens=0))[0].ids == []


def test_generated_logprobs_are_the_models_own(engine, tiny_model):
    sampling = Sampling(seed=3, max_tokens=20, temperature=1.7, top_k=50, logprobs=4, logit_bias={9: 5.0})
    generation = engine.generate([PROMPTS[1]], sampling)[0]
    scored = engine.score([PROMPTS[1] + generation.ids])[0]
    assert generation.logprobs == pytest.approx(scored[len(PROMPTS[1]) :], abs=1e-4)
    for top in generation.top_logprobs:
        assert len(top) == 4
        assert sorted((p for _, p in top), reverse=True) == [p for _, p in top]


def test_score_equals_log_softmax(engine, tiny_model, monkeypatch):
    sequences = [PROMPTS[4] * 6, PROMPTS[0], [7], PROMPTS[1]]
    expected = []
    for ids in sequences:
        with torch.no_grad():
            logprobs = tiny_model(torch.tensor([ids])).log_softmax(-1)[0]
        expected.append([0.0] + [float(logprobs[t, ids[t + 1]]) for t in range(len(ids) - 1)])
    for prefill_tokens, head_bytes in ((2048, 64 << 20), (40, 4 * 512 * 7), (4, 1)):
        monkeypatch.setattr(engine_module, "PREFILL_TOKENS", prefill_tokens)
        monkeypatch.setattr(scoring, "HEAD_BYTES", head_bytes)
        for found, wanted in zip(engine.score(sequences), expected, strict=True):
            assert found == pytest.approx(wanted, abs=1e-4)


def test_score_names_the_best_tokens(engine):
    greedy = engine.generate([PROMPTS[0]], Sampling(temperature=0, max_tokens=6))[0].ids
    scored = engine.score_top([PROMPTS[0] + greedy], 3)[0]
    assert scored.top_logprobs[0] == []
    for token, logprob, top in zip(greedy, scored.logprobs[3:], scored.top_logprobs[3:], strict=True):
        assert top[0] == (token, logprob)  # exactly: who compares them must see that the token was the best


def test_weights_are_read_at_every_call(tiny_model):
    import copy

    model = copy.deepcopy(tiny_model).train()
    engine = Engine(model)
    before = engine.score([PROMPTS[1]])[0]
    assert not model.training
    with torch.no_grad():
        model.lm_head.weight.mul_(0.5)
    assert engine.score([PROMPTS[1]])[0] != before


def test_the_context_has_an_end(tiny_model):
    engine = Engine(tiny_model, limit_tokens=10)
    assert len(engine.generate([PROMPTS[0]], Sampling(temperature=0))[0].ids) == 7
    assert len(engine.generate([[1] * 8], Sampling(temperature=0, max_tokens=2))[0].ids) == 2
    with pytest.raises(ContextOverflow, match="at most 10"):
        engine.generate([PROMPTS[0]], Sampling(max_tokens=8))
    with pytest.raises(ContextOverflow, match="at most 10"):
        engine.generate([[1] * 10], Sampling())
    with pytest.raises(ContextOverflow, match="longer than the context"):
        engine.score([[1] * 11])


@pytest.mark.parametrize(("prompt", "said"), [([], "empty"), ([3, 512], "no token"), ([-1], "no token")])
def test_what_is_no_prompt_is_refused(engine, prompt, said):
    for call in (lambda: engine.generate([prompt], Sampling(max_tokens=1)), lambda: engine.score([prompt])):
        with pytest.raises(RequestError, match=said) as caught:
            call()
        assert caught.value.where == "prompt"
