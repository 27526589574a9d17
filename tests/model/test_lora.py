"""Factors on every matrix: no change at zero, exact gradients, frozen weights in blocks, refusals."""

import pytest
import tiny
import torch

from freehold.core.errors import ConfigError
from freehold.kernels import grouped
from freehold.kernels.grouped import Weights
from freehold.model import adapted, lora
from freehold.model.afmoe import Afmoe
from freehold.model.groups import ADAPTABLE, group_of, select

IDS = torch.randint(32, 96, (1, 12), generator=torch.Generator().manual_seed(0))


def with_factors(dtype: torch.dtype = torch.float32, rank: int = 4) -> tuple[Afmoe, torch.Tensor]:
    """Return a model with factors of zeros on every group, and what the base answers."""
    model = tiny.disturb(Afmoe(tiny.hard("sliding full", moe_intermediate_size=32))).to_compute(dtype)
    base = model(IDS).detach()
    adapted.attach(model, dict.fromkeys(ADAPTABLE, rank), 32, torch.Generator().manual_seed(0))
    return model.to_compute(dtype), base


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zero_factors_change_no_bit(dtype):
    model, base = with_factors(dtype)
    assert torch.equal(model(IDS), base)
    with torch.no_grad():
        assert torch.equal(model(IDS), base)
        assert torch.equal(model.pack()(IDS), base)


def test_disabled_factors_are_the_base():
    model, base = with_factors()
    for factors in adapted.attached(model).values():
        torch.nn.init.normal_(factors.b, std=0.1)
    assert not torch.allclose(model(IDS), base, atol=1e-3)
    with adapted.disabled(model):
        assert torch.equal(model(IDS), base)


def test_only_the_planted_group_changes_the_answer():
    model, base = with_factors()
    factors = adapted.attached(model)
    assert {group_of(name) for name in factors} == set(ADAPTABLE)
    for group in ADAPTABLE:
        planted = [each for name, each in factors.items() if group_of(name) == group]
        for each in planted:
            torch.nn.init.ones_(each.b)
        assert (model(IDS) - base).abs().max() > 1e-3, group
        for each in planted:
            torch.nn.init.zeros_(each.b)
    assert torch.equal(model(IDS), base)


@pytest.mark.parametrize("native", ["1", "0"], ids=["kernels", "pytorch"])
@pytest.mark.parametrize("kind", [None, "Q4_0", "Q8_0", "NF4"])
def test_gradients_are_those_of_autograd_in_float64(kind, native, monkeypatch):
    if native == "0":
        monkeypatch.setattr(grouped.cpu, "available", lambda *_: False)
    experts, ins, outs, rank = 5, 64, 96, 3  # the rank is no multiple of 16
    g = torch.Generator().manual_seed(1)
    weight = torch.randn(experts, outs, ins, generator=g)
    weights = Weights.of(weight) if kind is None else grouped.pack(kind, weight)
    exact = (weight if kind is None else grouped.unpack(weights, torch.float32)).double()
    counts = torch.tensor([3, 0, 1, 20, 9])  # one is idle, one has a single row
    owner = torch.arange(experts).repeat_interleave(counts)
    factors = lora.Factors(experts, outs, ins, rank, 32)
    torch.nn.init.normal_(factors.a, generator=g)
    torch.nn.init.normal_(factors.b, generator=g)
    x = torch.randn(len(owner), ins, generator=g, requires_grad=True)
    dy = torch.randn(len(owner), outs, generator=g)
    y = factors.apply_to(x, counts, weights)
    y.backward(dy)
    x64, a64, b64 = (t.detach().double().requires_grad_() for t in (x, factors.a, factors.b))
    low = torch.einsum("rn,rkn->rk", x64, a64[owner])
    y64 = torch.einsum("rn,rmn->rm", x64, exact[owner]) + 32 / rank * torch.einsum("rk,rmk->rm", low, b64[owner])
    y64.backward(dy.double())
    for found, true in ((y, y64), (x.grad, x64.grad), (factors.a.grad, a64.grad), (factors.b.grad, b64.grad)):
        assert (found.double() - true).norm() <= 1e-6 * true.norm()
    assert not factors.b.grad[1].any(), "an idle expert has no gradient"


@pytest.mark.parametrize(("kind", "most"), [("Q4_0", 0.09), ("Q4_K", 0.08), ("Q8_0", 0.006), ("NF4", 0.095)])
def test_blocks_unpack_the_same_with_and_without_kernels(kind, most):
    weight = torch.randn(2, 48, 256, generator=torch.Generator().manual_seed(0))
    blocks = grouped.pack(kind, weight)
    numbers = grouped.unpack(blocks, torch.float32)
    assert torch.equal(numbers, grouped._unpack_plain(kind, blocks.data).view_as(numbers))
    assert (numbers - weight).norm() <= most * weight.norm()


def test_quantized_experts_train_without_their_numbers():
    model = tiny.disturb(Afmoe(tiny.hard("sliding full", moe_intermediate_size=32)))
    numbers = {n: layer.experts.gate_up_proj.detach().clone() for n, layer in model.moe_layers().items()}
    adapted.quantize_experts(model, "Q4_0")
    assert not any("experts.gate_up_proj" in name for name, _ in model.named_parameters())
    base = model(IDS).detach()
    adapted.attach(model, {"experts.gate_up": 2, "experts.down": 2}, 32, torch.Generator().manual_seed(0))
    answer = model(IDS)
    assert torch.equal(answer, base)
    answer.square().sum().backward()
    assert all(f.b.grad.abs().sum() > 0 for f in adapted.attached(model).values())
    layer, blocks = next((n, layer.experts.gate_up_blocks) for n, layer in model.moe_layers().items())
    assert (grouped.unpack(blocks, torch.float32) - numbers[layer]).norm() < 0.1 * numbers[layer].norm()


def test_group_that_matches_nothing_is_refused():
    with pytest.raises(ConfigError, match="matches no matrix") as error:
        select(["atention"], "adapt.groups")
    assert "attention" in str(error.value)
    with pytest.raises(ConfigError, match="low rank cannot hold"):
        select(["embedding"], "adapt.groups")
    assert select(["experts", "attention.q"], "adapt.groups") == ("attention.q", "experts.gate_up", "experts.down")


def test_rank_larger_than_the_matrix_is_refused():
    model = Afmoe(tiny.config())
    with pytest.raises(ConfigError, match="rank is larger"):
        adapted.attach(model, {"attention.k": 9}, 32, torch.Generator())


def test_group_that_the_model_lacks_is_refused():
    model = Afmoe(tiny.config(num_dense_layers=0))
    with pytest.raises(ConfigError, match="no matrix of this group"):
        adapted.attach(model, {"dense.up": 2}, 32, torch.Generator())
