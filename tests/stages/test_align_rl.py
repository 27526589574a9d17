"""Reinforcement learning: exact on policy, killed and resumed, graded, and refused where it teaches nothing."""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from freehold.checkpoint import dcp
from freehold.cli.main import main
from freehold.core.artifact import read_json
from freehold.core.errors import ArtifactError
from freehold.core.log import Log, read_metrics
from freehold.data.grading import figures, grade
from freehold.data.rollouts import CUT, NO_SPREAD, TRAINED, RolloutLedger, policy_batch
from freehold.environments.protocol import EnvironmentFault, Reply, Task, text_of
from freehold.infer.runner import not_exact
from freehold.model.afmoe import Afmoe
from freehold.optim.config import NoBalanceConfig, OptimConfig, PhaseConfig
from freehold.optim.schedule import Schedule
from freehold.stages.align import learn_rl
from freehold.stages.align.alarm import LikelihoodAlarm
from freehold.stages.align.held_out import HeldOut
from freehold.stages.align.rl_config import RlConfig
from freehold.stages.align.rollouts import RolloutOrder, Tasks
from freehold.tokenizer.bpe import train
from freehold.trainer.config import TrainerConfig
from freehold.trainer.errors import TrainingError
from freehold.trainer.loop import Trainer
from tests import tiny

SHAPE = tiny.config(
    vocab_size=320, hidden_size=32, intermediate_size=32, head_dim=32, num_attention_heads=1, num_key_value_heads=1,
    sliding_window=64, max_position_embeddings=192,
)  # fmt: skip


class Halves:
    """Right is an answer whose first byte is in the lower half: an untrained model is right half of the time."""

    name, version = "halves", "1"

    def __init__(self, turns: int = 1, fault: str = "") -> None:
        self.turns, self.fault = turns, fault

    def task(self, split: str, number: int) -> Task:
        asked = f"{random.Random(f'{split}{number}').randrange(1000)}"
        return Task(f"halves/{split}/{number}", ({"role": "user", "content": asked},), 0, licence="CC0-1.0")

    def start(self, task: Task) -> dict[str, int]:
        return {"turn": 0}

    def step(self, task: Task, state: Any, turn: Any) -> Reply:
        if self.fault == "dies":
            raise OSError("gone")
        count = state["turn"] + 1
        shown = json.dumps({"reward": 1} if self.fault == "reveals" else {"result": count})
        return Reply({"turn": count}, ({"role": "tool", "content": shown},), count >= self.turns)

    def reward(self, task: Task, state: Any, turns: Any) -> dict[str, float]:
        if self.fault == "prints":
            print("{}")
        if self.fault == "raises":
            raise KeyError("answer")
        if self.fault == "nan":
            return {"correct": float("nan")}
        text = text_of(turns).encode()
        return {"correct": float(bool(text) and text[0] < 96)} if self.fault != "flat" else {"correct": 1.0}

    gold = wrong = lambda self, task: []


@pytest.fixture(scope="module")
def tokenizer():
    return train(["the cat sat on the mat 0123456789"] * 9, 300, Log(quiet=True))


def config(**changes: Any) -> RlConfig:
    return RlConfig(
        **{
            "environments": {"halves": {}},
            "micro_rollouts": 4,
            "prompts": 3,
            "group": 4,
            "max_tokens": 6,
            "min_reward": 0.0,
            "held_out": 4,
        }
        | changes
    )


def made(
    folder: Path, tokenizer: Any, settings: RlConfig, steps: int = 3, environment: Any = None, **job: Any
) -> Trainer:
    """Return a run of reinforcement learning; its order is `trainer.job.order`."""
    tasks = Tasks({"halves": environment or Halves()}, {"halves": 1.0}, 0)
    order = RolloutOrder(
        settings, tasks, tokenizer, RolloutLedger(folder / "rollouts"), context_tokens=128, first_step=0,
        total_steps=steps, reference=None, loss=dataclasses.asdict(learn_rl.policy_loss(settings, 512)),
    )  # fmt: skip
    given = {
        "model": SHAPE,
        "order": order,
        "loss": learn_rl.policy_loss(settings, 512),
        "balance": NoBalanceConfig(),
        "schedule": Schedule({"rl": PhaseConfig(steps=steps)}),
        "trainer": TrainerConfig(**tiny.TRAINER, checkpoint_every_steps=1, log_every_steps=1, validate_every_steps=1),
        "optim": OptimConfig(matrices="adamw", lr=1e-3),
    }
    model = Afmoe(SHAPE)
    model.init_weights(torch.Generator().manual_seed(0))
    with torch.no_grad():
        # So that turns end: about every third token is the one that ends them.
        model.lm_head.weight[tokenizer.specials["<|im_end|>"]] *= 60
    return Trainer(tiny.job(folder, **given | job), Log(folder, quiet=True), seed=0, weights=model.state_dict())


def ran(trainer: Trainer) -> Trainer:
    order = trainer.job.order
    trainer.run(None, order.attach)
    return trainer


def metrics(folder: Path, name: str) -> list[float]:
    return [row[name] for row in read_metrics(folder / "metrics.jsonl") if name in row]


@pytest.fixture(scope="module")
def run(tmp_path_factory, tokenizer) -> Path:
    folder = tmp_path_factory.mktemp("rl") / "run/align"
    trainer = ran(made(folder, tokenizer, config()))
    assert not_exact(trainer.model) is None
    return folder


def test_rollouts_are_exactly_on_policy(run):
    assert metrics(run, "policy/gap") == [0.0] * 3 == metrics(run, "policy/differs")
    assert metrics(run, "policy/ratio") == [1.0] * 3
    assert all(0 < value < 1 for value in metrics(run, "rl/correct"))


def weights(folder: Path, step: int) -> dict[str, torch.Tensor]:
    return dcp.load(folder / f"checkpoints/step_{step:08}")["model"]


@pytest.mark.parametrize("lost", ["checkpoint", "rollouts too"])
def test_a_killed_run_ends_with_the_same_bytes(run, tokenizer, tmp_path, lost):
    folder = tmp_path / "again"
    shutil.copytree(run, folder)
    shutil.rmtree(folder / "checkpoints/step_00000003")
    (folder / "rollouts/step_00000002.parquet.tmp").write_bytes(b"half")
    if lost == "rollouts too":
        (folder / "rollouts/step_00000002.parquet").unlink()
    trainer = made(folder, tokenizer, config())
    ran(trainer)
    for name in ("step_00000001.parquet", "step_00000002.parquet"):
        assert (folder / "rollouts" / name).read_bytes() == (run / "rollouts" / name).read_bytes()
    one, two = weights(run, 3), weights(folder, 3)
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_batch_of_the_engine_changes_no_rollout(run, tokenizer, tmp_path):
    trainer = made(tmp_path, tokenizer, config(), steps=3)
    order = trainer.job.order
    order.attach(trainer)
    order.policy.engine.queue.max_batch = 5
    order.rollouts(0)
    assert (tmp_path / "rollouts/step_00000000.parquet").read_bytes() == (
        run / "rollouts/step_00000000.parquet"
    ).read_bytes()


def test_balance_is_frozen(run, tokenizer, tmp_path):
    start, end = weights(run, 2), weights(run, 3)
    biases = [name for name in start if name.endswith("expert_bias")]
    assert biases
    assert all(torch.equal(start[name], end[name]) for name in biases)
    assert not torch.equal(start["lm_head.weight"], end["lm_head.weight"])


def test_ledger_says_what_trained_and_inherits_licences(run):
    rollouts, settings = RolloutLedger(run / "rollouts").read(1)
    assert {one.licence for one in rollouts} == {"CC0-1.0"}
    assert {one.why for one in rollouts} <= {TRAINED, NO_SPREAD, CUT}
    assert len({one.policy for one in rollouts}) == 1
    assert rollouts == grade(rollouts, settings)
    for group in {one.group for one in rollouts}:
        assert sum(one.advantage for one in rollouts if one.group == group) == pytest.approx(0, abs=1e-12)


def test_ledger_shows_a_file_that_was_changed(run, tmp_path):
    shutil.copytree(run / "rollouts", tmp_path / "r")
    ledger = RolloutLedger(tmp_path / "r")
    rollouts, settings = ledger.read(0)
    ledger.write(0, rollouts[:-1], settings)
    with pytest.raises(ArtifactError, match="does not follow the one before it"):
        ledger.read(1)
    ledger.path(1).write_bytes(b"no parquet")
    with pytest.raises(ArtifactError, match="cannot be read"):
        ledger.read(1)


def graded(tokenizer, rewards, *, cut=(), tokens=None, **settings):
    """Return rollouts of one group with these rewards."""
    base, _ = GROUP[0]
    found = []
    for n, reward in enumerate(rewards):
        length = (tokens or [3] * len(rewards))[n]
        one = dataclasses.replace(
            base, member=n, parts=json.dumps({"correct": reward}), truncated=n in cut,
            ids=[1] * (4 + length), sampled=[False] * 4 + [True] * length, behaviour=[0.0] * (4 + length), why="",
        )  # fmt: skip
        found.append(one)
    return grade(found, {"advantage": "mean", "conciseness": 0.0, "truncated": "mask"} | settings)


GROUP: list[Any] = []


@pytest.fixture(autouse=True)
def _group(run):
    GROUP[:] = [(RolloutLedger(run / "rollouts").read(0)[0][0], None)]


def test_groups_are_kept_or_dropped_whole(tokenizer):
    assert {one.why for one in graded(tokenizer, [1.0, 1.0, 1.0])} == {NO_SPREAD}
    assert {one.why for one in graded(tokenizer, [1.0, 0.0, 1.0])} == {TRAINED}


def test_truncated_answers_count_in_the_mean_and_are_masked(tokenizer):
    masked = graded(tokenizer, [1.0, 0.0, 0.0, 1.0], cut={3})
    assert [one.why for one in masked] == [TRAINED] * 3 + [CUT]
    assert {one.group_mean for one in masked} == {0.5}
    zero = graded(tokenizer, [1.0, 0.0, 0.0, 1.0], cut={3}, truncated="zero")
    assert [one.why for one in zero] == [TRAINED] * 4
    assert {one.group_mean for one in zero} == {0.25}


def test_conciseness_scales_with_the_pass_rate(tokenizer):
    easy = graded(tokenizer, [1.0, 1.0, 1.0, 1.0], tokens=[2, 4, 6, 8], conciseness=0.5)
    hard = graded(tokenizer, [1.0, 0.0, 0.0, 1.0], tokens=[2, 1, 1, 8], conciseness=0.5)
    assert [one.reward for one in easy] == pytest.approx([1 - 0.5 * n / 7 for n in (0, 2, 4, 6)])
    assert [one.reward for one in hard] == pytest.approx([1, 0, 0, 1 - 0.25 * 6 / 7])
    assert figures(hard)["rl/tokens_right"] == 5


@pytest.mark.parametrize(
    ("settings", "fault", "says"),
    [
        ({}, "nan", "a reward that is no number"),
        ({}, "raises", "raised an error"),
        ({"max_turns": 2}, "dies", "raised an error"),
        ({"max_turns": 2}, "reveals", "shows the policy what it is judged by"),
        ({"max_tokens": 125}, "", "does not fit a row"),
    ],
)
def test_faults_of_an_environment_stop_the_run(tokenizer, tmp_path, settings, fault, says):
    trainer = made(tmp_path, tokenizer, config(**settings), environment=Halves(turns=2, fault=fault))
    order = trainer.job.order
    order.attach(trainer)
    with pytest.raises(EnvironmentFault, match=says):
        order.batch(0)
    assert not order.ledger.steps()


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"min_reward": 0.99}, r"(?s)the reward is .* nothing to sharpen.*fine-tune"),
        ({"max_tokens": 1}, r"(?s)nearly every answer was cut.*max_tokens"),
    ],
)
def test_rewards_that_teach_nothing_are_refused(tokenizer, tmp_path, settings, says):
    trainer = made(tmp_path, tokenizer, config(**settings))
    order = trainer.job.order
    order.attach(trainer)
    with pytest.raises(TrainingError, match=says):
        order.batch(0)


def test_a_verifier_that_prints_changes_nothing(run, tokenizer, tmp_path, capsys):
    trainer = made(tmp_path, tokenizer, config(), environment=Halves(fault="prints"))
    order = trainer.job.order
    order.attach(trainer)
    order.rollouts(0)
    assert "{}" not in capsys.readouterr().out
    name = "step_00000000.parquet"
    assert (tmp_path / "rollouts" / name).read_bytes() == (run / "rollouts" / name).read_bytes()


def test_groups_without_spread_change_no_weight(tokenizer, tmp_path):
    trainer = made(tmp_path, tokenizer, config(refill=1), steps=1, environment=Halves(fault="flat"))
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    ran(trainer)
    assert trainer.progress.skipped == [0]
    assert all(torch.equal(before[name], tensor) for name, tensor in trainer.model.state_dict().items())
    # Filled up once, with other tasks.
    assert len({one.group for one in trainer.job.order.ledger.read(0)[0]}) == 6


def test_lag_and_updates_are_fixed(tokenizer, tmp_path):
    trainer = ran(made(tmp_path, tokenizer, config(prompts=4, updates=2, lag=1, loss="cispo"), steps=4))
    ledger = trainer.job.order.ledger
    assert ledger.steps() == [0, 2]
    assert {one.drawn_at for step in (0, 2) for one in ledger.read(step)[0]} == {0}
    assert metrics(tmp_path, "policy/differs")[0] == 0 < metrics(tmp_path, "policy/differs")[-1]


def test_other_temperatures_are_scored_again(tokenizer, tmp_path):
    trainer = ran(made(tmp_path, tokenizer, config(temperature=1.3), steps=1))
    assert trainer.job.order.rescored
    assert metrics(tmp_path, "policy/ratio") == [1.0]


def test_turns_append_ids_and_mask_results(tokenizer, tmp_path):
    trainer = made(tmp_path, tokenizer, config(max_turns=3), steps=1, environment=Halves(turns=3))
    order = trainer.job.order
    order.attach(trainer)
    longest = max(order.rollouts(0), key=lambda one: len(json.loads(one.results)))
    assert len(json.loads(longest.results)) == 2
    text = tokenizer.decode(longest.ids, skip_specials=False)
    assert text.count("<tool_response>") == 2
    changes = np.flatnonzero(np.diff(np.array(longest.sampled, dtype=int)) == 1)
    assert len(changes) == 3
    batch = policy_batch([longest], tokenizer.pad)
    assert (batch.targets != -100).sum() == longest.drawn_tokens
    alone = order.player.begin(*order.tasks.task("train", longest.group), longest.group, longest.member, longest.seed)
    order.player.play([alone], order.policy)
    assert alone.ids == longest.ids


def test_collapse_stops_and_goes_back(tokenizer, tmp_path):
    trainer = made(tmp_path, tokenizer, config(), steps=2)
    order = trainer.job.order
    watch = HeldOut(order, tmp_path, trainer.log)

    def ready(loop: Trainer) -> None:
        order.attach(loop)
        watch.attach(loop)
        # As if it had been far better.
        watch.known["start"] = 3.0

    with pytest.raises(TrainingError, match=r"(?s)collapsed.*step 1.*rolled back"):
        trainer.run(watch.validate, ready)
    assert not list((tmp_path / "checkpoints").glob("step_00000001"))
    assert set(read_json(tmp_path / "held_out.json")) == {"start"}


def halves(settings: Any, seed: int, conversations: Any) -> Halves:
    """Return the environment as an entry point does."""
    return Halves()


@pytest.fixture
def declared(tmp_path, monkeypatch):
    """Declare the environment as an installed package would."""
    folder = tmp_path / "site/halves-1.0.dist-info"
    folder.mkdir(parents=True)
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: halves\nVersion: 1.0\n")
    (folder / "entry_points.txt").write_text(f"[freehold.environments]\nhalves = {__name__}:halves\n")
    monkeypatch.syspath_prepend(folder.parent)


def test_why_and_replay_explain_every_step(run, declared, capsys):
    for step in range(3):
        assert main(["replay", str(run.parent), str(step)]) == 0
        said = capsys.readouterr().out
        assert "12 rewards, 12 advantages, loss" in said
        assert "every bit equal" in said
    assert main(["why", str(run.parent), "1", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["licences"] == {"CC0-1.0": answer["why"][TRAINED]}
    assert answer["environments"] == {"halves": "1"}
    assert len(answer["groups"]) == 3
    assert main(["why", str(run.parent), "1"]) == 0
    assert "judged by halves 1" in capsys.readouterr().out
    assert main(["why", str(run.parent), "99"]) == 2
    assert main(["replay", str(run.parent), "99"]) == 2


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"parts": '{"correct": 0.5}'}, "DIFFERS: reward of"),
        ({"advantage": 0.123}, "DIFFERS"),
        ({"version": "2"}, "another version"),
    ],
)
def test_replay_names_the_first_difference(run, declared, tmp_path, capsys, change, says):
    shutil.copytree(run, tmp_path / "run/align")
    ledger = RolloutLedger(tmp_path / "run/align/rollouts")
    rollouts, settings = ledger.read(2)
    ledger.write(2, [dataclasses.replace(rollouts[0], **change), *rollouts[1:]], settings)
    assert main(["replay", str(tmp_path / "run"), "2"]) != 0
    output = capsys.readouterr()
    assert says in output.out + output.err


def test_replay_notices_another_loss(run, declared, tmp_path, capsys):
    shutil.copytree(run, tmp_path / "run/align")
    path = tmp_path / "run/align/metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        if "policy/loss" in row:
            row["policy/loss"] += 1e-12
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["replay", str(tmp_path / "run"), "0"]) == 1
    assert "DIFFERS: loss" in capsys.readouterr().out


def test_alarm_when_better_answers_lose_likelihood(tmp_path, capsys):
    alarm = LikelihoodAlarm(2.0, Log(None))
    for gain in (0.5, -1.0, -2.5, -3.0):
        alarm.log(1, {"preference/better_gain": gain, "preference/worse_gain": -9.0})
    alarm.log(2, {"perf/eta_s": 1})
    said = capsys.readouterr()
    assert (said.out + said.err).count("better answers are 2.5 nats less likely") == 1
