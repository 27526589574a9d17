import pytest
import torch
import torch.nn.functional as F

from freehold.data.packing import IGNORE
from freehold.losses.cross_entropy import chunked_loss, summed_nll


def inputs(dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(23, 8, generator=g, dtype=dtype, requires_grad=True)
    weight = torch.randn(17, 8, generator=g, dtype=dtype, requires_grad=True)
    targets = torch.randint(0, 17, (23,), generator=g)
    targets[[2, 9, 22]] = IGNORE
    return hidden, weight, targets


@pytest.mark.parametrize("chunk", [1, 5, 100])
@pytest.mark.parametrize("z_loss", [0.0, 0.01])
def test_equals_plain_cross_entropy_with_every_gradient(chunk, z_loss):
    hidden, weight, targets = inputs()
    logits = hidden @ weight.T
    z = torch.logsumexp(logits, 1)[targets != IGNORE].square().sum()
    plain = (F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum") + z_loss * z) / 20
    expected = torch.autograd.grad(plain, (hidden, weight))
    losses = chunked_loss(hidden, weight, targets, scale=1 / 20, z_loss=z_loss, chunk_tokens=chunk)
    found = torch.autograd.grad(losses.total, (hidden, weight))
    assert torch.allclose(losses.total, plain)
    assert torch.allclose(losses.z, z)
    for a, b in zip(found, expected, strict=True):
        assert torch.allclose(a, b, atol=1e-12)


@pytest.mark.parametrize("chunk", [5, 100])
def test_masked_form_equals_dropping_ignored_targets(chunk):
    hidden, weight, targets = inputs()
    found = []
    for scale in (1 / 20, torch.tensor(1 / 20, dtype=torch.float64)):
        losses = chunked_loss(hidden, weight, targets, scale=scale, z_loss=0.01, chunk_tokens=chunk)
        found.append([losses.total.detach(), *losses[1:], *torch.autograd.grad(losses.total, (hidden, weight))])
    for dropped, masked in zip(*found, strict=True):
        assert torch.allclose(dropped, masked, atol=1e-12)


def test_z_loss_has_a_gradient():
    # The published run had its z-loss silently switched off by a bug (trinity report, section 6).
    hidden, weight, targets = inputs()
    with_z = torch.autograd.grad(chunked_loss(hidden, weight, targets, scale=1.0, z_loss=1e-3).total, weight)[0]
    without = torch.autograd.grad(chunked_loss(hidden, weight, targets, scale=1.0).total, weight)[0]
    assert (with_z - without).abs().max() > 1e-3


def test_micro_batches_add_up():
    hidden, weight, targets = inputs()
    whole = torch.autograd.grad(chunked_loss(hidden, weight, targets, scale=1 / 20).total, weight)[0]
    parts = sum(
        torch.autograd.grad(chunked_loss(hidden[s], weight, targets[s], scale=1 / 20).total, weight)[0]
        for s in (slice(0, 10), slice(10, 23))
    )
    assert torch.allclose(whole, parts, atol=1e-12)


def test_all_ignored_is_zero():
    hidden, weight, targets = inputs()
    losses = chunked_loss(hidden, weight, torch.full_like(targets, IGNORE), scale=1.0)
    losses.total.backward()
    assert float(losses.total.detach()) == 0
    assert weight.grad.abs().max() == 0


def test_summed_nll():
    hidden, weight, targets = inputs(torch.float32)
    expected = F.cross_entropy(hidden @ weight.T, targets, ignore_index=IGNORE, reduction="none").detach()
    assert torch.allclose(summed_nll(hidden, weight, targets, chunk_tokens=7).float(), expected, atol=1e-5)
