"""On an accelerator nothing waits for the device between log points: figures are read there, steps judged there."""

import contextlib
import sys

import pytest
import tiny
import torch
from test_loop import make
from torch.utils._python_dispatch import TorchDispatchMode

from freehold.core.log import read_metrics
from freehold.losses.cross_entropy import CrossEntropy
from freehold.model import masks, ops
from freehold.model.afmoe import Afmoe
from freehold.optim.config import OptimConfig, SignConfig, SmebuConfig
from freehold.trainer import guards
from freehold.trainer.calendar import Due
from freehold.trainer.config import CollapseConfig, SpikeConfig, TrainerConfig
from freehold.trainer.errors import TrainingError
from freehold.trainer.loop import Trainer

READS = ("item", "tolist", "cpu", "numpy", "__float__", "__int__", "__bool__", "__index__", "nonzero")
OPERATORS = {"_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "bincount", "_unique2"}
LOSSES = {"sequence_loss": 1e-3, "router_z_loss": 1e-3}


def deferred(folder, **changes):
    """Return the trainer of test_loop as it would run on an accelerator."""
    trainer = make(folder, **changes)
    return Trainer(trainer.job, trainer.log, seed=0, deferred=True)


def settings(**changes):
    return TrainerConfig(dtype="float32", threads=1, log_every_steps=4, checkpoint_every_steps=100, **changes)


class Reads(TorchDispatchMode):
    """Counts what would wait for a device, with the place of ours that asks.

    The model's forms for CPUs are exempt: they look at ids to choose what to compute, where those for CUDA do not.
    """

    def __init__(self):
        super().__init__()
        self.places = []

    def note(self, what):
        frame = sys._getframe(2)
        while frame is not None:
            file = frame.f_code.co_filename
            if "/freehold/" in file:
                if "/freehold/model/" not in file:
                    self.places.append(f"{what} at {file.rpartition('/')[2]}:{frame.f_lineno}")
                return
            frame = frame.f_back

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket.__name__ in OPERATORS:
            self.note(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


@contextlib.contextmanager
def counted(patch):
    with Reads() as reads, patch.context() as methods:
        for name in READS:
            old = getattr(torch.Tensor, name)

            def read(tensor, *args, _old=old, _name=name, **kwargs):
                reads.note(_name)
                return _old(tensor, *args, **kwargs)

            methods.setattr(torch.Tensor, name, read)
        yield reads


@pytest.mark.parametrize("balance", [SmebuConfig(**LOSSES), SignConfig(), SmebuConfig()])
@pytest.mark.parametrize("matrices", ["muon", "adamw"])
def test_no_step_reads_the_device(tmp_path, monkeypatch, balance, matrices):
    optim = OptimConfig(matrices=matrices, weight_decay=0.1)
    trainer = deferred(tmp_path, balance=balance, trainer=settings(), micro=2, optim=optim)
    with counted(monkeypatch) as reads:
        for _ in range(3):
            trainer.train_step(trainer.next_batch())
    assert reads.places == []
    trainer.catch_up()


@pytest.mark.parametrize(
    "guard", [{"spike": SpikeConfig(action="skip")}, {"collapse": CollapseConfig(action="raise_rate")}]
)
def test_acting_guard_costs_one_read_a_step(tmp_path, monkeypatch, guard):
    # On a CPU the fused optimizer reads a step count that is in its own memory: only the loop's reads are counted.
    trainer, steps = make(tmp_path, trainer=settings(**guard), micro=2), 3
    trainer.forward_backward.deferred = True
    due = Due(log=False, validate=False, save=False, phase=None, stop=False)
    with counted(monkeypatch) as reads:
        for _ in range(steps):
            result = trainer.train_step(trainer.next_batch())
            trainer.look_back(due, result, skipped=False)
    ours = [place for place in reads.places if "adamw.py" not in place and "cpu.py" not in place]
    assert len(ours) <= steps, ours
    assert result.host_loads().sum(1).tolist() == [64 * 2] * 3


@pytest.mark.parametrize("flex", [False, True])
def test_model_on_a_device_asks_for_no_value(monkeypatch, flex):
    """The meta device has shapes and no values: whatever asks for one raises. Forms are those that CUDA takes."""
    monkeypatch.setattr(ops, "grouped_swiglu", lambda *tensors: ops.grouped_swiglu_gemm(*tensors[:4]))
    monkeypatch.setattr(ops, "_fused", lambda x: True)
    monkeypatch.setattr(masks, "takes_flex", lambda device, tokens: flex)
    with torch.device("meta"):
        model = Afmoe(tiny.config(vocab_size=64)).to(torch.bfloat16).train()
        ids, scale = torch.zeros(2, 256, dtype=torch.int64), torch.ones(())
        documents = torch.zeros_like(ids)
        if flex:
            found = masks.build_masks(model.config, torch.empty(2, 256, 16), None, documents)
            assert all(mask.flex is not None for mask in found.values())
            return
        hidden = model.hidden(ids, document_ids=documents, routings=[])
        loss = CrossEntropy(1e-6, 16)(hidden, model.lm_head.weight, {"targets": ids}, {"targets": scale}).total
        loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_counter_sees_the_reads_of_an_immediate_step(tmp_path, monkeypatch):
    trainer = make(tmp_path)
    with counted(monkeypatch) as reads:
        trainer.train_step(trainer.next_batch())
    assert any("step.py" in place for place in reads.places)


def test_reads_do_not_grow_with_steps_between_log_points(tmp_path, monkeypatch):
    def reads_of(steps, folder):
        trainer = deferred(folder, trainer=settings())
        with counted(monkeypatch) as reads:
            for _ in range(steps):
                trainer.train_step(trainer.next_batch())
            trainer.catch_up()
        return len(reads.places)

    assert reads_of(2, tmp_path / "a") == reads_of(6, tmp_path / "b") > 0


def test_deferred_run_ends_like_an_immediate_one(tmp_path):
    exact = settings().model_copy(update={"dtype": "float64"})  # so that a difference is one of meaning
    torch.set_default_dtype(torch.float64)
    try:
        one, two = make(tmp_path / "a", trainer=exact), deferred(tmp_path / "b", trainer=exact)
    finally:
        torch.set_default_dtype(torch.float32)
    one.run()
    two.run()
    a, b = (read_metrics(tmp_path / name / "metrics.jsonl") for name in "ab")
    assert [row["step"] for row in a] == [row["step"] for row in b]
    for mine, theirs in zip(a, b, strict=True):
        for name in ("loss/mean", "loss/z", "optim/grad_norm", "moe/entropy"):
            assert mine[name] == pytest.approx(theirs[name], rel=1e-9), name
        assert sum(mine["moe/load/1"]) == sum(theirs["moe/load/1"])
    for name, master in one.state.masters.items():
        assert torch.allclose(master, two.state.masters[name], rtol=1e-9, atol=1e-12), name


def test_device_skips_a_step_that_is_not_finite(tmp_path, capsys):
    trainer = deferred(tmp_path, quiet=False, trainer=settings(), micro=1)
    trainer.train_step(trainer.next_batch())
    before = {part: {n: t.clone() for n, t in x.items()} for part, x in trainer.checkpoints.tensors().items()}
    hook = trainer.state.parameters["lm_head.weight"].register_hook(lambda gradient: gradient * float("nan"))
    trainer.train_step(trainer.next_batch())
    hook.remove()
    for part, tensors in trainer.checkpoints.tensors().items():
        if part not in ("collapse", "spike"):
            for name, tensor in tensors.items():
                assert torch.equal(tensor, before[part][name]), f"{part}/{name}"
    trainer.train_step(trainer.next_batch())
    assert trainer.progress.skipped == []
    trainer.catch_up()
    assert (trainer.progress.skipped, trainer.step) == ([1], 3)
    assert trainer.job.order.documents(1)[0].document_id in capsys.readouterr().err
    assert sum(trainer.monitor.take()["moe/load/1"]) == 2 * 64 * 2


def test_deferred_run_gives_up_at_a_log_point(tmp_path, monkeypatch):
    monkeypatch.setattr(guards, "MAX_SKIPPED_STEPS", 3)
    trainer = deferred(tmp_path, trainer=settings())
    trainer.state.parameters["lm_head.weight"].data[3] = float("nan")
    with pytest.raises(TrainingError, match="3 steps in a row"):
        trainer.run()
    assert (trainer.step, trainer.progress.skipped) == (4, [0, 1, 2])


def test_guard_with_an_action_looks_at_each_step(tmp_path):
    acting = settings(spike=SpikeConfig(action="skip"))
    assert make(tmp_path, trainer=acting).guards.acts
    assert not make(tmp_path, trainer=settings()).guards.acts
