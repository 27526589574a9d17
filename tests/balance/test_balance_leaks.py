"""The conformance suite can fail: each leak, put into Freehold on purpose, is caught by its test."""

from __future__ import annotations

import inspect

import pytest
import test_balance_conformance as conformance
import torch
from balance_freehold import FreeholdAdapter

from freehold.losses import cross_entropy
from freehold.model import afmoe
from freehold.model.afmoe import Afmoe
from freehold.model.moe import MoE, Router
from freehold.optim import balance, build, muon
from freehold.optim.balance import NoBalance, Sign, Smebu, router_losses
from freehold.trainer import loop, step

LEAKS = {}


def leak(*tests):
    """Say which tests must fail under a leak, a function that breaks Freehold through the patch it is given."""

    def keep(function):
        LEAKS[function.__name__] = (function, tests)
        return function

    return keep


def around(patch, owner, name, wrapper):
    """Replace `owner.name` with wrapper(old, *args, **kwargs)."""
    old = getattr(owner, name)
    patch.setattr(owner, name, lambda *args, **kwargs: wrapper(old, *args, **kwargs))


# --- counts -------------------------------------------------------------------------------------------------------


@leak("test_padding_is_not_counted")
def padding_is_counted(patch):
    around(patch, MoE, "forward", lambda old, self, x, mask=None: old(self, x))


def count_in_layers(patch, training):
    """Let a layer add to the loads of the step itself, in training or in evaluation mode."""

    def passes(old, self, batch):
        for name, layer in self.state.model.moe_layers().items():
            layer.loads = self.state.moe_layers[name].load_counts
        return old(self, batch)

    def forward(old, self, x, mask=None):
        y, routing = old(self, x, mask)
        if self.training == training and hasattr(self, "loads"):
            self.loads += routing.counts
        return y, routing._replace(counts=torch.zeros_like(routing.counts)) if training else routing

    around(patch, step.ForwardBackward, "__call__", passes)
    around(patch, MoE, "forward", forward)


@leak("test_validation_leaves_no_trace")
def validation_is_counted(patch):
    count_in_layers(patch, training=False)


@leak("test_recompute_counts_once")
def counts_are_added_inside_the_layer(patch):
    count_in_layers(patch, training=True)


@leak("test_recompute_counts_once")
def losses_are_lost_under_recompute(patch):
    def run(old, *args, **kwargs):
        h, routing = old(*args, **kwargs)
        return h, routing and routing._replace(logits=routing.logits.detach())

    around(patch, afmoe, "checkpoint", run)


@leak("test_micro_batches_add_up")
def only_the_last_micro_batch_counts(patch):
    def forward(old, self, *args, **kwargs):
        for layer in self.state.moe_layers.values():
            layer.load_counts.zero_()
        return old(self, *args, **kwargs)

    around(patch, step._Passes, "forward", forward)


@leak("test_micro_batches_add_up")
def router_losses_are_means_of_micro_batches(patch):
    def losses(config, routings, real, scale, **_):
        return router_losses(config, routings, real, scale=0.25 / max(int(real.sum()), 1))

    patch.setattr(step, "router_losses", losses)


@leak("test_micro_batches_add_up")
def z_loss_is_a_mean_of_the_micro_batch(patch):
    def losses(old, hidden, weight, targets, *, scale, z_loss, chunk_tokens):
        own = 1 / max(int((targets != conformance.IGNORE).sum()), 1)
        return old(hidden, weight, targets, scale=scale, z_loss=z_loss * own / scale, chunk_tokens=chunk_tokens)

    around(patch, cross_entropy, "chunked_loss", losses)


@leak("test_counts_of_ranks_add_up")
def counts_are_means_over_rows(patch):
    def forward(old, self, x, mask=None):
        y, routing = old(self, x, mask)
        return y, routing._replace(counts=routing.counts // len(x))

    around(patch, MoE, "forward", forward)


# --- layers -------------------------------------------------------------------------------------------------------


@leak("test_each_layer_moves_by_its_own_counts")
def the_bias_is_never_updated(patch):
    patch.setattr(loop, "build_balance", lambda config: NoBalance())


@leak("test_each_layer_moves_by_its_own_counts")
def the_update_stops_at_the_first_layer(patch):
    for rule in (Smebu, Sign):
        around(patch, rule, "update", lambda old, self, layer, *rest: old(self, layer, *rest) if ".2." in layer else 0)


@leak("test_each_layer_moves_by_its_own_counts")
def layers_share_one_momentum(patch):
    around(patch, Smebu, "update", lambda old, self, layer, *rest: old(self, "all", *rest))


@leak("test_a_model_without_experts_trains")
def some_layer_is_taken_to_have_experts(patch):
    def layers(old, self):
        found = old(self)
        assert found, "no layer to read the number of experts from"
        return found

    around(patch, Afmoe, "moe_layers", layers)


@leak("test_a_layer_without_tokens_rests")
def the_mean_load_may_be_zero(patch):
    def update(self, layer, bias, counts):
        bias.add_(torch.tanh((counts.float().mean() - counts) / counts.float().mean()))

    patch.setattr(Smebu, "update", update)


@leak("test_nothing_but_the_rule_moves_the_bias")
def the_bias_decays_like_a_weight(patch):
    patch.setattr(NoBalance, "update", lambda self, layer, bias, counts: bias.mul_(0.998))


@leak("test_uninitialised_memory_does_not_count")
def initialisation_forgets_the_bias(patch):
    forget(patch, "expert_bias")


def forget(patch, name):
    def init(old, self, generator):
        kept = [getattr(moe, name).clone() for moe in self.moe_layers().values()]
        old(self, generator)
        for moe, values in zip(self.moe_layers().values(), kept, strict=True):
            getattr(moe, name).copy_(values)

    around(patch, Afmoe, "init_weights", init)


# --- scores -------------------------------------------------------------------------------------------------------


def router(patch, score=torch.sigmoid, select=None, weigh=None, normalise=True):
    """Route by another formula: `select` and `weigh` take (logits, scores, bias)."""

    def forward(self, x, bias):
        logits = x @ self.gate.weight.T
        scores = score(logits)
        chosen = (select(logits, scores, bias) if select else scores + bias).topk(self.top_k).indices
        weights = (weigh(logits, scores, bias) if weigh else scores).gather(1, chosen)
        return logits, self.route_scale * (weights / weights.sum(-1, keepdim=True) if normalise else weights), chosen

    patch.setattr(Router, "forward", forward)


SCORES = "test_the_bias_chooses_and_the_scores_weigh"


@leak(SCORES)
def scores_are_a_softmax(patch):
    router(patch, score=lambda logits: logits.softmax(-1))


@leak(SCORES)
def the_sigmoid_is_applied_twice(patch):
    router(patch, score=lambda logits: logits.sigmoid().sigmoid())


@leak(SCORES)
def the_bias_is_added_to_logits(patch):
    router(patch, select=lambda logits, scores, bias: logits + bias)


@leak(SCORES)
def the_bias_is_in_the_weights(patch):
    router(patch, weigh=lambda logits, scores, bias: scores + bias)


@leak(SCORES)
def weights_are_not_normalised(patch):
    router(patch, normalise=False)


@leak(SCORES)
def the_bias_is_ignored(patch):
    router(patch, select=lambda logits, scores, bias: scores)


# --- losses -------------------------------------------------------------------------------------------------------


@leak("test_sequence_loss_is_of_sequences_not_of_the_batch")
def the_sequence_loss_is_of_the_batch(patch):
    around(patch, balance, "sequence_loss", lambda old, x, chosen, real, *_: old(x, chosen, real.view(1, -1)))


@leak("test_sequence_loss_is_of_sequences_not_of_the_batch", "test_micro_batches_add_up")
def the_sequence_loss_is_divided_by_the_rows_once_more(patch):
    around(patch, balance, "sequence_loss", lambda old, x, chosen, real, *_: old(x, chosen, real) / len(real))


@leak("test_the_sequence_loss_is_the_published_one")
def the_sequence_loss_reads_a_softmax(patch):
    def loss(old, logits, chosen, real, *_):
        return old(logits.softmax(-1).logit(), chosen, real)  # whose sigmoid is the softmax

    around(patch, balance, "sequence_loss", loss)


@leak("test_the_sequence_loss_is_the_published_one")
def the_sequence_loss_has_no_gradient(patch):
    around(patch, balance, "sequence_loss", lambda old, x, chosen, real, *_: old(x.detach(), chosen, real))


@leak("test_the_sequence_loss_is_the_published_one")
def the_sequence_loss_is_of_one_layer_only(patch):
    around(
        patch,
        step,
        "router_losses",
        lambda old, config, routings, *rest, **scale: old(config, routings[-1:], *rest, **scale),
    )


@leak("test_the_sequence_loss_is_the_published_one")
def the_sequence_loss_is_a_mean_over_layers(patch):
    around(patch, balance, "sequence_loss", lambda old, *args: old(*args) / 3)


@leak("test_padding_does_not_enter_the_losses")
def padding_is_in_the_losses(patch):
    around(
        patch,
        step,
        "router_losses",
        lambda old, config, routings, real, **rest: old(config, routings, real | True, **rest),
    )


@leak("test_z_loss_has_its_gradient_at_its_scale")
def z_loss_is_switched_off(patch):
    around(patch, cross_entropy, "chunked_loss", lambda old, *args, z_loss, **rest: old(*args, z_loss=0.0, **rest))


@leak("test_z_loss_has_its_gradient_at_its_scale")
def z_loss_is_a_mean_over_all_tokens(patch):
    def losses(old, hidden, weight, targets, z_loss, **rest):
        share = float((targets != conformance.IGNORE).float().mean())
        return old(hidden, weight, targets, z_loss=z_loss * share, **rest)

    around(patch, cross_entropy, "chunked_loss", losses)


@leak("test_router_z_loss_has_its_gradient_at_its_scale")
def router_z_loss_is_divided_by_the_experts(patch):
    around(patch, balance, "router_z_loss", lambda old, logits, real: old(logits, real) / logits.shape[-1])


# --- Muon on expert stacks ----------------------------------------------------------------------------------------

MUON = (
    "test_muon_steps_each_matrix_of_each_expert_alone",
    "test_muon_step_of_an_expert_depends_on_it_alone",
)


@leak(*MUON)
def the_stack_is_one_matrix(patch):
    patch.setattr(muon, "as_matrices", lambda name, tensor: tensor.view(1, -1, tensor.shape[-1]))


@leak(MUON[0])
def gate_and_up_are_one_matrix(patch):
    patch.setattr(muon, "as_matrices", lambda name, tensor: tensor.view(-1, *tensor.shape[-2:]))


@leak(*MUON)
def the_stack_shares_one_norm(patch):
    def orthogonalize(old, matrices, steps, **how):
        shares = matrices.flatten(1).norm(dim=1) / matrices.norm()
        return old(matrices, steps, **how) * shares.view(-1, 1, 1).to(torch.bfloat16)

    around(patch, muon, "orthogonalize", orthogonalize)


@leak(MUON[0])
def experts_are_left_to_adamw(patch):
    around(patch, build, "is_hidden_matrix", lambda old, name, tensor: tensor.ndim == 2 and old(name, tensor))


@pytest.mark.parametrize("name", LEAKS)
def test_leak_is_caught(name, monkeypatch):
    function, tests = LEAKS[name]
    function(monkeypatch)
    for test in tests:
        with pytest.raises(AssertionError):
            getattr(conformance, test)(FreeholdAdapter)


def test_every_test_has_a_leak_it_catches():
    tests = {name for name, _ in inspect.getmembers(conformance, inspect.isfunction) if name.startswith("test_")}
    assert {test for _, caught in LEAKS.values() for test in caught} == tests
