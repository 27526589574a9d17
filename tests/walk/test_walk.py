"""The whole walk on a few hundred kilobytes of real text, then everything that can interrupt or change it."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from freehold.core.code import contract_versions
from freehold.core.errors import ArtifactError, ConfigError
from freehold.core.version import VERSION
from freehold.run.layout import WALK, RunFolder
from freehold.run.processes import locked
from freehold.run.recipe import resolve

RECIPE = "recipes/tiny.yaml"


def freehold(*args: str, check: bool = True) -> subprocess.CompletedProcess:
    result = subprocess.run([sys.executable, "-m", "freehold.cli", *args], capture_output=True, text=True)
    if check:
        assert result.returncode == 0, result.stderr
    return result


def hashes(run: Path) -> dict[str, str]:
    found = {s: run / s / "manifest.json" for s in WALK}
    return {s: json.loads(p.read_text())["content_sha256"] for s, p in found.items() if p.exists()}


@pytest.fixture(scope="module")
def runs(walked) -> Path:
    return walked


def test_walk_ends_with_an_answer_and_a_summary(runs):
    run = runs / "tiny"
    assert set(hashes(run)) == {name for name, stage in WALK.items() if not stage.on_request}
    answer = json.loads((run / "serve" / "answer.json").read_text())
    assert answer["question"]
    assert isinstance(answer["answer"], str)
    said = (runs / "said.txt").read_text()
    for word in ("freehold chat", "freehold serve", "TrueBase", "Base", "Preview", "GGUF", answer["question"]):
        assert word.lower() in said.lower(), word
    assert (run / "report.md").exists()
    assert (run / "report.png").read_bytes()[:4] == b"\x89PNG"


def test_manifest_names_inputs_versions_contract_and_code(runs):
    for stage, entry in WALK.items():
        if entry.on_request:
            continue
        manifest = json.loads((runs / "tiny" / stage / "manifest.json").read_text())
        assert manifest["kind"] == stage
        assert set(manifest["inputs"]) == set(entry.inputs)
        for name, digest in manifest["inputs"].items():
            assert digest == hashes(runs / "tiny")[name]
        assert manifest["versions"]["torch"]
        (span,) = manifest["code"]
        assert (span["first"], len(span["sha256"]), span["version"]) == (0, 64, VERSION)
        assert manifest["contract"] == contract_versions(f"{entry.module}.run")
        assert manifest["seconds"] >= 0


@pytest.mark.slow
def test_verify_resume_finds_the_same_bits(runs):
    result = freehold("verify-resume", RECIPE, f"runs_dir={runs}", "--first", "3", "--more", "4", "--json")
    answer = json.loads(result.stdout)
    (world,) = answer["worlds"]
    assert answer["passed"]
    assert world["check_exact"]
    assert {"model", "optimizer", "balance", "rng"} <= set(world["parts"])
    assert not any(part["differing"] for part in world["parts"].values())
    assert not (runs / "tiny" / "verify-resume").exists()


def test_up_to_date_run_does_nothing_quickly(runs):
    before = {p: p.stat().st_mtime_ns for p in (runs / "tiny").rglob("manifest.json")}
    started = time.monotonic()
    result = freehold("run", RECIPE, f"runs_dir={runs}", "--json")
    assert time.monotonic() - started < 10
    assert {s["state"] for s in json.loads(result.stdout)["stages"].values()} == {"up to date"}
    assert {p: p.stat().st_mtime_ns for p in (runs / "tiny").rglob("manifest.json")} == before


def test_changed_recipe_is_refused_and_shown(runs):
    before = hashes(runs / "tiny")
    result = freehold("run", RECIPE, f"runs_dir={runs}", "pretrain.optim.lr=1e-4", check=False)
    assert result.returncode == 2
    assert "config.optim.lr: 0.003 -> 0.0001" in result.stderr
    assert "--fork" in result.stderr
    assert hashes(runs / "tiny") == before


def test_fork_reuses_the_stages_that_are_the_same(runs):
    result = freehold(
        "run", RECIPE, f"runs_dir={runs}", "align.optim.lr=1e-4", "until=align", "--fork", "other", "--json"
    )
    states = {s: line["state"] for s, line in json.loads(result.stdout)["stages"].items()}
    assert states == dict.fromkeys(("gather", "curate", "rephrase", "tokenize", "pretrain"), "reused") | {
        "align": "made"
    }
    old, new = hashes(runs / "tiny"), hashes(runs / "other")
    assert old["pretrain"] == new["pretrain"]
    assert old["align"] != new["align"]


@pytest.mark.parametrize("victim", ["walk", pytest.param("stage", marks=pytest.mark.slow)])
def test_killed_run_resumes_to_the_same_bits(runs, tmp_path, victim):
    run = tmp_path / "tiny"
    for stage in ("gather", "curate", "rephrase", "tokenize"):
        shutil.copytree(runs / "tiny" / stage, run / stage)
    until = "align" if victim == "walk" else "pretrain"
    command = [sys.executable, "-m", "freehold.cli", "run", RECIPE, f"runs_dir={tmp_path}", f"until={until}", "--quiet"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while not list(run.glob("pretrain/checkpoints/step_*/manifest.json")):
        assert process.poll() is None
        time.sleep(0.02)
    stage = psutil.Process(process.pid).children()[0].pid
    os.kill(process.pid if victim == "walk" else stage, signal.SIGKILL)
    said = process.communicate()[1]
    assert process.returncode == (-signal.SIGKILL if victim == "walk" else 128 + signal.SIGKILL)
    assert ("pretrain was killed, perhaps by the system for lack of memory" in said) == (victim == "stage")
    assert not (run / "pretrain" / "manifest.json").exists()
    # What a kill in the middle of a write or of a removal can leave behind.
    (run / "pretrain" / "manifest.json.tmp").write_text("{")
    for leftover in ("step_00000003.tmp", "step_00000005"):
        (run / "pretrain" / "checkpoints" / leftover / "state").mkdir(parents=True)
        (run / "pretrain" / "checkpoints" / leftover / "state" / "__0_0.distcp").write_text("half")
    subprocess.run(command, check=True)
    assert hashes(run)[until] == hashes(runs / "tiny")[until]
    assert hashes(run)["pretrain"] == hashes(runs / "tiny")["pretrain"]
    assert "resumed from step_" in (run / "pretrain" / "log" / "attempt_2.txt").read_text()


@pytest.mark.slow
def test_buffer_order_resumes_to_the_same_bits(runs, tmp_path):
    said = ["pretrain.batch.order={kind: buffer, documents: 4, workers: 2}", "pretrain.phases.stable.steps=12"]
    said.append("pretrain.phases.anneal.steps=4")
    for name in ("whole", "killed"):
        for stage in ("gather", "curate", "rephrase", "tokenize"):
            shutil.copytree(runs / "tiny" / stage, tmp_path / name / stage)
    # The name of a run is no part of any stage's content.
    command = [sys.executable, "-m", "freehold.cli", "pretrain", RECIPE, f"runs_dir={tmp_path}", *said]
    subprocess.run([*command, "name=whole", "--quiet"], check=True)
    process = subprocess.Popen([*command, "name=killed", "--quiet"], start_new_session=True)
    while not list(tmp_path.glob("killed/pretrain/checkpoints/step_*/manifest.json")):
        assert process.poll() is None
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    subprocess.run([*command, "name=killed", "--quiet"], check=True)
    assert "resumed from step_" in (tmp_path / "killed/pretrain/log/attempt_2.txt").read_text()
    assert hashes(tmp_path / "killed") == hashes(tmp_path / "whole")
    assert hashes(tmp_path / "whole")["pretrain"] != hashes(runs / "tiny")["pretrain"]
    step = json.loads(freehold("trace", "--step", "3", "--run", str(tmp_path / "killed"), "--json").stdout)
    assert sum(document["tokens"] for document in step["documents"]) == 4 * 128


def test_bit_flipped_shard_stops_training_and_is_named(runs, tmp_path):
    run = tmp_path / "tiny"
    for stage in ("gather", "curate", "rephrase", "tokenize"):
        shutil.copytree(runs / "tiny" / stage, run / stage)
    shard = run / "tokenize" / "tokens" / "code.train.bin"
    data = bytearray(shard.read_bytes())
    data[1000] ^= 1
    shard.write_bytes(data)
    result = freehold("run", RECIPE, f"runs_dir={tmp_path}", "until=pretrain", check=False)
    assert result.returncode == 2
    assert "code.train.bin" in result.stderr
    shard.write_bytes(data[:-2])
    result = freehold("run", RECIPE, f"runs_dir={tmp_path}", "until=tokenize")
    assert "code.train.bin: missing or of another size" in result.stderr
    made = ("gather", "curate", "rephrase", "tokenize")
    assert hashes(run) == {s: h for s, h in hashes(runs / "tiny").items() if s in made}


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda run: (run / "tokenize" / "manifest.json").write_text("{"), "not JSON"),
        (lambda run: (run / "tokenize" / "manifest.json").write_text("{}"), "not a manifest"),
        (lambda run: (run / "tokenize" / "tokenizer" / "tokenizer.json").unlink(), "missing or of another size"),
    ],
)
def test_damaged_stage_is_named_and_made_again(runs, tmp_path, damage, says):
    run = tmp_path / "tiny"
    for stage in ("gather", "curate", "rephrase", "tokenize"):
        shutil.copytree(runs / "tiny" / stage, run / stage)
    damage(run)
    result = freehold("run", RECIPE, f"runs_dir={tmp_path}", "until=tokenize")
    assert "tokenize is damaged and is made again" in result.stderr
    assert says in result.stderr
    assert hashes(run)["tokenize"] == hashes(runs / "tiny")["tokenize"]


def test_damaged_input_is_found_before_it_is_used(runs, tmp_path):
    run = tmp_path / "tiny"
    for stage in ("gather", "curate"):
        shutil.copytree(runs / "tiny" / stage, run / stage)
    path = run / "curate" / "documents" / "code.parquet"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    result = freehold("run", RECIPE, f"runs_dir={tmp_path}", "until=tokenize", check=False)
    assert result.returncode == 2
    assert "code.parquet" in result.stderr
    assert "hash differs" in result.stderr


def test_second_process_cannot_lock_the_run_folder(tmp_path):
    run = RunFolder(tmp_path)
    with locked(run), pytest.raises(ArtifactError, match="another freehold"), locked(run, 0.2):
        raise AssertionError("two processes hold the lock")


def test_trace_and_lineage_answer_both_ways(runs):
    run = runs / "tiny"
    step = json.loads(freehold("trace", "--step", "3", "--run", str(run), "--json").stdout)
    document = (
        step["documents"][0]["document_id"] if "document_id" in step["documents"][0] else step["documents"][0]["id"]
    )
    back = json.dumps(json.loads(freehold("trace", document, "--run", str(run), "--json").stdout))
    assert "truebase" in back
    assert "preview" in back
    graph = freehold("lineage", str(run)).stdout
    for word in ("TrueBase", "Base", "Preview", "F32"):
        assert word in graph


def test_dry_run_and_json(runs):
    shown = freehold("run", RECIPE, f"runs_dir={runs}", "--dry-run").stdout
    assert "36 steps of 512 tokens" in shown
    answer = json.loads(freehold("pretrain", RECIPE, f"runs_dir={runs}", "optim.lr=1", "--dry-run", "--json").stdout)
    assert answer["stages"]["pretrain"]["state"] == "stale"
    assert answer["stages"]["pretrain"]["changes"] == ["config.optim.lr: 0.003 -> 1.0"]
    schema = json.loads(freehold("schema", "pretrain").stdout)
    assert "phases" in schema["properties"]


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["run", "recipes/lptop.yaml"], "did you mean recipes/laptop.yaml"),
        (["run", RECIPE, "pretrian.optim.lr=1"], "did you mean `pretrain`"),
        (["pretrain", RECIPE, "optim.lrr=1"], "did you mean `lr`"),
        (["run", RECIPE, "until=nowhere"], "no such stage"),
        (["run", RECIPE, "name=a/b"], "name"),
        (["run", RECIPE, "name=.."], "name"),
        (["trace"], "give a document"),
        (["lineage", "nowhere"], "no such run folder"),
        (["run", RECIPE, "--dry-run", "until=nowhere"], "no such stage"),
        (["run", RECIPE, "--nonsense"], "unrecognized argument: --nonsense"),
    ],
)
def test_mistake_names_its_cure(args, says):
    result = freehold(*args, check=False)
    assert result.returncode == 2
    assert says in result.stderr
    assert "Traceback" not in result.stderr


def test_unwritable_folder_is_an_error(tmp_path):
    (tmp_path / "file").write_text("in the way")
    result = freehold("run", RECIPE, f"runs_dir={tmp_path / 'file'}", check=False)
    assert result.returncode == 2
    assert "could not write or read: Not a directory" in result.stderr
    assert "Traceback" not in result.stderr


def test_trace_and_lineage_name_damaged_files(runs, tmp_path):
    run = tmp_path / "tiny"
    shutil.copytree(runs / "tiny", run)
    (run / "pretrain" / "trace.parquet").write_bytes(b"PAR1 nonsense")
    result = freehold("trace", "code", "--run", str(run), check=False)
    assert result.returncode == 2
    assert "damaged" in result.stderr
    (run / "pretrain" / "base" / "trainer.json").write_text("{")
    result = freehold("lineage", str(run), check=False)
    assert result.returncode == 2
    assert "trainer.json" in result.stderr


def test_section_must_be_a_mapping(tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("name: r\ngather: 3\n")
    with pytest.raises(ConfigError, match="not a mapping"):
        resolve(recipe)


def test_stage_without_its_input(tmp_path):
    result = freehold("curate", RECIPE, f"runs_dir={tmp_path}", check=False)
    assert result.returncode == 2
    assert "not a finished artifact" in result.stderr
    assert "freehold run" in result.stderr
