"""A tiny run folder, as the walk would leave it: two sources, a drop, four steps, one alignment, one export."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from freehold.core.artifact import write_json, write_manifest
from freehold.core.document import Conversation, Document, document_id, replace, write_rows

SPEECH, LETTER, TWIN = (document_id("speeches", name) for name in ("speech.txt", "letter.txt", "twin.txt"))
MODULE = document_id("code", "pkg/module.py")
TALK = document_id("made", "talk/1")


def _row(cls: type[Any], source: str, path: str, **more: str) -> Any:
    fields = {
        "source_version": f"{source}==1.2",
        "sha256": "ab" * 32,
        "wrapper_licence": "MIT",
        "licence": "LicenseRef-PD-USGov",
        "licence_evidence": "17 USC 105",
        "acquired": "2026-01-02",
        "kind": "prose",
        "synthetic_from": "",
        "teacher": "",
        "split": "",
        **more,
    }
    body = {"text": "words"} if cls is Document else {"messages": [{"role": "user", "content": "hi"}]}
    return cls(id=document_id(source, path), source=source, path=path, **fields, **body)


def _trace(path: Path, rows: list[tuple[Any, ...]], *, by_step: bool = False) -> None:
    columns = ["document_id", "source", "phase", "first_step", "last_step", "steps", "tokens"]
    types = [pa.string(), pa.string(), pa.string(), pa.int32(), pa.int32(), pa.list_(pa.int32()), pa.int64()]
    if by_step:
        columns, types = [*columns, "step_tokens"], [*types, pa.list_(pa.int32())]
    schema = pa.schema(list(zip(columns, types, strict=True)))
    pq.write_table(pa.Table.from_pylist([dict(zip(columns, r, strict=True)) for r in rows], schema=schema), path)


def _checkpoint(folder: Path, **facts: Any) -> str:
    folder.mkdir(parents=True)
    write_json(folder / "trainer.json", {"skipped_steps": [], "parent": "", **facts})
    return str(write_manifest(folder, kind="checkpoint")["content_sha256"])


def build_run(folder: Path, until: str = "export", *, by_step: bool = False) -> Path:
    """Write the stages up to `until`; returns the run folder."""
    speeches = [_row(Document, "speeches", name) for name in ("letter.txt", "speech.txt", "twin.txt")]
    code = [_row(Document, "code", "pkg/module.py", licence="PSF-2.0 OR MIT", kind="code", wrapper_licence="PSF-2.0")]
    talks = [_row(Conversation, "made", "talk/1", licence="Apache-2.0", kind="conversation")]
    made: dict[str, str] = {}

    def finish(stage: str, *inputs: str, **more: Any) -> bool:
        manifest = write_manifest(folder / stage, kind=stage, inputs={name: made[name] for name in inputs}, **more)
        made[stage] = manifest["content_sha256"]
        return stage == until

    write_rows(folder / "gather/documents/speeches.parquet", speeches, Document)
    write_rows(folder / "gather/documents/code.parquet", code, Document)
    write_rows(folder / "gather/conversations/made.parquet", talks, Conversation)
    write_json(
        folder / "gather/sources.json",
        {"speeches": {"version": "speeches==1.2", "licences": {"LicenseRef-PD-USGov": 3}}, "code": {"version": "3.11"}},
    )
    if finish("gather", counts={"documents": 4}):
        return folder
    kept = [replace(speeches[0], split="validation"), replace(speeches[1], split="train")]
    write_rows(folder / "curate/documents/speeches.parquet", kept, Document)
    write_rows(folder / "curate/documents/code.parquet", [replace(code[0], split="train")], Document)
    write_rows(folder / "curate/conversations/made.parquet", [replace(talks[0], split="train")], Conversation)
    drop = {"id": TWIN, "source": "speeches", "path": "twin.txt", "reason": "near_duplicate"}
    drop |= {"detail": f"0.95 like {SPEECH}", "chars": 5}
    pq.write_table(pa.Table.from_pylist([drop]), folder / "curate/drops.parquet")
    if finish("curate", "gather", counts={"documents": {"in": 4, "out": 3}}):
        return folder
    shards = {"speeches.train": (SPEECH, 0, 40), "speeches.validation": (LETTER, 0, 9), "code.train": (MODULE, 7, 20)}
    for name, (identity, start, tokens) in shards.items():
        path = folder / f"tokenize/tokens/{name}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        row = {"id": identity, "start": start, "tokens": tokens, "bytes": 4 * tokens}
        pq.write_table(pa.Table.from_pylist([row]), path)
        path.with_suffix(".bin").write_bytes(b"\0\0" * tokens)
    write_json(folder / "tokenize/tokenizer/tokenizer.json", {"vocabulary": 1})
    if finish("tokenize", "curate"):
        return folder
    pretrain = folder / "pretrain"
    _checkpoint(pretrain / "checkpoints/step_000001", stage="pretrain", stage_type="step", step=1, phase="stable")
    _checkpoint(pretrain / "truebase", stage="pretrain", stage_type="TrueBase", step=2, phase="stable")
    if until == "truebase":
        return folder
    base = _checkpoint(
        pretrain / "base", stage="pretrain", stage_type="Base", step=4, phase="anneal", skipped_steps=[2]
    )
    rows: list[tuple[Any, ...]] = [
        (SPEECH, "speeches", "stable", 0, 1, [0, 1], 40),
        (SPEECH, "speeches", "anneal", 3, 3, [3], 10),
        (MODULE, "code", "anneal", 2, 3, [2, 3], 30),
    ]
    if by_step:
        rows = [(*row, tokens) for row, tokens in zip(rows, ([25, 15], [10], [20, 10]), strict=True)]
    _trace(pretrain / "trace.parquet", rows, by_step=by_step)
    if finish("pretrain", "tokenize"):
        return folder
    _checkpoint(folder / "align/preview", stage="align", stage_type="Preview", step=2, phase="sft", parent=base)
    _trace(folder / "align/trace.parquet", [(TALK, "made", "sft", 0, 1, [0, 1], 12)])
    if finish("align", "pretrain", "tokenize", "curate"):
        return folder
    for name in ("hf/model.safetensors", "hf/config.json", "gguf/Tiny-F32.gguf"):
        path = folder / "export" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(name))
    finish("export", "align", config={"checkpoint": "align/preview"})
    return folder
