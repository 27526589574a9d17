"""Lineage: the graph from sources to exports, and the hashes that tie it together."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from run_fixture import build_run

from freehold.core.artifact import write_manifest
from freehold.core.errors import ArtifactError
from freehold.run.lineage import Graph, draw, lineage


def edges(graph: Graph) -> set[tuple[str, str]]:
    return {(edge.origin, edge.made) for edge in graph.edges}


def test_whole_chain(tmp_path: Path) -> None:
    graph = lineage(build_run(tmp_path / "tiny"))
    assert graph.sound
    assert graph.missing == []
    assert edges(graph) == {
        ("source speeches", "gather"),
        ("source code", "gather"),
        ("gather", "curate"),
        ("curate", "tokenizer"),
        ("curate", "tokens"),
        ("tokenizer", "tokens"),
        ("tokens", "TrueBase"),
        ("tokens", "Base"),
        ("TrueBase", "Base"),
        ("Base", "Preview"),
        ("curate", "Preview"),
        ("tokenizer", "Preview"),
        ("Preview", "HF export"),
        ("Preview", "Tiny-F32.gguf"),
    }
    nodes = {node.name: node for node in graph.nodes}
    assert nodes["curate"].detail == "3 documents"
    assert nodes["Base"].content_sha256
    assert nodes["source speeches"].detail == "speeches==1.2 LicenseRef-PD-USGov"
    assert json.loads(json.dumps(graph.to_dict()))["sound"] is True


def test_tree_and_mermaid(tmp_path: Path) -> None:
    graph = lineage(build_run(tmp_path / "tiny"))
    tree = draw(graph)
    lines = tree.split("\n")
    depth = {
        name: next(line.index(name) for line in lines if f" {name}" in line) for name in ("gather", "curate", "Base  ")
    }
    assert lines[0] == "run tiny"
    assert depth["gather"] < depth["curate"] < depth["Base  "]
    assert "Preview" in tree
    assert "Tiny-F32.gguf" in tree
    assert "CHANGED" not in tree
    picture = draw(graph, mermaid=True)
    assert picture.startswith("graph TD\n")
    assert picture.count("-->") == len(graph.edges)


def test_changed_artifact_is_marked(tmp_path: Path) -> None:
    run = build_run(tmp_path / "tiny")
    (run / "curate/report.json").write_text("{}")
    write_manifest(run / "curate", kind="curate")
    graph = lineage(run)
    assert not graph.sound
    wrong = {(edge.origin, edge.made) for edge in graph.edges if not edge.matches}
    assert wrong == {("curate", "tokenizer"), ("curate", "tokens"), ("curate", "Preview")}
    assert "CHANGED: made from curate" in draw(graph)
    assert "some recorded hashes do not match" in draw(graph)
    assert draw(graph, mermaid=True).count("-. changed .->") == 3


def test_another_parent_is_marked(tmp_path: Path) -> None:
    run = build_run(tmp_path / "tiny")
    trainer = run / "align/preview/trainer.json"
    trainer.write_text(trainer.read_text().replace('"parent": "', '"parent": "0'))
    graph = lineage(run)
    assert [(e.origin, e.made) for e in graph.edges if not e.matches] == [("Base", "Preview")]


def test_branch_of_another_run(tmp_path: Path) -> None:
    run = build_run(tmp_path / "tiny", "pretrain")
    for trainer in run.glob("pretrain/*/trainer.json"):
        trainer.write_text(trainer.read_text().replace('"parent": ""', '"parent": "feed00000000"'))
    graph = lineage(run)
    assert ("outside feed00000000", "TrueBase") in edges(graph)
    assert "a checkpoint of another run" in draw(graph)


def test_unfinished_and_partly_deleted_runs(tmp_path: Path) -> None:
    run = build_run(tmp_path / "tiny", "truebase")
    graph = lineage(run)
    assert graph.missing == ["pretrain: not finished", "align: not finished", "export: not finished"]
    assert "TrueBase" in draw(graph)
    assert "missing: align: not finished" in draw(graph)
    whole = build_run(tmp_path / "whole")
    shutil.rmtree(whole / "align")
    graph = lineage(whole)
    assert {(e.origin, e.made) for e in graph.edges if not e.matches} == {
        ("align/preview", "HF export"),
        ("align/preview", "Tiny-F32.gguf"),
    }
    assert "not in this run folder any more" in draw(graph)


def test_not_a_run(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="not a run"):
        lineage(tmp_path)
