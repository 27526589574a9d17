"""Rewrites in the ledger: traced like any document, gone with their seed, and taken down by themselves."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from run_fixture import LETTER, SPEECH, build_run

from freehold import cli
from freehold.core.artifact import write_atomic, write_manifest
from freehold.core.document import Document, document_id, read_rows, replace, write_rows
from freehold.core.errors import LicenceError
from freehold.ledger.policy import Policy
from freehold.run import policy_check
from freehold.run.card import facts
from freehold.run.lineage import lineage
from freehold.run.takedown import takedown
from freehold.run.takedown_answer import Excluded
from freehold.run.takedown_recipe import write_recipe
from freehold.run.trace import trace_document

SOURCE = "rephrased_condensed"


def rewritten_run(folder: Path) -> tuple[Path, dict[str, str]]:
    """A run whose two kept speeches were rewritten."""
    run = build_run(folder / "tiny", "curate")
    seeds = {row.id: row for row in read_rows(run / "curate/documents/speeches.parquet", Document)}
    ids = {seed: document_id(SOURCE, f"{seed}#0") for seed in (SPEECH, LETTER)}
    more = {"source": SOURCE, "kind": "generated", "teacher": "Small", "split": "train"}
    rows = [replace(seeds[s], id=ids[s], path=f"{s}#0", synthetic_from=s, **more) for s in ids]
    write_rows(run / f"rephrase/documents/{SOURCE}.parquet", rows, Document)
    write_manifest(run / "rephrase", kind="rephrase", inputs={}, counts={"teacher": "Small", "documents": 2})
    return run, ids


def test_a_rewrite_is_found_and_goes_with_its_seed(tmp_path: Path) -> None:
    run, ids = rewritten_run(tmp_path)
    assert {d.id for d in trace_document(run, SOURCE).documents} == set(ids.values())
    assert {e.origin for e in lineage(run).edges if e.made == "rephrase"} == {"curate", "teacher Small"}
    assert any(r["synthetic_from"] == "speeches" and r["teacher"] == "Small" for r in facts(run)["origins"])
    answer = takedown(run, SPEECH)
    assert (answer.asked, answer.derived, answer.rows) == (1, 1, 2)
    assert answer.excluded == Excluded([], [SPEECH], [])


def test_the_gate_sees_what_a_teacher_wrote(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = build_run(tmp_path / "tiny")
    seed = next(read_rows(run / "curate/documents/speeches.parquet", Document))
    terms = {"licence": "LicenseRef-No-Redistribution", "teacher": "Small", "split": "train"}
    row = replace(seed, id=document_id(SOURCE, "0"), source=SOURCE, kind="generated", synthetic_from=seed.id, **terms)
    write_rows(run / f"rephrase/documents/{SOURCE}.parquet", [row], Document)
    own = {"allow": ["LicenseRef-No-Redistribution"], "uses": ["train"]}
    write_manifest(run / "rephrase", kind="rephrase", inputs={}, counts={}, config={"policy": own})
    trace = pq.read_table(run / "pretrain/trace.parquet").to_pylist()
    pq.write_table(pa.Table.from_pylist([*trace, {**trace[0], "document_id": row.id}]), run / "pretrain/trace.parquet")

    with pytest.raises(LicenceError, match=f"(?s)1 rows into the mixture.*{SOURCE}"):
        policy_check.before_stage(run, "pretrain", Policy(), {})
    # What let the rewrites in judges them here too; the use an export asks for counts as well.
    theirs = Policy.model_validate(own)
    policy_check.before_stage(run, "pretrain", Policy(), {}, theirs)
    policy_check.before_stage(run, "export", Policy(uses=("train",)), {"checkpoint": "pretrain/base"}, theirs)
    wanted = {"checkpoint": "pretrain/base", "uses": ["redistribute"]}
    with pytest.raises(LicenceError, match=f"(?s)1 rows into the export.*{SOURCE}.*passing it on"):
        policy_check.before_stage(run, "export", Policy(uses=("train",)), wanted, theirs)

    assert cli.main(["rights", str(run), "--json"]) == 0
    assert SOURCE in {group["source"] for group in json.loads(capsys.readouterr().out)["rows"]}
    assert cli.main(["rights", str(run), "--of", "pretrain/base", "--use", "redistribute"]) == 1


def test_a_rewrite_is_taken_down_by_itself(tmp_path: Path) -> None:
    run, ids = rewritten_run(tmp_path)
    assert takedown(run, ids[SPEECH]).excluded == Excluded([], [], [ids[SPEECH]])
    answer = takedown(run, SOURCE)
    assert answer.excluded == Excluded([], [], [SOURCE])
    write_atomic(run / "gather/resolved.yaml", "sources: {}")
    write_atomic(run / "curate/resolved.yaml", "split: {}")
    write_atomic(run / "tokenize/resolved.yaml", "vocab_size: 700")
    write_atomic(run / "rephrase/resolved.yaml", "{teacher: {kind: gguf}, exclude: [x], reuse: []}")
    made = yaml.safe_load(Path(write_recipe(run, answer, tmp_path).recipe).read_text())
    assert made["rephrase"]["exclude"] == [SOURCE, "x"]
    assert made["rephrase"]["reuse"] == [f"{run.as_posix()}/rephrase/answers.jsonl"]
