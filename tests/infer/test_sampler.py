"""The sampler: filters, penalties and seeds, checked against what the numbers say."""

from __future__ import annotations

import collections
import math

import pytest
import torch

from freehold.core.errors import RequestError
from freehold.infer import sampler as sampler_module
from freehold.infer.sampler import Draw, Sampling, check_ids, draw

CHANCES = [0.5, 0.25, 0.125, 0.0625, 0.0625]
LOGITS = torch.tensor([CHANCES]).log()


def draws(sampling: Sampling, count: int = 4000, logits: torch.Tensor = LOGITS) -> dict[int, float]:
    """Return how often each token was drawn, as a share."""
    one, found = Draw(sampling, logits.shape[1]), collections.Counter()
    for one.position in range(count):
        found[int(draw(logits, [one]))] += 1
    return {token: n / count for token, n in found.items()}


def test_draws_follow_the_probabilities():
    shares = draws(Sampling(seed=0))
    for token, chance in enumerate(CHANCES):
        assert shares[token] == pytest.approx(chance, abs=4 * math.sqrt(chance / 4000))


def test_temperature_sharpens_and_zero_is_greedy():
    assert draws(Sampling(temperature=0), 50) == {0: 1.0}
    assert draws(Sampling(temperature=1e-30, seed=0), 50) == {0: 1.0}
    # At temperature 0.5 chances are squared: 16/64 against 4/64 ...
    total = sum(c * c for c in CHANCES)
    assert draws(Sampling(temperature=0.5, seed=0))[0] == pytest.approx(0.25 / total, abs=0.03)


@pytest.mark.parametrize(
    ("sampling", "possible"),
    [
        (Sampling(top_k=1, seed=0), {0}),
        (Sampling(top_k=2, seed=0), {0, 1}),
        (Sampling(top_k=99, seed=0), {0, 1, 2, 3, 4}),
        (Sampling(top_p=0.01, seed=0), {0}),
        (Sampling(top_p=0.5, seed=0), {0}),
        (Sampling(top_p=0.51, seed=0), {0, 1}),
        (Sampling(top_p=0.9, seed=0), {0, 1, 2, 3}),
        (Sampling(min_p=0.3, seed=0), {0, 1}),
        (Sampling(min_p=1.0, seed=0), {0}),
        (Sampling(top_k=4, top_p=0.9, min_p=0.2, seed=0), {0, 1, 2}),
    ],
    ids=str,
)
def test_filters_leave_what_they_say(sampling, possible):
    assert set(draws(sampling, 600)) == possible


def test_of_equal_logits_exactly_k_stay():
    assert set(draws(Sampling(top_k=2, seed=0), 200, torch.zeros(1, 6))) == {0, 1}


def test_ranking_the_best_first_changes_nothing(monkeypatch):
    logits = torch.randn(6, 3000, generator=torch.Generator().manual_seed(0)) * 2
    settings = [
        Sampling(top_p=0.3),  # ends among the best
        Sampling(top_p=0.9999),  # reaches beyond them
        Sampling(top_k=40, top_p=0.8),
        Sampling(top_k=2000, top_p=0.99),
        Sampling(min_p=0.05),
        Sampling(min_p=1e-6, top_p=0.5),
    ]
    fast = sampler_module._filter(logits, settings)
    monkeypatch.setattr(sampler_module, "RANKED", 10**9)
    whole = sampler_module._filter(logits, settings)
    assert torch.equal(fast, whole)
    for row, s in enumerate(settings):
        assert torch.equal(whole[row : row + 1], sampler_module._filter(logits[row : row + 1], [s]))
    kept = (whole > -torch.inf).sum(dim=1).tolist()
    assert kept[0] < 1024 < kept[1]
    assert kept[2] < 40


def test_penalties_count_what_was_generated():
    one = Draw(Sampling(temperature=0, presence_penalty=1.0), 5)
    assert draw(LOGITS, [one]).tolist() == [0]
    one.took(0)
    assert draw(LOGITS, [one]).tolist() == [1]  # log 0.5 - 1 < log 0.25
    mild, found = Draw(Sampling(temperature=0, frequency_penalty=0.3), 5), []
    for _ in range(4):
        found += draw(LOGITS, [mild]).tolist()
        mild.took(found[-1])
    assert found == [0, 0, 0, 1]  # log 2 = 0.69 is used up by the third 0.3


def test_bias_moves_a_token_up_or_out():
    assert draws(Sampling(temperature=0, logit_bias={4: 100}), 3) == {4: 1.0}
    assert 0 not in draws(Sampling(logit_bias={0: -100}, seed=0), 300)


def test_a_row_draws_the_same_alone_and_in_company():
    logits = torch.randn(4, 300, generator=torch.Generator().manual_seed(0))
    settings = [
        Sampling(seed=5),
        Sampling(seed=6, top_p=0.7, temperature=0.8),
        Sampling(temperature=0),
        Sampling(seed=7, top_k=9, frequency_penalty=0.5),
    ]
    rows = [Draw(s, 300) for s in settings]
    for _ in range(50):
        found = draw(logits, rows).tolist()
        assert found == [int(draw(logits[row : row + 1], [one])) for row, one in enumerate(rows)]
        for one, token in zip(rows, found, strict=True):
            one.took(token)


def test_draw_depends_on_seed_and_position_only():
    logits = torch.zeros(1, 300)
    found = {}
    for seed in (1, 2):
        for position in (0, 5, 6):
            found[seed, position] = int(draw(logits, [Draw(Sampling(seed=seed), 300, position)]))
    late = Draw(Sampling(seed=2), 300, 5)
    assert int(draw(logits, [late])) == found[2, 5]
    late.took(0)
    assert int(draw(logits, [late])) == found[2, 6]
    assert len(set(found.values())) == 6


def test_seeds_repeat_and_none_does_not():
    logits = torch.zeros(1, 100000)
    once, twice = (int(draw(logits, [Draw(Sampling(seed=1), 10**5)])) for _ in range(2))
    assert once == twice
    assert len({int(draw(logits, [Draw(Sampling(), 10**5)])) for _ in range(5)}) > 1


def test_impossible_tokens_are_never_drawn():
    logits = torch.full((1, 50), -torch.inf)
    logits[0, [0, 7]] = 0.0
    assert set(draws(Sampling(seed=0), 300, logits)) == {0, 7}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1), ("temperature", 2.1), ("temperature", math.nan), ("top_p", 0.0), ("top_p", 1.1),
        ("top_k", -1), ("min_p", -0.1), ("min_p", 1.5), ("presence_penalty", 2.5), ("frequency_penalty", -3.0),
        ("logprobs", 21), ("max_tokens", -1), ("logit_bias", {3: 101.0}),
    ],
)  # fmt: skip
def test_a_value_out_of_range_is_refused_by_name(name, value):
    with pytest.raises(RequestError, match=name) as caught:
        Sampling(**{name: value})
    assert caught.value.where == name


def test_a_bias_for_no_token_is_refused():
    with pytest.raises(RequestError, match="0 to 4"):
        check_ids([Sampling(logit_bias={5: 1.0})], 5)
