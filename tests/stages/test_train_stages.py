"""pretrain and align against what tokenize and curate write."""

import json
import shutil

import pyarrow.parquet as pq
import pytest
import torch
import yaml

from freehold.api import load
from freehold.checkpoint import dcp
from freehold.core.artifact import Workspace, write_manifest
from freehold.core.config import fill, merge, parse_override
from freehold.core.config import override as config_override
from freehold.core.document import Conversation, Document, document_id, write_rows
from freehold.core.errors import ArtifactError, CheckpointError, ConfigError, DataError
from freehold.core.log import Log
from freehold.data.shards import ShardSet
from freehold.model.config import to_hf_dict
from freehold.run.trace import trace_step
from freehold.stages.align.config import AlignConfig as AlignConfig
from freehold.stages.align.run import run as align
from freehold.stages.evaluate.config import NeedlesConfig
from freehold.stages.evaluate.needles import find_needles, needle_tables
from freehold.stages.pretrain.config import PretrainConfig as PretrainConfig
from freehold.stages.pretrain.extend import extended
from freehold.stages.pretrain.run import run as pretrain
from freehold.stages.reshape.config import GrowConfig
from freehold.stages.reshape.grow import grow
from freehold.stages.reshape.model import open_model, save_model
from freehold.stages.tokenize.config import TokenizeConfig as TokenizeConfig
from freehold.stages.tokenize.run import run as tokenize

RIGHTS = {
    "source_version": "x==1", "path": "p", "sha256": "0", "wrapper_licence": "MIT", "licence": "MIT",
    "licence_evidence": "LICENSE", "acquired": "2026-01-01", "kind": "prose", "synthetic_from": "", "teacher": "",
}  # fmt: skip
MODEL = {
    "vocab_size": 320, "hidden_size": 16, "intermediate_size": 32, "moe_intermediate_size": 16,
    "num_hidden_layers": 4, "num_dense_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8,
    "num_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8, "max_position_embeddings": 64,
}  # fmt: skip
PRETRAIN = {
    "model": MODEL,
    "batch": {"context_tokens": 32, "sequences": 2},
    "trainer": {"threads": 1, "dtype": "float32", "checkpoint_every_steps": 4},
    "phases": {
        "stable": {"steps": 4, "checkpoint": "truebase", "stage_type": "TrueBase"},
        "anneal": {"steps": 2, "shape": "linear", "end": 0.0, "checkpoint": "base", "stage_type": "Base"},
    },
}
ALIGN = {
    "batch": {"context_tokens": 64, "sequences": 2},
    "trainer": {"threads": 1, "dtype": "float32"},
    "phases": {"sft": {"steps": 3, "checkpoint": "preview", "stage_type": "Preview"}},
}


def workspace(run, stage, *inputs):
    return Workspace(run / stage, stage, "t", 0, Log(None, quiet=True), {name: run / name for name in inputs})


def finish(run, stage, counts):
    write_manifest(run / stage, kind=stage, counts=counts, inputs={}, seed=0, config={}, seconds=0.0)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    run = tmp_path_factory.mktemp("run")
    for source in ("a", "b"):
        rows = [
            Document(
                id=document_id(source, str(i)), source=source, split="validation" if i % 7 == 0 else "train",
                text=f"Document {i} of {source}. " + "The quick brown fox jumps over the dog, twice. " * (2 + i % 5),
                **RIGHTS,
            )
            for i in range(40)
        ]  # fmt: skip
        write_rows(run / "curate" / "documents" / f"{source}.parquet", rows, Document)
    talks = [
        Conversation(
            id=f"t{i}", source="talk", split="validation" if i == 0 else "train",
            messages=[{"role": "user", "content": f"Say {i}"}, {"role": "assistant", "content": f"{i}, the fox."}],
            **RIGHTS,
        )
        for i in range(12)
    ]  # fmt: skip
    write_rows(run / "curate" / "conversations" / "talk.parquet", talks, Conversation)
    finish(run, "curate", {})
    finish(run, "tokenize", tokenize(TokenizeConfig(vocab_size=320), workspace(run, "tokenize", "curate")))
    config = fill(PretrainConfig, PRETRAIN, "pretrain")
    finish(run, "pretrain", pretrain(config, workspace(run, "pretrain", "tokenize")))
    config = fill(AlignConfig, ALIGN, "align")
    finish(run, "align", align(config, workspace(run, "align", "pretrain", "tokenize", "curate")))
    return run


def test_chain_of_checkpoints(run):
    truebase, base, preview = (dcp.check(run / p) for p in ("pretrain/truebase", "pretrain/base", "align/preview"))
    assert [f["stage_type"] for f in (truebase, base, preview)] == ["TrueBase", "Base", "Preview"]
    assert (truebase["step"], base["step"], preview["step"]) == (4, 6, 3)
    assert base["tokens"] == 6 * 64
    assert preview["tokens"] == 6 * 64 + 3 * 128
    parent = json.loads((run / "pretrain/base/manifest.json").read_text())["content_sha256"]
    assert preview["parent"] == parent
    assert (run / "align/preview/tokenizer.json").exists()


def test_every_step_can_be_traced(run):
    tokens = sum(row.tokens for row in trace_step(run, 2).documents)
    assert tokens == 64
    assert {row.source for row in trace_step(run, 1, stage="align").documents} == {"talk"}


def test_decay_branch_from_truebase(run, tmp_path):
    """Another anneal from the same TrueBase continues from its step, its optimizer and its place in the data."""
    data = merge(PRETRAIN, {"parent": str(run / "pretrain/truebase"), "phases": {"stable": None}})
    counts = pretrain(fill(PretrainConfig, data, "pretrain"), _next_to(run, tmp_path))
    assert counts["steps"] == 6
    branch = dcp.load(tmp_path / "pretrain/base")["model"]
    whole = dcp.load(run / "pretrain/base")["model"]
    assert all((branch[name] == whole[name]).all() for name in whole)


def test_buffer_order_and_its_branch(run, tmp_path):
    """A branch continues in its parent's buffer; the parent of another order is no place to continue from."""
    data = merge(PRETRAIN, parse_override("batch.order={kind: buffer, documents: 4, workers: 2}"))
    pretrain(fill(PretrainConfig, data, "pretrain"), _next_to(run, tmp_path / "whole"))
    only_anneal = {"phases": {"stable": None}}
    branch = merge(data, {"parent": str(tmp_path / "whole/pretrain/truebase"), **only_anneal})
    pretrain(fill(PretrainConfig, branch, "pretrain"), _next_to(run, tmp_path / "branch"))
    weights = [dcp.load(tmp_path / name / "pretrain/base")["model"] for name in ("whole", "branch")]
    assert all((weights[0][name] == weights[1][name]).all() for name in weights[0])
    work = _next_to(run, tmp_path / "other")
    pretrain(fill(PretrainConfig, merge(branch, {"parent": str(run / "pretrain/truebase")}), "pretrain"), work)
    facts = [dcp.check(tmp_path / name / "pretrain/base") for name in ("branch", "other")]
    assert sum(facts[0]["consumed"]["6"].values()) == 6 * 2
    assert sum(facts[1]["consumed"]["6"].values()) == 2 * 2


def test_parent_alone_is_kept_with_what_it_saw(run, tmp_path):
    data = PRETRAIN | {"parent": str(run / "pretrain/base"), "phases": {}}
    work = _next_to(run, tmp_path)
    work.folder.mkdir()
    counts = pretrain(fill(PretrainConfig, data, "pretrain"), work)
    assert (counts["steps"], counts["checkpoints"]) == (6, {"base": "Base"})
    for name in ("base/manifest.json", "trace.parquet"):
        assert (tmp_path / "pretrain" / name).read_bytes() == (run / "pretrain" / name).read_bytes()
    dcp.check(tmp_path / "pretrain/base")
    with pytest.raises(ConfigError, match="at least one phase"):
        fill(PretrainConfig, PRETRAIN | {"phases": {}}, "pretrain")


def test_branch_from_inside_a_phase(run, tmp_path):
    data = merge(PRETRAIN, {"phases": {"stable": {"steps": 6}, "anneal": None}})
    whole = Workspace(tmp_path / "whole", "pretrain", "t", 0, Log(None, quiet=True), {"tokenize": run / "tokenize"})
    pretrain(fill(PretrainConfig, data, "pretrain"), whole)
    parent = tmp_path / "whole/checkpoints/step_00000004"
    data = merge(data, {"parent": str(parent), "phases": {"stable": {"steps": 2}}})
    assert pretrain(fill(PretrainConfig, data, "pretrain"), _next_to(run, tmp_path))["steps"] == 6
    ends = [dcp.check(tmp_path / p)["consumed"]["6"] for p in ("whole/truebase", "pretrain/truebase")]
    assert sum(ends[0].values()) == sum(ends[1].values()) == 12


def test_quarantine_is_part_of_the_data_of_a_resumed_run(run, tmp_path):
    work = _next_to(run, tmp_path)
    shutil.copytree(run / "pretrain/checkpoints", work.folder / "checkpoints")
    pretrain(fill(PretrainConfig, PRETRAIN, "pretrain"), work)  # the same data: continues
    ids = ShardSet.load(run / "tokenize/tokens").shards["b", "train"].ids
    (tmp_path / "bad").write_text("unknown\n" + json.dumps({"id": ids[0], "step": 3}) + "\n")
    less = merge(PRETRAIN, {"quarantine": str(tmp_path / "bad")})
    with pytest.raises(CheckpointError, match=r"(?s)not those the checkpoint was trained on.*: data\n.*other b\n"):
        pretrain(fill(PretrainConfig, less, "pretrain"), work)
    again = _next_to(run, tmp_path / "again")
    pretrain(fill(PretrainConfig, less, "pretrain"), again)
    seen = pq.read_table(again.folder / "trace.parquet")["document_id"].to_pylist()
    assert ids[0] not in seen
    assert set(ids[1:]) & set(seen)


LONG = {
    "phases": {"stable": None, "anneal": None, "long": {"steps": 2, "context_tokens": 256, "checkpoint": "base"}},
    "extension": {"keep_short": 0.9, "needles": 0.5, "keys": 1, "target_tokens": 240, "global_q_gain": 1.5},
}


def test_longer_context_changes_only_what_the_model_states(run, tmp_path):
    """Every form states the same context; each row is of the new length; only the asked-for gain moved."""
    data = merge(PRETRAIN, {"parent": str(run / "pretrain/base"), **LONG, "optim": {"lr": 1e-12, "muon_lr": 1e-12}})
    work = _next_to(run, tmp_path)
    assert pretrain(fill(PretrainConfig, data, "pretrain"), work)["steps"] == 8
    facts, shape = dcp.check(tmp_path / "pretrain/base"), dcp.read_config(tmp_path / "pretrain/base")
    assert (facts["context_tokens"], shape.max_position_embeddings, facts["tokens"]) == (256, 240, 6 * 64 + 2 * 256)
    before, after = (dcp.load(f)["model"] for f in (run / "pretrain/base", tmp_path / "pretrain/base"))
    gain = "model.layers.3.self_attn.q_norm.weight"
    assert [name for name in before if not torch.allclose(before[name], after[name], atol=2e-3)] == [gain]
    assert torch.allclose(after[gain], 1.5 * before[gain], atol=1e-5)
    assert to_hf_dict(shape)["max_position_embeddings"] == 240  # what the GGUF writer takes its context from too
    # A further branch of short rows reads its text from the beginning: the pool was another text.
    short = merge(PRETRAIN, {"parent": str(tmp_path / "pretrain/base"), "phases": {"stable": None}})
    short = merge(short, {"model": {"max_position_embeddings": 240}})
    assert pretrain(fill(PretrainConfig, short, "pretrain"), _next_to(run, tmp_path / "short"))["steps"] == 10

    loaded, texts = load(tmp_path / "pretrain/base"), {"a": [("The quick brown fox jumps over the dog. " * 60, True)]}
    found = find_needles(loaded, texts, NeedlesConfig(lengths=(230,), keys=(1,), items=5), work.log, "base")
    assert set(found["needles"]["230"]["1"]["depths"]) == {"0", "0.25", "0.5", "0.75", "1"}
    assert {"0-64", "64-128", "128-230"} == set(found["positions"])
    assert all(0 < bits < 20 for bits in found["positions"].values())
    shown = needle_tables({"checkpoints": {"base": {"long": found}}})
    assert [table.title for table in shown] == ["Needles", "Bits per byte by position"]
    with pytest.raises(ConfigError, match="beyond the model's context"):
        find_needles(loaded, texts, NeedlesConfig(lengths=(240,)), work.log, "base")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"phases": {"long": {"context_tokens": 32}}}, "does not extend"),
        ({"extension": {"target_tokens": 257}}, "cannot be stated"),
        ({"model": {"sliding_window": 32}}, "window is not smaller than its context"),
        ({"model": {"layer_types": ["sliding_attention"] * 4}}, "no global layer"),
    ],
)
def test_context_that_cannot_be_extended(run, change, says):
    data = merge(merge(PRETRAIN, {"parent": "x", **LONG}), change)
    config = fill(PretrainConfig, data, "pretrain")
    with pytest.raises(ConfigError, match=says):
        extended(config, config.model, {"context_tokens": 32})


def test_grown_model_is_refused_with_the_old_shape(run, tmp_path):
    """Its own recipe continues it; a recipe with the old number of experts sees both numbers."""
    parent = open_model(run / "pretrain/base")
    shape, state = grow(parent.config, parent.state, GrowConfig(experts=8))
    save_model(tmp_path / "grown", parent, shape, state, {"how": "grown"}, None)
    old = merge(PRETRAIN, {"parent": str(tmp_path / "grown"), "phases": {"stable": None}})
    with pytest.raises(CheckpointError, match=r"(?s)another shape.*num_experts"):
        pretrain(fill(PretrainConfig, old, "pretrain"), _next_to(run, tmp_path))
    section = yaml.safe_load((tmp_path / "grown/recipe.yaml").read_text())["pretrain"]
    config = fill(PretrainConfig, merge(old, section), "pretrain")
    assert pretrain(config, _next_to(run, tmp_path / "new"))["steps"] == 8
    assert dcp.check(tmp_path / "new/pretrain/base")["parent"] == dcp_hash(tmp_path / "grown")
    with pytest.raises(ArtifactError, match="of this name already"):
        save_model(tmp_path / "grown", parent, shape, state, {"how": "grown"}, None)


def dcp_hash(folder):
    return json.loads((folder / "manifest.json").read_text())["content_sha256"]


def test_longer_rows_need_a_parent_and_one_length(run):
    for change in ({"parent": ""}, {"phases": {"more": {"steps": 1, "context_tokens": 128}}}):
        with pytest.raises(ConfigError, match="extends a parent"):
            fill(PretrainConfig, merge(merge(PRETRAIN, {"parent": "x", **LONG}), change), "pretrain")


def _next_to(run, tmp_path):
    return Workspace(tmp_path / "pretrain", "pretrain", "t", 0, Log(None, quiet=True), {"tokenize": run / "tokenize"})


@pytest.mark.parametrize(
    ("override", "error", "says"),
    [
        ("model.vocab_size=321", ConfigError, "disagree about the vocabulary"),
        ("phases.stable.mixture.zzz=1", DataError, "mixture.zzz"),
        ("batch.context_tokens=65", ConfigError, r"(?s)pretrain\.batch\.context_tokens.*65.*= 64"),
        ("phases.stable.steps=1_000_000_000 batch.sequences=1_000", ConfigError, r"(?s)memory.*pretrain\.phases"),
        ("model.hidden_size=32", CheckpointError, "another shape"),
    ],
)
def test_pretrain_mistakes(run, tmp_path, override, error, says):
    data = config_override(PRETRAIN, override.split())
    if error is CheckpointError:
        data = merge(data, {"parent": str(run / "pretrain/truebase")})
    with pytest.raises(error, match=says):
        pretrain(fill(PretrainConfig, data, "pretrain"), _next_to(run, tmp_path))


def test_another_tokenizer_is_refused(run, tmp_path):
    inputs = {"curate": run / "curate"}
    work = Workspace(tmp_path / "tokenize", "tokenize", "t", 1, Log(None, quiet=True), inputs)
    tokenize(TokenizeConfig(vocab_size=320, train_bytes=2000), work)
    finish(tmp_path, "tokenize", {})
    config = fill(AlignConfig, ALIGN, "align")
    inputs |= {"pretrain": run / "pretrain", "tokenize": tmp_path / "tokenize"}
    with pytest.raises(CheckpointError, match="another tokenizer"):
        align(config, Workspace(tmp_path / "align", "align", "t", 0, Log(None, quiet=True), inputs))
    data = merge(PRETRAIN, {"parent": str(run / "pretrain/truebase")})
    work = Workspace(tmp_path / "p", "pretrain", "t", 0, Log(None, quiet=True), {"tokenize": tmp_path / "tokenize"})
    with pytest.raises(CheckpointError, match="another tokenizer"):
        pretrain(fill(PretrainConfig, data, "pretrain"), work)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("batch.context_tokens=65", r"(?s)align\.batch\.context_tokens.*65.*= 64"),
        ("phases.sft.steps=1_000_000_000 batch.sequences=1_000", r"(?s)memory.*align\.phases"),
    ],
)
def test_align_mistakes(run, tmp_path, override, says):
    config = fill(AlignConfig, config_override(ALIGN, override.split()), "align")
    inputs = {name: run / name for name in ("pretrain", "tokenize", "curate")}
    with pytest.raises(ConfigError, match=says):
        align(config, Workspace(tmp_path / "align", "align", "t", 0, Log(None, quiet=True), inputs))


def test_no_conversations(run, tmp_path):
    (tmp_path / "curate").mkdir()
    inputs = {"curate": tmp_path / "curate", "pretrain": run / "pretrain", "tokenize": run / "tokenize"}
    with pytest.raises(DataError, match="no conversations"):
        align(
            fill(AlignConfig, ALIGN, "align"), Workspace(tmp_path / "a", "align", "t", 0, Log(None, quiet=True), inputs)
        )
