"""Trace: documents to steps, checkpoints and exports, and back; errors name the nearest thing there is."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from run_fixture import LETTER, MODULE, SPEECH, TALK, TWIN, build_run

from freehold.core.artifact import write_manifest
from freehold.core.errors import DataError
from freehold.run.checkpoints import find_checkpoint
from freehold.run.takedown import takedown
from freehold.run.trace import Place, Sum, ranges, trace_checkpoint, trace_document, trace_step
from freehold.run.trace_text import render


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_run(tmp_path_factory.mktemp("runs") / "tiny")


def test_document_goes_everywhere(run: Path) -> None:
    answer = trace_document(run, SPEECH)
    assert (answer.matched_by, answer.found, answer.missing) == ("id", 1, [])
    document = answer.documents[0]
    assert document.licence == "LicenseRef-PD-USGov"
    assert document.wrapper_licence == "MIT"
    assert document.source_version == "speeches==1.2"
    assert document.fate == "train"
    assert document.shard == Place("speeches.train.bin", 0, 40)
    assert [(s.phase, s.steps, s.tokens) for s in document.seen] == [
        ("stable", [0, 1], 40),
        ("anneal", [3], 10),
    ]
    assert [c.path for c in answer.checkpoints] == [
        "pretrain/checkpoints/step_000001",
        "pretrain/truebase",
        "pretrain/base",
        "align/preview",
    ]
    assert [e.path for e in answer.exports] == ["export/gguf/Tiny-F32.gguf", "export/hf/model.safetensors"]


def test_a_checkpoint_saw_only_the_steps_before_it(run: Path) -> None:
    # The module was first read in step 2; TrueBase was saved after steps 0 and 1.
    answer = trace_document(run, MODULE)
    assert [c.stage_type for c in answer.checkpoints] == ["Base", "Preview"]
    assert [c.stage_type for c in trace_document(run, TALK).checkpoints] == ["Preview"]


def test_dropped_and_validation_documents_were_never_seen(run: Path) -> None:
    dropped = trace_document(run, TWIN)
    assert dropped.documents[0].fate == "dropped"
    assert dropped.documents[0].reason == "near_duplicate"
    assert dropped.documents[0].detail == f"0.95 like {SPEECH}"
    assert dropped.documents[0].licence == "LicenseRef-PD-USGov"
    held_out = trace_document(run, LETTER)
    assert held_out.documents[0].fate == "validation"
    assert held_out.documents[0].shard.shard == "speeches.validation.bin"
    for answer in (dropped, held_out):
        assert answer.seen == answer.checkpoints == answer.exports == ()


@pytest.mark.parametrize(
    ("query", "matched_by", "found"),
    [
        ("speeches", "source", 3),
        ("speeches==1.2", "source", 3),
        ("psf-2.0 or mit", "licence", 1),
        ("MIT", "licence", 1),
        ("LicenseRef-PD-USGov", "licence", 3),
        ("PKG/mod", "path", 1),
        ("talk/", "path", 1),
    ],
)
def test_ways_to_ask(run: Path, query: str, matched_by: str, found: int) -> None:
    answer = trace_document(run, query)
    assert (answer.matched_by, answer.found) == (matched_by, found)


def test_counts_are_over_all_matches_and_details_are_limited(run: Path) -> None:
    answer = trace_document(run, "speeches", limit=1)
    assert len(answer.documents) == 1
    assert answer.found == 3
    assert {(row.fate, row.documents) for row in answer.fate} == {
        ("train", 1),
        ("validation", 1),
        ("dropped", 1),
    }
    assert answer.checkpoints[-1].documents == 1
    assert answer.seen[0].ranges == [[0, 1]]


def test_step(run: Path) -> None:
    answer = trace_step(run, 3)
    assert {d.id: (d.licence, d.path) for d in answer.documents} == {
        SPEECH: ("LicenseRef-PD-USGov", "speech.txt"),
        MODULE: ("PSF-2.0 OR MIT", "pkg/module.py"),
    }
    assert answer.phase == "anneal"
    assert answer.checkpoints == ["pretrain/base", "align/preview"]
    # The table holds a document's tokens over all its steps: those of one step are a share, and said to be.
    assert answer.sources["speeches"] == Sum(1, 10)
    assert answer.tokens_exact is False
    assert not answer.changed_nothing
    assert trace_step(run, 2).changed_nothing
    assert [d.id for d in trace_step(run, 1, stage="align").documents] == [TALK]


def test_step_with_tokens_by_step_is_exact(tmp_path: Path) -> None:
    answer = trace_step(build_run(tmp_path / "run", "pretrain", by_step=True), 0)
    assert answer.tokens == 25
    assert answer.tokens_exact is True


def test_both_ways_agree(run: Path) -> None:
    for step in range(4):
        for document in trace_step(run, step).documents:
            seen = trace_document(run, document.id).documents[0].seen
            assert step in [s for entry in seen if entry.stage == "pretrain" for s in entry.steps]


@pytest.mark.parametrize("query", ["", " ", "or"])  # what stands in every path, or between the ids of a licence
def test_a_question_that_names_nothing_matches_nothing(query: str, run: Path) -> None:
    with pytest.raises(DataError, match="no document has this id"):
        trace_document(run, query)
    with pytest.raises(DataError, match="no document has this id"):
        takedown(run, query)


def test_errors_name_the_nearest(run: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"did you mean speeches\?"):
        trace_document(run, "speches")
    with pytest.raises(DataError, match=r"did you mean LicenseRef-PD-USGov\?"):
        trace_document(run, "LicenceRef-PD-US")
    with pytest.raises(DataError, match="for instance a source: code, made, speeches"):
        trace_document(run, "zzzzzzzzzzzzzzzzzzzz")
    with pytest.raises(DataError, match=r"pretrain has no step 4\n.*\n.*steps 0 to 3"):
        trace_step(run, 4)
    with pytest.raises(DataError, match="has no documents"):
        trace_document(tmp_path, "speeches")


@pytest.mark.parametrize(
    ("until", "missing"),
    [
        ("gather", ["curate", "tokenize", "pretrain", "align", "export"]),
        ("curate", ["tokenize", "pretrain", "align", "export"]),
        ("truebase", ["pretrain", "align", "export"]),
        ("pretrain", ["align", "export"]),
    ],
)
def test_unfinished_run_answers_what_it_can(tmp_path: Path, until: str, missing: list[str]) -> None:
    run = build_run(tmp_path / "run", until)
    answer = trace_document(run, SPEECH)
    assert answer.found == 1
    assert [line.partition(":")[0] for line in answer.missing] == missing
    assert "not answered: " + answer.missing[0][:20] in render(answer)
    if until != "pretrain":
        with pytest.raises(DataError, match="pretrain has not finished"):
            trace_step(run, 0)


def test_export_of_another_alignment_is_not_claimed(tmp_path: Path) -> None:
    run = build_run(tmp_path / "run")
    (run / "align/extra.txt").write_text("changed")
    write_manifest(run / "align", kind="align")
    answer = trace_document(run, SPEECH)
    assert answer.exports == ()
    assert answer.missing == ["export: made from another align than the one in this run"]


def test_parent_outside_the_run_is_said(tmp_path: Path) -> None:
    run = build_run(tmp_path / "run")
    trainer = run / "align/preview/trainer.json"
    trainer.write_text(trainer.read_text().replace('"parent": "', '"parent": "0'))
    answer = trace_document(run, SPEECH)
    assert [c.stage_type for c in answer.checkpoints] == ["step", "TrueBase", "Base"]
    assert answer.missing[0].startswith("align: its parent checkpoint is outside this run")


def test_render(run: Path) -> None:
    text = render(trace_document(run, SPEECH))
    for part in ("1 document by id", "speeches==1.2", "17 USC 105", "speeches.train.bin", "stable: 0, 1", "TrueBase"):
        assert part in text
    assert "exported in export/gguf/Tiny-F32.gguf" in text
    text = render(trace_document(run, "speeches"))
    assert "near_duplicate" in text
    text = render(trace_step(run, 2))
    assert "pretrain step 2 (of 0 to 3), phase anneal" in text
    assert "this step was skipped" in text
    assert "PSF-2.0 OR MIT" in text


@pytest.mark.parametrize(
    ("query", "path"),
    [
        ("pretrain/base", "pretrain/base"),
        ("truebase", "pretrain/truebase"),
        ("Preview", "align/preview"),
        ("export/gguf/Tiny-F32.gguf", "align/preview"),
        ("export/hf", "align/preview"),
        ("speeches", None),
        ("export/nothing.gguf", None),
    ],
)
def test_checkpoints_are_found_by_name(run: Path, query: str, path: str | None) -> None:
    assert find_checkpoint(run, query) == path
    assert find_checkpoint(run, f"{run}/{query}") == path


def test_checkpoint_by_hash(run: Path) -> None:
    content = trace_document(run, SPEECH).checkpoints[-1].content_sha256
    assert find_checkpoint(run, content[:8]) == "align/preview"
    assert find_checkpoint(run, content[:7]) is None


def test_back_from_a_checkpoint(tmp_path: Path) -> None:
    run = build_run(tmp_path / "run", by_step=True)
    base = trace_checkpoint(run, "pretrain/base")
    assert {row.source: (row.documents, row.tokens) for row in base.sources} == {
        "speeches": (1, 50),
        "code": (1, 30),
    }
    assert {row.licence for row in base.licences} == {"LicenseRef-PD-USGov", "PSF-2.0 OR MIT"}
    assert (base.found, base.tokens, base.exports) == (2, 80, ())
    # The first checkpoint was made after one step of the two that its document's row speaks of.
    first = trace_checkpoint(run, "pretrain/checkpoints/step_000001")
    assert [(row.id, row.tokens) for row in first.documents] == [(SPEECH, 25)]
    preview = trace_checkpoint(run, "align/preview")
    assert {row.id for row in preview.documents} == {SPEECH, MODULE, TALK}
    assert len(preview.exports) == 2
    text = render(preview)
    for part in ("align/preview (Preview)", "3 documents, 92 tokens", "PSF-2.0 OR MIT", "exported in export/gguf"):
        assert part in text
    with pytest.raises(DataError, match="no such checkpoint"):
        trace_checkpoint(run, "pretrain/nothing")


def test_ranges() -> None:
    assert ranges([0, 1, 2, 5, 7, 8]) == [[0, 2], [5, 5], [7, 8]]


def test_answers_without_torch() -> None:
    code = "import sys, freehold.run.trace, freehold.run.lineage; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
