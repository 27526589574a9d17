"""The losses on the routing by themselves: values that can be worked out by hand, and what the loop reports."""

import math

import pytest
import torch
from balance_adapter import Setup
from balance_freehold import FreeholdAdapter
from test_balance_conformance import padded, text

from freehold.core.config import fill
from freehold.core.errors import ConfigError
from freehold.model.moe import Routing
from freehold.optim.balance import router_losses, sequence_loss
from freehold.optim.config import NoBalanceConfig, SmebuConfig

REAL = torch.ones(1, 4, dtype=torch.bool)


def routing(*chosen, experts=4):
    """Each token chooses one expert at score 3/4, the others have 1/4: shares of 1/2 and 1/6."""
    logits = torch.full((len(chosen), experts), 0.25).logit()
    logits[torch.arange(len(chosen)), list(chosen)] = torch.tensor(0.75).logit()
    return Routing(logits, torch.tensor(chosen)[:, None], torch.ones(len(chosen), 1), torch.zeros(experts))


def test_sequence_loss_by_hand():
    even, one = routing(0, 1, 2, 3), routing(2, 2, 2, 2)
    assert float(sequence_loss(even.logits, even.chosen, REAL)) == pytest.approx(4 * 1.0)
    assert float(sequence_loss(one.logits, one.chosen, REAL)) == pytest.approx(4 * (4 * 0.5))
    half = torch.tensor([[True, True, False, False]])  # f = (2, 2, 0, 0), P = (1/3, 1/3, 1/6, 1/6)
    assert float(sequence_loss(even.logits, even.chosen, half)) == pytest.approx(2 * (2 / 3 + 2 / 3))


def test_losses_are_summed_over_layers_and_only_if_configured():
    layers = [routing(0, 1, 2, 3), routing(2, 2, 2, 2)]
    both = router_losses(SmebuConfig(sequence_loss=0.1, router_z_loss=0.2), layers, REAL, scale=0.25)
    z = 2 * 4 * float(torch.logsumexp(layers[0].logits[0], 0)) ** 2
    assert float(both.sequence) == pytest.approx(4 + 8)
    assert float(both.z) == pytest.approx(z, rel=1e-6)
    assert float(both.total) == pytest.approx(0.25 * (0.1 * 12 + 0.2 * z), rel=1e-6)
    only = router_losses(NoBalanceConfig(sequence_loss=0.1), layers, REAL, scale=0.25)
    assert float(only.z) == 0
    assert float(only.total) == pytest.approx(0.25 * 0.1 * 12, rel=1e-6)


def test_loop_reports_means_over_tokens_and_layers():
    rows = padded(text(), [16, 16, 9, 0])
    assert not {"loss/sequence", "loss/router_z"} & FreeholdAdapter(Setup()).report(rows).keys()
    setup = Setup(sequence_loss=1e-3, router_z_loss=1e-3, micro_batches=2)
    values = FreeholdAdapter(setup).report(rows)
    assert 0.9 < values["loss/sequence"] < 2.0
    assert values["loss/router_z"] == pytest.approx(math.log(8) ** 2, rel=0.1)


def test_a_negative_weight_is_refused():
    with pytest.raises(ConfigError, match="sequence_loss"):
        fill(SmebuConfig, {"sequence_loss": -1.0}, "pretrain.balance")
