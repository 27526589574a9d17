"""Preference losses: equal to their published formulas in value and gradient, and the same however a step is cut."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import trl_losses

from freehold.core.marks import IGNORE
from freehold.data.packing import Example
from freehold.data.pairs import Answers, PairOrder
from freehold.losses.preference import Preference
from freehold.losses.targets import token_logprobs

V, D = 50, 8
PROMPT = [3, 4, 5]


def pairs(count: int, kto: bool = False) -> list[Answers]:
    """Return pairs of answers of uneven lengths (kto: single answers, two of three of them good)."""
    draw = np.random.default_rng(0)
    found = []
    for number in range(count):
        ids = [[*PROMPT, *draw.integers(6, V, draw.integers(2, 7)).tolist()] for _ in range(1 if kto else 2)]
        examples = tuple(Example(str(number), "s", one, [i >= len(PROMPT) for i in range(len(one))]) for one in ids)
        signs = (1 if number % 3 else -1,) if kto else (1, -1)
        found.append(Answers(str(number), "s", examples, signs, margin=0.1 * number))
    return found


def prepared(kind: str, count: int = 6):
    """Return a batch of one pair a row with references, hidden states of every row, and a head."""
    answers = pairs(count, kto=kind == "kto")
    order = PairOrder(answers, context_tokens=20, sequences=count, steps=1, seed=0, pad=0)
    draw = np.random.default_rng(1)
    order.reference = {a.id: [-draw.random(len(e.ids) - 1).astype(np.float32) * 4 for e in a.examples] for a in answers}
    batch = order.arrange([[one] for one in answers])
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(count, 20, D, generator=generator, dtype=torch.float64)
    head = torch.randn(V, D, generator=generator, dtype=torch.float64)
    return answers, order, batch, hidden, head


def columns(batch) -> dict[str, torch.Tensor]:
    names = ("targets", "sequence", "sign", "reference", "margins")
    return {name: torch.from_numpy(getattr(batch, name)) for name in names}


def plainly(loss: Preference, answers, order, hidden, head) -> torch.Tensor:
    """Return the loss as the papers write it, pair by pair."""
    terms, tokens, cross_entropy = [], 0, hidden.new_zeros(())
    for row, one in enumerate(answers):
        at, policy, reference, sizes = 0, [], [], []
        for number, example in enumerate(one.examples):
            length = len(example.ids) - 1
            where = [i for i in range(length) if example.loss_mask[i + 1]]
            logp = torch.stack([(hidden[row, at + i] @ head.t()).log_softmax(0)[example.ids[i + 1]] for i in where])
            policy.append(logp.sum())
            reference.append(float(sum(order.reference[one.id][number][i] for i in where)))
            sizes.append(len(where))
            if one.signs[number] > 0:
                cross_entropy, tokens = cross_entropy - logp.sum(), tokens + len(where)
            at += length
        ratio = [p - r for p, r in zip(policy, reference, strict=True)]
        if loss.kind == "dpo":
            terms.append(-torch.nn.functional.logsigmoid(loss.beta * (ratio[0] - ratio[1]) - one.margin))
        elif loss.kind == "ipo":
            terms.append((ratio[0] / sizes[0] - ratio[1] / sizes[1] - 1 / (2 * loss.beta)) ** 2)
        elif loss.kind == "simpo":
            gap = policy[0] / sizes[0] - policy[1] / sizes[1]
            terms.append(-torch.nn.functional.logsigmoid(loss.beta * gap - loss.margin - one.margin))
        else:
            terms.append(1 - torch.sigmoid(loss.beta * ratio[0] * one.signs[0]))
    return torch.stack(terms).mean() + loss.cross_entropy * cross_entropy / tokens


def scales(loss: Preference, batch) -> dict[str, float]:
    return {name: 1 / count for name, count in loss.counts(batch).items()}


@pytest.mark.parametrize("kind", ["dpo", "ipo", "simpo", "kto"])
def test_loss_and_gradients_equal_the_published_formula(kind):
    loss = Preference(kind, beta=0.3, margin=0.2, cross_entropy=0.5, chunk_tokens=7)
    answers, order, batch, hidden, head = prepared(kind)
    found = []
    for formula in (True, False):
        h, w = hidden.clone().requires_grad_(), head.clone().requires_grad_()
        if formula:
            total = plainly(loss, answers, order, h, w)
        else:
            total = loss(h, w, columns(batch), scales(loss, batch)).total
        total.backward()
        found.append((total.detach(), h.grad, w.grad))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours.double(), theirs.double(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("kind", "trl"), [("dpo", 6.140612602), ("ipo", 11.661920547)])
def test_loss_is_what_trl_1_16_computes(kind, trl):
    """The golden values are TRL's own, printed by benchmarks/trl_losses.py on the same weights and ids."""
    found, _ = trl_losses.ours(kind, trl_losses.model(2), trl_losses.prepared())
    assert found == pytest.approx(trl, rel=1e-5)


@pytest.mark.parametrize("kind", ["dpo", "kto"])
@pytest.mark.parametrize("rows", [1, 2, 3])
def test_micro_batches_add_up_to_the_step(kind, rows):
    loss = Preference(kind)
    _, _, batch, hidden, head = prepared(kind)
    by = scales(loss, batch)  # counted over the whole step, before the first pass
    whole = hidden.clone().requires_grad_()
    loss(whole, head, columns(batch), by).total.backward()
    parts = hidden.clone().requires_grad_()
    for start in range(0, 6, rows):
        part = batch.rows(start, start + rows)
        loss(parts[start : start + rows], head, columns(part), by).total.backward()
    torch.testing.assert_close(parts.grad, whole.grad, rtol=1e-12, atol=1e-14)


def test_packing_changes_no_loss():
    loss = Preference("dpo")
    answers, order, batch, hidden, head = prepared("dpo", 4)
    apart = loss(hidden, head, columns(batch), scales(loss, batch)).total
    packed = PairOrder(answers, context_tokens=80, sequences=1, steps=1, seed=0, pad=0)
    packed.reference = order.reference
    together = packed.arrange([answers])
    joined = torch.zeros(1, 80, D, dtype=torch.float64)
    at = 0
    for row, one in enumerate(answers):
        joined[0, at : at + one.tokens] = hidden[row, : one.tokens]
        at += one.tokens
    torch.testing.assert_close(loss(joined, head, columns(together), scales(loss, together)).total, apart)


def test_counts_name_pairs_answers_and_tokens():
    _, _, batch, _, _ = prepared("dpo")
    counts = Preference("dpo").counts(batch)
    assert (counts["answers"], counts["better"], counts["worse"]) == (6, 6, 6)
    assert counts["better_tokens"] == int(((batch.targets != IGNORE) & (batch.sign > 0)).sum())
    _, _, single, _, _ = prepared("kto")
    assert (Preference("kto").counts(single)["answers"], Preference("kto").counts(single)["worse"]) == (6, 2)


def test_a_policy_equal_to_its_reference_starts_at_log_2():
    loss = Preference("dpo", cross_entropy=0.0)
    answers, order, batch, hidden, head = prepared("dpo", 3)
    for one in answers:
        object.__setattr__(one, "margin", 0.0)
    kept = torch.from_numpy(batch.targets) != IGNORE
    known = torch.zeros(batch.targets.shape, dtype=torch.float64)
    known[kept] = token_logprobs(hidden[kept], head, torch.from_numpy(batch.targets)[kept])
    given = {**columns(batch), "reference": known, "margins": torch.zeros_like(known)}
    found = loss(hidden, head, given, scales(loss, batch))
    assert float(found.total) == pytest.approx(math.log(2), abs=1e-6)


def test_rows_without_answers_cost_nothing():
    _, _, batch, hidden, head = prepared("dpo", 2)
    empty = {**columns(batch), "targets": torch.full(batch.targets.shape, IGNORE)}
    h = hidden.clone().requires_grad_()
    found = Preference("dpo")(h, head, empty, {"answers": 1.0, "better_tokens": 1.0})
    found.total.backward()
    assert float(found.total) == 0 == float(h.grad.abs().sum())


def test_an_order_names_what_does_not_fit():
    order = PairOrder(pairs(6), context_tokens=12, sequences=2, steps=3, seed=0, pad=0, first_step=5)
    assert order.too_long + len(order.answers) == 6
    seen = {piece.document_id for step in range(5, 8) for piece in order.documents(step)}
    assert seen <= {one.id for one in order.answers}
    assert order.batch(5).input_ids.shape == (2, 12)
    with pytest.raises(Exception, match="no pair of answers fits a row"):
        PairOrder(pairs(3), context_tokens=2, sequences=1, steps=1, seed=0, pad=0)
