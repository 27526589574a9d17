import pytest
import torch

from freehold.optim.balance import build_balance, max_violation
from freehold.optim.config import NoBalanceConfig, SignConfig, SmebuConfig


def test_smebu_is_the_published_update():
    counts = torch.tensor([10, 0, 30, 0])
    bias, rule = torch.zeros(4), build_balance(SmebuConfig())
    momentum = torch.zeros(4)
    expected = torch.zeros(4)
    for _ in range(3):
        step = 5e-4 * torch.tanh(2.0 * (10.0 - counts) / 10.0)
        step = step - step.mean()
        momentum = 0.5 * momentum + 0.5 * step
        expected = expected + momentum
        rule.update("a", bias, counts)
    assert torch.allclose(bias, expected, atol=1e-9)
    assert abs(float(bias.sum())) < 1e-9
    assert bias[1] > 0 > bias[2]


def test_smebu_rests_at_balance_and_without_tokens():
    bias, rule = torch.zeros(4), build_balance(SmebuConfig())
    rule.update("a", bias, torch.full((4,), 7))
    assert torch.equal(bias, torch.zeros(4))
    rule.update("a", bias, torch.zeros(4, dtype=torch.int64))
    assert torch.isfinite(bias).all()


def test_smebu_step_is_bounded():
    bias, rule = torch.zeros(64), build_balance(SmebuConfig(momentum=0.0))
    counts = torch.zeros(64, dtype=torch.int64)
    counts[0] = 10**6
    rule.update("a", bias, counts)
    assert bias.abs().max() < 2 * 5e-4


def test_smebu_depends_on_shares_not_on_batch_size():
    small, large = torch.zeros(3), torch.zeros(3)
    build_balance(SmebuConfig()).update("a", small, torch.tensor([1, 2, 3]))
    build_balance(SmebuConfig()).update("a", large, torch.tensor([1000, 2000, 3000]))
    assert torch.allclose(small, large)


def test_smebu_state_round_trip():
    counts = [torch.tensor([5, 1]), torch.tensor([2, 4])]
    bias, rule = torch.zeros(2), build_balance(SmebuConfig())
    rule.update("a", bias, counts[0])
    again, other = bias.clone(), build_balance(SmebuConfig())
    other.load_state_dict({k: v.clone() for k, v in rule.state_dict().items()})
    rule.update("a", bias, counts[1])
    other.update("a", again, counts[1])
    assert torch.equal(bias, again)


def test_sign_rule():
    bias, rule = torch.zeros(4), build_balance(SignConfig(rate=0.1))
    rule.update("a", bias, torch.tensor([9, 1, 1, 1]))
    assert torch.allclose(bias, torch.tensor([-0.15, 0.05, 0.05, 0.05]))
    with pytest.raises(ValueError, match="no state"):
        rule.load_state_dict({"a": bias})


def test_none_leaves_the_bias():
    bias = torch.ones(2)
    build_balance(NoBalanceConfig()).update("a", bias, torch.tensor([9, 1]))
    assert torch.equal(bias, torch.ones(2))


def test_max_violation():
    assert max_violation(torch.tensor([4, 2, 0, 2])) == 1.0
    assert max_violation(torch.zeros(4)) == 0.0
