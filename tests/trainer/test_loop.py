import dataclasses
import json
import os
import shutil
import signal

import numpy as np
import pytest
import torch

from freehold.checkpoint import dcp
from freehold.core.errors import ArtifactError, CheckpointError
from freehold.core.log import Log, read_metrics
from freehold.data.loader import PhaseRows, Source, TextOrder
from freehold.data.packing import IGNORE, PADDING, Batch
from freehold.kernels import cpu as kernels
from freehold.model.config import ModelConfig
from freehold.optim.config import OptimConfig, PhaseConfig, SmebuConfig
from freehold.optim.schedule import Schedule
from freehold.trainer import guards
from freehold.trainer.config import TrainerConfig
from freehold.trainer.errors import Interrupted, TrainingError
from freehold.trainer.job import Job
from freehold.trainer.loop import Trainer
from freehold.trainer.monitor import gemm_flops_per_s
from freehold.trainer.validate import bits_per_byte, held_out

MODEL = ModelConfig(
    vocab_size=64, hidden_size=16, intermediate_size=32, moe_intermediate_size=16, num_hidden_layers=4,
    num_dense_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=8, num_experts=4,
    num_experts_per_tok=2, sliding_window=8, max_position_embeddings=64,
)  # fmt: skip
PHASES = {
    "stable": PhaseConfig(steps=5, warmup_steps=2, checkpoint="truebase", stage_type="TrueBase"),
    "anneal": PhaseConfig(steps=3, shape="linear", end=0.0, checkpoint="base", stage_type="Base"),
}


def source(name="a", seed=0):
    g = np.random.default_rng(seed)
    lengths = g.integers(5, 40, 30)
    tokens = np.concatenate([np.append(g.integers(32, 64, n - 1), 1) for n in lengths]).astype(np.uint16)
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    return Source(name, tokens, starts, lengths, [f"{name}{i}" for i in range(30)])


def make(folder, quiet=True, micro=4, **changes):
    order = TextOrder(
        {"a": source()}, [PhaseRows(n, p.steps, {}) for n, p in PHASES.items()],
        context_tokens=16, sequences=4, seed=0, separator=1,
    )  # fmt: skip
    job = Job(
        folder=folder,
        model=MODEL,
        trainer=TrainerConfig(dtype="float32", threads=1, checkpoint_every_steps=2, log_every_steps=1, keep_last=2),
        optim=OptimConfig(muon_lr=0.02, lr=1e-2),
        balance=SmebuConfig(),
        schedule=Schedule(PHASES),
        order=order,
        micro_sequences=micro,
        stage="pretrain",
        parent="",
        facts={"tokenizer_sha256": "x"},
    )
    return Trainer(dataclasses.replace(job, **changes), Log(folder, quiet=quiet), seed=0)


def hashes(folder):
    return {p.parent.name: json.loads(p.read_text())["content_sha256"] for p in folder.rglob("manifest.json")}


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    folder = tmp_path_factory.mktemp("straight")
    make(folder).run()
    return folder


def test_loss_falls_and_named_checkpoints_are_kept(straight):
    rows = read_metrics(straight / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 9))
    assert rows[-1]["loss/mean"] < rows[0]["loss/mean"]
    assert set(hashes(straight)) == {"truebase", "base", "step_00000006", "step_00000008"}
    facts = dcp.check(straight / "truebase")
    assert (facts["step"], facts["phase"], facts["stage_type"], facts["tokens"]) == (5, "stable", "TrueBase", 5 * 64)
    assert sum(rows[0]["moe/load/1"]) == 64 * 2


@pytest.mark.parametrize("killed_after", [1, 2, 5, 7])
def test_killed_and_resumed_ends_with_the_same_bits(straight, tmp_path, killed_after):
    class Killed(Exception):
        pass

    trainer = make(tmp_path)
    whole_step = trainer.train_step

    def step_then_die(batch):
        if trainer.step == killed_after:
            raise Killed
        return whole_step(batch)

    trainer.train_step = step_then_die
    with pytest.raises(Killed):
        trainer.run()
    make(tmp_path).run()
    assert hashes(tmp_path) == hashes(straight)
    assert [r["step"] for r in read_metrics(tmp_path / "metrics.jsonl")] == list(range(1, 9))


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"data": {"a": "1", "b": "3"}}, r"(?s): data\n.*other b\n"),
        ({"data": {"a": "1"}}, "other b"),
        ({"seed": 1}, r"(?s): seed\n.*0\n.*1\n"),
        ({"tokenizer_sha256": "y"}, r"(?s)tokenizer_sha256.*x.*y"),
        ({"order": {"kind": "buffer"}}, "other kind"),
    ],
)
def test_resume_refuses_other_data(tmp_path, changed, says):
    facts = {"tokenizer_sha256": "x", "seed": 0, "order": {"kind": "stream"}, "data": {"a": "1", "b": "2"}}
    trainer = make(tmp_path, facts=facts)
    trainer.train_step(trainer.job.order.batch(0))
    trainer.checkpoints.save_step()
    assert make(tmp_path, facts={**facts, "more": 1}).restore()
    with pytest.raises(CheckpointError, match=says):
        make(tmp_path, facts={**facts, **changed}).restore()


def test_resume_with_other_operators_warns(tmp_path, capsys, monkeypatch):
    trainer = make(tmp_path)
    trainer.train_step(trainer.job.order.batch(0))
    trainer.checkpoints.save_step()
    monkeypatch.setattr(kernels, "operators", lambda dtype: "others")
    assert make(tmp_path, quiet=False).restore()
    assert f"ran on {trainer.checkpoints.settings['operators']}, the rest will on others" in capsys.readouterr().err


def test_interrupt_saves_and_leaves_the_same_bits(straight, tmp_path):
    trainer = make(tmp_path)
    whole_step = trainer.train_step

    def step_then_ask(batch):
        values = whole_step(batch)
        if trainer.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return values

    trainer.train_step = step_then_ask
    with pytest.raises(Interrupted):
        trainer.run()
    assert (tmp_path / "checkpoints" / "step_00000003").exists()
    make(tmp_path).run()
    assert hashes(tmp_path) == hashes(straight)


def test_resume_skips_damaged_checkpoint(straight, tmp_path, capsys):
    shutil.copytree(straight / "checkpoints", tmp_path / "checkpoints")
    shard = tmp_path / "checkpoints" / "step_00000008" / "state" / "__0_0.distcp"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    (tmp_path / "checkpoints" / "step_00000009").mkdir()
    trainer = make(tmp_path, quiet=False)
    assert trainer.restore()
    assert trainer.step == 6
    said = capsys.readouterr().err
    assert "step_00000008/state/__0_0.distcp" in said
    assert "step_00000009" in said


def test_micro_batches_equal_one_batch(tmp_path):
    whole, parts = make(tmp_path / "a"), make(tmp_path / "b", micro=1)
    batch = whole.job.order.batch(0)
    one, two = whole.train_step(batch), parts.train_step(batch)
    assert one["loss/mean"] == pytest.approx(two["loss/mean"], rel=1e-6)
    for name, master in whole.state.masters.items():
        assert torch.allclose(master, parts.state.masters[name], atol=2e-3), name
    for name, layer in whole.state.moe_layers.items():
        assert torch.equal(layer.load_counts, parts.state.moe_layers[name].load_counts)
        assert torch.equal(layer.expert_bias, parts.state.moe_layers[name].expert_bias)


def test_not_finite_step_changes_nothing_and_names_documents(tmp_path, capsys):
    trainer = make(tmp_path, quiet=False)
    trainer.state.parameters["lm_head.weight"].data[3] = float("nan")
    before = {n: m.detach().clone() for n, m in trainer.state.masters.items()}
    trainer.train_step(trainer.job.order.batch(0))
    assert trainer.progress.skipped == [0]
    assert all(torch.equal(before[n].nan_to_num(), m.nan_to_num()) for n, m in trainer.state.masters.items())
    assert trainer.job.order.documents(0)[0].document_id in capsys.readouterr().err
    assert all(float(layer.expert_bias.abs().max()) == 0 for layer in trainer.model.moe_layers().values())


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", ["activations", "gradient"])
def test_poisoned_micro_batch_leaves_no_trace(tmp_path, capsys, place, poison):
    poisoned, spared = make(tmp_path / "a", micro=1, quiet=False), make(tmp_path / "b", micro=1)
    calls = []

    def third_is_bad(value):
        calls.append(value)
        return value * poison if len(calls) == 3 else value

    if place == "activations":  # so the router sees it too, and what it then counts must not count
        hook = poisoned.model.model.embed_tokens.register_forward_hook(lambda _, __, output: third_is_bad(output))
    else:
        hook = poisoned.state.parameters["lm_head.weight"].register_hook(third_is_bad)
    poisoned.train_step(poisoned.job.order.batch(0))
    hook.remove()
    assert len(calls) == 4
    assert poisoned.progress.skipped == [0]
    said = capsys.readouterr().err
    assert all(f"{p.source}:{p.document_id}" in said for p in poisoned.job.order.documents(0))
    assert poisoned.monitor.take() == {}
    spared.skip_step(spared.job.order.batch(0))
    for trainer in (poisoned, spared):
        trainer.train_step(trainer.job.order.batch(1))
    for part, tensors in poisoned.checkpoints.tensors().items():
        for name, tensor in tensors.items():
            assert torch.equal(tensor.nan_to_num(), spared.checkpoints.tensors()[part][name].nan_to_num()), (
                f"{part}/{name}"
            )
    assert poisoned.monitor.take() == spared.monitor.take()
    assert (poisoned.step, poisoned.progress.tokens, poisoned.progress.skipped) == (
        spared.step,
        spared.progress.tokens,
        spared.progress.skipped,
    )


def test_gives_up_after_steps_without_finite_loss(tmp_path, monkeypatch):
    monkeypatch.setattr(guards, "MAX_SKIPPED_STEPS", 3)
    trainer = make(tmp_path, trainer=TrainerConfig(dtype="float32", threads=1))
    trainer.state.parameters["lm_head.weight"].data[3] = float("nan")
    with pytest.raises(TrainingError, match="3 steps in a row"):
        trainer.run()
    assert trainer.step == 2


def test_broken_weights_are_not_saved(tmp_path, capsys):
    trainer = make(tmp_path, quiet=False)
    good = trainer.train_step

    def breaks_at_the_third(batch):
        if trainer.step == 2:
            trainer.state.masters["lm_head.weight"].data[3] = float("inf")
        return good(batch)

    trainer.train_step = breaks_at_the_third
    with pytest.raises(TrainingError, match=r"weights are not finite\n *where: *pretrain step 5"):
        trainer.run()
    assert "step 4 was not saved" in capsys.readouterr().err
    assert [p.name for p in sorted((tmp_path / "checkpoints").iterdir())] == [dcp.step_folder(tmp_path, 2).name]
    assert not (tmp_path / "truebase").exists()


def test_rolled_back_steps_are_not_counted_as_not_finite(tmp_path, monkeypatch):
    monkeypatch.setattr(guards, "MAX_SKIPPED_STEPS", 3)
    trainer = make(tmp_path, trainer=TrainerConfig(dtype="float32", threads=1))
    trainer.progress.rollbacks = [{"first_step": 0, "end_step": 2, "layers": [1]}]
    for step in range(2):
        trainer.skip_step(trainer.job.order.batch(step))
    trainer.state.parameters["lm_head.weight"].data[3] = float("nan")
    for step in range(2, 4):
        trainer.train_step(trainer.job.order.batch(step))
    with pytest.raises(TrainingError, match="3 steps in a row"):
        trainer.train_step(trainer.job.order.batch(4))


def test_router_metrics_by_layer(tmp_path):
    trainer = make(tmp_path, micro=1)
    layer = trainer.model.moe_layers()["model.layers.2.mlp"]
    seen = []
    hook = layer.router.register_forward_hook(lambda _, __, output: seen.append(float(output[0].detach().max())))
    loads = []
    for step in range(2):
        trainer.train_step(trainer.job.order.batch(step))
        loads.append(trainer.state.moe_layers["model.layers.2.mlp"].load_counts.double())
    hook.remove()
    values = trainer.monitor.take()
    share = sum(loads) / sum(loads).sum()
    assert values["moe/load/2"] == sum(loads).tolist()
    assert values["moe/max_vio/2"] == pytest.approx(sum(float(x.max() / x.mean()) - 1 for x in loads) / 2)
    assert values["moe/entropy/2"] == pytest.approx(float(-(share * share.log()).sum() / np.log(4)))
    assert values["moe/dead/2"] == 0
    assert values["moe/bias_abs_max/2"] == float(layer.expert_bias.abs().max()) > 0
    assert values["moe/router_logit_max/2"] == max(seen)
    assert len(seen) == 2 * 4
    for name, over in (("bias_abs_max", max), ("router_logit_max", max), ("dead", sum)):
        assert values[f"moe/{name}"] == over(values[f"moe/{name}/{n}"] for n in (1, 2, 3))
    for name in ("max_vio", "entropy"):
        assert values[f"moe/{name}"] == pytest.approx(sum(values[f"moe/{name}/{n}"] for n in (1, 2, 3)) / 3)
    assert trainer.monitor.take() == {}


@pytest.mark.parametrize("background", [False, True])
def test_failed_save_costs_no_other_checkpoint(tmp_path, monkeypatch, background):
    write = dcp.save

    def full_once(folder, *rest):
        if folder.name == "step_00000004":
            raise ArtifactError("No space left on device", where=folder)
        return write(folder, *rest)

    monkeypatch.setattr(dcp, "save", full_once)
    config = {"dtype": "float32", "threads": 1, "checkpoint_every_steps": 2, "keep_last": 9}
    trainer = make(tmp_path, trainer=TrainerConfig(**config, background_save=background))
    trainer.run()
    assert set(hashes(tmp_path)) == {"truebase", "base", "step_00000002", "step_00000006", "step_00000008"}


def test_matrix_rate_is_measured_on_the_device(monkeypatch):
    product, seen = torch.mm, []
    monkeypatch.setattr(torch, "mm", lambda a, b: (seen.append(a.device.type), product(a, b))[1])
    gemm_flops_per_s(torch.float32, torch.device("meta"), size=8, seconds=1e-4)
    assert set(seen) == {"meta"}


def test_single_expert_is_even(tmp_path):
    trainer = make(tmp_path, model=MODEL.model_copy(update={"num_experts": 1, "num_experts_per_tok": 1}))
    trainer.train_step(trainer.job.order.batch(0))
    values = trainer.monitor.take()
    assert (values["moe/entropy"], values["moe/max_vio"], values["moe/dead"]) == (1.0, 0.0, 0)


def test_validation_is_not_counted_as_load(tmp_path):
    trainer = make(tmp_path)
    held = held_out(source(seed=1), np.full(30, 50), 16, 100, begin=1)
    bits_per_byte(trainer.model, {"a": held})
    assert all(int(layer.load_counts.sum()) == 0 for layer in trainer.state.moe_layers.values())
    assert trainer.model.training


def test_padding_is_not_counted_as_load(tmp_path):
    trainer = make(tmp_path)
    ids = np.full((4, 16), 40)
    documents = np.zeros((4, 16), dtype=np.int32)
    documents[:, 10:] = PADDING
    targets = np.where(documents == PADDING, IGNORE, 41)
    trainer.train_step(Batch(ids, targets, documents))
    for layer in trainer.state.moe_layers.values():
        assert int(layer.load_counts.sum()) == 4 * 10 * 2


def test_held_out_reads_every_token_once(tmp_path):
    text = source(seed=2)
    held = held_out(text, np.full(30, 50), 16, 0, begin=1)
    targets = held.batch.targets[held.batch.targets != IGNORE]
    assert sorted(targets) == sorted(text.tokens)
    assert held.text_bytes == 30 * 50
    trainer = make(tmp_path)
    bits = bits_per_byte(trainer.model, {"a": held})
    assert 5.5 * len(text.tokens) / 1500 < bits["val/bpb"] < 6.6 * len(text.tokens) / 1500
    assert bits["val/bpb"] == bits["val/bpb/a"]


def test_restore_of_step_zero_leaves_nothing_behind(tmp_path):
    trainer = make(tmp_path)
    trainer.checkpoints.save(dcp.step_folder(tmp_path / "checkpoints", 0))
    batches = [trainer.job.order.batch(step) for step in range(2)]
    first = [trainer.train_step(batch) for batch in batches]
    state = {
        part: {k: v.clone() for k, v in tensors.items()} for part, tensors in trainer.checkpoints.tensors().items()
    }
    assert trainer.restore()
    assert trainer.step == 0
    assert not trainer.state.optimizers.state_dict()
    assert [trainer.train_step(batch) for batch in batches] == first
    for part, tensors in trainer.checkpoints.tensors().items():
        assert tensors.keys() == state[part].keys()
        assert all(torch.equal(t.nan_to_num(), state[part][k].nan_to_num()) for k, t in tensors.items()), part


def test_checkpoint_of_another_model_is_refused(straight, tmp_path):
    shutil.copytree(straight / "checkpoints", tmp_path / "checkpoints")
    with pytest.raises(CheckpointError, match="another shape"):
        make(tmp_path, model=MODEL.model_copy(update={"intermediate_size": 48})).restore()
    with pytest.raises(CheckpointError, match="missing"):
        make(tmp_path, model=MODEL.model_copy(update={"num_dense_layers": 2})).restore()
