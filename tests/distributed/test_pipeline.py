"""Stages on 2 and 4 processes give the loss, the gradients and the expert loads of one process, bit for bit."""

from __future__ import annotations

import pytest
import sharded_case as case
import torch
import torch.distributed as dist

from freehold.losses.attach import attach_loss
from freehold.parallel import pipeline
from freehold.parallel.pipeline import Pipeline, keep_layers, stage_layers


def staged(stages, micro_rows, static=True, steps=2, attach=attach_loss):
    """Take the gradient of the batch through stages, twice; return the loss of a step and what is held here.

    One schedule serves all steps, so buffers that keep something of the step before would show.
    """
    model, whole, usual = case.build(case.config()), case.batch(), pipeline.PipelineStage
    if not static:
        pipeline.PipelineStage = lambda *args, input_args, output_args, **rest: usual(*args, **rest)
    try:
        pipe = Pipeline(
            model.config,
            dist.group.WORLD,
            stages=stages,
            micro_batches=len(whole.ids) // micro_rows,
            micro_shape=(micro_rows, case.TOKENS),
            dtype=torch.float64,
            device=torch.device("cpu"),
        )
    finally:
        pipeline.PipelineStage = usual
    keep_layers(model, pipe.stages.values())
    for _ in range(steps):
        losses, loads = [], {}
        model.zero_grad()

        def forward(x, documents, layers, losses=losses, loads=loads):
            routings = []
            hidden = model.hidden(x, document_ids=documents, routings=routings, layers=layers)
            case.add_loads(loads, model, routings, layers)
            if not routings:
                return hidden
            losses.append(case.routing_loss(routings, documents, whole))
            return attach(hidden, losses[-1])

        def loss(hidden, targets, losses=losses):
            losses.append(case.head_loss(model, hidden, targets, whole))
            return losses[-1]

        pipe.step(*whole, forward=forward, loss=loss)
    total = torch.stack([x.detach().double() for x in losses]).sum() if losses else torch.zeros((), dtype=torch.float64)
    dist.all_reduce(total)
    return total.item(), case.gradients(model), loads, list(model.state_dict())


def together(parts):
    """Join what the ranks hold; nothing may be held twice."""
    gradients, loads = {}, {}
    for _, some, counts, _ in parts:
        assert not some.keys() & gradients.keys()
        gradients |= some
        loads |= counts
    return case.Result(parts[0][0], gradients, loads)


@pytest.mark.parametrize(("size", "stages", "micro_rows"), [(2, 2, 1), (2, 2, 2), (2, 4, 1), (4, 4, 1)])
def test_stages_equal_one_process(ranks, size, stages, micro_rows):
    parts = ranks(size).run(staged, stages, micro_rows)
    loss, worst, same_loads = case.difference(together(parts), case.one_process(case.config(), micro_rows))
    assert loss < 1e-13
    assert worst == 0  # nothing is added in another order
    assert same_loads
    names = [name for part in parts for name in part[3]]
    assert sorted(names) == sorted(case.build(case.config()).state_dict())


def without(hidden, loss):
    return hidden


@pytest.mark.parametrize(("wrong", "where"), [({"static": False, "steps": 1}, "loads"), ({"attach": without}, "worst")])
def test_this_test_would_see(ranks, wrong, where):
    parts = ranks(2).run(call, wrong)
    _, worst, same_loads = case.difference(together(parts), case.one_process(case.config(), 1))
    assert (worst > 1e-3) == (where == "worst")
    assert same_loads == (where != "loads")


def call(settings):
    return staged(2, 1, **settings)


@pytest.mark.parametrize(("layers", "stages"), [(6, 4), (6, 6), (60, 16), (7, 2), (5, 1)])
def test_layers_are_cut_into_even_runs(layers, stages):
    runs = stage_layers(layers, stages)
    assert [number for run in runs for number in run] == list(range(layers))
    assert len(runs) == stages
    assert max(map(len, runs)) - min(map(len, runs)) <= 1


def test_a_stage_computes_its_part_of_the_model_alone():
    shape, whole = case.config(), case.batch()
    model = case.build(shape)
    expected = model.hidden(whole.ids, document_ids=whole.documents)
    h, names = whole.ids, []
    for layers in stage_layers(shape.num_hidden_layers, 3):
        part = case.build(shape)
        keep_layers(part, [layers])
        h = part.hidden(h, document_ids=whole.documents, layers=layers)
        names += part.state_dict()
    assert torch.equal(h, expected)
    assert sorted(names) == sorted(model.state_dict())
