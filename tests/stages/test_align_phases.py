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
from freehold.core.errors import ConfigError, DataError
from freehold.core.log import Log
from freehold.stages.align.config import AlignConfig, plan
from freehold.stages.align.forgetting import open_for_use
from freehold.stages.align.rows import reference_logprobs, render_answers, without_reasoning
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
        ("pretrain", pretrain, fill(PretrainConfig, tiny.PRETRAIN, "pretrain"), ("tokenize",)),
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
