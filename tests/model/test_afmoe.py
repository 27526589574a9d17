"""Building, initialising, casting; the seams for distribution."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from freehold.model.afmoe import Afmoe
from freehold.model.attention import attend
from freehold.model.config import PRESETS, ModelConfig
from freehold.model.masks import Mask


def test_the_largest_shape_builds_on_meta() -> None:
    with torch.device("meta"):
        model = Afmoe(PRESETS["trillion"])
    assert sum(p.numel() for p in model.parameters()) > 10**12


def test_model_built_on_meta_equals_one_built_here(hard: ModelConfig) -> None:
    with torch.device("meta"):
        model = Afmoe(hard)
    model.to_empty(device="cpu")
    model.init_weights(torch.Generator().manual_seed(7))
    other = Afmoe(hard)
    other.init_weights(torch.Generator().manual_seed(7))
    for (name, ours), theirs in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name
    assert torch.equal(model(torch.arange(20)[None]), other(torch.arange(20)[None]))


def test_initial_values(hard: ModelConfig) -> None:
    model = Afmoe(hard)
    model.init_weights(torch.Generator().manual_seed(0))
    sigma = 0.5 / 32**0.5
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            assert parameter.abs().max() <= 3 * sigma * 1.0001, name
            assert parameter.std().item() == pytest.approx(0.9866 * sigma, rel=0.1), name
        else:
            post = "post_" in name
            assert torch.equal(parameter, torch.full_like(parameter, 5**-0.5 if post else 1.0)), name
    assert all((moe.expert_bias == 0).all() for moe in model.moe_layers().values())


def test_initial_values_do_not_depend_on_the_dtype(hard: ModelConfig) -> None:
    exact, coarse = Afmoe(hard), Afmoe(hard).to_compute(torch.bfloat16)
    for model in (exact, coarse):
        model.init_weights(torch.Generator().manual_seed(0))
    for (name, a), b in zip(exact.named_parameters(), coarse.parameters(), strict=True):
        assert torch.equal(a.to(b.dtype), b), name


@pytest.mark.parametrize("cast", ["to_compute", "to", "bfloat16"])
def test_bf16_runs_forward_and_backward_with_exact_biases(model: Afmoe, cast: str) -> None:
    ids = torch.arange(13, 53).view(2, 20)
    expected = model(ids)
    biases = [moe.expert_bias.clone() for moe in model.moe_layers().values()]
    coarse = getattr(model, cast)(*([] if cast == "bfloat16" else [torch.bfloat16]))
    for moe, bias in zip(coarse.moe_layers().values(), biases, strict=True):
        assert moe.expert_bias.dtype == torch.float32
        assert torch.equal(moe.expert_bias, bias)
    logits = coarse(ids, document_ids=torch.zeros_like(ids))
    assert logits.dtype == torch.bfloat16
    F.cross_entropy(logits.float().flatten(0, 1), ids.flatten()).backward()
    for name, parameter in coarse.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.dtype == (torch.float32 if cast == "to_compute" and parameter.ndim == 1 else torch.bfloat16)
    # Rounding may send a token to another expert, so the bulk is compared, not the worst.
    error = (logits.float() - expected).norm() / expected.norm()
    assert error < 0.15


def test_hidden_is_what_the_head_is_applied_to(model: Afmoe) -> None:
    ids = torch.arange(13, 33)[None]
    assert torch.equal(model.lm_head(model.hidden(ids)), model(ids))


def test_two_runs_give_the_same_bits(model: Afmoe) -> None:
    ids = torch.arange(13, 53).view(2, 20)
    gradients = []
    for _ in range(2):
        model.zero_grad()
        F.cross_entropy(model(ids).flatten(0, 1), ids.flatten()).backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


class Reversing:
    """A dispatcher that moves the rows somewhere else and back, as one between devices would."""

    def dispatch(self, x: Tensor, counts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return x.flip(0), counts.flip(0), counts

    def combine(self, y: Tensor, context: Tensor) -> Tensor:
        return y.flip(0)


def test_the_seams_for_distribution_carry_the_computation(model: Afmoe, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = torch.arange(13, 33)[None]
    expected, calls = model(ids), []

    def core(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
        calls.append(mask.window)
        return attend(q, k, v, mask)

    for block in model.model.layers.values():
        block.self_attn.core = core
    for moe in model.moe_layers().values():
        moe.dispatcher = Reversing()
        flipped = [weight.flip(0) for weight in moe.experts.local_weights()]
        monkeypatch.setattr(moe.experts, "local_weights", lambda flipped=flipped: flipped)
    torch.testing.assert_close(model(ids), expected, rtol=1e-4, atol=1e-5)
    assert calls == [5, None, 5, 5, None]
