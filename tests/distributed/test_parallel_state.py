"""A sharded run starts from, keeps and reads what one process would."""

import dataclasses

import numpy as np
import torch
import toy

from freehold.core.artifact import write_json
from freehold.data.packing import IGNORE
from freehold.model.afmoe import Afmoe
from freehold.trainer.collapse import Alarm
from freehold.trainer.loop import Trainer
from freehold.trainer.validate import HeldOut, bits_per_byte

DEGREES = {"replicate": 2, "shard": 2, "expert": 2}
UNEVEN = {"shard": 4}


def first_values(parallel):
    trainer = Trainer(toy.make(parallel, "float32").job, toy.Log(quiet=True), seed=7)
    return {n: toy.whole(trainer, n, m) for n, m in trainer.state.masters.items()}


def test_first_values_are_those_of_one_process(ranks):
    model = Afmoe(toy.shape())
    model.init_weights(torch.Generator().manual_seed(7))
    for degrees in (DEGREES, UNEVEN):
        for found in ranks(4).run(first_values, degrees):
            for name, parameter in model.named_parameters():
                assert np.array_equal(found[name], parameter.detach().double().numpy()), name


def taken_and_given(parallel):
    """Take a step, gather the state, hand it to a fresh trainer; return whether that one's parts are the same bits."""
    trainer, other = toy.make(parallel), toy.make(parallel)
    trainer.train_step(toy.part(trainer, toy.batches()[0]))
    other.train_step(toy.part(other, toy.batches()[1]))
    state = trainer.checkpoints.tensors()
    whole = {part: {n: trainer.state.gathered(t) for n, t in tensors.items()} for part, tensors in state.items()}
    other.checkpoints.adopt(whole, trainer.job.folder)
    # What the detectors remember is for `restore` to adopt: it belongs to a run, not to weights.
    mine, theirs = (
        {p: t for p, t in x.checkpoints.tensors().items() if p not in ("collapse", "spike")} for x in (trainer, other)
    )
    keys = all(mine[part].keys() == theirs[part].keys() for part in mine)
    pairs = [
        [trainer.state.local(tensor).detach().numpy() for tensor in (found, theirs[part][name])]
        for part, tensors in mine.items()
        for name, found in tensors.items()
    ]
    return keys and all(np.array_equal(*pair, equal_nan=pair[0].dtype.kind == "f") for pair in pairs)


def test_state_goes_through_whole_tensors_and_back(ranks):
    assert all(ranks(4).run(taken_and_given, DEGREES))
    assert all(ranks(4).run(taken_and_given, UNEVEN))


def known_of_roll_backs(folder):
    trainer = toy.make({"shard": 2})
    mine = folder / str(trainer.world.rank)
    mine.mkdir()
    if trainer.world.is_main:
        write_json(mine / "rollbacks.json", {"rollbacks": [{"first_step": 1, "end_step": 2, "layers": []}]})
    trainer.checkpoints.job = dataclasses.replace(trainer.job, folder=mine)
    trainer.restore()
    return [trainer.progress.rolled_back(step) for step in range(3)]


def test_ranks_skip_the_same_steps_when_one_is_behind(ranks, tmp_path):
    assert ranks(2).run(known_of_roll_backs, tmp_path) == [[False, True, False]] * 2


def validated(parallel, rows):
    trainer = toy.make(parallel)
    batch = toy.batches()[0]
    held = HeldOut(batch.rows(0, rows), 100)
    before = bits_per_byte(trainer.model, {"a": held}, trainer.world, rows=1)
    trainer.train_step(toy.part(trainer, toy.batches()[1]))
    return before, bits_per_byte(trainer.model, {"a": held}, trainer.world, rows=1)


def test_validation_is_shared_out_and_follows_the_weights(ranks):
    expected = validated({}, 6)
    assert expected[0] != expected[1]
    for found in ranks(4).run(validated, DEGREES, 6):
        for mine, theirs in zip(found, expected, strict=True):
            assert np.isclose(mine["val/bpb"], theirs["val/bpb"], rtol=1e-9)


def redrawn(parallel):
    trainer = toy.make(parallel)
    trainer.train_step(toy.part(trainer, toy.batches()[0]))
    layer = next(iter(trainer.state.moe_layers))
    torch.manual_seed(3)
    trainer.state.reinitialise(Alarm(layer, "dead", 1, 0, (1, 6), 0.0), trainer.balance.state_dict())
    state = trainer.checkpoints.tensors()
    names = {n: t for part in ("model", "optimizer") for n, t in state[part].items() if n.startswith(layer)}
    return {n: trainer.state.gathered(t).detach().numpy() for n, t in names.items()}


def test_routing_is_redrawn_as_in_one_process(ranks):
    expected = redrawn({})
    stack = next(n for n in expected if n.endswith("experts.down_proj"))
    assert np.abs(expected[stack][1]).max() < 0.26 < np.abs(expected[stack][2]).max()
    for found in ranks(4).run(redrawn, DEGREES):
        for name, values in expected.items():
            assert np.allclose(found[name], values, rtol=1e-9, atol=1e-12), name


def test_the_toy_batches_are_hard():
    for batch in toy.batches():
        per_row = (batch.targets != IGNORE).sum(1)
        assert per_row[0] == 0
        assert len(set(per_row)) > 3
