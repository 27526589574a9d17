import pytest
import torch

from freehold.kernels import cpu
from freehold.optim import muon as module
from freehold.optim.build import Optimizers, decays, is_hidden_matrix
from freehold.optim.config import OptimConfig
from freehold.optim.muon import COEFFICIENTS, Muon, as_matrices, orthogonalize


def test_singular_values_are_drawn_to_one():
    x = torch.randn(3, 24, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalize(x))
    assert values.min() > 0.7
    assert values.max() < 1.3


def test_orthogonalize_keeps_singular_vectors():
    x = torch.randn(1, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    u, _, vt = torch.linalg.svd(x[0])
    inner = u.T @ orthogonalize(x)[0] @ vt.T
    assert torch.allclose(inner, torch.diag(torch.diagonal(inner)), atol=1e-9)


def test_tall_and_wide_agree():
    x = torch.randn(2, 8, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    assert torch.allclose(orthogonalize(x), orthogonalize(x.transpose(1, 2)).transpose(1, 2))


def test_iteration_is_the_published_polynomial():
    x = torch.randn(1, 6, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    y = x[0] / (x[0].norm() + 1e-7)
    for a, b, c in COEFFICIENTS:
        gram = y @ y.T
        y = a * y + (b * gram + c * gram @ gram) @ y
    assert torch.allclose(orthogonalize(x)[0], y, atol=1e-12)


def test_stacked_experts_are_a_batch_of_gate_up_and_down_maps():
    stack = torch.randn(4, 12, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    views = as_matrices("mlp.experts.gate_up_proj", stack)
    assert views.shape == (8, 6, 5)
    assert torch.equal(views[0], stack[0, :6])
    assert torch.equal(views[1], stack[0, 6:])
    together = orthogonalize(views)
    alone = torch.stack([orthogonalize(view[None])[0] for view in views])
    assert torch.allclose(together, alone, atol=1e-12)


def test_bits_depend_on_neither_threads_nor_neighbours(monkeypatch):
    """One matrix of its shape, and stacks that wait for each other or do not."""
    shapes = {"single": (64, 48), "mlp.experts.gate_up_proj": (3, 64, 48), "down": (2, 48, 32), "more": (4, 48, 32)}

    def stepped():
        g = torch.Generator().manual_seed(6)
        named = {n: torch.randn(shape, generator=g).requires_grad_() for n, shape in shapes.items()}
        for parameter in named.values():
            parameter.grad = torch.randn(parameter.shape, generator=g)
        optimizer = Muon(named.items(), lr=0.1)
        optimizer.step()
        return {n: p.detach() for n, p in named.items()}

    together = stepped()
    monkeypatch.setattr(module, "BATCH_ELEMENTS", 1)
    apart = stepped()
    threads = torch.get_num_threads()
    torch.set_num_threads(3 - min(threads, 2))
    try:
        otherwise = stepped()
    finally:
        torch.set_num_threads(threads)
    for name in shapes:
        if cpu.available(torch.empty(0, dtype=torch.bfloat16)):
            assert torch.equal(together[name], apart[name]), name
            assert torch.equal(together[name], otherwise[name]), name
        assert torch.allclose(together[name], apart[name], atol=1e-2)


def test_one_by_one_is_the_batch(monkeypatch):
    x = torch.randn(3, 24, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(8))
    batch = orthogonalize(x)
    monkeypatch.setattr(module, "ONE_BY_ONE_FROM", 24 * 40)
    assert torch.allclose(orthogonalize(x), batch, atol=1e-12)


def test_learning_rate_follows_the_shape():
    tall = torch.zeros(16, 4, dtype=torch.float64, requires_grad=True)
    tall.grad = torch.randn(16, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    Muon([("w", tall)], lr=0.1).step()
    values = torch.linalg.svdvals(tall.detach())
    assert 0.7 * 0.1 * 2 < values.min() <= values.max() < 1.3 * 0.1 * 2


def test_groups_and_decay():
    names = {
        "model.embed_tokens.weight": (False, False),
        "lm_head.weight": (False, True),
        "model.layers.1.mlp.router.gate.weight": (False, True),
        "model.layers.1.mlp.experts.down_proj": (True, True),
        "model.layers.0.self_attn.q_proj.weight": (True, True),
    }
    for name, (muon, decay) in names.items():
        assert is_hidden_matrix(name, torch.zeros(2, 2)) is muon
        assert decays(name, torch.zeros(2, 2)) is decay
    assert not decays("model.norm.weight", torch.zeros(2))
    assert not is_hidden_matrix("model.norm.weight", torch.zeros(2))


def test_state_round_trip_gives_the_same_next_step():
    def make():
        g = torch.Generator().manual_seed(7)
        return {
            "model.layers.0.self_attn.q_proj.weight": torch.randn(8, 8, generator=g).requires_grad_(),
            "lm_head.weight": torch.randn(8, 8, generator=g).requires_grad_(),
            "model.norm.weight": torch.ones(8).requires_grad_(),
        }

    def give_gradients(named, seed):
        g = torch.Generator().manual_seed(seed)
        for p in named.values():
            p.grad = torch.randn(p.shape, generator=g)

    named = make()
    straight = Optimizers(named, OptimConfig())
    give_gradients(named, 1)
    straight.step(1.0)
    saved = {k: v.clone() for k, v in straight.state_dict().items()}
    middle = {n: p.detach().clone() for n, p in named.items()}
    give_gradients(named, 2)
    straight.step(0.5)

    again = {n: p.requires_grad_() for n, p in middle.items()}
    resumed = Optimizers(again, OptimConfig())
    resumed.load_state_dict(saved)
    give_gradients(again, 2)
    resumed.step(0.5)
    for name in named:
        assert torch.equal(named[name], again[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_and_pytorch_take_the_same_steps(dtype, monkeypatch):
    if not cpu.available(torch.empty(16, dtype=dtype)):
        pytest.skip(cpu.describe(dtype))
    shapes = {"a": (3, 32, 48), "mlp.experts.gate_up_proj": (2, 64, 16), "tall": (64, 32), "odd": (10, 6)}
    results = []
    for kernels in (True, False):
        if not kernels:
            monkeypatch.setattr(cpu, "available", lambda *_: False)
        g = torch.Generator().manual_seed(3)
        named = {n: torch.randn(shape, generator=g).requires_grad_() for n, shape in shapes.items()}
        copies = {p: torch.empty_like(p, dtype=torch.bfloat16) for p in list(named.values())[:3]}
        muon = Muon(named.items(), lr=0.1, weight_decay=0.1, copies=copies)
        for _ in range(3):
            for p in named.values():
                p.grad_dtype = None
                p.grad = torch.randn(p.shape, generator=g).to(dtype)
            muon.step(scale=0.5)
        assert all(torch.equal(copy, p.detach().bfloat16()) for p, copy in copies.items())
        results.append([*named.values(), *(muon.state[p]["momentum"] for p in named.values())])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found.detach(), expected.detach(), rtol=0, atol=5e-3)
