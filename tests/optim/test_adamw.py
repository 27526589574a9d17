import pytest
import torch

from freehold.core.config import fill
from freehold.core.errors import ConfigError
from freehold.kernels import cpu
from freehold.optim.adamw import AdamW, gradient_norm
from freehold.optim.build import Optimizers
from freehold.optim.config import OptimConfig

SHAPES = ((40, 64), (7, 5), (16,), (300, 160))


@pytest.fixture(params=["kernel", "pytorch"])
def _path(request, monkeypatch):
    if request.param == "pytorch":
        monkeypatch.setattr(cpu, "available", lambda *_: False)
    elif not cpu.available(torch.empty(16)):
        pytest.skip(cpu.describe(torch.float32))


def draw(seed, dtype, size=1.0):
    generator = torch.Generator().manual_seed(seed)
    return [(size * torch.randn(shape, generator=generator)).to(dtype) for shape in SHAPES]


@pytest.mark.usefixtures("_path")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_are_those_of_adamw_in_float64(dtype):
    weights = [w.requires_grad_() for w in draw(0, torch.float32)]
    exact = [w.detach().double().requires_grad_() for w in weights]
    copies = {w: torch.zeros_like(w, dtype=torch.bfloat16) for w in weights}
    settings = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8}
    ours = AdamW([{"params": weights[:2], "weight_decay": 0.1}, {"params": weights[2:]}], copies=copies, **settings)
    groups = [{"params": exact[:2], "weight_decay": 0.1}, {"params": exact[2:], "weight_decay": 0.0}]
    theirs = torch.optim.AdamW(groups, **settings)
    for step in range(5):
        for w, e, g in zip(weights, exact, draw(step + 1, dtype, 10.0**-step), strict=True):
            w.grad_dtype = None
            w.grad, e.grad = g, 0.25 * g.double()
        ours.step(scale=0.25)
        theirs.step()
    for w, e in zip(weights, exact, strict=True):
        torch.testing.assert_close(w.detach().double(), e.detach(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(
            ours.state[w]["exp_avg_sq"].double(), theirs.state[e]["exp_avg_sq"], rtol=1e-5, atol=0
        )
        assert torch.equal(copies[w], w.detach().bfloat16())


@pytest.mark.usefixtures("_path")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_is_of_all_gradients_in_full_precision(dtype):
    gradients = draw(9, dtype)
    exact = torch.cat([g.double().flatten() for g in gradients]).norm()
    assert float(gradient_norm(gradients)) == pytest.approx(float(exact), rel=1e-5)
    gradients[1][0, 0] = torch.nan
    assert gradient_norm(gradients).isnan()


def test_a_weight_without_gradient_is_left_alone():
    weight = torch.ones(16, 16, requires_grad=True)
    optimizer = AdamW([{"params": [weight], "weight_decay": 0.1}], lr=1.0, betas=(0.9, 0.95), eps=1e-8, copies={})
    optimizer.step()
    assert torch.equal(weight.detach(), torch.ones(16, 16))
    assert not optimizer.state


def test_all_state_is_on_the_device_of_the_weight():
    weights = {"lm_head.weight": torch.empty(4, 4, device="meta"), "a.weight": torch.empty(4, 4, device="meta")}
    for weight in weights.values():
        weight.grad = torch.empty_like(weight)
    fresh, resumed = Optimizers(weights, OptimConfig()), Optimizers(weights, OptimConfig())
    fresh.step(1.0)
    read = {key: torch.zeros(value.shape) for key, value in fresh.state_dict().items()}  # as from a checkpoint
    resumed.load_state_dict(read)
    for state in (fresh.state_dict(), resumed.state_dict()):
        assert len(state) == 4
        assert {tensor.device.type for tensor in state.values()} == {"meta"}


def test_a_moment_that_never_decays_is_refused():
    with pytest.raises(ConfigError, match=r"(?s)pretrain\.optim\.betas.*less than 1"):
        fill(OptimConfig, {"betas": [1.0, 0.95]}, "pretrain.optim")
