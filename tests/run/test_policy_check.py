"""The gate after gather: a mixture, an alignment set and an export are judged from the run's own tables."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from run_fixture import build_run

from freehold import cli
from freehold.core.errors import DataError, LicenceError
from freehold.ledger.policy import Policy
from freehold.run import policy_check


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_run(tmp_path_factory.mktemp("runs") / "tiny")


def no(*ids: str, **more: object) -> Policy:
    return Policy(refuse=ids, **more)  # type: ignore[arg-type]


def mixture(**weights: float) -> dict:
    return {"phases": {"stable": {"mixture": weights}}}


def test_lets_through_what_gather_let_through(run: Path) -> None:
    for stage, config in (("pretrain", mixture()), ("align", {}), ("export", {"checkpoint": "align/preview"})):
        policy_check.before_stage(run, stage, Policy(), config)


def test_damaged_checkpoint_does_not_block_training(tmp_path: Path) -> None:
    run = build_run(tmp_path / "tiny")
    damaged = run / "pretrain" / "checkpoints" / "step_00000008"
    damaged.mkdir(parents=True)
    for name in ("trainer.json", "manifest.json"):
        (damaged / name).write_text("{ cut off")
    for stage in ("pretrain", "align"):
        policy_check.before_stage(run, stage, Policy(), mixture())


def test_a_mixture_is_stopped_by_the_rows_it_would_read(run: Path) -> None:
    policy = no("LicenseRef-PD-USGov")
    with pytest.raises(LicenceError, match="1 rows into the mixture") as caught:
        policy_check.before_stage(run, "pretrain", policy, mixture())
    assert "refuse: speeches, speech.txt: wrapper MIT, content LicenseRef-PD-USGov" in str(caught.value)
    # Rows that no phase reads do not count, nor do conversations or what was held out.
    policy_check.before_stage(run, "pretrain", policy, mixture(code=1.0, speeches=0.0))
    policy_check.before_stage(run, "pretrain", no("Apache-2.0"), mixture())
    with pytest.raises(LicenceError):
        policy_check.before_stage(run, "pretrain", policy, mixture(code=1.0, speeches=0.1))


def test_of_alternatives_one_is_enough(run: Path) -> None:
    policy_check.before_stage(run, "pretrain", no("PSF-2.0"), mixture())
    with pytest.raises(LicenceError, match="code, pkg/module.py"):
        policy_check.before_stage(run, "pretrain", no("PSF-2.0", "MIT"), mixture())


def test_an_alignment_set_is_stopped(run: Path) -> None:
    with pytest.raises(LicenceError, match="1 rows into the alignment set"):
        policy_check.before_stage(run, "align", no("Apache-2.0"), {})
    policy_check.before_stage(run, "align", no("LicenseRef-PD-USGov"), {})


def test_an_export_is_stopped_by_all_it_learned_from(run: Path) -> None:
    for licence in ("LicenseRef-PD-USGov", "Apache-2.0"):  # of pre-training, of alignment
        with pytest.raises(LicenceError, match="into the export"):
            policy_check.before_stage(run, "export", no(licence), {"checkpoint": "align/preview"})
    policy_check.before_stage(run, "export", no("Apache-2.0"), {"checkpoint": "pretrain/base"})
    # After two steps the module was not read yet.
    policy_check.before_stage(run, "export", no("PSF-2.0", "MIT"), {"checkpoint": "pretrain/truebase"})


def test_an_export_may_be_for_more_than_training_was(run: Path) -> None:
    research = Policy.model_validate({"uses": ["train"], "by_use": {"commercial": {"refuse": ["Apache-2.0"]}}})
    policy_check.before_stage(run, "export", research, {"checkpoint": "align/preview", "uses": []})
    with pytest.raises(LicenceError, match="refuse list for `commercial`"):
        policy_check.before_stage(run, "export", research, {"checkpoint": "align/preview", "uses": ["commercial"]})


def test_rows_made_from_what_is_refused_name_themselves(run: Path) -> None:
    groups = policy_check.checkpoint(run, "align/preview", Policy())
    assert {(g.claim.source, g.documents, g.verdict.decision) for g in groups} == {
        ("speeches", 1, "allow"), ("code", 1, "allow"), ("made", 1, "allow"),
    }  # fmt: skip
    assert policy_check.worst(groups) == "allow"
    assert policy_check.worst([]) == "allow"
    with pytest.raises(DataError, match="no such checkpoint"):
        policy_check.checkpoint(run, "align/other", Policy())


def test_the_command_answers_and_says_no_by_its_exit_code(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["rights", str(run), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert (answer["decision"], answer["of"], len(answer["rows"])) == ("allow", "corpus", 3)
    (tmp_path / "policy.yaml").write_text("refuse: [Apache-2.0]\njurisdictions: [EU]\n")
    asked = ["rights", str(run), "--of", "export/hf", "--policy", str(tmp_path / "policy.yaml"), "--use", "train"]
    assert cli.main([*asked, "--json"]) == 1
    answer = json.loads(capsys.readouterr().out)
    assert answer["uses"] == ["train"]
    assert [(r["decision"], r["source"]) for r in answer["rows"]][0] == ("refuse", "made")
    assert cli.main(asked) == 1
    said = capsys.readouterr().out
    assert "export/hf of tiny, for train: refuse" in said
    assert "EU: 17 U.S.C. 105" in " ".join(said.split())
