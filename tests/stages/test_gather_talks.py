"""Sources of conversations: rights, curation, split, and plain fine-tuning on them, by the shipped recipe."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from freehold.checkpoint import dcp
from freehold.core.artifact import Workspace, write_manifest
from freehold.core.document import Conversation, read_rows
from freehold.core.errors import DataError, LicenceError
from freehold.core.log import Log
from freehold.run.layout import WALK
from freehold.run.recipe import resolve
from freehold.stages.align.run import run as align
from freehold.stages.curate.run import run as curate
from freehold.stages.gather.run import run as gather_run
from freehold.stages.pretrain.run import run as pretrain
from freehold.stages.tokenize.run import run as tokenize
from tests.stages.gather_fixtures import gather, report
from tests.tiny import SHAPE

ROOT = Path(__file__).resolve().parents[2]
OWN = {"licence": "MIT", "licence_evidence": {"rule": "ours"}}


def talk(number: int, **more: Any) -> dict[str, Any]:
    said = [{"role": "user", "content": f"How much is {number}?"}, {"role": "assistant", "content": f"{number} it is"}]
    return {"messages": said, **more}


def jsonl(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def talks(folder: Path, name: str = "talks") -> list[Conversation]:
    return list(read_rows(folder / "conversations" / f"{name}.parquet", Conversation))


def source(path: str, **more: Any) -> dict[str, Any]:
    return {"kind": "conversations", "path": path, **OWN, **more}


def test_rows_become_conversations_with_rights(tmp_path):
    own = talk(2, licence="CC0-1.0", licence_evidence="the author's page", teacher="model-x")
    path = jsonl(tmp_path / "a.jsonl", [talk(1), own])
    counts = gather(tmp_path / "out", {"talks": source(path, origin="our desk")})
    first, second = sorted(talks(tmp_path / "out"), key=lambda row: row.path)
    assert counts["conversations"] == 2
    assert (first.licence, first.licence_evidence, first.path) == ("MIT", "ours", "a.jsonl#1")
    assert (second.licence, second.licence_evidence, second.teacher) == ("CC0-1.0", "the author's page", "model-x")
    assert first.source_version == "our desk"
    said = report(tmp_path / "out", "talks")
    assert (said["format"], said["rows"], said["licences"]) == ("messages", 2, {"CC0-1.0": 1, "MIT": 1})


def test_a_row_under_a_refused_licence_stops_gather(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", [talk(1), talk(2, licence="GPL-3.0-only")])
    with pytest.raises(LicenceError, match="GPL-3"):
        gather(tmp_path / "out", {"talks": source(path)})
    gather(tmp_path / "drop", {"talks": source(path, refused="drop")})
    assert len(talks(tmp_path / "drop")) == 1


def test_tasks_are_held_out_and_not_learned(tmp_path):
    rows = [{"prompt": f"How much is {n} and {n}?", "answer": 2 * n} for n in range(3)]
    gather(tmp_path / "out", {"sums": source(jsonl(tmp_path / "a.jsonl", rows))})
    assert not (tmp_path / "out/conversations").exists()
    items = [json.loads(line) for line in (tmp_path / "out/tasks/sums.jsonl").read_text().splitlines()]
    assert {(i["task"], i["kind"], i["licence"]) for i in items} == {("sums", "generate", "MIT")}
    assert {i["answer"] for i in items} == {"0", "2", "4"}


def test_few_refused_rows_are_named_and_many_stop(tmp_path):
    rows = [*(talk(n) for n in range(30)), {"messages": []}]
    path = jsonl(tmp_path / "a.jsonl", rows)
    gather(tmp_path / "out", {"talks": source(path)})
    named = report(tmp_path / "out", "talks")["skipped"]["named"]
    assert named == [{"path": "a.jsonl#31", "reason": "its messages are not a list with at least one message"}]
    with pytest.raises(DataError, match=r"(?s)too many rows.*1 of 31 rows of messages.*a.jsonl#31.*align --check"):
        gather(tmp_path / "no", {"talks": source(path, max_refused=0.01)})


def test_max_bytes_limits_the_rows(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", [talk(n) for n in range(9)])
    gather(tmp_path / "out", {"talks": source(path, max_bytes=60)})
    assert len(talks(tmp_path / "out")) == 2


def test_conversations_given_as_text_name_the_right_kind(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", [talk(1)])
    with pytest.raises(DataError, match=r"(?s)given as a file of text.*rows of messages.*kind: conversations"):
        gather(tmp_path / "out", {"talks": {**source(path), "kind": "jsonl"}})


WORDS = "the of and to in that was for with on as his they at be this from had by not but which harbour town hill ship"


def text(number: int) -> str:
    """Return a page of sentences of common words, another one for each number."""
    draw = random.Random(number)
    sentences = [" ".join(draw.choices(WORDS.split(), k=draw.randint(6, 12))).capitalize() for _ in range(40)]
    return ". ".join(sentences) + ".\n"


@pytest.fixture(scope="module")
def walked(tmp_path_factory):
    """The shipped recipe as far as align, on a few texts and conversations, with a tiny model."""
    folder = tmp_path_factory.mktemp("talks")
    (folder / "texts").mkdir()
    for number in range(12):
        (folder / f"texts/{number}.txt").write_text(text(number))
    mail = talk(40)
    mail["messages"][1]["reasoning_content"] = "ask ann.smith@harbourmail.com"
    rows = [*(talk(n) for n in range(20)), talk(3), mail]
    pair = [
        {"prompt": f"Is {n} odd?", "chosen": f"It is {n}", "rejected": "I am ann.smith@harbourmail.com"} for n in (1, 2)
    ]
    shape = {**SHAPE, "vocab_size": 320, "max_position_embeddings": 128}
    overrides = [
        f"runs_dir={folder}", f"gather.sources.text.path={folder / 'texts'}",
        f"gather.sources.talks.path={jsonl(folder / 'talks.jsonl', rows)}",
        "gather.sources.pairs={kind: conversations, licence: LicenseRef-Own, licence_evidence: {rule: ours}, "
        f"path: {jsonl(folder / 'pairs.jsonl', pair)}}}",
        "gather.sources.asked={kind: conversations, licence: LicenseRef-Own, licence_evidence: {rule: ours}, "
        f"path: {jsonl(folder / 'asked.jsonl', [{'prompt': 'How much is 7?', 'answer': '7'}])}}}",
        "tokenize.vocab_size=320", f"pretrain.model={json.dumps(shape)}", "pretrain.batch.context_tokens=64",
        "pretrain.batch.sequences=2", "align.batch.context_tokens=128", "align.batch.sequences=2",
        "pretrain.phases.stable.steps=2", "pretrain.phases.anneal.steps=2", "align.phases.sft.steps=4",
        "pretrain.trainer.dtype=float32", "align.trainer.dtype=float32", "curate.split.conversation_fraction=0.2",
    ]  # fmt: skip
    plan = resolve(ROOT / "recipes/talks.yaml", overrides)
    for name, run in (
        ("gather", gather_run), ("curate", curate), ("tokenize", tokenize), ("pretrain", pretrain), ("align", align)
    ):  # fmt: skip
        inputs = {one: plan.run.stage(one) for one in WALK[name].inputs}
        if "rephrase" in inputs:
            inputs.pop("rephrase")
        stage = plan.run.stage(name)
        stage.mkdir(parents=True)
        counts = run(plan.stages[name].config, Workspace(stage, name, "t", 0, Log(None, quiet=True), inputs))
        write_manifest(stage, kind=name, counts=counts, inputs={}, seed=0, config={}, seconds=0.0)
    return plan.run


def test_recipe_for_talks_ends_in_preview(walked):
    assert dcp.check(walked.stage("align") / "preview")["stage_type"] == "Preview"
    kept = talks(walked.stage("curate"))
    assert {row.split for row in kept} == {"train", "validation"}
    trained = json.loads((walked.stage("align") / "manifest.json").read_text())["counts"]["conversations"]
    assert trained == sum(row.split == "train" for row in kept)


def test_curate_drops_duplicates_and_held_out_questions(walked):
    reasons = json.loads((walked.stage("curate") / "report.json").read_text())["conversations"]["talks"]["dropped"]
    assert reasons == {"exact_duplicate": 1, "decontamination": 1}


def test_curate_redacts_reasoning_and_worse_answers(walked):
    texts = json.dumps([row.messages for name in ("talks", "pairs") for row in talks(walked.stage("curate"), name)])
    assert "harbourmail" not in texts
    assert "rejected" in texts
