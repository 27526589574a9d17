"""`freehold init`: what it sees, what it writes, and that the recipe runs as written."""

import inspect
import json
import pkgutil
import shutil
import subprocess
import sys
import textwrap

import pytest
import yaml

from freehold.cli.main import main
from freehold.run.init import look, write_recipe
from freehold.run.recipe import resolve
from freehold.run.sizing import EPOCHS, Machine, choose, tokens_of

MESSAGES = {"messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "We are."}]}
CPU = Machine("cpu")


@pytest.fixture
def texts(tmp_path):
    """A folder of English text: what Python's modules say of themselves."""
    folder = tmp_path / "texts"
    (folder / "more").mkdir(parents=True)
    for module in [textwrap, inspect, json, shutil, subprocess, pkgutil]:
        members = [member for _, member in inspect.getmembers(module) if inspect.getmodule(member) is module]
        words = "\n\n".join(filter(None, map(inspect.getdoc, [module, *members])))
        (folder / "more" / f"{module.__name__}.txt").write_text(words)
    (folder / "picture.png").write_bytes(b"\x89PNG")
    return folder


def rows(path, *each):
    path.write_text("".join(json.dumps(row) + "\n" for row in each))
    return path


def recipe_of(paths, tmp_path, machine=CPU, minutes=30, **settings):
    written = write_recipe(look(paths), "own", tmp_path / "own.yaml", machine, 60 * minutes, **settings)
    (tmp_path / "own.yaml").write_text(written.text)
    return written, yaml.safe_load(written.text)


@pytest.mark.slow
def test_recipe_of_a_folder_runs_as_written(texts, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    talks = rows(tmp_path / "talks.jsonl", *[MESSAGES] * 20)
    assert main(["init", str(texts), str(talks), "--licence", "LicenseRef-Own"]) == 0
    said = capsys.readouterr().out
    assert "text: 6 files (6 .txt)" in said
    assert "not taken: 1 x .png" in said
    assert "freehold run own.yaml" in said
    short = [f"pretrain.phases.{name}.steps=2" for name in ("stable", "anneal")]
    short += [
        "pretrain.batch.sequences=2",
        "pretrain.batch.context_tokens=64",
        "pretrain.trainer.validation_tokens=256",
    ]
    command = [sys.executable, "-m", "freehold.cli", "run", "own.yaml", "until=pretrain", "--quiet"]
    done = subprocess.run([*command, *short], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs" / "own" / "pretrain" / "base" / "manifest.json").exists()


def test_dry_run_writes_nothing(texts, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["init", str(texts), "--dry-run", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert any("not seen: the right to use this text" in line for line in answer["said"])
    assert yaml.safe_load(answer["recipe"])["gather"]["sources"]["text"]["licence"] == "LicenseRef-Unstated"
    assert not (tmp_path / "own.yaml").exists()


def test_existing_recipe_is_not_overwritten(texts, tmp_path, capsys):
    (tmp_path / "own.yaml").write_text("mine")
    assert main(["init", str(texts), "--output", str(tmp_path / "own.yaml")]) == 2
    assert "there is a file of this name" in capsys.readouterr().err
    assert (tmp_path / "own.yaml").read_text() == "mine"


def test_licence_file_is_seen_and_not_asked_for(texts, tmp_path):
    (texts / "LICENSE").write_text("MIT License")
    written, data = recipe_of([texts], tmp_path)
    assert data["gather"]["sources"]["text"]["licence"] == "detect"
    assert not any("not seen" in line for line in written.said)
    resolve(tmp_path / "own.yaml")


def test_conversations_replace_generated_talk(texts, tmp_path):
    talks = rows(tmp_path / "talks.jsonl", *[MESSAGES] * 3)
    lines = rows(tmp_path / "lines.jsonl", {"text": "Once upon a time."})
    written, data = recipe_of([texts, talks, lines], tmp_path, licence="CC0-1.0")
    sources = data["gather"]["sources"]
    assert {name: source["kind"] for name, source in sources.items()} == {
        "text": "folder", "rows": "jsonl", "talks": "conversations",
    }  # fmt: skip
    assert sources["talks"]["format"] == "messages"
    assert data["gather"]["policy"]["allow"] == ["CC0-1.0"]
    assert any("conversations" in line and "messages" in line for line in written.said)
    resolve(tmp_path / "own.yaml")


def test_other_languages_are_let_through(tmp_path):
    folder = tmp_path / "texte"
    folder.mkdir()
    (folder / "a.txt").write_text("Es war einmal ein Fischer, der wohnte mit seiner Frau dicht an der See. " * 20)
    _, data = recipe_of([folder], tmp_path, licence="LicenseRef-Own")
    assert data["curate"]["kinds"]["prose"] == {"languages": ["de"], "quality": False}
    resolve(tmp_path / "own.yaml")


def test_model_is_imported_first(tmp_path):
    model = tmp_path / "nano"
    model.mkdir()
    (model / "config.json").write_text("{}")
    written, data = recipe_of([model, rows(tmp_path / "t.jsonl", MESSAGES)], tmp_path, licence="Apache-2.0")
    assert written.next[0].startswith(f"freehold import {model} --name own-model --licence Apache-2.0")
    assert data["base"].endswith("runs/own-model/import/recipe.yaml")
    assert data["align"]["phases"]["sft"]["steps"] >= 5


def test_folder_without_text_is_named(tmp_path, capsys):
    (tmp_path / "a.png").write_bytes(b"x")
    assert main(["init", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "nothing here can be trained on" in error
    assert "1 x .png" in error
    assert main(["init", str(tmp_path / "nothing")]) == 2


@pytest.mark.parametrize("machine", [CPU, Machine("h100")], ids=lambda machine: machine.device)
def test_more_text_gets_more_model_within_the_time(machine):
    sizes = [choose(size, machine, 1800) for size in (200_000, 1_000_000, 20_000_000, 500_000_000)]
    assert [size.vocab_size for size in sizes] == sorted(size.vocab_size for size in sizes)
    assert all(size.seconds <= 1800 for size in sizes)
    assert all(size.epochs <= EPOCHS + 0.1 for size in sizes)
    active = [size.active for size in sizes[:3]]
    assert active == sorted(active)
    read = sizes[0].steps * sizes[0].step_tokens / tokens_of(200_000, sizes[0].vocab_size)
    assert read == pytest.approx(sizes[0].epochs, rel=0.1)


def test_slower_machine_gets_a_shorter_training():
    quick, slow = (choose(20_000_000, Machine("cpu", rate), 600) for rate in (4e11, 1e11))
    assert slow.steps * slow.step_tokens < quick.steps * quick.step_tokens
