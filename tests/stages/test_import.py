"""A published model: rights, hashes, links, and every stage that works on it as on a checkpoint of our own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from freehold import api
from freehold.checkpoint import dcp
from freehold.checkpoint.hf import save_hf
from freehold.cli import main
from freehold.core.artifact import Workspace, read_json, read_manifest, verify_files, write_manifest
from freehold.core.config import fill, load_yaml
from freehold.core.document import Conversation, Document, document_id, write_rows
from freehold.core.errors import ArtifactError, CheckpointError, LicenceError
from freehold.core.log import Log
from freehold.model.afmoe import Afmoe
from freehold.model.config import SHAPES, ModelConfig
from freehold.run.layout import WALK
from freehold.stages.align.run import run as align
from freehold.stages.curate.run import run as curate
from freehold.stages.evaluate.run import run as evaluate
from freehold.stages.export.run import run as export
from freehold.stages.gather.run import run as gather
from freehold.stages.importing.config import ImportConfig
from freehold.stages.importing.run import import_model
from freehold.stages.pretrain.run import run as pretrain
from freehold.stages.serve.backends import open_model
from freehold.stages.serve.config import ServeConfig
from freehold.stages.tokenize.run import run as tokenize
from freehold.tokenizer.bpe import Tokenizer, train

APACHE = (Path(__file__).resolve().parents[2] / "LICENSE").read_text(encoding="utf-8")
NARROW = {
    "vocab_size": 384, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16, "head_dim": 16,
    "num_experts": 8, "max_position_embeddings": 256, "sliding_window": 16,
}  # fmt: skip
"""Widths; layers, dense layers, experts a token and the rest stay those of the published shape."""


def published(folder: Path, preset: str, **changes: Any) -> ModelConfig:
    """Write a folder as transformers does, with the names and the config.json of a published Trinity model."""
    shape = ModelConfig(preset=preset, **{**NARROW, "num_attention_heads": 4, "num_key_value_heads": 1, **changes})
    model = Afmoe(shape)
    model.init_weights(torch.Generator().manual_seed(1))
    save_hf(folder / "ours", shape, model.state_dict())
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder / "ours", dtype=torch.bfloat16)
    theirs.save_pretrained(folder, max_shard_size="500KB")
    shutil.rmtree(folder / "ours")
    facts = json.loads((folder / "config.json").read_text())
    facts |= {
        "auto_map": {"AutoConfig": "configuration_afmoe.AfmoeConfig"}, "num_expert_groups": 1, "num_limited_groups": 1,
        "use_grouped_mm": True, "load_balance_coeff": 0.001, "rope_scaling": None, "torch_dtype": "bfloat16",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(facts))
    (folder / "modeling_afmoe.py").write_text("raise SystemExit('never run')\n")
    (folder / "LICENSE").write_text(APACHE)
    return shape


def trinity_tokenizer(folder: Path, text: str) -> None:
    """Write a tokenizer with Trinity's specials and its own chain, which cuts runs at 510 digits, and a template."""
    train([text] * 3, 340, Log(quiet=True)).save(folder)
    data = json.loads((folder / "tokenizer.json").read_text())
    digits = {"type": "Split", "pattern": {"Regex": "\\p{N}{510}"}, "behavior": "Isolated", "invert": False}
    data["pre_tokenizer"]["pretokenizers"].insert(0, digits)
    (folder / "tokenizer.json").write_text(json.dumps(data))
    facts = json.loads((folder / "tokenizer_config.json").read_text())
    del facts["chat_template"]
    (folder / "tokenizer_config.json").write_text(json.dumps(facts))
    (folder / "chat_template.jinja").write_text("{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}")


def settings(path: Path, runs: Path, **changes: Any) -> ImportConfig:
    evidence = {"file": "LICENSE", "quote": "Apache License Version 2.0, January 2004"}
    given = {"path": path, "name": "trinity", "runs_dir": runs, "licence": "Apache-2.0", "licence_evidence": evidence}
    return fill(ImportConfig, given | changes, "import")


TEXT = "Which city is the capital? The harbour of the town is old and 1234567 ships have come there since. " * 20


@pytest.fixture(scope="module")
def nano(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in Nano's layout, 8 layers deep, with a tokenizer in Trinity's form."""
    folder = tmp_path_factory.mktemp("published") / "Trinity-Nano"
    folder.mkdir()
    published(folder, "nano", num_hidden_layers=8)
    trinity_tokenizer(folder, TEXT)
    return folder


@pytest.mark.parametrize("preset", ["nano", "mini", "large"])
def test_published_layouts_import_with_all_names(preset, tmp_path):
    shape = published(tmp_path, preset, num_key_value_heads=2)
    folder = import_model(settings(tmp_path, tmp_path / "runs"), quiet=True) / "base"
    assert (shape.num_hidden_layers, shape.num_dense_layers) == (
        SHAPES[preset]["num_hidden_layers"], SHAPES[preset]["num_dense_layers"]
    )  # fmt: skip
    read, state = dcp.read_model(folder)
    assert read.layer_types == shape.layer_types
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    ours = Afmoe(read).eval()
    ours.load_state_dict(state)
    ids = torch.arange(2 * 20).view(2, 20) * 7 % 384
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), theirs(ids).logits, rtol=1e-4, atol=1e-5)


def test_weights_are_linked_hashed_and_described(nano, tmp_path):
    folder = import_model(settings(nano, tmp_path, vendor="Arcee", country="US"), quiet=True)
    base = folder / "base"
    for path in nano.glob("*.safetensors"):
        assert (base / path.name).stat().st_ino == path.stat().st_ino
    assert not list(base.glob("*.py"))
    facts = dcp.check(base)
    assert (facts["stage_type"], facts["step"], facts["parent"]) == ("Imported", 0, "")
    assert facts["begins_with"] == [0]  # as its tokenizer.json says
    rights = read_json(folder / "rights.json")
    assert (rights["licence"], rights["licence_confidence"], rights["vendor"]) == ("Apache-2.0", "high", "Arcee")
    verify_files(folder, read_manifest(folder, kind="import"))
    assert read_manifest(folder)["counts"]["linked"] is True
    with pytest.raises(ArtifactError, match="a model of this name already"):
        import_model(settings(nano, tmp_path), quiet=True)
    import_model(settings(nano, tmp_path), clean=True, quiet=True)


def test_a_changed_original_is_noticed(nano, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(nano, copy)
    folder = import_model(settings(copy, tmp_path / "runs"), quiet=True)
    first = sorted(copy.glob("*.safetensors"))[0]
    with first.open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x11")
    with pytest.raises(CheckpointError, match="damaged"):
        dcp.read_model(folder / "base")


def test_a_file_system_without_links_gets_a_copy(nano, tmp_path, monkeypatch):
    def refuse(*_: Any) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr("os.link", refuse)
    folder = import_model(settings(nano, tmp_path), quiet=True)
    assert read_manifest(folder)["counts"]["linked"] is False
    dcp.check(folder / "base")


def test_without_a_tokenizer_the_model_alone_is_there(tmp_path):
    published(tmp_path / "m", "nano", num_hidden_layers=4)
    import_model(settings(tmp_path / "m", tmp_path / "runs"), quiet=True)
    loaded = api.load(tmp_path / "runs/trinity")
    assert loaded.model(torch.tensor([[3, 4, 5]])).shape == (1, 3, 384)
    assert len(loaded.engine.score([[3, 4, 5]])[0]) == 3
    with pytest.raises(ArtifactError, match=r"(?s)no tokenizer.*tokenizer.json"):
        loaded.generate("Which city?")


def test_another_tokenizer_is_carried_but_not_used(tmp_path):
    published(tmp_path / "m", "nano", num_hidden_layers=4)
    trinity_tokenizer(tmp_path / "m", TEXT)
    data = json.loads((tmp_path / "m/tokenizer.json").read_text())
    data["added_tokens"] = [t for t in data["added_tokens"] if t["content"] != "<|im_end|>"]
    (tmp_path / "m/tokenizer.json").write_text(json.dumps(data))
    folder = import_model(settings(tmp_path / "m", tmp_path / "runs"), quiet=True)
    assert "<|im_end|>" in read_manifest(folder)["counts"]["without_tokenizer"]
    assert (folder / "base/tokenizer.json").is_file()
    assert api.load(folder).model is not None


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            {"licence": "CC-BY-NC-4.0", "licence_evidence": {"rule": "x"}},
            r"(?s)contradict.*text of Apache",
        ),
        ({"licence": "GPL-3.0-only", "licence_evidence": {"rule": "x"}, "settled": "ours"}, "the policy stops"),
        ({"licence_evidence": {"file": "LICENSE", "quote": "all rights are reserved"}}, "quoted evidence is not"),
    ],
)
def test_rights_are_judged_before_anything_is_written(nano, tmp_path, change, says):
    with pytest.raises(LicenceError, match=says):
        import_model(settings(nano, tmp_path, **change), quiet=True)
    assert not (tmp_path / "trinity/import/base").exists()


def test_a_card_that_names_another_licence_is_a_conflict(nano, tmp_path):
    shutil.copytree(nano, tmp_path / "m")
    (tmp_path / "m/README.md").write_text("---\nlicense: mit\n---\n# Card\n")
    with pytest.raises(LicenceError, match="README.md:2 says license: MIT"):
        import_model(settings(tmp_path / "m", tmp_path / "runs"), quiet=True)
    settled = settings(tmp_path / "m", tmp_path / "runs", settled="the card is old")
    rights = read_json(import_model(settled, quiet=True) / "rights.json")
    assert "settled: the card is old" in rights["licence_evidence"]


def test_broken_weights_are_refused_by_name(nano, tmp_path):
    shutil.copytree(nano, tmp_path / "m")
    path = sorted((tmp_path / "m").glob("*.safetensors"))[0]
    tensors = load_file(path)
    name = sorted(tensors)[0]
    tensors[name].view(-1)[0] = float("nan")
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=rf"(?s)not finite.*{name}"):
        import_model(settings(tmp_path / "m", tmp_path / "runs"), quiet=True)
    with pytest.raises(ArtifactError, match="no model to import"):
        import_model(settings(tmp_path / "none", tmp_path / "runs"), quiet=True)


RIGHTS = {
    "source_version": "x==1", "path": "p", "sha256": "0", "wrapper_licence": "MIT", "licence": "MIT",
    "licence_evidence": "LICENSE", "acquired": "2026-01-01", "kind": "prose", "synthetic_from": "", "teacher": "",
}  # fmt: skip


@pytest.fixture(scope="module")
def walked(nano: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that starts from the imported model by the recipe that import wrote: tokenize to export."""
    runs = tmp_path_factory.mktemp("runs")
    import_model(settings(nano, runs), quiet=True)
    recipe = load_yaml(runs / "trinity/import/recipe.yaml")
    run = runs / "child"
    rows = [
        Document(
            id=document_id("a", str(n)), source="a", split="validation" if n % 5 == 0 else "train",
            text=f"{n}. {TEXT[:300]}", **RIGHTS,
        )
        for n in range(20)
    ]  # fmt: skip
    write_rows(run / "curate/documents/a.parquet", rows, Document)
    said = [
        Conversation(
            id=f"t{n}", source="talk", split="train", **RIGHTS,
            messages=[{"role": "user", "content": f"City {n}?"}, {"role": "assistant", "content": f"{n}, the town"}],
        )
        for n in range(8)
    ]  # fmt: skip
    write_rows(run / "curate/conversations/talk.parquet", said, Conversation)
    one = {"threads": 1, "dtype": "float32"}
    recipe["align"] = {
        "batch": {"context_tokens": 128, "sequences": 2}, "trainer": one,
        "phases": {"sft": {"steps": 2, "checkpoint": "preview", "stage_type": "Preview"}},
    }  # fmt: skip
    recipe["pretrain"]["batch"] = {"context_tokens": 64, "sequences": 2}
    recipe["evaluate"] |= {"context_tokens": 64, "task_checkpoints": []}
    recipe["export"] = {"types": []}
    write_manifest(run / "curate", kind="curate", counts={}, inputs={}, seed=0, config={}, seconds=0.0)
    for name, do in (
        ("tokenize", tokenize), ("pretrain", pretrain), ("align", align), ("evaluate", evaluate), ("export", export)
    ):  # fmt: skip
        _make(run, name, do, recipe)
    return run


def _make(run: Path, name: str, do: Any, recipe: dict[str, Any]) -> dict[str, Any]:
    (run / name).mkdir()
    config = fill(WALK[name].config_class(), recipe[name], name)
    inputs = {one: run / one for one in WALK[name].inputs if one != "rephrase"}
    counts = do(config, Workspace(run / name, name, "t", 0, Log(None, quiet=True), inputs))
    write_manifest(run / name, kind=name, counts=counts, inputs={}, seed=0, config={}, seconds=0.0)
    return counts


def test_conversations_alone_are_enough_with_an_import(nano, tmp_path):
    import_model(settings(nano, tmp_path), quiet=True)
    recipe = load_yaml(tmp_path / "trinity/import/recipe.yaml")
    rows = [
        {"messages": [{"role": "user", "content": f"City {n}?"}, {"role": "assistant", "content": f"Town {n}"}]}
        for n in range(60)
    ]
    (tmp_path / "talks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    talks = {
        "kind": "conversations", "path": str(tmp_path / "talks.jsonl"), "licence": "MIT",
        "licence_evidence": {"rule": "ours"},
    }  # fmt: skip
    recipe |= {"gather": {"sources": {"talks": talks}}, "curate": {"split": {"conversation_fraction": 0.1}}}
    recipe["align"] = {
        "batch": {"context_tokens": 64, "sequences": 2}, "trainer": {"threads": 1},
        "phases": {"sft": {"steps": 2, "checkpoint": "preview", "stage_type": "Preview"}},
    }  # fmt: skip
    recipe["evaluate"] |= {"context_tokens": 64, "task_checkpoints": []}
    run = tmp_path / "child"
    run.mkdir()
    for name, do in (
        ("gather", gather), ("curate", curate), ("tokenize", tokenize), ("pretrain", pretrain), ("align", align),
        ("evaluate", evaluate),
    ):  # fmt: skip
        _make(run, name, do, recipe)
    assert dcp.check(run / "align/preview")["stage_type"] == "Preview"
    assert set(read_json(run / "evaluate/results.json")["text"]["sources"]) == {"talks"}


def test_pretrain_keeps_the_import_without_a_second_copy(walked, nano):
    for path in nano.glob("*.safetensors"):
        assert (walked / "pretrain/base" / path.name).stat().st_ino == path.stat().st_ino
    assert dcp.check(walked / "pretrain/base")["imported"] is True


def test_pretrain_continues_from_the_import(walked, tmp_path):
    recipe = load_yaml(walked.parent / "trinity/import/recipe.yaml")
    recipe["pretrain"] |= {
        "batch": {"context_tokens": 64, "sequences": 2}, "trainer": {"threads": 1, "dtype": "float32"},
        "phases": {"more": {"steps": 2, "checkpoint": "base", "stage_type": "Base"}},
    }  # fmt: skip
    shutil.copytree(walked / "tokenize", tmp_path / "tokenize")
    assert _make(tmp_path, "pretrain", pretrain, recipe)["steps"] == 2
    facts = dcp.check(tmp_path / "pretrain/base")
    assert facts["parent"] == read_manifest(walked.parent / "trinity/import/base")["content_sha256"]


def test_align_evaluate_and_export_work_on_the_import(walked):
    facts = dcp.check(walked / "align/preview")
    assert facts["parent"] == read_manifest(walked.parent / "trinity/import/base")["content_sha256"]
    assert set(read_json(walked / "evaluate/results.json")["checkpoints"]) == {"base", "preview"}
    assert read_json(walked / "export/parity.json")["exports"]["hf"]["passed"]
    transformers.AutoModelForCausalLM.from_pretrained(walked / "export/hf")


def test_load_and_serve_open_the_import(walked):
    root = walked.parent / "trinity"
    loaded = api.load(root)
    assert loaded.folder == root / "import/base"
    assert isinstance(loaded.generate("Which city?", max_tokens=3), str)
    assert loaded.tokenizer.encode("1234567") == Tokenizer.load(walked / "tokenize/tokenizer").encode("1234567")
    served = open_model(ServeConfig(path=root), root)
    assert served.tokenizer.sha256 == loaded.tokenizer.sha256


def test_import_verb_says_what_to_do_next(nano, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = [str(nano), "--name", "t", "--licence", "Apache-2.0"]
    quote = ["--evidence", "LICENSE: Apache License Version 2.0, January 2004"]
    assert main(["import", *arguments, *quote, "origin=https://example.org/nano"]) == 0
    assert "base: runs/t/import/recipe.yaml" in capsys.readouterr().out
    assert main(["import", *arguments, "--evidence", "the vendor's page", "--clean", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["counts"]["checkpoints"] == {"base": "Imported"}
    assert main(["schema", "import"]) == 0
