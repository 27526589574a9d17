"""Promotion: gates decide, waivers are signed, only what a trusted key promoted is served."""

import json
import shutil
from pathlib import Path

import pytest

from freehold.cli.main import main
from freehold.core.errors import ConfigError, ProofError
from freehold.proof import folder, verify
from freehold.run import anchoring, card, check_behaviour, check_release, promotion, release, segments
from freehold.run.layout import RunFolder
from freehold.run.reproduce import NotReproduced

GATES = "gates: {audit/leaks/personal_data: {most: 0}, evaluate/bits_per_byte/preview: {most: 9}}\n"
FAILING = "gates: {evaluate/bits_per_byte/preview: {most: 0.1}}\n"


@pytest.fixture
def run(walked, tmp_path):
    return Path(shutil.copytree(walked / "tiny", tmp_path / "tiny"))


@pytest.fixture
def owner(tmp_path):
    return folder.create(tmp_path / "keys")


def test_promoted_model_is_served_and_others_are_not(run, owner, tmp_path):
    gates = tmp_path / "gates.yaml"
    gates.write_text(GATES)
    preview, root = run / "align/preview", owner.root_fingerprint
    with pytest.raises(promotion.NotPromoted, match="was not promoted"):
        promotion.require(preview, root)
    assert promotion.state(RunFolder(run)) == "audited"
    promotion.promote(run, gates, owner, "Ada", {})
    ring = owner.path / "keyring.json"
    assert promotion.require(preview, root, ring).predicate["by"] == "Ada"
    gguf = next((run / "export/gguf").glob("*Q8_0.gguf"))
    for path in (run, run / "export/hf", gguf):
        promotion.require(path, root, ring)
    with pytest.raises(promotion.NotPromoted, match="another model"):
        promotion.require(run / "pretrain/base", root, ring)
    with pytest.raises(ProofError, match="root you trust"):
        promotion.require(preview, "0" * 64, ring)
    gguf.write_bytes(gguf.read_bytes()[:-1] + b"x")
    with pytest.raises(promotion.NotPromoted, match="not the one that was promoted"):
        promotion.require(gguf, root, ring)
    owner.revoke("release-1")
    with pytest.raises(ProofError, match="no trusted key"):
        promotion.require(preview, root, ring)


def test_failing_gate_needs_a_signed_waiver_on_the_card(run, owner, tmp_path, capsys):
    gates = tmp_path / "gates.yaml"
    gates.write_text(FAILING)
    with pytest.raises(promotion.NotPromoted, match="does not keep its gates"):
        promotion.promote(run, gates, owner, "Ada", {})
    why = "evaluate/bits_per_byte/preview=it is a toy"
    command = ["promote", str(run), "--gates", str(gates), "--keys", str(owner.path), "--by", "Ada"]
    assert main([*command, "--waive", "evaluate/bits_per_byte/preview"]) == 2
    assert main([*command, "--waive", why, "--json"]) == 0
    release.build(release.gather_contents(run, card.Statements(), detached=True), owner, tmp_path / "pack")
    assert "it is a toy" in (tmp_path / "pack/card/README.md").read_text()
    verified = verify.verify_pack(tmp_path / "pack", owner.root_fingerprint)
    assert "promotion" in check_release.check(tmp_path / "pack", verified, owner.root_fingerprint).checked
    statement = promotion.unsigned(run / "promotion.dsse.json")
    statement["predicate"]["waivers"] = []
    evaluation = json.loads((run / "evaluate/results.json").read_text())
    manifests = {"export": json.loads((run / "export/manifest.json").read_text())}
    assert not promotion.decided_again(statement, promotion.figures(manifests, evaluation, {}))


def test_unknown_metric_and_needless_waiver_are_errors(run, owner, tmp_path):
    gates = tmp_path / "gates.yaml"
    gates.write_text("gates: {audit/leaks/personal_date: {most: 0}}\n")
    with pytest.raises(ConfigError, match="audit/leaks/personal_data"):
        promotion.promote(run, gates, owner, "Ada", {})
    gates.write_text(GATES)
    with pytest.raises(promotion.NotPromoted, match="does not fail"):
        promotion.promote(run, gates, owner, "Ada", {"audit/leaks/personal_data": "no reason"})
    gates.write_text("gates: {audit/leaks/personal_data: {}}\n")
    with pytest.raises(ConfigError, match="most"):
        promotion.promote(run, gates, owner, "Ada", {})


def test_training_anchored_its_checkpoints(run):
    pack = run / "release/pack"
    found = segments.intervals(pack)
    assert [(i.stage, i.start, i.end) for i in found if i.stage == "pretrain"] == [
        ("pretrain", start, end) for start, end in zip((0, 8, 16, 24, 32), (8, 16, 24, 32, 36), strict=True)
    ]
    order = [i.name for i in segments.chosen(found, "a")]
    assert sorted(order) == sorted(i.name for i in found)
    assert order != [i.name for i in segments.chosen(found, "b")]
    log = folder.load(run / "keys").log
    assert anchoring.anchor(RunFolder(run), log) == 0


@pytest.mark.slow
def test_intervals_are_replayed_to_the_same_hash(run, tmp_path):
    pack = run / "release/pack"
    outcomes = segments.replay(pack, run, tmp_path / "work", 2, "nonce")
    assert [o.verdict for o in outcomes if o.verdict != "not replayed"] == ["equal", "equal"]
    entries = (pack / verify.LOG_ENTRIES).read_text()
    last = [json.loads(line) for line in entries.splitlines() if '"pretrain/checkpoints' in line]
    for entry in last:
        entries = entries.replace(entry["content_sha256"], "0" * 64)
    (pack / verify.LOG_ENTRIES).write_text(entries)
    with pytest.raises(NotReproduced, match="another checkpoint"):
        segments.replay(pack, run, tmp_path / "work", 9, "nonce")


def test_recorded_answers_are_given_again(run):
    pack = run / "release/pack"
    found = check_behaviour.check(pack, 6, "mine")
    assert found.items == 6
    path = pack / "evaluation/answers/preview.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(row | {"answer": "forty-two", "correct": False}) + "\n" for row in rows))
    with pytest.raises(check_behaviour.OtherBehaviour, match="does not answer as the release says"):
        check_behaviour.check(pack, 6, "mine")
    shutil.rmtree(pack / "model/hf")
    with pytest.raises(ProofError, match="cannot be measured again"):
        check_behaviour.check(pack, 6, "mine")
