"""The ladder: answers have the bits of training, whatever the batch, the cuts, the threads. Compared exactly."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator

import pytest
import tiny
import torch
from torch import Tensor

from freehold.infer.cache import Step
from freehold.infer.engine import Engine
from freehold.infer.pages import PagePool, Pages
from freehold.infer.runner import not_exact
from freehold.infer.sampler import Sampling
from freehold.kernels import cpu, packed, routing
from freehold.losses.cross_entropy import cross_entropy_, head_logits
from freehold.model.afmoe import Afmoe
from freehold.model.masks import first_seen

# A window of more than a page and less than two; lengths on both sides of page and window ends.
WINDOW = 70
LENGTHS = (1, 2, 63, 64, 65, 69, 70, 71, 127, 128, 129, 134, 140, 200)
ROWS = (1, 7, 32, 64)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
THREADS = pytest.mark.parametrize("threads", [1, 2])


@pytest.fixture(autouse=True)
def _kernels(request: pytest.FixtureRequest):
    dtype = request.node.callspec.params.get("dtype", torch.float32)
    if not cpu.available(torch.empty(1, dtype=dtype)):
        pytest.skip(cpu.describe(dtype))
    before = torch.get_num_threads()
    torch.set_num_threads(request.node.callspec.params.get("threads", 1))
    yield
    torch.set_num_threads(before)


def build(dtype: torch.dtype) -> Afmoe:
    """Return a model with everything irregular that the kernels take, far from uniform attention and routing."""
    shape = tiny.hard(
        "sliding full sliding sliding full", hidden_size=64, intermediate_size=80, moe_intermediate_size=48,
        num_attention_heads=4, head_dim=32, vocab_size=160, sliding_window=WINDOW, max_position_embeddings=512,
    )  # fmt: skip
    model = tiny.disturb(Afmoe(shape)).to_compute(dtype)
    assert not_exact(model) is None
    return model


@pytest.fixture(scope="module")
def models() -> dict[torch.dtype, Afmoe]:
    return {dtype: build(dtype) for dtype in (torch.float32, torch.bfloat16)}


def ids(length: int, seed: int = 0) -> list[int]:
    return torch.randint(0, 160, (length,), generator=torch.Generator().manual_seed(seed + length)).tolist()


def numbers(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@DTYPES
@THREADS
@pytest.mark.parametrize(("ins", "outs"), [(32, 48), (96, 208), (256, 320)])
def test_a_product_row_does_not_depend_on_the_others(dtype, threads, ins, outs):
    weight, x = numbers(outs, ins, dtype=dtype), numbers(130, ins, dtype=dtype, seed=1)
    words, training = packed.Packed().words(weight), cpu.linear(x, weight)
    for rows, first in itertools.product((*ROWS, 130), (0, 5)):
        assert torch.equal(packed.linear(x[first : first + rows], words, outs), training[first : first + rows])
        assert torch.equal(cpu.linear(x[first : first + rows], weight), training[first : first + rows])


@DTYPES
@THREADS
def test_an_expert_row_does_not_depend_on_the_others(dtype, threads):
    gate_up, down = numbers(4, 160, 96, dtype=dtype) / 10, numbers(4, 96, 80, dtype=dtype, seed=1) / 9
    packs = packed.Packed().words(*gate_up.chunk(2, dim=1)), packed.Packed().words(down)
    x = numbers(200, 96, dtype=dtype, seed=2)
    for counts in ([3, 0, 7, 190], [50, 50, 50, 50], [0, 0, 200, 0]):
        expert = torch.arange(4).repeat_interleave(torch.tensor(counts))
        together = packed.experts(x, torch.tensor(counts), *packs, 80)
        assert torch.equal(together, cpu.experts(x, torch.tensor(counts), gate_up, down)[0])
        for row in (0, 2, 9, 60, 150, 199):
            alone = torch.zeros(4, dtype=torch.int64)
            alone[expert[row]] = 1
            assert torch.equal(packed.experts(x[row : row + 1], alone, *packs, 80), together[row : row + 1])


@DTYPES
@THREADS
@pytest.mark.parametrize("window", [None, 1, 64, WINDOW, 1000])
def test_a_decode_step_is_the_row_of_full_attention(dtype, threads, window):
    q, k, v = (numbers(1, 300, heads, 32, dtype=dtype, seed=heads) for heads in (4, 2, 2))
    full = cpu.attention(q, k, v, first_seen(300, window, None, 1))[0][0]
    for pieces in ([300], [1] * 300, [7, 64, 100, 1, 1, 127], [63, 1, 1, 235]):
        store = torch.full((6, packed.page_words(2, 32, dtype.itemsize)), -1, dtype=torch.int32)  # not-a-numbers
        table, at = torch.tensor([[3, 0, 5, 1, 2, 4]], dtype=torch.int32), 0
        for count in pieces:
            new, place = slice(at, at + count), torch.tensor([at])
            offsets = torch.tensor([0, count])
            found = packed.attention(q[0, new], k[0, new], v[0, new], offsets, place, table, store, window)
            assert torch.equal(found, full[new])
            at += count


@THREADS
def test_router_choice_and_weights_do_not_depend_on_the_others(threads, models):
    model = models[torch.float32]
    moe = model.moe_layers()["model.layers.1.mlp"]
    x = numbers(64, 64, dtype=torch.float32)
    logits, weights, chosen = moe.router(x, moe.expert_bias)
    for rows in ROWS:
        for found, whole in zip(moe.router(x[-rows:], moe.expert_bias), (logits, weights, chosen), strict=True):
            assert torch.equal(found, whole[-rows:])


@THREADS
def test_the_lower_expert_wins_a_tie(threads):
    logits = torch.tensor([[0.5, 2.0, 2.0, 2.0, -1.0], [1.0, 1.0, 1.0, 1.0, 1.0]])
    assert routing.choose(logits, torch.zeros(5), 3, 1.0)[1].tolist() == [[1, 2, 3], [0, 1, 2]]


@contextlib.contextmanager
def recorded(model: Afmoe) -> Iterator[list[list[Tensor]]]:
    """Record what leaves each layer in every pass: [layers][passes] of [T, d]."""
    found: list[list[Tensor]] = [[] for _ in model.model.layers]
    hooks = [
        block.register_forward_hook(lambda _, __, out, own=own: own.append(out[0][0].detach()))
        for block, own in zip(model.model.layers.values(), found, strict=True)
    ]
    yield found
    for hook in hooks:
        hook.remove()


def through_pages(model: Afmoe, sequence: list[int], pieces: list[int]) -> None:
    """Read a sequence piece by piece, from pages and with packed weights."""
    pages = Pages(PagePool(model.config, model.lm_head.weight.dtype, torch.device("cpu"), 40))
    for count in pieces:
        pages.extend(count)
        step = Step(pages.pool, [(pages, count)])
        part = torch.tensor([sequence[pages.length : pages.length + count]])
        with torch.inference_mode():
            model.hidden(part, positions=step.positions, cache=step)
        pages.advance(count)


@DTYPES
@THREADS
@pytest.mark.parametrize("pieces", [[150], [1] * 150, [64, 64, 22], [70, 1, 79], [7, 56, 1, 1, 85]], ids=len)
def test_hidden_states_of_every_layer_are_those_of_training(dtype, threads, models, pieces):
    model, sequence = models[dtype].pack().train(), ids(150)
    with recorded(model) as training:
        assert model.hidden(torch.tensor([sequence])).requires_grad  # weights are packed by the call
    with recorded(model) as answering:
        through_pages(model, sequence, pieces)
    for (whole,), parts in zip(training, answering, strict=True):
        assert len(parts) == len(pieces)
        assert torch.equal(torch.cat(parts), whole)


@DTYPES
@THREADS
def test_logprobs_of_training_scoring_and_answering_are_equal(dtype, threads, models):
    model = models[dtype]
    engine = Engine(model)
    sampling = Sampling(seed=3, max_tokens=20)
    prompts = [ids(length) for length in (1, 63, 64, 70, 129)]
    answers = engine.generate(prompts, sampling)
    sequences = [prompt + answer.ids for prompt, answer in zip(prompts, answers, strict=True)]
    for prompt, answer, sequence, scored in zip(prompts, answers, sequences, engine.score(sequences), strict=True):
        assert answer.logprobs == scored[len(prompt) :]
        model.train()
        hidden = model.hidden(torch.tensor([sequence[:-1]]))[0]
        logits = head_logits(hidden, model.lm_head.weight).detach()
        trained = cross_entropy_(logits, torch.tensor(sequence[1:]), 1.0, 0.0)[0]
        assert (-trained).tolist() == scored[1:]


@DTYPES
@THREADS
def test_one_call_for_all_layers_has_the_bits_of_each_module(dtype, threads, models):
    model, sampling = models[dtype], Sampling(seed=5, max_tokens=6)
    prompts = [ids(length) for length in (1, 64, 130)]
    together = Engine(model).generate(prompts, sampling)
    with recorded(model) as passes:  # modules that someone observes run one by one
        assert Engine(model).generate(prompts, sampling) == together
    assert all(passes)


PROMPTS = [ids(LENGTHS[i % len(LENGTHS)], seed=i) for i in range(64)]
SETTINGS = [Sampling(seed=i, max_tokens=3 + i % 5, temperature=0.0 if i % 3 == 0 else 1.0) for i in range(64)]


@pytest.fixture(scope="module")
def alone(models) -> dict[torch.dtype, list[list[tuple[int, float]]]]:
    """What each prompt gets alone, on one thread."""
    torch.set_num_threads(1)
    found = {}
    for dtype, model in models.items():
        engine = Engine(model, max_batch=1)
        pairs = zip(PROMPTS, SETTINGS, strict=True)
        found[dtype] = [[(t.id, t.logprob) for t in engine.stream(*each)] for each in pairs]
    return found


@DTYPES
@THREADS
@pytest.mark.parametrize("rows", [7, 32, pytest.param(64, marks=pytest.mark.slow)])
def test_generations_do_not_depend_on_who_joins_and_leaves(dtype, threads, models, alone, rows, monkeypatch):
    monkeypatch.setattr("freehold.infer.engine.STEP_TOKENS", 100)
    # Room for about six of the longer ones: some are pre-empted and read again.
    tight = {"cache_bytes": 80 * 4 * packed.page_words(2, 32, dtype.itemsize), "limit_tokens": 220}
    engine = Engine(models[dtype], rows, **(tight if rows == 64 else {}))
    requests = []
    for number in range(rows):
        requests.append(engine.submit(PROMPTS[number], SETTINGS[number]))
        if number % 5 == 4:
            engine.cancel(engine.submit(ids(90, seed=number), Sampling(seed=0)))  # one that leaves early
            engine.step()
    while engine.step():
        pass
    assert [[(t.id, t.logprob) for t in request.tokens] for request in requests] == alone[dtype][:rows]
    assert engine.pool.free == engine.pool.pages
    assert rows < 64 or any(request.preempted for request in requests)


@DTYPES
def test_no_key_survives_a_weight_update(dtype):
    model, prompt = build(dtype), ids(130)
    engine, sampling = Engine(model), Sampling(seed=1, max_tokens=30)
    request = engine.submit(prompt, sampling)
    for _ in range(10):
        engine.step()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.9)
    while engine.step():
        pass
    first, later = list(request.tokens)[:10], list(request.tokens)[10:]
    again = Engine(model).generate([prompt + [t.id for t in first]], Sampling(seed=1, max_tokens=20))[0]
    assert [(t.id, t.logprob) for t in later] == list(zip(again.ids, again.logprobs, strict=True))


@DTYPES
def test_optimizer_kernels_make_packed_weights_stale(dtype):
    weight, copy = numbers(32, 32, dtype=torch.float32), numbers(32, 32, dtype=dtype)
    pack, x = packed.Packed(), numbers(3, 32, dtype=dtype)
    moments = torch.zeros(32, 32), torch.zeros(32, 32)
    before = packed.linear(x, pack.words(copy), 32)
    cpu.adamw_(weight, numbers(32, 32, dtype=dtype, seed=2), *moments, copy, 1.0, 1, 0.1, 0.9, 0.99, 1e-8, 0.0)
    assert torch.equal(packed.linear(x, pack.words(copy), 32), cpu.linear(x, copy))
    update = numbers(32, 32, dtype=torch.bfloat16)
    moved = packed.linear(x, pack.words(copy), 32)
    cpu.muon_move_(weight, update, copy, 0.1, 1.0)
    found = packed.linear(x, pack.words(copy), 32)
    assert torch.equal(found, cpu.linear(x, copy))
    assert not torch.equal(found, moved)
    assert not torch.equal(moved, before)
