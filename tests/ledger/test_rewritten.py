"""Rewrites in the ledger: traced like any document, gone with their seed, and taken down by themselves."""

from __future__ import annotations

from pathlib import Path

import yaml
from run_fixture import LETTER, SPEECH, build_run

from freehold.core.artifact import write_atomic, write_manifest
from freehold.core.document import Document, document_id, read_rows, replace, write_rows
from freehold.ledger.card import facts
from freehold.ledger.lineage import lineage
from freehold.ledger.takedown import takedown, write_recipe
from freehold.ledger.trace import trace_document

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
    assert {d["id"] for d in trace_document(run, SOURCE)["documents"]} == set(ids.values())
    assert {e.origin for e in lineage(run).edges if e.made == "rephrase"} == {"curate", "teacher Small"}
    assert any(r["synthetic_from"] == "speeches" and r["teacher"] == "Small" for r in facts(run)["origins"])
    answer = takedown(run, SPEECH)
    assert (answer["asked"], answer["derived"], answer["rows"]) == (1, 1, 2)
    assert answer["excluded"] == {"sources": [], "documents": [SPEECH], "rewritten": []}


def test_a_rewrite_is_taken_down_by_itself(tmp_path: Path) -> None:
    run, ids = rewritten_run(tmp_path)
    assert takedown(run, ids[SPEECH])["excluded"] == {"sources": [], "documents": [], "rewritten": [ids[SPEECH]]}
    answer = takedown(run, SOURCE)
    assert answer["excluded"] == {"sources": [], "documents": [], "rewritten": [SOURCE]}
    write_atomic(run / "gather/resolved.yaml", "sources: {}")
    write_atomic(run / "curate/resolved.yaml", "split: {}")
    write_atomic(run / "tokenize/resolved.yaml", "vocab_size: 700")
    write_atomic(run / "rephrase/resolved.yaml", "{teacher: {kind: gguf}, exclude: [x], reuse: []}")
    made = yaml.safe_load(Path(write_recipe(run, answer, tmp_path)["recipe"]).read_text())
    assert made["rephrase"]["exclude"] == [SOURCE, "x"]
    assert made["rephrase"]["reuse"] == [f"{run.as_posix()}/rephrase/answers.jsonl"]
