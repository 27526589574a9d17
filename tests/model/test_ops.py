"""Every fast form against its plain reference: values and gradients, in fp64 and fp32, ragged and empty."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from freehold.model import blockwise, ops, reference
from freehold.model.rows import route

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=["fp64", "fp32"])


def compare(fast: Callable[..., Tensor], plain: Callable[..., Tensor], inputs: list[Tensor], tolerance: float) -> None:
    """Check the value and the gradient of every input, under an uneven incoming gradient."""
    results = []
    for form in (fast, plain):
        leaves = [x.detach().clone().requires_grad_() for x in inputs]
        y = form(*leaves)
        weights = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view_as(y)
        results.append([y.detach(), *torch.autograd.grad((y * weights).sum(), leaves)])
    for ours, theirs in zip(*results, strict=True):
        assert ours.dtype == theirs.dtype
        scale = theirs.abs().amax().item() if theirs.numel() else 0.0
        torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance * scale)


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


@DTYPES
@pytest.mark.parametrize("counts", [[3, 0, 7, 1], [0, 0, 11, 0], [1, 1, 1, 1], [0, 0, 0, 0]], ids=str)
def test_grouped_swiglu(dtype: torch.dtype, counts: list[int]) -> None:
    numbers = torch.tensor(counts)
    x = random(sum(counts), 8, dtype=dtype, seed=1)
    weights = [random(4, 2 * 6, 8, dtype=dtype, seed=2), random(4, 8, 6, dtype=dtype, seed=3)]

    def fast(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        return ops.grouped_swiglu(x, numbers, gate_up, down)

    def plain(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        return reference.grouped_swiglu(x, numbers, gate_up, down)

    compare(fast, plain, [x, *weights], TOLERANCE[dtype])


def test_idle_experts_get_a_gradient_of_zero_not_none() -> None:
    gate_up, down = random(3, 12, 8).requires_grad_(), random(3, 8, 6).requires_grad_()
    ops.grouped_swiglu(random(5, 8), torch.tensor([5, 0, 0]), gate_up, down).sum().backward()
    for weight in (gate_up, down):
        assert weight.grad is not None
        assert weight.grad[0].abs().max() > 0
        assert (weight.grad[1:] == 0).all()


def test_frozen_experts_pass_the_gradient_through() -> None:
    x = random(5, 8).requires_grad_()
    gate_up, down = random(2, 12, 8), random(2, 8, 6)
    ops.grouped_swiglu(x, torch.tensor([2, 3]), gate_up, down).sum().backward()
    (expected,) = torch.autograd.grad(reference.grouped_swiglu(x, torch.tensor([2, 3]), gate_up, down).sum(), x)
    assert x.grad is not None
    torch.testing.assert_close(x.grad, expected)


def test_the_grouped_gemm_form_that_cuda_uses() -> None:
    numbers = torch.tensor([3, 0, 7, 1])
    inputs = [random(11, 8, seed=1), random(4, 2 * 8, 8, seed=2), random(4, 8, 8, seed=3)]
    compare(
        lambda x, gate_up, down: ops.grouped_swiglu_gemm(x, numbers, gate_up, down),
        lambda x, gate_up, down: reference.grouped_swiglu(x, numbers, gate_up, down),
        inputs,
        1e-5,
    )


@DTYPES
def test_rows_go_to_their_experts_and_back(dtype: torch.dtype) -> None:
    chosen = torch.tensor([[2, 0], [0, 3], [2, 3], [3, 0], [0, 2]])
    path = route(chosen)
    assert torch.equal(chosen.flatten()[path.order], torch.tensor([0, 0, 0, 0, 2, 2, 2, 3, 3, 3]))
    assert path.token.tolist() == [0, 1, 3, 4, 0, 2, 4, 1, 2, 3]
    assert torch.equal(path.order[path.inverse], torch.arange(10))
    x = random(5, 8, dtype=dtype)
    compare(lambda x: ops.gather(x, path), lambda x: reference.gather(x, path), [x], TOLERANCE[dtype])
    inputs = [random(10, 8, dtype=dtype), random(5, 2, dtype=dtype, seed=1), random(5, 8, dtype=dtype, seed=2)]
    compare(
        lambda y, weights, base: ops.combine(y, path, weights, base),
        lambda y, weights, base: reference.combine(y, path, weights, base),
        inputs,
        TOLERANCE[dtype],
    )


def test_results_of_experts_are_added_in_more_than_bf16() -> None:
    # 256 + 1 + 1 + 1 + 1: bf16 has no 257, so adding there would stay at 256.
    path = route(torch.tensor([[0, 1, 2, 3]]))
    y = torch.ones(4, 1, dtype=torch.bfloat16)
    assert ops.combine(y, path, torch.ones(1, 4), torch.full((1, 1), 256.0).bfloat16()).item() == 260
    incoming = torch.tensor([[256.0], [1], [1], [1]]).bfloat16()
    x = torch.zeros(1, 1, dtype=torch.bfloat16, requires_grad=True)
    (gradient,) = torch.autograd.grad(ops.gather(x, route(torch.tensor([[0, 1, 2, 3]]))), x, incoming)
    assert gradient.item() == pytest.approx(259, abs=1)
    assert gradient.item() != 256


@DTYPES
def test_rms_norm(dtype: torch.dtype) -> None:
    compare(
        lambda x, gain: ops.rms_norm(x, gain, 1e-5),
        lambda x, gain: reference.rms_norm(x, gain, 1e-5),
        [random(3, 5, 16, dtype=dtype), random(16, dtype=dtype, seed=1)],
        TOLERANCE[dtype],
    )


def test_rms_norm_in_bf16_rounds_once() -> None:
    x, gain = random(64, 32).bfloat16(), random(32, seed=1)
    exact = reference.rms_norm(x.double(), gain.double(), 1e-5)
    assert torch.equal(ops.rms_norm(x, gain, 1e-5), exact.float().bfloat16())


@DTYPES
@pytest.mark.parametrize("rows", [1, 2])
def test_rotate(dtype: torch.dtype, rows: int) -> None:
    angles = random(rows, 1, 7, 4, dtype=dtype)
    cos, sin = angles.cos(), angles.sin()
    x = random(2, 7, 3, 8, dtype=dtype).transpose(1, 2)
    compare(lambda x: ops.rotate(x, cos, sin), lambda x: reference.rotate(x, cos, sin), [x], TOLERANCE[dtype])
    pairs = torch.view_as_complex(torch.stack(x.chunk(2, -1), -1).contiguous()) * torch.polar(
        torch.ones_like(angles), angles
    )
    torch.testing.assert_close(ops.rotate(x, cos, sin), torch.cat([pairs.real, pairs.imag], -1))


@DTYPES
@pytest.mark.parametrize("case", ["causal", "window", "documents", "padding", "any"])
def test_blockwise_attention(dtype: torch.dtype, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blockwise, "BLOCK_TOKENS", 8)
    tokens = 37
    order = torch.arange(tokens)
    allowed = (order[:, None] >= order[None, :])[None, None]
    if case == "window":
        allowed = allowed & (order[:, None] - order[None, :] < 5)
    elif case == "documents":
        ids = torch.stack([torch.arange(tokens) // 11, torch.arange(tokens) // 20])
        allowed = allowed & (ids[:, None, :, None] == ids[:, None, None, :])
    elif case == "padding":
        ids = torch.stack([order < 30, order >= 9])
        allowed = allowed & (ids[:, None, :, None] == ids[:, None, None, :])
    elif case == "any":
        allowed = (random(2, 1, tokens, tokens) > 0.8) | torch.eye(tokens, dtype=torch.bool)
    blocks = blockwise.attention_blocks(allowed)
    pairs = sum(block.bias.numel() for block in blocks) * (2 // allowed.shape[0])
    assert case == "any" or pairs < 2 * tokens * tokens * (0.45 if case == "window" else 0.75)

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, enable_gqa=True)

    q = random(2, tokens, 6, 16, dtype=dtype).transpose(1, 2)
    k, v = (random(2, 3, tokens, 16, dtype=dtype, seed=seed) for seed in (1, 2))
    compare(lambda q, k, v: blockwise.blockwise_attention(q, k, v, blocks), plain, [q, k, v], TOLERANCE[dtype])


def test_bf16_attention_is_as_exact_as_pytorchs_own() -> None:
    order = torch.arange(200)
    allowed = (order[:, None] >= order[None, :])[None, None]
    q, k, v = (random(1, heads, 200, 32, seed=heads) for heads in (4, 2, 1))
    v = v.expand(1, 2, 200, 32).contiguous()
    exact = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, enable_gqa=True)
    coarse = [x.bfloat16() for x in (q, k, v)]
    ours = blockwise.blockwise_attention(*coarse, blockwise.attention_blocks(allowed))  # type: ignore[arg-type]
    theirs = F.scaled_dot_product_attention(*coarse, attn_mask=allowed, enable_gqa=True)  # type: ignore[misc]
    assert (ours - exact).norm() < 1.3 * (theirs - exact).norm()
