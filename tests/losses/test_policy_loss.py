"""Policy losses: equal to their formulas in value and gradient, the same however a step is cut or shared."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from freehold.core.marks import IGNORE
from freehold.data.rollouts import PolicyBatch
from freehold.losses.advantage import advantages, concise
from freehold.losses.policy import PolicyLoss
from freehold.losses.targets import token_logprobs

B, T, V, D = 8, 12, 40, 16
KINDS = ["pg", "clip", "cispo", "dppo", "gspo"]


@pytest.fixture(scope="module")
def data():
    """A batch of 8 answers of uneven lengths with hidden states, a head, and behaviour close to the policy."""
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(B, T, D, generator=g, dtype=torch.float64)
    head = torch.randn(V, D, generator=g, dtype=torch.float64) * 0.5
    ids = torch.randint(V, (B, T), generator=g)
    mask = torch.zeros(B, T, dtype=torch.bool)
    for row in range(B):
        mask[row, 2 : 4 + row] = True
    logprobs = (hidden @ head.t()).log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    behaviour = logprobs + torch.randn(B, T, generator=g, dtype=torch.float64) * 0.5
    reference = logprobs + torch.randn(B, T, generator=g, dtype=torch.float64) * 0.3
    advantage = torch.randn(B, 1, generator=g, dtype=torch.float64).expand(B, T)
    batch = PolicyBatch(
        ids.numpy(), np.where(mask, ids, IGNORE), np.zeros((B, T), np.int32), behaviour.numpy(),
        advantage.numpy().copy(), reference.numpy(), np.zeros((B, T), np.int32),
    )  # fmt: skip
    return batch, hidden, head


def columns(batch):
    return {name: torch.from_numpy(np.ascontiguousarray(getattr(batch, name))) for name in batch.__dataclass_fields__}


def scales(loss, *parts):
    """Return 1 / count over all parts of a step."""
    counts = [loss.counts(part) for part in parts]
    return {name: 1 / sum(count[name] for count in counts) for name in counts[0]}


def trl(kind, batch, hidden, head, *, loss_type, beta=0.0, high=0.28, low=0.2, cap=5.0, length=9):
    """Return the loss as TRL 1.16 writes it: `GRPOTrainer._compute_loss` with its loss types."""
    mask = torch.from_numpy(batch.targets != IGNORE).double()
    ids = torch.from_numpy(batch.input_ids)
    logps = (hidden @ head.t()).log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    old, ref = torch.from_numpy(batch.behaviour), torch.from_numpy(batch.reference)
    advantages = torch.from_numpy(batch.advantage)[:, :1]
    log_ratio = logps - old
    if kind == "gspo":
        log_ratio = ((log_ratio * mask).sum(-1) / mask.sum(-1))[:, None]
    coef_1 = log_ratio.exp()
    if kind == "cispo":
        per_token = -coef_1.clamp(max=cap).detach() * advantages * logps
    else:
        per_token = -torch.min(coef_1 * advantages, coef_1.clamp(1 - low, 1 + high) * advantages)
    per_token = per_token.expand_as(mask)
    if beta:
        k3 = (ref - logps).exp() - (ref - logps) - 1
        per_token = per_token + beta * k3 * coef_1.detach()
    if loss_type == "grpo":
        return ((per_token * mask).sum(-1) / mask.sum(-1)).mean()
    if loss_type == "dr_grpo":
        return (per_token * mask).sum() / (len(mask) * length)
    return (per_token * mask).sum() / mask.sum()


@pytest.mark.parametrize(
    ("kind", "loss_type", "normalise", "beta"),
    [
        ("clip", "dapo", "tokens", 0.0), ("clip", "dapo", "tokens", 0.3), ("clip", "dr_grpo", "constant", 0.0),
        ("clip", "grpo", "sequences", 0.0), ("cispo", "cispo", "tokens", 0.0), ("gspo", "grpo", "sequences", 0.0),
        ("gspo", "dapo", "tokens", 0.0),
    ],
)  # fmt: skip
def test_loss_and_gradients_equal_trls_formula(data, kind, loss_type, normalise, beta):
    batch, hidden, head = data
    loss = PolicyLoss(kind, normalise, kl=beta, constant_tokens=9, cap=1.2, chunk_tokens=7)
    found = []
    for formula in (True, False):
        h, w = hidden.clone().requires_grad_(), head.clone().requires_grad_()
        if formula:
            total = trl(kind, batch, h, w, loss_type=loss_type, beta=beta, cap=1.2)
        else:
            total = loss(h, w, columns(batch), scales(loss, batch)).total
        total.backward()
        found.append((total.detach(), h.grad, w.grad))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("parts", [[1] * 8, [4, 4], [3, 5]])
def test_micro_batches_and_ranks_add_up_to_the_step(data, kind, parts):
    """8 x 1 rows, 2 ranks x 4 rows, uneven parts: counts are those of the step, known before the first pass."""
    batch, hidden, head = data
    loss = PolicyLoss(kind, "sequences" if kind == "gspo" else "tokens", kl=0.1)
    whole = hidden.clone().requires_grad_()
    one = loss(whole, head, columns(batch), scales(loss, batch))
    one.total.backward()
    ends = np.cumsum([0, *parts])
    cuts = [batch.rows(a, b) for a, b in zip(ends[:-1], ends[1:], strict=True)]
    by = scales(loss, *cuts)
    pieces = hidden.clone().requires_grad_()
    total = 0.0
    for part, at in zip(cuts, ends, strict=False):
        found = loss(pieces[at : at + len(part.targets)], head, columns(part), by)
        found.total.backward()
        total += float(found.total.detach())
    assert total == pytest.approx(float(one.total.detach()), rel=1e-12)
    torch.testing.assert_close(pieces.grad, whole.grad, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("guard", ["none", "icepop", "tis"])
def test_all_kinds_have_one_gradient_when_ratios_are_1(data, guard):
    """And a guard has nothing to do: bit for bit."""
    batch, hidden, head = data
    kept = torch.from_numpy(batch.targets) != IGNORE
    exact = columns(batch)
    exact["behaviour"] = torch.zeros(B, T, dtype=torch.float64)
    with torch.no_grad():
        exact["behaviour"][kept] = token_logprobs(hidden[kept], head, exact["targets"][kept])
    gradients = []
    for kind in ("pg", "clip", "cispo", "dppo"):
        loss = PolicyLoss(kind, guard=guard)
        h = hidden.clone().requires_grad_()
        found = loss(h, head, exact, scales(loss, batch))
        found.total.backward()
        gradients.append(h.grad)
        assert (float(found.sums["policy/differs"]), float(found.sums["policy/guarded"])) == (0, 0)
    assert all(torch.equal(gradients[0], other) for other in gradients[1:])


def test_guards_count_what_they_drop(data):
    batch, hidden, head = data
    given = columns(batch)
    kept = given["targets"] != IGNORE
    logprobs = token_logprobs(hidden[kept], head, given["targets"][kept])
    ratio = (logprobs - given["behaviour"][kept]).exp()
    for guard, dropped in (("icepop", (ratio < 0.5) | (ratio > 5)), ("tis", ratio > 2)):
        loss = PolicyLoss("clip", guard=guard, high=100, low=0.999)
        found = loss(hidden, head, given, scales(loss, batch))
        assert float(found.sums["policy/guarded"]) == int(dropped.sum()) > 0


def test_dppo_drops_what_moved_too_far_and_would_move_further(data):
    batch, hidden, head = data
    given = columns(batch)
    kept = given["targets"] != IGNORE
    p = token_logprobs(hidden[kept], head, given["targets"][kept]).exp()
    moved = p - given["behaviour"][kept].exp()
    loss = PolicyLoss("dppo", distance=0.02)
    found = loss(hidden, head, given, scales(loss, batch))
    away = (moved.abs() > 0.02) & (moved * given["advantage"][kept] > 0)
    assert 0 < float(found.sums["policy/held"]) == int(away.sum()) < len(p)


def test_every_token_counts_the_same_whatever_the_length(data):
    batch, hidden, head = data
    given = columns(batch)
    given["advantage"] = torch.ones(B, T, dtype=torch.float64)
    kept = given["targets"] != IGNORE
    logprobs = token_logprobs(hidden[kept], head, given["targets"][kept]).requires_grad_()
    loss = PolicyLoss("pg")
    loss.of(logprobs, kept, given, scales(loss, batch)).total.backward()
    assert len(logprobs.grad.unique()) == 1


def test_rows_without_sampled_tokens_cost_nothing(data):
    batch, hidden, head = data
    empty = {**columns(batch), "targets": torch.full((B, T), IGNORE)}
    h = hidden.clone().requires_grad_()
    found = PolicyLoss()(h, head, empty, {"sampled_tokens": 1.0, "sequences": 1.0, "loss_units": 1.0})
    found.total.backward()
    assert float(found.total) == 0 == float(h.grad.abs().sum())


def test_logprobs_of_a_temperature_have_their_gradient(data):
    _, hidden, head = data
    h, w = hidden[0, :3, :4].clone().requires_grad_(), head[:6, :4].clone().requires_grad_()
    targets = torch.tensor([1, 2, 3])
    assert torch.autograd.gradcheck(lambda a, b: token_logprobs(a, b, targets, 2, 0.7), (h, w))


@pytest.mark.parametrize("kind", ["mean", "rloo", "std", "max_rl"])
def test_advantages_sum_to_0_in_a_group(kind):
    rewards = np.array([1.0, 0.0, 0.0, 1.0, 1.0])
    found = advantages(rewards, kind)
    assert found.sum() == pytest.approx(0, abs=1e-12)
    others = (rewards.sum() - rewards) / 4
    expected = {"mean": rewards - 0.6, "rloo": rewards - others, "std": (rewards - 0.6) / (rewards.std(ddof=1) + 1e-4),
                "max_rl": (rewards - 0.6) / 0.6}[kind]  # fmt: skip
    np.testing.assert_allclose(found, expected)


def test_wrong_answers_gain_nothing_by_being_short():
    assert concise(np.array([0.0, 1.0, 1.0]), np.array([1, 5, 9]), 0.5)[0] == 1
    assert list(concise(np.array([0.0, 0.0]), np.array([1, 9]), 0.5)) == [1, 1]
