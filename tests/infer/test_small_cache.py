"""Keys and values of 8 bits: half of the memory, close to all bits, and exact among themselves."""

from __future__ import annotations

import pytest
import tiny
import torch

from freehold.core.errors import ConfigError
from freehold.infer.engine import Engine
from freehold.infer.pages import page_bytes
from freehold.infer.sampler import Sampling
from freehold.model.afmoe import Afmoe
from freehold.planner.memory import cache_bytes

LENGTHS = (1, 63, 64, 65, 130, 200)


def build(**changes) -> Afmoe:
    shape = tiny.hard(
        "sliding full sliding full", hidden_size=64, intermediate_size=80, moe_intermediate_size=48,
        num_attention_heads=4, head_dim=32, vocab_size=160, sliding_window=70, max_position_embeddings=512, **changes,
    )  # fmt: skip
    return tiny.disturb(Afmoe(shape))


def ids(length: int, seed: int = 0) -> list[int]:
    return torch.randint(0, 160, (length,), generator=torch.Generator().manual_seed(seed + length)).tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_answers_are_exact_among_themselves(dtype):
    model = build().to_compute(dtype)
    prompts = [ids(length) for length in LENGTHS]
    settings = [Sampling(seed=i, max_tokens=5, temperature=float(i % 2)) for i in range(len(prompts))]
    engine = Engine(model, cache_type="int8", prefix_cache=True)
    alone = [Engine(model, cache_type="int8").generate([p], s)[0] for p, s in zip(prompts, settings, strict=True)]
    for _ in range(2):  # the second time from kept pages
        requests = [engine.submit(p, s) for p, s in zip(prompts, settings, strict=True)]
        engine.queue.step_tokens = 37
        while engine.step():
            if len(requests[-1].tokens) == 2 and not requests[-1].preempted:
                engine.queue.preempt(requests[-1])
        found = [[(t.id, t.logprob) for t in r.tokens] for r in requests]
        assert found == [list(zip(a.ids, a.logprobs, strict=True)) for a in alone]
    assert requests[-1].tokens[0].cached_tokens == 192
    scored = engine.score([p + a.ids for p, a in zip(prompts, alone, strict=True)])
    assert [s[-5:] for s in scored] == [a.logprobs for a in alone]


@pytest.mark.parametrize("native", [True, False], ids=["kernels", "pytorch"])
def test_numbers_are_close_to_those_of_all_bits(native, monkeypatch):
    if not native:
        monkeypatch.setattr("freehold.infer.pages.cpu.available", lambda *_: False)
    model, sequence = build(), ids(400)
    small, full = (torch.tensor(Engine(model, cache_type=kind).score([sequence])[0]) for kind in ("int8", "auto"))
    assert 0 < (small - full).abs().mean() < 0.05
    if not native:
        monkeypatch.undo()
        kernels = torch.tensor(Engine(model, cache_type="int8").score([sequence])[0])
        assert (small - kernels).abs().mean() < 0.02


def test_memory_is_what_the_planner_says():
    config = build(num_key_value_heads=2).config
    # Half of bfloat16, and a bfloat16 scale for 32 values.
    assert page_bytes(config, torch.bfloat16, small=True) == 64 * 2 * 2 * (32 + 2)
    blocks = 512 // 64
    pages = sum(2 if kind == "sliding_attention" else blocks for kind in config.layer_types)
    planned = cache_bytes(config, 512, bytes_per_value=1)
    assert pages * page_bytes(config, torch.bfloat16, small=True) == pytest.approx(planned * 34 / 32, rel=0.2)
    with pytest.raises(ConfigError, match="multiple of 32"):
        Engine(tiny.disturb(Afmoe(tiny.config())), cache_type="int8")


@pytest.mark.slow
def test_128k_tokens_fit_the_memory_that_is_planned():
    shape = tiny.config(
        hidden_size=32, intermediate_size=32, moe_intermediate_size=16, num_attention_heads=2, num_key_value_heads=1,
        head_dim=32, vocab_size=64, sliding_window=128, max_position_embeddings=131_072,
    )  # fmt: skip
    model = tiny.disturb(Afmoe(shape)).to_compute(torch.bfloat16)
    budget = int(1.1 * cache_bytes(shape, 131_072, bytes_per_value=1) * 34 / 32) + 100 * page_bytes(
        shape, torch.bfloat16, small=True
    )
    engine = Engine(model, 1, 131_072, budget, cache_type="int8")
    assert engine.pool.bytes <= budget
    prompt = torch.randint(0, 64, (131_000,), generator=torch.Generator().manual_seed(0)).tolist()
    answer = engine.generate([prompt], Sampling(temperature=0, max_tokens=8))[0]
    assert len(answer.ids) == 8
