"""Rights across runs: what a parent or a teacher may not, its descendants may not, also when its folder is gone."""

from __future__ import annotations

import itertools
import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from freehold import cli
from freehold.core.artifact import read_manifest, write_json, write_manifest
from freehold.core.document import Document, document_id, write_rows
from freehold.core.errors import LicenceError
from freehold.data.exposure import write_trace
from freehold.ledger.policy import SEVERITY, Policy, judge
from freehold.run import ancestry, card, disclosure, policy_check
from freehold.run.layout import RunFolder
from freehold.run.lineage import draw, lineage

BASE = "pretrain/base"
USES = ("train", "distill", "redistribute", "commercial")
NON_COMMERCIAL = "CC-BY-NC-4.0"


def run_of(folder: Path, licences: list[str], parent: Path | None = None, **rephrase: Any) -> Path:
    """Write a run that learned one document of each licence, from a checkpoint of another run when one is given."""
    run, name = RunFolder(folder), folder.name
    ids = [document_id(name, str(number)) for number in range(len(licences))]
    rights = {"source": name, "source_version": f"{name}==1", "sha256": "0" * 64, "wrapper_licence": "MIT"}
    rights |= {"licence_evidence": "LICENSE", "kind": "prose", "acquired": "2026-01-02", "synthetic_from": ""}
    rows = [
        Document(id=i, path=f"{n}.txt", licence=licence, teacher="", split="train", text=f"{name} {n}", **rights)
        for n, (i, licence) in enumerate(zip(ids, licences, strict=True))
    ]
    for stage in ("gather", "curate"):
        write_rows(run.stage(stage) / f"documents/{name}.parquet", rows, Document)
        write_manifest(run.stage(stage), kind=stage, config={"policy": {"uses": ["train"], "allow": licences}})
    if rephrase:
        run.stage("rephrase").mkdir()
        ancestry.write(run, "rephrase", rephrase)
        write_manifest(run.stage("rephrase"), kind="rephrase", config=rephrase, counts={"teacher": "a teacher"})
    config = {"parent": str(parent or ""), "phases": {"stable": {"steps": 2}}}
    run.stage("pretrain").mkdir()
    ancestry.write(run, "pretrain", config)
    facts = {"stage": "pretrain", "stage_type": "Base", "step": 2, "phase": "stable"}
    facts |= {"parent": read_manifest(parent)["content_sha256"] if parent else ""}
    (folder / BASE).mkdir()
    write_json(folder / BASE / "trainer.json", facts)
    (folder / BASE / "weights").write_text(name)
    write_manifest(folder / BASE, kind="checkpoint")
    seen = {"source": name, "phase": "stable", "first_step": 0, "last_step": 0, "steps": [0], "tokens": 5}
    write_trace(run.trace("pretrain"), [{"document_id": i, **seen, "step_tokens": [5]} for i in ids])
    write_manifest(run.stage("pretrain"), kind="pretrain", config=config, counts={"steps": 2})
    return folder


def decision(run: Path, *uses: str, **policy: Any) -> str:
    wide = {"allow": ["MIT", "CC0-1.0", NON_COMMERCIAL, *policy.pop("allow", ())], **policy}
    return policy_check.worst(policy_check.checkpoint(run, BASE, Policy.model_validate({**wide, "uses": uses})))


def test_branch_is_denied_what_its_base_is_denied(tmp_path, capsys):
    base = run_of(tmp_path / "base", [NON_COMMERCIAL])
    child = run_of(tmp_path / "child", ["MIT"], base / BASE)
    grandchild = run_of(tmp_path / "grandchild", ["MIT"], child / BASE)
    for keep in (True, False):  # with the folders of the parents, and without
        for run in (child, grandchild):
            for of in ([], ["--of", BASE]):
                assert cli.main(["rights", str(run), *of, "--use", "commercial", "--json"]) == 1
                answer = json.loads(capsys.readouterr().out)
                assert answer["decision"] == "refuse"
                assert f"base/{BASE}: base" in answer["rows"][0]["source"]
                assert "forbids commercial use" in answer["rows"][0]["reason"]
            export = {"checkpoint": BASE, "uses": ["commercial", "redistribute"]}
            policy = Policy.model_validate({"uses": ["train"], "allow": ["MIT", NON_COMMERCIAL]})
            with pytest.raises(LicenceError, match="(?s)into the export.*forbids commercial use"):
                policy_check.before_stage(run, "export", policy, export)
        if keep:
            shutil.move(base, tmp_path / "elsewhere")
    assert decision(grandchild, "train") == "allow"
    assert decision(grandchild, "commercial") == "refuse"


def test_training_stops_before_it_starts_from_a_denied_parent(tmp_path):
    base = run_of(tmp_path / "base", [NON_COMMERCIAL])
    config = {"parent": str(base / BASE), "phases": {}}
    with pytest.raises(LicenceError, match="(?s)by its parent or teacher.*forbids commercial use"):
        policy_check.before_stage(tmp_path / "new", "pretrain", Policy(), config)
    trained = Policy.model_validate({"uses": ["train"], "allow": [NON_COMMERCIAL]})
    policy_check.before_stage(tmp_path / "new", "pretrain", trained, config)


def test_parent_without_a_record_is_reviewed_until_settled(tmp_path):
    base = run_of(tmp_path / "base", ["MIT"])
    child = run_of(tmp_path / "child", ["MIT"], base / BASE)
    (child / "pretrain/ancestry.json").unlink()  # as a run of an earlier version
    assert decision(child, "commercial") == "allow"  # its folder still says it
    shutil.rmtree(base)
    assert decision(child, "train") == "review"
    config = read_manifest(child / "pretrain")["config"] | {"parent_settled": "we trained it on our own letters"}
    write_manifest(child / "pretrain", kind="pretrain", config=config, counts={"steps": 2})
    assert decision(child, "train") == "allow"
    assert "settled: we trained it" in disclosure.make(card.facts(child), card.Statements(), ["data"])["data.md"]


def test_changed_or_lost_record_is_reviewed(tmp_path):
    base = run_of(tmp_path / "base", [NON_COMMERCIAL])
    child = run_of(tmp_path / "child", ["MIT"], base / BASE)
    path = child / "pretrain/ancestry.json"
    path.write_text(path.read_text().replace(NON_COMMERCIAL, "MIT"))
    assert decision(child, "commercial") == "review"
    for stage in ("gather", "curate"):
        shutil.rmtree(base / stage / "documents")
        write_rows(base / stage / "documents/other.parquet", [], Document)
    path.unlink()
    assert decision(child, "train") == "review"  # what its base learned from is not there any more


def test_checkpoint_outside_any_run_is_unknown(tmp_path):
    base = run_of(tmp_path / "base", ["MIT"])
    shutil.copytree(base / BASE, tmp_path / "alone/base")
    child = run_of(tmp_path / "child", ["MIT"], tmp_path / "alone/base")
    assert decision(child, "train") == "review"


def test_origin_of_a_published_model_may_be_refused(tmp_path):
    folder = tmp_path / "nano/import/base"
    rights = {
        "source": "nano",
        "licence": "Apache-2.0",
        "licence_evidence": "LICENSE",
        "vendor": "Acme",
        "country": "US",
    }
    folder.mkdir(parents=True)
    write_json(folder / "trainer.json", {"imported": True, "rights": rights, "step": 0})
    write_manifest(folder, kind="checkpoint")
    child = run_of(tmp_path / "child", ["MIT"], folder)
    wide = {"allow": ["Apache-2.0"]}
    assert decision(child, "commercial", **wide) == "allow"
    assert decision(child, "commercial", **wide, origins=[{"vendor": "ac*"}]) == "refuse"
    assert decision(child, "commercial", **wide, origins=[{"country": "US", "decision": "review"}]) == "review"
    assert decision(child, "commercial", **wide, origins=[{"country": "DE"}, {"compute": "US"}]) == "allow"
    assert decision(child, "commercial", **wide, unknown_origin="refuse") == "allow"


def test_teacher_of_another_run_and_its_origin_count(tmp_path):
    teacher = run_of(tmp_path / "teacher", [NON_COMMERCIAL])
    write_json(teacher / "export/gguf/T.gguf", {})
    write_manifest(teacher / "export", kind="export", config={"checkpoint": BASE})
    own = {"teacher": {"kind": "gguf", "path": str(teacher / "export/gguf/T.gguf")}}
    child = run_of(tmp_path / "child", ["MIT"], **own)
    shutil.rmtree(teacher)
    assert decision(child, "commercial") == "refuse"
    served = {"teacher": {"kind": "endpoint", "model": "Big", "country": "US"}}
    other = run_of(tmp_path / "other", ["MIT"], **served)
    assert decision(other, "commercial") == "allow"
    assert decision(other, "commercial", origins=[{"country": "US"}]) == "refuse"


@pytest.mark.parametrize("seed", range(3))
def test_rights_are_never_wider_than_the_strictest_ancestor(tmp_path, seed):
    dice = random.Random(seed)
    licences = ["MIT", "CC0-1.0", NON_COMMERCIAL, "CC-BY-ND-4.0", "LicenseRef-No-Distill", "CC-BY-4.0", "GPL-3.0-only"]
    made: list[tuple[Path, set[str]]] = []  # each run with the licences of all its ancestors
    for number in range(5):
        own = dice.sample(licences, dice.randint(1, 2))
        parent = dice.choice([None, *made]) if made else None
        teacher = dice.choice([None, None, *made]) if made else None
        rephrase = {}
        if teacher:
            write_json(teacher[0] / "export/T.gguf", {})
            write_manifest(teacher[0] / "export", kind="export", config={"checkpoint": BASE})
            rephrase = {"teacher": {"kind": "gguf", "path": str(teacher[0] / "export/T.gguf")}}
        run = run_of(tmp_path / f"run{number}", own, parent[0] / BASE if parent else None, **rephrase)
        made.append((run, {*own, *(parent[1] if parent else ()), *(teacher[1] if teacher else ())}))
    if dice.random() < 0.5:
        for run, _ in made[:2]:
            shutil.rmtree(run)
        made = made[2:]
    for (run, inherited), uses in itertools.product(made, [("distill",), ("commercial",), USES]):
        policy = Policy(uses=uses, allow=("MIT", "CC0-1.0", "CC-BY-ND-4.0"), allow_copyleft=dice.random() < 0.5)
        strictest = max(SEVERITY[judge(licence, policy).decision] for licence in inherited)
        assert SEVERITY[policy_check.worst(policy_check.checkpoint(run, BASE, policy))] == strictest
        if uses == USES:
            assert SEVERITY[policy_check.worst(policy_check.everything(run, policy))] == strictest


def test_lineage_and_card_name_ancestors(tmp_path):
    base = run_of(tmp_path / "base", [NON_COMMERCIAL])
    child = run_of(tmp_path / "child", ["MIT"], base / BASE)
    grandchild = run_of(tmp_path / "grandchild", ["MIT"], child / BASE)
    shutil.rmtree(base)
    graph = lineage(grandchild)
    edges = {(edge.origin, edge.made) for edge in graph.edges}
    assert {(f"base/{BASE}", f"child/{BASE}"), (f"child/{BASE}", "Base")} <= edges
    assert f"learned from {NON_COMMERCIAL}" in draw(graph)
    texts = disclosure.make(card.facts(grandchild), card.Statements(), ["data", "eu"])
    assert "Models of other runs" in texts["data.md"]
    assert NON_COMMERCIAL in texts["data.md"]
    assert f"base/{BASE}, content" in texts["eu-training-content.md"]
