"""More steps on a finished run: in place where the schedule so far is the same, else the error names the branch."""

import shlex
import shutil

import pytest
import tiny
import torch

from freehold.checkpoint import dcp
from freehold.cli import main
from freehold.core.artifact import read_json, read_manifest
from freehold.core.log import read_metrics
from freehold.data.loader import consumed_by
from freehold.run.layout import RunFolder
from freehold.run.lengthen import recorded
from freehold.stages.pretrain.run import segment_steps

LONGER = ["pretrain.phases.stable.steps=27"]
GUARDS = {"/collapse", "/spike"}


@pytest.fixture
def copied(walked, tmp_path):
    """A copy of the run as far as pre-training."""
    for stage in ("gather", "curate", "rephrase", "tokenize", "pretrain"):
        shutil.copytree(walked / "tiny" / stage, tmp_path / "tiny" / stage)
    return tmp_path


def tensors(state, at=""):
    """Return weights, optimizer, balancing and random state; a branch starts with guards of its own."""
    if not isinstance(state, dict):
        return {at: state}
    parts = [tensors(value, f"{at}/{key}") for key, value in state.items() if f"{at}/{key}" not in GUARDS]
    return {key: value for part in parts for key, value in part.items()}


def test_constant_phase_continues_from_its_checkpoint(copied):
    run = RunFolder(copied / "tiny")
    before = read_metrics(run.metrics("pretrain"))
    parent = shutil.copytree(run.stage("pretrain") / "truebase", copied / "parent")
    shutil.copytree(copied / "tiny", copied / "other", ignore=shutil.ignore_patterns("pretrain"))
    longer = ["pretrain", str(tiny.RECIPE), f"runs_dir={copied}", *LONGER, "--quiet"]
    assert main(longer) == 0
    after = read_metrics(run.metrics("pretrain"))
    assert [row for row in after if row["step"] <= 24] == [row for row in before if row["step"] <= 24]
    manifest = read_manifest(run.stage("pretrain"))
    assert manifest["counts"]["steps"] == 39
    assert manifest["lengthened"] == recorded(run, "pretrain") == {"stable": [24]}
    # The added steps are those of a branch that starts at the old end: the same rows, rates and bits.
    stable = ["phases.stable.steps=3", "phases.stable.warmup_steps=0"]
    branch = ["pretrain", str(tiny.RECIPE), f"runs_dir={copied}", "name=other", "phases.anneal=null", *stable]
    assert main([*branch, f"parent={parent}", "parent_settled=a copy", "--quiet"]) == 0
    found, expected = (tensors(dcp.load(copied / name / "pretrain/truebase")) for name in ("tiny", "other"))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    facts = read_json(run.stage("pretrain") / "truebase" / "trainer.json")
    other = read_json(copied / "other/pretrain/truebase/trainer.json")
    assert consumed_by(facts) == consumed_by(other)
    assert consumed_by({**facts, "step": 26}) == consumed_by({**other, "step": 26})
    assert main(longer) == 0  # done: nothing is made again
    assert read_manifest(run.stage("pretrain"))["created"] == manifest["created"]


def test_longer_decay_names_the_branch_command(copied, capsys):
    command = ["pretrain", str(tiny.RECIPE), f"runs_dir={copied}", "pretrain.phases.anneal.steps=14", "--quiet"]
    assert main(command) == 2
    said = capsys.readouterr().err
    assert "config.phases.anneal.steps: 12 -> 14" in said
    branch = said.partition("checkpoint before them: freehold ")[2].partition(";")[0]
    assert main([*shlex.split(branch), "--quiet"]) == 0
    manifest = read_manifest(copied / "tiny-longer/pretrain")
    assert manifest["counts"]["steps"] == 38
    assert read_manifest(copied / "tiny/pretrain")["counts"]["steps"] == 36
    # The rights of the run it branched from came along.
    (record,) = read_json(copied / "tiny-longer/pretrain/ancestry.json")["parents"]
    assert record["path"] == "pretrain/truebase"
    assert "PSF-2.0" in {row["licence"] for row in record["rows"]}
    assert "pretrain/ancestry.json".partition("/")[2] in manifest["files"]


@pytest.mark.parametrize(
    ("before", "steps"), [([], [9]), ([6], [6, 3]), ([6, 8], [6, 2, 1]), ([9], [9]), ([6, 12], [6, 3])]
)
def test_segments_of_a_lengthened_phase(before, steps):
    assert segment_steps(9, before) == steps
