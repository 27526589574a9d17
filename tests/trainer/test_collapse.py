"""Routing that collapses: noticed early, never in a healthy run; each remedy cures it, and survives a kill."""

from __future__ import annotations

import functools
import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from freehold.checkpoint import dcp
from freehold.core.artifact import write_json
from freehold.core.log import Log, read_metrics
from freehold.data.loader import PhaseRows, Source, TextOrder
from freehold.data.packing import Batch
from freehold.model.config import ModelConfig
from freehold.optim.config import OptimConfig, PhaseConfig, SmebuConfig
from freehold.optim.schedule import Schedule
from freehold.trainer import collapse, guards, monitor
from freehold.trainer.checkpoints import ROLLBACKS
from freehold.trainer.collapse import Alarm, CollapseDetector
from freehold.trainer.config import CollapseConfig, TrainerConfig
from freehold.trainer.errors import TrainingError
from freehold.trainer.guards import RollBack
from freehold.trainer.job import Job
from freehold.trainer.loop import Trainer

LAYERS = ["model.layers.1.mlp", "model.layers.2.mlp"]


def watch(detector: CollapseDetector, loads: np.ndarray, first: int = 0) -> list[Alarm]:
    """Show the detector loads [steps, layers, E]; return every alarm."""
    alarms = []
    for step, load in enumerate(loads, first):
        alarms += detector.watch(step, np.asarray(load))
    return alarms


def detector(**config: Any) -> CollapseDetector:
    return CollapseDetector(CollapseConfig(warmup_steps=0, **config), LAYERS, experts=16, top_k=2, first_step=0)


def loads(busiest: np.ndarray, seed: int = 0) -> np.ndarray:
    """Return noisy loads [steps, 2, 16] of 8192 assignments; in layer 2 expert 5 gets `busiest` equal shares."""
    g = np.random.default_rng(seed)
    even = np.full(16, 1 / 16)
    found = []
    for times in busiest:
        skewed = np.full(16, (1 - times / 16) / 15)
        skewed[5] = times / 16
        found.append([g.multinomial(8192, g.dirichlet(300 * share)) for share in (even, skewed)])
    return np.array(found)


def test_healthy_laptop_run_raises_no_alarm() -> None:
    """Loads of the first 400 steps of recipes/laptop.yaml (seed 0, one thread, log_every_steps 1)."""
    real = np.load(Path(__file__).parent / "laptop_loads.npz")["loads"].astype(np.int64)
    layers = [f"model.layers.{n}.mlp" for n in (1, 2, 3)]
    assert not watch(CollapseDetector(CollapseConfig(), layers, 16, 2, 0), real)
    # The same run starts with loads as uneven as those of a collapse: only the warm-up separates them.
    early = watch(CollapseDetector(CollapseConfig(warmup_steps=0), layers, 16, 2, 0), real)
    assert {alarm.reason for alarm in early} == {"rise"}
    assert max(alarm.step for alarm in early) < 50


def test_even_loads_raise_no_alarm() -> None:
    assert not watch(detector(), loads(np.ones(600)))


def test_rise_names_layer_expert_and_first_step() -> None:
    busiest = np.concatenate([np.full(100, 1.2), np.geomspace(1.2, 7.9, 60), np.full(40, 7.9)])
    first, *later = watch(detector(), loads(busiest))
    assert (first.layer, first.reason, first.experts, first.number) == (LAYERS[1], "rise", (5,), 2)
    assert busiest[first.step] < 6
    assert 100 <= first.first_step <= 120
    assert first.bits >= 1
    assert f"layer 2: the busiest share (of expert 5) grew {2**first.bits:.1f}-fold" in str(first)
    assert all(alarm.step >= first.step + 32 for alarm in later)


def test_jump_alarms_soon_but_one_odd_batch_does_not() -> None:
    calm = np.full(100, 1.2)
    odd = np.concatenate([calm, np.full(3, 7.5), calm])
    assert not watch(detector(), loads(odd))
    jump = watch(detector(), loads(np.concatenate([calm, np.full(20, 7.5)])))
    assert [alarm.reason for alarm in jump] == ["rise"]
    assert jump[0].step <= 100 + 32 / 6 + 1
    assert jump[0].first_step in range(96, 101)


def test_slow_drift_alarms() -> None:
    busiest = np.concatenate([np.full(100, 1.2), np.geomspace(1.2, 7.9, 900)])
    alarms = watch(detector(), loads(busiest))
    assert {alarm.reason for alarm in alarms} == {"drift"}
    assert busiest[alarms[0].step] < 6
    assert "over its lowest" in str(alarms[0])


def test_dead_experts_are_named_after_three_windows() -> None:
    lively = np.full((300, 2, 16), 1000)
    lively[50:, 1, [3, 9]] = 5
    alarms = watch(detector(), lively)
    assert [(a.reason, a.step, a.experts, a.first_step) for a in alarms[:1]] == [("dead", 145, (3, 9), 50)]
    assert str(alarms[0]) == "layer 2: almost no tokens for experts 3, 9 since step 50"
    assert [a.step for a in alarms] == [145, 241]
    lively[140, 1, [3, 9]] = 500
    assert watch(detector(), lively[:230]) == []


def test_limit_follows_from_experts_and_top_k() -> None:
    def limit(experts: int, top_k: int, **config: Any) -> float:
        return CollapseDetector(CollapseConfig(**config), LAYERS, experts, top_k, 0).limit

    assert (limit(256, 4), limit(256, 4, rise_bits=2.5), limit(8, 4)) == (1.0, 2.5, 0.5)
    dense = CollapseDetector(CollapseConfig(warmup_steps=0), LAYERS, 4, 4, 0)
    assert not watch(dense, np.full((200, 2, 4), 7))


def test_empty_and_warm_up_steps_are_not_watched() -> None:
    late = CollapseDetector(CollapseConfig(warmup_steps=50), LAYERS, 16, 2, first_step=1000)
    jump = np.concatenate([np.full(20, 1.2), np.full(100, 7.5)])
    assert not watch(late, loads(jump), first=1000)
    empty = detector()
    watch(empty, np.zeros((200, 2, 16)))
    assert np.isnan(empty.bits).all()


def test_entropy_falls_no_more_than_busiest_share_rises() -> None:
    for seed in range(200):
        g = np.random.default_rng(seed)
        share = g.dirichlet(np.full(16, g.uniform(0.01, 3)))
        kept = share[share > 0]
        assert math.log2(16) + (kept * np.log2(kept)).sum() <= math.log2(16 * share.max()) + 1e-9


@pytest.mark.parametrize("cut", [20, 105, 112, 190])
def test_restored_detector_raises_the_same_alarms(cut: int) -> None:
    busiest = np.concatenate([np.full(100, 1.2), np.full(200, 7.5)])
    data = loads(busiest)
    data[40:, 0, 7] = 0
    straight = watch(detector(), data)
    assert {alarm.reason for alarm in straight} >= {"rise", "dead"}
    one, two = detector(), detector()
    before = watch(one, data[:cut])
    one.raise_rate(LAYERS[0], 7)
    two.load_state_dict(one.state_dict())
    assert before + watch(two, data[cut:], first=cut) == straight
    assert two.rate_factor(LAYERS[0], 22) == 20
    assert two.rate_factor(LAYERS[0], 23) == two.rate_factor(LAYERS[1], 8) == 1


# -- with a real run --------------------------------------------------------------------------------------------------

MODEL = ModelConfig(
    vocab_size=64, hidden_size=16, intermediate_size=32, moe_intermediate_size=16, num_hidden_layers=3,
    num_dense_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=8, num_experts=8,
    num_experts_per_tok=2, sliding_window=8, max_position_embeddings=64,
)  # fmt: skip
START, FAULT, END = 20, 29, 54
WATCH = {"warmup_steps": 4, "window_steps": 12}


class Killed(Exception):
    """Stands for a kill: nothing after it runs."""


class Faulty(Trainer):
    """A run in which the update of one step, or of every step since, breaks the router: two experts always win."""

    faults: Callable[[int], bool] = staticmethod(lambda step: step == FAULT)
    dies: Callable[[int], bool] = staticmethod(lambda step: False)

    def train_step(self, batch: Batch) -> dict[str, Any]:
        step = self.step
        if self.dies(step):
            raise Killed
        values = super().train_step(batch)
        if self.faults(step):
            for layer in self.state.moe_layers.values():
                layer.expert_bias[:2] += 4
        return values


def text() -> Source:
    g = np.random.default_rng(0)
    lengths = g.integers(5, 40, 60)
    tokens = np.concatenate([np.append(g.integers(32, 64, n - 1), 1) for n in lengths]).astype(np.uint16)
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    return Source("a", tokens, starts, lengths, [f"a{i}" for i in range(60)])


def make(folder: Path, action: str, *, kind: type[Trainer] = Faulty, quiet: bool = True, **settings: Any) -> Trainer:
    phases = {"stable": PhaseConfig(steps=END - 3, warmup_steps=2, checkpoint="truebase"), "last": PhaseConfig(steps=3)}
    job = Job(
        folder=folder,
        model=MODEL,
        trainer=TrainerConfig(
            dtype="float32",
            threads=1,
            checkpoint_every_steps=10,
            log_every_steps=1,
            collapse=CollapseConfig(action=action, **{**WATCH, **settings}),
        ),  # fmt: skip
        optim=OptimConfig(muon_lr=0.005, lr=1e-3),
        balance=SmebuConfig(rate=0.01),
        schedule=Schedule(phases),
        order=TextOrder(
            {"a": text()},
            [PhaseRows(n, p.steps, {}) for n, p in phases.items()],
            context_tokens=16,
            sequences=8,
            seed=0,
            separator=1,
        ),  # fmt: skip
        micro_sequences=8,
        stage="pretrain",
        parent="",
    )
    return kind(job, Log(folder, quiet=quiet), seed=0)


def max_vio(folder: Path) -> dict[int, float]:
    rows = read_metrics(folder / "metrics.jsonl")
    return {row["step"]: row["moe/max_vio"] for row in rows if row.get("moe/max_vio") is not None}


def content(folder: Path) -> dict[str, str]:
    """Return the hash of everything a run leaves that is content."""
    found = {p.parent.name: json.loads(p.read_text())["content_sha256"] for p in folder.rglob("manifest.json")}
    decided = folder / ROLLBACKS
    return found | ({"rollbacks": decided.read_text()} if decided.exists() else {})


@pytest.fixture(scope="module", autouse=True)
def short_measurement() -> Iterator[None]:
    """Measure the machine's matrix rate on less than the half second that suits a real run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(collapse, "RATE_FACTOR", 20.0)  # so that a cure fits into a short run
        patch.setattr(collapse, "RAISE_STEPS", 16)
        patch.setattr(monitor, "gemm_flops_per_s", functools.partial(monitor.gemm_flops_per_s, size=32, seconds=0.001))
        yield


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run that was killed after its checkpoint at START; copy it before a run continues."""
    folder = tmp_path_factory.mktemp("start") / "run"
    trainer = make(folder, "roll_back")
    trainer.dies = lambda step: step == START
    with pytest.raises(Killed):
        trainer.run()
    return folder


@pytest.fixture(scope="module")
def runs(start: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Trainer]]:
    """Return the finished run of an action: all continue from one start, and each is made once."""
    folder = tmp_path_factory.mktemp("collapse")
    made: dict[str, tuple[Path, Trainer]] = {}

    def run(action: str) -> tuple[Path, Trainer]:
        if action not in made:
            trainer = make(shutil.copytree(start, folder / action), action)
            trainer.run()
            made[action] = folder / action, trainer
        return made[action]

    return run


def test_collapse_without_remedy_is_reported_and_stays(runs: Callable[[str], tuple[Path, Trainer]]) -> None:
    folder, trainer = runs("none")
    found = max_vio(folder)
    assert max(found[s] for s in range(START, FAULT + 1)) < 1.5
    assert min(found[s] for s in range(FAULT + 2, END + 1)) > 2.5
    first = trainer.progress.alarms[0]
    assert (first["reason"], first["experts"], first["action"]) == ("rise", (0, 1), "none")
    assert FAULT + 1 < first["step"] <= FAULT + 4
    assert {alarm["layer"] for alarm in trainer.progress.alarms[:2]} == {"model.layers.1.mlp", "model.layers.2.mlp"}
    said = [row for row in read_metrics(folder / "metrics.jsonl") if "moe/alarm" in row]
    assert (said[0]["step"], said[0]["moe/alarm"]) == (first["step"] + 1, [1, 2])
    assert dcp.check(folder / "truebase")["alarms"][0]["reason"] == "rise"


@pytest.mark.parametrize("action", ["raise_rate", "reinitialise", "roll_back"])
def test_each_remedy_cures_collapse(runs: Callable[[str], tuple[Path, Trainer]], action: str) -> None:
    folder, trainer = runs(action)
    found = max_vio(folder)
    assert max(found[s] for s in range(END - 10, END + 1)) < 2
    assert not trainer.progress.alarms or {alarm["action"] for alarm in trainer.progress.alarms} == {action}


def test_raised_rate_is_a_multiple_and_ends(runs: Callable[[str], tuple[Path, Trainer]]) -> None:
    folder, trainer = runs("raise_rate")
    name = "model.layers.1.mlp"
    layer = trainer.state.moe_layers[name]
    moved = []
    for step in (int(trainer.guards.collapse.raised_until[0]) - 1, int(trainer.guards.collapse.raised_until[0])):
        trainer.progress.step = step
        before, momentum = layer.expert_bias.clone(), trainer.balance.state_dict()[name].clone()
        trainer.update.move_bias(step, name, layer)
        moved.append(layer.expert_bias - before)
        layer.expert_bias.copy_(before)
        trainer.balance.load_state_dict({name: momentum})
    torch.testing.assert_close(moved[0], 20 * moved[1])
    assert moved[1].abs().max() > 0


def test_reinitialise_redraws_routing_and_forgets_its_past(tmp_path: Path) -> None:
    trainer = make(tmp_path, "reinitialise", kind=Trainer)
    for step in range(3):
        trainer.train_step(trainer.job.order.batch(step))
    name = "model.layers.1.mlp"
    trainer.state.moe_layers[name].expert_bias[5] = 3
    before = {
        part: {k: v.clone() for k, v in tensors.items()} for part, tensors in trainer.checkpoints.tensors().items()
    }
    alarms = [Alarm(name, "rise", 2, 1, (5,), 1.5), Alarm("model.layers.2.mlp", "dead", 2, 0, (3,), 0.0)]
    trainer.act(trainer.guards.on_alarms(alarms, trainer.step))
    after = trainer.checkpoints.tensors()
    changed = {
        (part, key): sorted({int(i) for i in (tensor != before[part][key]).nonzero()[:, 0]})
        for part in ("model", "optimizer", "balance")
        for key, tensor in after[part].items()
        if not torch.equal(tensor, before[part][key])
    }
    gate, bias = "router.gate.weight", "expert_bias"
    matrices = [f"model.layers.2.mlp.experts.{matrix}" for matrix in ("gate_up_proj", "down_proj")]
    assert {key: rows for (part, key), rows in changed.items() if part == "model"} == {
        f"{name}.{gate}": [5], f"{name}.{bias}": [5], f"model.layers.2.mlp.{gate}": [3],
        f"model.layers.2.mlp.{bias}": [3], **dict.fromkeys(matrices, [3]),
    }  # fmt: skip
    others = [0, 1, 2, 3, 4, 6, 7]
    neighbours = after["model"][f"{name}.{gate}"][others]
    apart = (after["model"][f"{name}.{gate}"][5] - neighbours.mean(0)) / neighbours.std(0)
    assert 0.3 < float(apart.square().mean().sqrt()) < 2
    assert after["model"][matrices[0]][3].abs().max() <= 3 * MODEL.initializer_range
    torch.testing.assert_close(after["model"][f"{name}.{bias}"][5], after["model"][f"{name}.{bias}"][others].mean())
    slots = {key: rows for (part, key), rows in changed.items() if part == "optimizer"}
    assert slots.keys() >= {f"{name}.{gate}.exp_avg", f"{name}.{gate}.exp_avg_sq", f"{matrices[0]}.momentum"}
    assert all((after["optimizer"][key][rows] == 0).all() for key, rows in slots.items())
    assert all(
        float(after["balance"][key][rows].abs().max()) == 0 for (p, key), rows in changed.items() if p == "balance"
    )
    for key, parameter in trainer.state.parameters.items():
        assert torch.equal(parameter, trainer.state.masters[key]), key


def test_roll_back_skips_batches_and_names_them(
    runs: Callable[[str], tuple[Path, Trainer]], start: Path, tmp_path: Path
) -> None:
    folder, trainer = runs("roll_back")
    (decision,) = json.loads((folder / ROLLBACKS).read_text())["rollbacks"]
    skipped = list(range(decision["first_step"], decision["end_step"]))
    assert FAULT in skipped
    assert len(skipped) <= 12
    assert decision["layers"] == [1, 2]
    facts = dcp.check(folder / "checkpoints" / f"step_{END:08d}")
    assert facts["skipped_steps"] == trainer.progress.skipped == skipped
    assert facts["rollbacks"] == [decision]
    assert facts["tokens"] == END * 128
    rows = read_metrics(folder / "metrics.jsonl")
    assert [row["step"] for row in rows if "loss/mean" in row] == list(range(1, END + 1))
    assert [row["step"] for row in rows if "moe/alarm" in row] == [skipped[0] + 1]
    assert {row["step"] - 1 for row in rows if "loss/mean" in row and row["loss/mean"] is None} == set(skipped)
    said = "".join(path.read_text() for path in (folder / "log").glob("*.txt"))
    for step in skipped:
        for piece in trainer.job.order.documents(step):
            assert f"{piece.source}:{piece.document_id}" in said
    # What is left is what a run would be that had known before which steps to skip.
    knowing = shutil.copytree(start, tmp_path / "run")
    write_json(knowing / ROLLBACKS, {"rollbacks": [decision]})
    make(knowing, "roll_back").run()
    assert content(knowing) == content(folder)


@pytest.mark.parametrize("moment", ["decided", "while removing", "in the replay"])
def test_kill_around_a_roll_back_ends_with_the_same_bits(
    runs: Callable[[str], tuple[Path, Trainer]],
    start: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    moment: str,
) -> None:
    straight, _ = runs("roll_back")
    folder = shutil.copytree(start, tmp_path / "run")
    decided = folder / ROLLBACKS

    def dying(function: Callable[..., Any], when: Callable[[Any], bool]) -> Callable[..., Any]:
        def die(*args: Any, **settings: Any) -> Any:
            if when(args[0]):
                raise Killed
            return function(*args, **settings)

        return die

    places = {
        "decided": (dcp, "remove_unless", lambda _: decided.exists()),
        "while removing": (dcp.shutil, "rmtree", lambda path: decided.exists() and path.name == "step_00000030.tmp"),
        "in the replay": (Trainer, "skip_step", lambda trainer: trainer.step == FAULT + 1),
    }
    module, name, when = places[moment]
    with monkeypatch.context() as patch:
        patch.setattr(module, name, dying(getattr(module, name), when))
        with pytest.raises(Killed):
            make(folder, "roll_back").run()
    assert decided.exists()
    make(folder, "roll_back").run()
    assert content(folder) == content(straight)


@pytest.mark.parametrize(("action", "step"), [("raise_rate", 42), ("reinitialise", 42)])
def test_kill_after_a_remedy_ends_with_the_same_bits(
    runs: Callable[[str], tuple[Path, Trainer]], start: Path, tmp_path: Path, action: str, step: int
) -> None:
    straight, _ = runs(action)
    folder = shutil.copytree(start, tmp_path / "run")
    trainer = make(folder, action)
    trainer.dies = lambda at: at == step
    with pytest.raises(Killed):
        trainer.run()
    again = make(folder, action)
    again.run()
    assert again.progress.alarms[0]["step"] < 40  # the remedy itself is in the checkpoint it continues from
    assert content(folder) == content(straight)


def test_gives_up_when_rolling_back_does_not_help(start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = shutil.copytree(start, tmp_path / "run")
    monkeypatch.setattr(guards, "MAX_ROLLBACKS", 2)
    trainer = make(folder, "roll_back")
    trainer.faults = lambda step: step >= FAULT
    with pytest.raises(TrainingError, match="collapsed again after 2 roll-backs"):
        trainer.run()
    assert len(json.loads((folder / ROLLBACKS).read_text())["rollbacks"]) == 2
    again = make(folder, "roll_back")
    again.faults = trainer.faults
    with pytest.raises(TrainingError, match="collapsed again after 2 roll-backs"):
        again.run()


def test_roll_back_without_checkpoint_starts_from_scratch(start: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(start, tmp_path / "run")
    trainer = make(folder, "roll_back")
    assert trainer.restore()
    for path in (folder / "checkpoints").glob("step_*/trainer.json"):
        path.write_text("{")
    trainer.progress.step = 31
    with pytest.raises(TrainingError, match="no checkpoint from before the collapse is left"):
        trainer.act(RollBack(28, "routing collapsed", limit=3, layers=(1,)))
    again = make(folder, "roll_back")
    assert not again.restore()
    assert (again.step, again.progress.rollbacks) == (0, [{"first_step": 28, "end_step": 31, "layers": [1]}])


def test_dead_experts_do_not_roll_back(tmp_path: Path) -> None:
    trainer = make(tmp_path, "roll_back", kind=Trainer)
    alarm = Alarm("model.layers.1.mlp", "dead", 90, 55, (3,), 0.0)
    assert not trainer.act(trainer.guards.on_alarms([alarm], 91))
    assert [alarm["action"] for alarm in trainer.progress.alarms] == ["none"]
    assert not (tmp_path / ROLLBACKS).exists()
