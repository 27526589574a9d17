"""Phases of kinds: fine-tuning then preference learning, replay of text, and the gate on forgetting."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from freehold.checkpoint import dcp
from freehold.core.artifact import Workspace, read_json, read_manifest, write_manifest
from freehold.core.config import fill, merge
from freehold.core.document import Conversation, Document, document_id, write_rows
from freehold.core.errors import CheckpointError, ConfigError, DataError, LicenceError
from freehold.core.log import Log
from freehold.model.afmoe import Afmoe
from freehold.stages.align.config import AlignConfig, SftConfig, plan
from freehold.stages.align.forgetting import open_for_use
from freehold.stages.align.learn_teacher import check_terms
from freehold.stages.align.learned import without_reasoning
from freehold.stages.align.reward_model import RewardModel
from freehold.stages.align.rl_config import TeacherConfig
from freehold.stages.align.rows import reference_logprobs, render_answers, render_examples
from freehold.stages.align.run import run as align
from freehold.stages.pretrain.config import PretrainConfig
from freehold.stages.pretrain.run import run as pretrain
from freehold.stages.tokenize.config import TokenizeConfig
from freehold.stages.tokenize.run import run as tokenize
from freehold.tokenizer.bpe import Tokenizer
from freehold.trainer.errors import TrainingError
from tests import tiny

RIGHTS = {
    "source_version": "x==1", "path": "p", "sha256": "0", "wrapper_licence": "MIT", "licence": "MIT",
    "licence_evidence": "LICENSE", "acquired": "2026-01-01", "kind": "conversation", "synthetic_from": "",
    "teacher": "", "split": "train",
}  # fmt: skip
PREFER = {"steps": 3, "kind": "preference", "checkpoint": "thinking", "stage_type": "Thinking"}
LONGER = {"model": {"max_position_embeddings": 256}}
BOTH = merge(tiny.ALIGN, {"phases": {"prefer": PREFER}})


def asked(number: int, **answer: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": f"Say {number}"}, {"role": "assistant", "content": "the fox", **answer}]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run as far as pretrain, with plain conversations, pairs, and labelled answers."""
    run = tmp_path_factory.mktemp("run")
    texts = [f"Part {i}. " + "The quick brown fox jumps over the dog. " * (2 + i % 5) for i in range(30)]
    rows = [
        Document(id=document_id("a", str(i)), source="a", text=text, **{**RIGHTS, "split": "validation" if i % 7 == 0
                 else "train", "kind": "prose"})
        for i, text in enumerate(texts)
    ]  # fmt: skip
    write_rows(run / "curate/documents/a.parquet", rows, Document)
    worse = [{"role": "assistant", "content": "the dog dog dog"}]
    kinds = {
        "talk": [asked(n) for n in range(8)],
        "pairs": [asked(n, rejected=worse) for n in range(9)],
        "labelled": [asked(n, label=n % 2 == 0) for n in range(6)],
    }
    for name, talks in kinds.items():
        said = [Conversation(id=f"{name}{n}", source=name, messages=m, **RIGHTS) for n, m in enumerate(talks)]
        write_rows(run / f"curate/conversations/{name}.parquet", said, Conversation)
    for stage, do, config, inputs in (
        ("tokenize", tokenize, TokenizeConfig(vocab_size=320), ("curate",)),
        ("pretrain", pretrain, fill(PretrainConfig, merge(tiny.PRETRAIN, LONGER), "pretrain"), ("tokenize",)),
    ):
        counts = do(config, workspace(run, stage, *inputs))  # type: ignore[operator]
        write_manifest(run / stage, kind=stage, counts=counts, inputs={}, seed=0, config={}, seconds=0.0)
    return run


def workspace(run: Path, stage: str, *inputs: str, folder: Path | None = None) -> Workspace:
    return Workspace(folder or run / stage, stage, "t", 0, Log(None, quiet=True), {name: run / name for name in inputs})


def aligned(made: Path, folder: Path, data: dict[str, Any]) -> dict[str, Any]:
    folder.mkdir(exist_ok=True)
    work = workspace(made, "align", "pretrain", "tokenize", "curate", folder=folder)
    return align(fill(AlignConfig, data, "align"), work)


def test_preference_starts_from_the_fine_tuned_checkpoint(made, tmp_path):
    counts = aligned(made, tmp_path / "a", BOTH)
    preview, thinking = (dcp.check(tmp_path / "a" / name) for name in ("preview", "thinking"))
    assert thinking["parent"] == read_manifest(tmp_path / "a/preview")["content_sha256"]
    assert (preview["step"], thinking["step"]) == (3, 6)
    assert thinking["tokens"] == preview["tokens"] + 3 * 2 * 64
    assert counts["checkpoints"] == {"preview": "Preview", "thinking": "Thinking"}
    assert (counts["steps"], counts["conversations"], counts["answers"]) == (6, 8, 9)
    trace = pq.read_table(tmp_path / "a/trace.parquet").to_pylist()
    assert {(row["phase"], row["source"]) for row in trace} == {("sft", "talk"), ("prefer", "pairs")}
    assert min(row["first_step"] for row in trace if row["phase"] == "prefer") == 3


def test_one_kind_gives_the_bits_of_the_first_of_two(made, tmp_path):
    aligned(made, tmp_path / "one", tiny.ALIGN)
    aligned(made, tmp_path / "two", BOTH)
    one, two = (dcp.load(tmp_path / name / "preview")["model"] for name in ("one", "two"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_stopped_second_phase_resumes_with_the_same_bits(made, tmp_path):
    saved = merge(BOTH, {"trainer": {"checkpoint_every_steps": 1}})
    aligned(made, tmp_path / "a", saved)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    for gone in ("thinking", "trace.parquet", "phases/prefer/checkpoints/step_00000006"):
        path = tmp_path / "b" / gone
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    aligned(made, tmp_path / "b", saved)
    one, two = (dcp.load(tmp_path / name / "thinking")["model"] for name in "ab")
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("loss", ["dpo", "ipo", "simpo", "kto"])
def test_preference_learns_which_answer_is_better(made, tmp_path, loss):
    phase = {**PREFER, "steps": 12, "preference": {"loss": loss, "beta": 0.5}}
    data = merge(tiny.ALIGN, {"optim": {"lr": 3e-3}, "trainer": {"log_every_steps": 1}})
    data["phases"] = {"prefer": phase}
    (tmp_path / "a").mkdir()
    log = Log(tmp_path / "a", quiet=True)
    work = dataclasses.replace(
        workspace(made, "align", "pretrain", "tokenize", "curate", folder=tmp_path / "a"), log=log
    )
    counts = align(fill(AlignConfig, data, "align"), work)
    assert counts["answers"] == (15 if loss == "kto" else 9)
    lines = [json.loads(line) for line in (tmp_path / "a/metrics.jsonl").read_text().splitlines()]
    first, last = ([row for row in lines if "preference/accuracy" in row][at] for at in (0, -1))
    assert last["loss/mean"] < first["loss/mean"]
    assert last["preference/accuracy"] > 0.9


def test_reference_is_the_policy_at_the_start(made):
    tokenizer = Tokenizer.load(made / "tokenize/tokenizer")
    work = workspace(made, "align", "pretrain", "tokenize", "curate")
    from freehold.data.pairs import PairOrder

    answers = render_answers(work, tokenizer, unpaired=False)
    order = PairOrder(answers, context_tokens=64, sequences=2, steps=1, seed=0, pad=tokenizer.pad)
    found = reference_logprobs(open_for_use(made / "pretrain/base", "float32"), order)
    assert set(found) == {one.id for one in answers}
    for one in answers:
        for values, example in zip(found[one.id], one.examples, strict=True):
            assert len(values) == len(example.ids) - 1
            assert all((v < 0) == bool(m) for v, m in zip(values, example.loss_mask[1:], strict=True))


def test_replay_mixes_text_into_each_step(made, tmp_path):
    counts = aligned(made, tmp_path / "a", tiny.ALIGN | {"replay": 0.5})
    assert counts["replayed_rows"] == 1
    trace = pq.read_table(tmp_path / "a/trace.parquet").to_pylist()
    assert {row["source"] for row in trace} == {"talk", "a"}


def test_forgetting_is_measured_and_gated(made, tmp_path):
    counts = aligned(made, tmp_path / "a", tiny.ALIGN | {"max_forgetting": 10.0})
    found = read_json(tmp_path / "a/forgetting.json")
    assert counts["forgetting"] == found
    assert found["rise"] == pytest.approx(found["after"] / found["before"] - 1, abs=1e-5)
    harm = merge(tiny.ALIGN, {"max_forgetting": 1e-4, "optim": {"lr": 0.05}})
    with pytest.raises(TrainingError, match=r"(?s)forgot more.*at most 0.0 %.*align.replay"):
        aligned(made, tmp_path / "b", harm)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"phases": {"sft": {"checkpoint": ""}, "prefer": PREFER}}, "followed by another kind"),
        ({"replay": 0.9}, "replay leaves no row"),
        ({"phases": {"sft": None, "prefer": PREFER}, "parallel": {"shard": 2}}, "run in one process"),
    ],
)
def test_settings_that_contradict_are_refused(change, says):
    with pytest.raises(ConfigError) as error:
        fill(AlignConfig, merge(tiny.ALIGN, change), "align")
    assert says in str(error.value)


def test_plan_names_the_kinds():
    assert plan(fill(AlignConfig, BOTH, "align"))[0].startswith("fine-tuning, then dpo: 6 steps")


def test_without_pairs_the_error_names_the_format(made, tmp_path):
    shutil.copytree(made, tmp_path / "run")
    for name in ("pairs", "labelled"):
        (tmp_path / f"run/curate/conversations/{name}.parquet").unlink()
    with pytest.raises(DataError, match=r"(?s)no better and worse answers.*chosen.*docs/conversations.md"):
        aligned(tmp_path / "run", tmp_path / "a", merge(tiny.ALIGN, {"phases": {"sft": None, "prefer": PREFER}}))


def test_reasoning_is_learned_or_dropped_by_phase() -> None:
    thoughtful = [asked(1)[0], {"role": "assistant", "content": "2", "reasoning_content": "1 + 1 = 2"}]
    assert without_reasoning(thoughtful) == [asked(1)[0], {"role": "assistant", "content": "2"}]
    brief = {"steps": 2, "checkpoint": "preview", "sft": {"reasoning": "drop"}}
    config = AlignConfig(phases={"a": {**brief, "checkpoint": ""}, "b": brief, "c": {"steps": 2}})
    assert [list(group) for group in config.groups()] == [["a", "b"], ["c"]]


def test_phase_learns_conversations_of_its_sources(made: Path) -> None:
    tokenizer = Tokenizer.load(made / "tokenize/tokenizer")
    work = workspace(made, "align", "curate")
    everything, _ = render_examples(work, tokenizer)
    some, _ = render_examples(work, tokenizer, settings=SftConfig(sources=("talk",)))
    assert {example.source for example in everything} >= {example.source for example in some}
    assert 0 < len(some) <= len(everything)
    with pytest.raises(DataError, match="names a source that has no conversations"):
        render_examples(work, tokenizer, settings=SftConfig(sources=("talks",)))


# -- reward models -----------------------------------------------------------------------------------------------------

REWARD = {"kind": "reward", "steps": 30, "checkpoint": "judge", "stage_type": "Reward"}


@pytest.fixture(scope="module")
def judge(made, tmp_path_factory) -> Path:
    """A run with a reward model."""
    folder = tmp_path_factory.mktemp("judge") / "align"
    data = merge(tiny.ALIGN, {"optim": {"lr": 3e-3}, "trainer": {"log_every_steps": 1}}) | {"phases": {"judge": REWARD}}
    folder.mkdir()
    work = dataclasses.replace(
        workspace(made, "align", "pretrain", "tokenize", "curate", folder=folder), log=Log(folder, quiet=True)
    )
    align(fill(AlignConfig, data, "align"), work)
    return folder


def test_reward_model_learns_which_answer_is_better(judge, made):
    lines = [json.loads(line) for line in (judge / "metrics.jsonl").read_text().splitlines()]
    assert lines[0]["reward/accuracy"] == 0  # both scores are 0 at the start
    assert lines[-1]["reward/accuracy"] == 1
    model = RewardModel.open(judge / "judge", "float32")
    answers = render_answers(
        workspace(made, "align", "curate"), Tokenizer.load(made / "tokenize/tokenizer"), unpaired=False
    )
    for one in answers:
        better, worse = model.score([example.ids for example in one.examples])
        assert better > worse


def test_scores_do_not_depend_on_batch_or_padding(made):
    """Bit for bit, and where padding is the token that ends a turn. Kernels compute rows of multiples of 16."""
    shape = tiny.config(vocab_size=320, hidden_size=32, head_dim=32, num_attention_heads=1)
    model = RewardModel(tiny.disturb(Afmoe(shape)))
    draw = torch.Generator().manual_seed(1)
    answers = [torch.randint(40, 320, (length,), generator=draw).tolist() for length in (5, 9, 17, 30)]
    alone = [model.score([ids])[0] for ids in answers]
    assert len(set(alone)) == 4
    assert model.score(answers) == alone
    end = 3
    for left in (True, False):
        rows, real = torch.full((4, 30), end), torch.zeros(4, 30, dtype=torch.bool)
        for row, ids in enumerate(answers):
            place = slice(30 - len(ids), 30) if left else slice(len(ids))
            rows[row, place], real[row, place] = torch.tensor(ids), True
        assert model.score_padded(rows, real) == alone


def test_other_checkpoints_are_no_reward_models(made):
    with pytest.raises(CheckpointError, match="is no reward model"):
        RewardModel.open(made / "pretrain/base", "float32")


# -- distillation and reinforcement learning ---------------------------------------------------------------------------


SFT = {"steps": 5, "checkpoint": "preview", "stage_type": "Preview"}


def distil(**distill: Any) -> dict[str, Any]:
    """Return a recipe that moves away by fine-tuning, then back to Base."""
    teacher = {"teacher": {"checkpoint": "pretrain/base"}}
    phase = {"kind": "distill", "steps": 10, "checkpoint": "student", "stage_type": "Student"}
    return merge(tiny.ALIGN, {"trainer": {"log_every_steps": 1}, "optim": {"lr": 3e-3}}) | {
        "phases": {"sft": SFT, "imitate": phase | {"distill": merge(teacher, distill)}}
    }


def measured(made: Path, folder: Path, data: dict[str, Any], name: str) -> tuple[dict[str, Any], list[float]]:
    folder.mkdir()
    log = Log(folder, quiet=True)
    work = dataclasses.replace(workspace(made, "align", "pretrain", "tokenize", "curate", folder=folder), log=log)
    counts = align(fill(AlignConfig, data, "align"), work)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return counts, [line[name] for line in lines if name in line]


def test_distillation_lowers_the_divergence(made, tmp_path):
    counts, losses = measured(made, tmp_path / "a", distil(), "loss/mean")
    losses = losses[SFT["steps"] :]
    assert losses[0] > 2 * losses[-1] > 0
    assert counts["teacher"].startswith("pretrain/base@")
    assert counts["balance"] == "frozen"


def test_distillation_on_own_answers_keeps_them_with_the_teacher(made, tmp_path):
    data = distil(on_policy=True)
    data["phases"]["imitate"]["rl"] = {
        "environments": {"spelling": {}}, "prompts": 4, "group": 2, "max_tokens": 8, "micro_rollouts": 8,
    }  # fmt: skip
    data["batch"] = {"context_tokens": 128, "sequences": 2}
    _, losses = measured(made, tmp_path / "a", data, "loss/mean")
    losses = losses[SFT["steps"] :]
    assert losses[-1] < losses[0]
    ledger = pq.read_table(tmp_path / "a/phases/imitate/rollouts/step_00000005.parquet").to_pylist()
    assert {row["teacher"].partition("@")[0] for row in ledger} == {"pretrain/base"}
    trace = [row for row in pq.read_table(tmp_path / "a/trace.parquet").to_pylist() if row["phase"] == "imitate"]
    # Tasks that this program wrote are no documents of the run: the ledger has them, rights have nothing to judge.
    assert trace == []


@pytest.mark.parametrize(
    ("teacher", "says"),
    [
        ({"allows_training": False}, "terms forbid"),
        ({}, "terms of the teacher are not known"),
        ({"licence": "MIT"}, "terms of the teacher are not known"),
        ({"licence": "LicenseRef-Closed", "licence_evidence": "page"}, "does not let a model learn"),
    ],
)
def test_forbidden_teachers_are_refused_before_the_first_call(tmp_path, teacher, says):
    with pytest.raises(LicenceError, match=says):
        check_terms(TeacherConfig(checkpoint="../x", **teacher), tmp_path / "elsewhere/x", tmp_path / "run")


def test_teachers_with_terms_that_allow_it_are_taken(tmp_path):
    teacher = TeacherConfig(checkpoint="../x", licence="Apache-2.0", licence_evidence="LICENSE")
    assert check_terms(teacher, tmp_path / "elsewhere/x", tmp_path / "run") == "Apache-2.0"


def test_practice_then_reinforcement(made, tmp_path):
    """Right answers are learned from first; then the phase of kind rl draws, grades, and names what it saw."""
    data = merge(tiny.ALIGN, {"optim": {"lr": 1e-2}, "trainer": {"log_every_steps": 1}})
    data["batch"] = {"context_tokens": 128, "sequences": 4}
    rl = {
        "environments": {"halves": {"environment": "spelling"}}, "prompts": 4, "group": 4, "max_tokens": 12,
        "min_reward": 0.0, "held_out": 4, "held_out_every_steps": 1, "collapse": 0.0, "kl": 0.01, "micro_rollouts": 16,
    }  # fmt: skip
    data["phases"] = {
        "sft": {
            "steps": 25, "checkpoint": "preview", "stage_type": "Preview",
            "practice": {"environments": {"spelling": {}}, "examples": 50},
        },
        "think": {"kind": "rl", "steps": 2, "checkpoint": "thinking", "stage_type": "Thinking", "rl": rl},
    }  # fmt: skip
    counts = aligned(made, tmp_path / "a", data)
    assert counts["conversations"] == 8 + 50
    assert sum(counts["rollouts"].values()) == 2 * 16
    assert set(counts["held_out"]) == {"start", "26", "27"}
    assert counts["environments"] == {"halves": "1"}
    assert dcp.check(tmp_path / "a/thinking")["step"] == 27
    row = pq.read_table(tmp_path / "a/phases/think/rollouts/step_00000025.parquet").to_pylist()[0]
    assert (row["environment"], len(row["reference"])) == ("halves", len(row["ids"]))


@pytest.mark.parametrize(
    ("phase", "says"),
    [
        ({"kind": "rl", "steps": 1}, "rl.environments is empty"),
        ({"kind": "distill", "steps": 1}, "distill.teacher.checkpoint is missing"),
        ({"kind": "rl", "steps": 1, "rl": {"prompts": 3, "updates": 2}}, "must be a multiple of updates"),
    ],
)
def test_phases_that_lack_something_are_refused(phase, says):
    with pytest.raises(ConfigError) as error:
        fill(AlignConfig, tiny.ALIGN | {"phases": {"one": phase}}, "align")
    assert says in str(error.value)


def test_reinforcement_warms_up_unless_asked_otherwise():
    rl = {"kind": "rl", "steps": 9, "rl": {"environments": {"letters": {}}}}
    filled = fill(AlignConfig, tiny.ALIGN | {"phases": {"one": rl, "two": rl | {"warmup_steps": 0}}}, "align")
    assert [phase.warmup_steps for phase in filled.phases.values()] == [5, 0]
    assert filled.phases["one"].rl.bounds == (0.2, 0.28)
