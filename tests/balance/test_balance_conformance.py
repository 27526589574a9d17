"""One test for each way in which expert counts, bias or balance losses have been wrong in a public framework.

`build` makes an adapter (see balance_adapter.py) from a Setup. Nothing here knows Freehold; the table in
docs/balancing.md says who had which leak. test_balance_leaks.py proves that each test can fail.
"""

from __future__ import annotations

import torch
from balance_adapter import IGNORE, PADDING, Routed, Rows, Setup, Unsupported
from torch import Tensor

WEIGHTS = {"sequence_loss": 1.0, "router_z_loss": 0.1, "z_loss": 0.1}
"""Weights large enough that an error in a loss is not lost in the gradient of the cross-entropy."""


def text(rows: int = 4, tokens: int = 16, seed: int = 0) -> Rows:
    """Random rows of skewed ids, one document each; half of the targets carry loss."""
    g = torch.Generator().manual_seed(seed)
    ids = (64 * torch.rand(rows, tokens, generator=g) ** 2).long()
    targets = (64 * torch.rand(rows, tokens, generator=g) ** 2).long()
    targets[torch.rand(rows, tokens, generator=g) < 0.5] = IGNORE
    return Rows(ids, targets, torch.zeros(rows, tokens, dtype=torch.int32))


def padded(rows: Rows, real: list[int], filler: int = 7) -> Rows:
    """Make all but the first `real[r]` tokens of row r padding, all of one id."""
    ids, targets, documents = (tensor.clone() for tensor in rows)
    for r, n in enumerate(real):
        ids[r, n:], targets[r, n:], documents[r, n:] = filler, IGNORE, PADDING
    return Rows(ids, targets, documents)


def join(*parts: Rows) -> Rows:
    return Rows(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))


def counts(adapter) -> dict[int, Tensor]:
    return {layer: adapter.counts(layer) for layer in adapter.moe_layers}


def biases(adapter) -> dict[int, Tensor]:
    return {layer: adapter.bias(layer) for layer in adapter.moe_layers}


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def close(a: dict, b: dict, tolerance: float = 1e-5) -> bool:
    """Return whether two sets of tensors agree to a fraction of each one's largest element."""
    return a.keys() == b.keys() and all(
        float((a[key] - b[key]).abs().max()) <= tolerance * (float(b[key].abs().max()) + 1e-6) for key in a
    )


def losses_of(build) -> dict[str, float]:
    return {name: WEIGHTS[name] for name in build.losses}


def from_losses(build, rows: Rows, **losses: float) -> dict[str, Tensor]:
    """Return the part of each router's gradient (and the head's) that comes from the losses named."""
    for name in losses.keys() - set(build.losses):
        raise Unsupported(name)
    with_them, without = (build(Setup(**kind)).gradients(rows) for kind in (losses, {}))
    return {key: with_them[key] - without[key] for key in without if key.startswith(("router", "head"))}


# --- counts -------------------------------------------------------------------------------------------------------


def test_padding_is_not_counted(build):
    real = [16, 10, 3, 0]
    first, second = (build(Setup(rule=build.rules[0])) for _ in range(2))
    first.step(padded(text(), real, filler=7))
    second.step(padded(text(), real, filler=50))
    assert all(int(n.sum()) == sum(real) * 2 for n in counts(first).values())
    assert same(counts(first), counts(second))
    assert same(biases(first), biases(second))


def test_validation_leaves_no_trace(build):
    plain, validated = (build(Setup(rule=build.rules[0])) for _ in range(2))
    validated.evaluate(text(seed=9))
    for seed in (1, 2):
        plain.step(text(seed=seed))
        validated.step(text(seed=seed))
        before = counts(validated), biases(validated)
        validated.evaluate(text(seed=9))
        assert same(counts(validated), before[0])
        assert same(biases(validated), before[1])
    assert same(counts(validated), counts(plain))
    assert same(biases(validated), biases(plain))


def test_recompute_counts_once(build):
    rows, setup = text(), {"rule": build.rules[0], **losses_of(build)}
    plain, again = build(Setup(**setup)), build(Setup(**setup, recompute=True))
    assert close(again.gradients(rows), plain.gradients(rows))
    plain.step(rows)
    again.step(rows)
    assert same(counts(again), counts(plain))
    assert same(biases(again), biases(plain))


def test_micro_batches_add_up(build):
    rows, setup = padded(text(), [16, 16, 9, 2]), {"rule": build.rules[0], **losses_of(build)}
    whole, parts = build(Setup(**setup)), build(Setup(**setup, micro_batches=4))
    assert close(parts.gradients(rows), whole.gradients(rows))
    whole.step(rows)
    parts.step(rows)
    assert same(counts(parts), counts(whole))
    assert same(biases(parts), biases(whole))


def test_counts_of_ranks_add_up(build):
    """What each data-parallel rank would count sums to what one process counts, also where padding is uneven."""
    rows = padded(text(), [16, 16, 9, 0])
    whole, *ranks = (build(Setup(rule=build.rules[0])) for _ in range(3))
    whole.step(rows)
    for rank, part in zip(ranks, (slice(0, 2), slice(2, 4)), strict=True):
        rank.step(Rows(*(tensor[part] for tensor in rows)))
    summed = {layer: ranks[0].counts(layer) + ranks[1].counts(layer) for layer in whole.moe_layers}
    assert same(summed, counts(whole))


# --- layers -------------------------------------------------------------------------------------------------------


def test_each_layer_moves_by_its_own_counts(build):
    for rule in build.rules:
        adapter = build(Setup(layers=5, dense_layers=2, rule=rule, rate=0.01))
        assert adapter.moe_layers == [2, 3, 4]
        expected = {layer: torch.zeros(8) for layer in adapter.moe_layers}
        momentum = {layer: torch.zeros(8) for layer in adapter.moe_layers}
        for seed in range(3):
            adapter.step(text(seed=seed))
            for layer, load in counts(adapter).items():
                violation = (load.float().mean() - load) / load.float().mean()
                step = 0.01 * (torch.tanh(2 * violation) if rule == "smebu" else violation.sign())
                momentum[layer] = 0.5 * (momentum[layer] + step - step.mean())
                expected[layer] += momentum[layer] if rule == "smebu" else step - step.mean()
        assert all(float(load.abs().max()) > 0.005 for load in expected.values())
        assert close(biases(adapter), expected)


def test_a_model_without_experts_trains(build):
    adapter = build(Setup(dense_layers=4, rule=build.rules[0], **losses_of(build)))
    before = adapter.weights()["head"]
    adapter.step(text())
    assert adapter.moe_layers == []
    assert not torch.equal(adapter.weights()["head"], before)


def test_a_layer_without_tokens_rests(build):
    for rule in build.rules:
        adapter = build(Setup(rule=rule, **losses_of(build)))
        adapter.step(padded(text(), [0, 0, 0, 0]))
        assert all(int(n.sum()) == 0 for n in counts(adapter).values())
        assert all(torch.equal(b, torch.zeros(8)) for b in biases(adapter).values())
        assert all(bool(w.isfinite().all()) for w in adapter.weights().values())


def test_nothing_but_the_rule_moves_the_bias(build):
    adapter = build(Setup(rule="", weight_decay=0.1, **losses_of(build)))
    start = {layer: torch.linspace(-0.2, 0.3, 8) for layer in adapter.moe_layers}
    for layer, values in start.items():
        adapter.set_bias(layer, values)
    for seed in range(2):
        adapter.step(text(seed=seed))
    assert same(biases(adapter), start)


def test_uninitialised_memory_does_not_count(build):
    plain, meta = (build(Setup(rule=build.rules[0], meta=meta)) for meta in (False, True))
    assert all(torch.equal(bias, torch.zeros(8)) for bias in biases(meta).values())
    assert all(int(n.sum()) == 0 for n in counts(meta).values())
    assert same(meta.weights(), plain.weights())
    for adapter in (plain, meta):
        adapter.step(text())
    assert same(counts(meta), counts(plain))
    assert same(biases(meta), biases(plain))


# --- scores -------------------------------------------------------------------------------------------------------


def test_the_bias_chooses_and_the_scores_weigh(build):
    adapter = build(Setup())
    generator = torch.Generator().manual_seed(3)
    for layer in adapter.moe_layers:
        adapter.set_bias(layer, 0.1 * torch.randn(8, generator=generator))
    weights = adapter.weights()
    for layer, routed in adapter.forward(text()).layers.items():
        logits = routed.inputs @ weights[f"router.{layer}"].T
        assert torch.allclose(routed.logits, logits, atol=1e-5)
        scores, biased = logits.sigmoid(), logits.sigmoid() + adapter.bias(layer)
        chosen = biased.gather(-1, routed.chosen)
        others = biased.scatter(-1, routed.chosen, -torch.inf)
        assert bool((chosen.amin(-1) >= others.amax(-1) - 1e-6).all()), "the largest of score + bias are not chosen"
        assert not torch.equal(scores.topk(2).indices.sort().values, routed.chosen.sort().values), "no bias was needed"
        own = scores.gather(-1, routed.chosen)
        assert torch.allclose(routed.weights, 2.3 * own / own.sum(-1, keepdim=True), atol=1e-5)


# --- losses -------------------------------------------------------------------------------------------------------


def sequence_loss(logits: Tensor, chosen: Tensor) -> Tensor:
    """The loss of one row in one layer, as published: logits [T, E], chosen [T, k]."""
    (tokens, experts), k = logits.shape, chosen.shape[1]
    f = torch.zeros(experts)
    for token in chosen.tolist():
        for expert in token:
            f[expert] += experts / (k * tokens)
    scores = logits.sigmoid()
    return (f * (scores / scores.sum(1, keepdim=True)).mean(0)).sum()


def check_router_gradients(build, losses: dict[str, float], expected) -> None:
    """Compare each router's gradient from `losses` with that of expected(routed, router weight).

    In the last layer there is no way but through its own logits; in the others a router also acts on the layers
    above it, which is little: a loss that forgot a layer, or took the mean over layers, is farther away.
    """
    rows, adapter = text(), build(Setup())
    found, weights = from_losses(build, rows, **losses), adapter.weights()
    for layer, routed in adapter.forward(rows).layers.items():
        weight = weights[f"router.{layer}"].requires_grad_()
        gradient = torch.autograd.grad(expected(routed, weight), weight)[0]
        tolerance = 1e-3 if layer == adapter.moe_layers[-1] else 0.25
        assert close({layer: found[f"router.{layer}"]}, {layer: gradient}, tolerance), f"layer {layer}"


def test_the_sequence_loss_is_the_published_one(build):
    def loss(routed: Routed, weight: Tensor) -> Tensor:
        rows = [sequence_loss(x @ weight.T, c) for x, c in zip(routed.inputs, routed.chosen, strict=True)]
        return sum(rows) / len(rows)

    for alpha in (1.0, 0.25):
        check_router_gradients(build, {"sequence_loss": alpha}, lambda *args, a=alpha: a * loss(*args))


def test_sequence_loss_is_of_sequences_not_of_the_batch(build):
    one, two = text(1, seed=1), text(1, seed=2)
    alone = [from_losses(build, rows, sequence_loss=1.0) for rows in (one, two)]
    together, twice = (
        from_losses(build, rows, sequence_loss=1.0) for rows in (join(one, two), join(one, two, one, two))
    )
    mean = {key: (alone[0][key] + alone[1][key]) / 2 for key in together}
    assert close(together, mean, 1e-3)
    assert close(twice, mean, 1e-3)


def test_padding_does_not_enter_the_losses(build):
    rows = padded(text(), [10, 10, 10, 10])
    short = Rows(*(tensor[:, :10] for tensor in rows))
    adapter = build(Setup(**losses_of(build)))
    expected = adapter.gradients(short)
    assert close(adapter.gradients(rows), expected)
    assert close(adapter.gradients(padded(text(), [10, 10, 10, 10], filler=50)), expected)


def test_z_loss_has_its_gradient_at_its_scale(build):
    rows, adapter = text(), build(Setup())
    hidden, weight = adapter.forward(rows).hidden, adapter.weights()["head"].requires_grad_()
    logits = (hidden @ weight.T)[rows.targets != IGNORE]
    expected = torch.autograd.grad(torch.logsumexp(logits, -1).square().mean(), weight)[0]
    assert float(expected.abs().max()) > 1e-3
    for share in (1.0, 1e-2):
        assert close({"head": from_losses(build, rows, z_loss=share)["head"]}, {"head": share * expected}, 1e-3)


def test_router_z_loss_has_its_gradient_at_its_scale(build):
    def loss(routed: Routed, weight: Tensor) -> Tensor:
        return torch.logsumexp(routed.inputs @ weight.T, -1).square().mean()

    for share in (1.0, 0.1):
        check_router_gradients(build, {"router_z_loss": share}, lambda *args, s=share: s * loss(*args))


# --- Muon on expert stacks ----------------------------------------------------------------------------------------


def expert_gradients(adapter, seed: int = 5) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    names = [key for key in adapter.weights() if key.split(".")[0] in ("gate", "up", "down")]
    return {key: torch.randn(adapter.weights()[key].shape, generator=g) for key in names}


def moved(adapter, gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    before = adapter.weights()
    adapter.apply(gradients)
    after = adapter.weights()
    return {key: before[key] - after[key] for key in gradients}


def test_muon_steps_each_matrix_of_each_expert_alone(build):
    """Singular values of one step: lr * sqrt(max(1, fan_out / fan_in)) of the expert's own matrix."""
    adapter = build(Setup(dense_layers=3, muon_lr=0.02))
    for key, step in moved(adapter, expert_gradients(adapter)).items():
        scale = 0.02 * max(1.0, step.shape[0] / step.shape[1]) ** 0.5
        values = torch.linalg.svdvals(step) / scale
        assert 0.6 < float(values.min()) <= float(values.max()) < 1.4, f"{key}: {values}"


def test_muon_step_of_an_expert_depends_on_it_alone(build):
    """Not on how many tokens the expert got, nor on what the other experts got."""
    gradients = expert_gradients(build(Setup(dense_layers=3)))
    plain = moved(build(Setup(dense_layers=3)), gradients)
    scaled = {key: g * (0.01 if key.endswith(".2") else 1.0) for key, g in gradients.items()}
    idle = {key: g * (0.0 if key.endswith(".2") else 1.0) for key, g in gradients.items()}
    assert close(moved(build(Setup(dense_layers=3)), scaled), plain, 0.02)
    rest = moved(build(Setup(dense_layers=3)), idle)
    for key in gradients:
        assert close({0: rest[key]}, {0: torch.zeros_like(plain[key]) if key.endswith(".2") else plain[key]}, 0.02), key
