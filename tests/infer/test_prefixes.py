"""Kept prefixes: a hit has the bits of a cold answer, and nothing is shared that should not be."""

from __future__ import annotations

import pytest
import tiny
import torch

from freehold.infer.engine import Engine
from freehold.infer.sampler import Sampling
from freehold.kernels.packed import PAGE_TOKENS
from freehold.model.afmoe import Afmoe

TURN = 5
"""The token that ends a turn."""


@pytest.fixture(scope="module")
def model() -> Afmoe:
    shape = tiny.config(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_attention_heads=2, head_dim=32, sliding_window=70,
        max_position_embeddings=1024,
    )  # fmt: skip
    return tiny.disturb(Afmoe(shape)).eval()


def ids(length: int, seed: int = 0) -> list[int]:
    return torch.randint(6, 96, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def ask(engine: Engine, prompt: list[int], key=None, **changes):
    """Return the tokens with their log-probabilities, and how many of the prompt's were cached."""
    request = engine.submit(prompt, Sampling(**{"seed": 1, "max_tokens": 4, "stop_ids": (TURN,)} | changes), key)
    while not request.finished:
        engine.step()
    return [(t.id, t.logprob) for t in request.tokens], request.tokens[0].cached_tokens


@pytest.mark.parametrize("length", [64, 65, 70, 129, 200, 300])
def test_cache_hit_has_the_bits_of_a_cold_answer(model, length):
    prompt, engine = ids(length), Engine(model, prefix_cache=True)
    cold = ask(Engine(model), prompt)
    assert cold[1] == 0
    assert ask(engine, prompt) == cold
    hit = ask(engine, prompt)
    assert hit[0] == cold[0]
    assert hit[1] == (length - 1) // PAGE_TOKENS * PAGE_TOKENS
    assert (
        ask(engine, prompt[: length // 2] + ids(40, seed=9))[0]
        == ask(Engine(model), prompt[: length // 2] + ids(40, 9))[0]
    )


def test_conversation_past_its_window_resumes_from_its_answer(model):
    engine, cold, talk = Engine(model, prefix_cache=True), Engine(model), [*ids(100), TURN]
    for turn in range(4):
        talk += [*ids(30, seed=turn), TURN, *ids(3)]
        found, cached = ask(engine, talk, max_tokens=90, temperature=0.0)
        assert found == ask(cold, talk, max_tokens=90, temperature=0.0)[0]
        # At most the page that was not full, and what the user wrote, is read again.
        assert cached >= (len(talk) - 34 - PAGE_TOKENS - 1 if turn else 0)
        talk += [token for token, _ in found]
    other = talk[:101] + ids(50, seed=77)
    assert ask(engine, other) == (ask(cold, other)[0], 64)  # the end of the system prompt


def test_long_prompt_can_be_resumed_every_2048_tokens(model, monkeypatch):
    monkeypatch.setattr("freehold.infer.requests.EVERY_BLOCKS", 2)
    engine, prompt = Engine(model, prefix_cache=True), ids(400)
    ask(engine, prompt)
    other = prompt[:300] + ids(30, seed=3)
    assert ask(engine, other) == (ask(Engine(model), other)[0], 256)


def test_collision_and_other_keys_find_nothing(model):
    engine = Engine(model, prefix_cache=True)
    engine.prefixes.digest = lambda tokens: 7  # every block collides with every other
    first, second = ids(150), ids(150, seed=1)
    ask(engine, first, "a")
    assert ask(engine, second, "a") == (ask(Engine(model), second)[0], 0)
    assert ask(engine, first, "a")[1] == 128
    assert ask(engine, first, "b")[1] == 0
    assert ask(engine, first)[1] == 0


def test_weight_update_empties_the_cache(model):
    changed = Afmoe(model.config)
    changed.load_state_dict(model.state_dict())
    engine, prompt = Engine(changed.eval(), prefix_cache=True), ids(150)
    ask(engine, prompt)
    with torch.no_grad():
        changed.lm_head.weight.mul_(0.5)
    assert ask(engine, prompt) == ask(Engine(changed), prompt)
    assert ask(engine, prompt)[1] == 128


def test_kept_pages_give_way_and_all_come_back(model):
    # Room for about two requests: earlier prefixes must go, the least recently used first.
    page = Engine(model, max_batch=1, limit_tokens=64).pool
    engine = Engine(model, cache_bytes=30 * page.bytes // page.pages, limit_tokens=400, prefix_cache=True)
    prompts, cold = [ids(250, seed=i) for i in range(4)], Engine(model)
    cached = []
    for prompt in [*prompts, prompts[-1], prompts[0]]:
        found = ask(engine, prompt)
        assert found[0] == ask(cold, prompt)[0]
        cached.append(found[1])
    assert cached == [0, 0, 0, 0, 192, 0]
    assert engine.prefixes.evicted > 0
    assert engine.score([prompts[0]]) == Engine(model).score([prompts[0]])
    assert engine.prefixes.found_tokens >= 192
    engine.prefixes.clear()
    assert engine.pool.free == engine.pool.pages
    assert engine.prefixes.blocks == 0
    assert not engine.prefixes._roots


def test_requests_that_share_pages_may_leave_in_any_order(model):
    engine, prompt = Engine(model, prefix_cache=True), ids(200)
    ask(engine, prompt)
    both = [engine.submit(prompt + ids(20, seed=i), Sampling(seed=i, max_tokens=30)) for i in range(3)]
    for _ in range(10):
        engine.step()
    engine.cancel(both[0])
    engine.queue.preempt(both[1])
    while engine.step():
        pass
    for i in (1, 2):
        alone = Engine(model).generate([prompt + ids(20, seed=i)], Sampling(seed=i, max_tokens=30))[0]
        assert [t.id for t in both[i].tokens] == alone.ids
        assert both[i].tokens[0].cached_tokens == 192
    engine.prefixes.clear()
    assert engine.pool.free == engine.pool.pages


def test_model_without_windows_resumes_anywhere():
    shape = tiny.config(vocab_size=96, layer_types=("full_attention",) * 4, max_position_embeddings=1024)
    model = tiny.disturb(Afmoe(shape)).eval()
    engine, prompt = Engine(model, prefix_cache=True), ids(300)
    ask(engine, prompt)
    other = prompt[:200] + ids(20, seed=1)
    found, cached = ask(engine, other)
    assert cached == 192
    assert [t for t, _ in found] == [t for t, _ in ask(Engine(model), other)[0]]
    assert engine.prefixes.blocks == 4
