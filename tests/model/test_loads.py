"""Expert loads: who is counted, when, and that recomputing activations counts nothing twice."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from freehold.model.afmoe import Afmoe
from freehold.model.moe import Routing


def loads(model: Afmoe, *arguments: Tensor, **more: Tensor) -> Tensor:
    """Run a forward pass; return what each MoE layer says about its tokens, [layers, E]."""
    routings: list[Routing] = []
    model.hidden(*arguments, routings=routings, **more)
    return torch.stack([routing.counts for routing in routings])


def ids() -> Tensor:
    return torch.randint(13, 96, (2, 21), generator=torch.Generator().manual_seed(2))


def test_every_assignment_of_every_token_is_counted(model: Afmoe) -> None:
    assert list(model.moe_layers()) == [f"model.layers.{i}.mlp" for i in range(1, 5)]
    once = loads(model, ids())
    assert once.dtype == torch.int64
    assert (once.sum(1) == 2 * 21 * 3).all()
    assert torch.equal(loads(model.eval(), ids()), once)


def test_counts_are_those_of_the_router(model: Afmoe) -> None:
    moe = model.moe_layers()["model.layers.1.mlp"]
    x = torch.randn(2, 7, 32)
    _, routing = moe(x)
    logits = x.flatten(0, 1) @ moe.router.gate.weight.T
    chosen = (logits.sigmoid() + moe.expert_bias).topk(3).indices
    assert torch.equal(routing.counts, chosen.flatten().bincount(minlength=8))
    torch.testing.assert_close(routing.logits, logits)


def test_weights_come_from_unbiased_scores_and_have_the_scale(model: Afmoe) -> None:
    router = model.moe_layers()["model.layers.1.mlp"].router
    x, bias = torch.randn(9, 32), torch.zeros(8)
    bias[5] = 10.0
    logits, weights, chosen = router(x, bias)
    assert (chosen == 5).any(1).all()
    torch.testing.assert_close(weights.sum(1), torch.full((9,), 2.3))
    scores = logits.sigmoid().gather(1, chosen)
    torch.testing.assert_close(weights, 2.3 * scores / scores.sum(1, keepdim=True))


def test_padding_and_masked_tokens_are_not_counted(model: Afmoe) -> None:
    documents = torch.zeros(2, 21, dtype=torch.int64)
    documents[0, 15:] = -1
    mask = torch.ones(2, 21, dtype=torch.bool)
    mask[1, :4] = False
    both = loads(model, ids(), document_ids=documents, token_mask=mask)
    assert (both.sum(1) == (15 + 17) * 3).all()
    assert torch.equal(loads(model, ids()[:1, :15]) + loads(model, ids()[1:], token_mask=mask[1:]), both)


def test_recompute_gives_the_same_gradients_and_counts_once(model: Afmoe) -> None:
    def step() -> tuple[dict[str, Tensor], Tensor]:
        model.zero_grad()
        routings: list[Routing] = []
        logits = model.lm_head(model.hidden(ids(), routings=routings))
        F.cross_entropy(logits.flatten(0, 1), ids().flatten()).backward()
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        return gradients, torch.stack([routing.counts for routing in routings])

    plain, counts = step()
    model.recompute = True
    runs = 0

    def run(*_: object) -> None:
        nonlocal runs
        runs += 1

    hook = model.model.layers["2"].register_forward_pre_hook(run)
    again, counts_again = step()
    hook.remove()
    assert runs == 2, "the layer was not run again"
    assert torch.equal(counts, counts_again)
    assert counts.sum() == 4 * 42 * 3
    assert plain.keys() == again.keys()
    for name, gradient in plain.items():
        assert torch.equal(gradient, again[name]), name


def test_compiled_layers_give_the_same_gradients_and_counts(model: Afmoe) -> None:
    def step() -> tuple[dict[str, Tensor], Tensor]:
        routings: list[Routing] = []
        mask = torch.arange(ids().shape[1]).expand_as(ids()) > 3
        logits = model.lm_head(model.hidden(ids(), token_mask=mask, routings=routings))
        gradients = torch.autograd.grad(F.cross_entropy(logits.flatten(0, 1), ids().flatten()), [*model.parameters()])
        counts = torch.stack([routing.counts for routing in routings])
        return dict(zip(dict(model.named_parameters()), gradients, strict=True)), counts

    names = list(model.state_dict())
    plain, counts = step()
    torch._dynamo.utils.counters.clear()
    model.compile_layers("aot_eager")  # all of the compiler but making machine code, which takes a minute
    for model.recompute in (False, True):
        again, counts_again = step()
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0, "nothing was compiled"
        assert list(model.state_dict()) == names
        assert torch.equal(counts, counts_again)
        for name, gradient in plain.items():
            torch.testing.assert_close(gradient, again[name], rtol=1e-5, atol=1e-7, msg=name)


def test_routings_are_collected_when_asked_for(model: Afmoe) -> None:
    routings: list[Routing] = []
    model.hidden(ids(), routings=routings)
    assert len(routings) == 4
    for routing in routings:
        assert routing.logits.requires_grad
        assert routing.weights.shape == routing.chosen.shape
        assert torch.equal(routing.counts, routing.chosen.flatten().bincount(minlength=8))
