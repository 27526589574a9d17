"""The export: what is refused before, what is written, and that the proof fails when something is wrong."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from freehold.checkpoint import dcp
from freehold.core.artifact import Workspace, hash_files
from freehold.core.config import fill
from freehold.core.errors import ArtifactError, ConfigError, ExportError, RequestError
from freehold.core.log import Log
from freehold.model.afmoe import Afmoe
from freehold.model.config import PRESETS, ModelConfig
from freehold.stages.export import check, gguf_writer, reference, samples
from freehold.stages.export.config import ExportConfig, Proof, plan
from freehold.stages.export.files import write_files
from freehold.stages.export.llama import ExactLlama
from freehold.stages.export.proof import probes, prove_gguf, prove_hf
from freehold.stages.export.release import vllm_line
from freehold.stages.export.run import run
from freehold.tokenizer import bpe, chat

# Irregular where it can be: queries wider than the model, a route scale, two shared experts, spare rows.
MODEL: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32, "num_hidden_layers": 5,
    "num_dense_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "num_experts": 8,
    "num_experts_per_tok": 2, "num_shared_experts": 2, "route_scale": 1.7, "sliding_window": 24,
    "max_position_embeddings": 256, "vocab_size": 640,
}  # fmt: skip
# A random model loses more to rounding than a trained one.
SMALL_PROOF = Proof(gguf_positions=16, max_kl={"BF16": 1.0, "Q8_0": 1.0})


@dataclass
class Exported:
    """A finished export and what its proofs need."""

    work: Workspace
    counts: dict[str, Any]
    config: ModelConfig
    weights: dict[str, torch.Tensor]
    tokenizer: bpe.Tokenizer
    passages: list[reference.Passage]

    @property
    def hf(self) -> Path:
        return self.work.folder / "hf"

    def gguf(self, kind: str) -> Path:
        return self.work.folder / "gguf" / f"Tiny-{kind}.gguf"

    def prove_gguf(self, path: Path, kind: str = "F32") -> dict[str, Any]:
        log = path.with_suffix(".log")
        return prove_gguf(path, self.hf, kind, self.config, self.passages, self.tokenizer, SMALL_PROOF, log)


def random_state(config: ModelConfig) -> dict[str, torch.Tensor]:
    model = Afmoe(config)
    generator = torch.Generator().manual_seed(3)
    model.init_weights(generator)
    state = model.state_dict()
    for name, tensor in state.items():
        if tensor.ndim == 1:  # gains and biases that are all equal would hide a mix-up
            tensor.add_(torch.randn(tensor.shape, generator=generator) * (0.02 if "bias" in name else 0.2))
        else:
            tensor.mul_(3)
    return state


@pytest.fixture(scope="module")
def align(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished `align` folder: a random model and a tokenizer trained on the samples."""
    folder = tmp_path_factory.mktemp("align")
    texts = [*samples.KINDS.values(), *samples.SCRIPTS.values()]
    tokenizer = bpe.train(texts * 2, MODEL["vocab_size"] - 8, Log(quiet=True))
    tokenizer.save(folder / "tokenizer")
    config = ModelConfig(**MODEL)
    files = sorted((folder / "tokenizer").iterdir())
    dcp.save(folder / "preview", {"model": random_state(config)}, config, {"step": 1}, files)
    return folder


def workspace(folder: Path, align: Path) -> Workspace:
    return Workspace(folder, "export", "test", 0, Log(folder, quiet=True), {"align": align})


@pytest.fixture(scope="module")
def exported(align: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    work = workspace(tmp_path_factory.mktemp("export"), align)
    counts = run(ExportConfig(name="Tiny", proof=SMALL_PROOF), work)
    config, state = dcp.read_model(align / "preview")
    weights = {n: t.bfloat16().float() if t.ndim > 1 else t for n, t in state.items()}
    model = Afmoe(config)
    model.load_state_dict(weights)
    tokenizer = bpe.Tokenizer.load(work.folder / "hf")
    passages, _ = reference.settled(model.eval(), list(reference.passages(tokenizer, config)))
    return Exported(work, counts, config, weights, tokenizer, passages)


def test_export_is_proven(exported: Exported) -> None:
    parity = json.loads((exported.work.folder / "parity.json").read_text())
    for name in ("hf", "F32"):
        record = parity["exports"][name]
        assert record["passed"]
        assert record["mean_kl"] <= 1e-8
        assert record["top1_agreement"] == 1.0
    assert parity["exports"]["hf"]["routing_agreement"] == 1.0
    assert parity["exports"]["F32"]["routing_agreement"] == 1.0
    assert set(parity["exports"]["F32"]["routing_agreement_by_layer"]) == {1.0}
    assert 0.5 < parity["exports"]["Q8_0"]["routing_agreement"] <= 1
    assert 0 < parity["exports"]["BF16"]["mean_kl"] < 1
    assert 0 < parity["exports"]["Q8_0"]["mean_kl"] < 1
    assert parity["experts_reached"] == 1.0
    assert exported.counts["files"].keys() == {"Tiny-F32.gguf", "Tiny-BF16.gguf", "Tiny-Q8_0.gguf"}


def test_the_same_checkpoint_gives_the_same_bytes(exported: Exported, align: Path, tmp_path: Path) -> None:
    run(ExportConfig(name="Tiny", proof=SMALL_PROOF), workspace(tmp_path, align))
    assert hash_files(tmp_path) == hash_files(exported.work.folder)


def test_limits_are_stated_and_modes_follow_the_umask(exported: Exported) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(exported.hf)
    assert tokenizer.model_max_length == exported.config.max_position_embeddings
    assert len(tokenizer("a " * 500, truncation=True)["input_ids"]) == exported.config.max_position_embeddings
    files = [*exported.hf.iterdir(), *(exported.work.folder / "gguf").iterdir()]
    (exported.work.folder / "log" / "plain").touch()
    assert {f.stat().st_mode for f in files} == {(exported.work.folder / "log" / "plain").stat().st_mode}


def test_every_file_has_a_card(exported: Exported) -> None:
    for kind in ("F32", "Q8_0"):
        card = json.loads(exported.gguf(kind).with_suffix(".card.json").read_text())
        proof = card["proof"]
        assert card["bytes"] == card["planned_bytes"] == exported.gguf(kind).stat().st_size
        assert card["types"]["experts"] == {kind: 8}
        assert card["types"]["router"] == {"F32": 8}
        assert card["calibration"] == {"importance": "none"}
        assert proof["plain_text_begins_with"] == [exported.tokenizer.bos]
        assert proof["median_kl"] <= proof["p99_kl"] <= proof["max_kl"]
        assert proof["perplexity"] == pytest.approx(
            proof["perplexity_of_the_model"], rel=1e-4 if kind == "F32" else 0.5
        )
        assert len(card["worst_tensors"]) == 5
        assert "| norms |" in exported.gguf(kind).with_suffix(".card.md").read_text()
    worst = card["worst_tensors"][0]["relative_error"]
    assert 0.001 < worst < 0.02


def render_go(template: str, messages: list[dict[str, str]]) -> str:
    """Render the part of Go's template language that our Modelfile uses."""
    loop = re.fullmatch(r"\{\{- range \.Messages \}\}(.*)\{\{ end \}\}(.*)", template, re.DOTALL)
    assert loop
    body, rest = loop.groups()
    choice = re.search(r'\{\{ if eq \.Role "tool" \}\}(.*?)\{\{ else \}\}(.*?)\{\{ end \}\}', body, re.DOTALL)
    assert choice
    text = ""
    for message in messages:
        one = body[: choice.start()] + choice[1 if message["role"] == "tool" else 2] + body[choice.end() :]
        text += one.replace("{{ .Role }}", message["role"]).replace("{{ .Content }}", message["content"])
    return text + rest


@pytest.mark.parametrize(("dialect", "parser"), [("hermes", "hermes"), ("xml", "qwen3_coder")])
def test_line_for_vllm_names_its_parsers(dialect, parser) -> None:
    line = vllm_line(Path("runs/my run/hf"), "mine", dialect)
    assert line.startswith("vllm serve 'runs/my run/hf' --served-model-name mine ")
    assert f"--tool-call-parser {parser} " in line


def test_modelfile_renders_the_ids_of_the_chat_template(exported: Exported) -> None:
    text = exported.gguf("Q8_0").with_suffix(".Modelfile").read_text()
    assert text.startswith("FROM ./Tiny-Q8_0.gguf\n")
    assert f"PARAMETER num_ctx {exported.config.max_position_embeddings}\n" in text
    template = re.search(r'TEMPLATE """(.*?)"""', text, re.DOTALL)
    assert template
    tool = [{"role": "user", "content": "?"}, {"role": "tool", "content": "!"}]
    plain = [messages for messages, tools in samples.CONVERSATIONS.values() if not tools]
    for messages in [*plain, tool]:
        ids = chat.render_ids(exported.tokenizer, messages, generation=True)[0]
        rendered = exported.tokenizer.encode(render_go(template[1], messages), specials=True)
        assert [exported.tokenizer.bos, *rendered] == ids


def test_transformers_opens_the_folder_and_generates(exported: Exported) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(exported.hf)
    tokenizer = AutoTokenizer.from_pretrained(exported.hf)
    assert model.dtype == torch.bfloat16
    assert model.generation_config.eos_token_id == [exported.tokenizer.eos, exported.tokenizer.end_of_text]
    messages = [{"role": "user", "content": "Hello"}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    assert model.generate(**ids, max_new_tokens=3, do_sample=False).shape[1] <= ids["input_ids"].shape[1] + 3


def test_gguf_holds_every_tensor_in_its_type(exported: Exported) -> None:
    layers = exported.config.num_hidden_layers
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.AFMOE, layers)
    expected = {}
    for source in load_file(exported.hf / "model.safetensors"):
        # llama.cpp's converter calls the bias so, and merges the experts of a layer under this name.
        merged = source.replace("expert_bias", "expert_bias.bias")
        for expert in range(exported.config.num_experts):
            merged = merged.replace(f".experts.{expert}.", ".experts.")
        expected[names.get_name(merged, (".weight", ".bias"))] = source
    for kind in ("F32", "BF16", "Q8_0"):
        tensors = {t.name: t for t in gguf.GGUFReader(exported.gguf(kind)).tensors}
        assert tensors.keys() == expected.keys()
        for name, tensor in tensors.items():
            exact = len(tensor.shape) == 1 or ".ffn_gate_inp." in name
            assert tensor.tensor_type.name == ("F32" if exact else kind), name
    kinds = {name.split(".")[-2] for name in expected}
    known = {gguf.TENSOR_NAMES[t].split(".")[-1] for t in gguf.MODEL_TENSORS[gguf.MODEL_ARCH.AFMOE]}
    assert kinds == known


def test_gguf_metadata(exported: Exported) -> None:
    fields = gguf.GGUFReader(exported.gguf("Q8_0")).fields
    value = {key: field.contents() for key, field in fields.items()}
    config = exported.config
    assert value["general.architecture"] == "afmoe"
    assert value["general.file_type"] == gguf.LlamaFileType.MOSTLY_Q8_0
    assert value["afmoe.expert_weights_scale"] == pytest.approx(config.route_scale)
    assert value["afmoe.attention.sliding_window"] == config.sliding_window
    assert value["afmoe.expert_gating_func"] == gguf.ExpertGatingFuncType.SIGMOID
    assert value["afmoe.leading_dense_block_count"] == config.num_dense_layers
    assert value["tokenizer.ggml.pre"] == check.PRE_TOKENIZER
    assert value["tokenizer.ggml.eos_token_id"] == exported.tokenizer.eos
    tokens, types = value["tokenizer.ggml.tokens"], value["tokenizer.ggml.token_type"]
    assert len(tokens) == len(types) == config.vocab_size
    assert tokens[-1] == f"[PAD{config.vocab_size - 1}]"
    assert types[-1] == gguf.TokenType.UNUSED
    assert types[exported.tokenizer.eos] == gguf.TokenType.CONTROL


# --- refused before anything is written ---


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"global_attn_every_n_layers": 2}, "layer 1 is full_attention"),
        ({"layer_types": ["sliding_attention"] * 5}, "layer 3 is sliding_attention"),
        ({"num_hidden_layers": 3}, "num_hidden_layers is 3"),
        ({"mup_enabled": False}, "mup_enabled is off"),
        ({"num_dense_layers": 5}, "needs a layer with experts"),
        ({"num_experts": 513, "route_scale": 2.0}, "at most 512"),
    ],
)
def test_what_llama_cpp_cannot_express_is_refused(change: dict[str, Any], said: str) -> None:
    assert said in "\n".join(check.check(ModelConfig(**MODEL | change)))


def test_what_can_be_exported_is_not_refused() -> None:
    assert check.check(ModelConfig(**MODEL)) == []
    for name, preset in PRESETS.items():
        assert check.check(preset) == [], name


def test_refusal_writes_nothing(align: Path, tmp_path: Path) -> None:
    config = ModelConfig(**MODEL | {"mup_enabled": False})
    dcp.save(
        tmp_path / "align" / "preview",
        {"model": random_state(config)},
        config,
        {},
        [align / "preview" / name for name in ("tokenizer.json", "tokenizer_config.json")],
    )
    with pytest.raises(ExportError, match="mup_enabled is off"):
        run(ExportConfig(), workspace(tmp_path / "export", tmp_path / "align"))
    assert hash_files(tmp_path / "export") == {}


def test_a_stage_the_export_does_not_read_is_refused(align: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="does not read that stage"):
        run(ExportConfig(checkpoint="pretrain/base"), workspace(tmp_path, align))


def test_another_tokenizer_is_refused(exported: Exported) -> None:
    tokenizer = json.loads((exported.hf / "tokenizer.json").read_text())
    assert check.check_tokenizer(tokenizer, exported.config) == []
    few_rows = exported.config.model_copy(update={"vocab_size": 300})
    assert "only 300 rows" in check.check_tokenizer(tokenizer, few_rows)[0]
    other = tokenizer | {"pre_tokenizer": {"type": "Whitespace"}}
    assert "split" in check.check_tokenizer(other, exported.config)[0]


def test_plan_says_what_fails() -> None:
    assert any("1e-08" in line for line in plan(ExportConfig()))
    assert any("without F32" in line for line in plan(ExportConfig(types=("Q8_0",))))


# --- tensors that do not add up ---


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop("model.layers.2.mlp.experts.3.up_proj.weight"), "experts.3.up_proj.weight is missing"),
        (lambda t: t.update({"model.layers.2.extra": torch.zeros(2)}), "model.layers.2.extra"),
    ],
)
def test_tensors_are_accounted_for_both_ways(exported: Exported, tmp_path: Path, change: Any, said: str) -> None:
    shutil.copytree(exported.hf, tmp_path / "hf")
    tensors = load_file(tmp_path / "hf" / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "hf" / "model.safetensors")
    with pytest.raises(ExportError, match=said):
        write_files(tmp_path / "hf", exported.config, {"F32": tmp_path / "x.gguf"}, name="x")


def test_file_of_other_tensors_or_types_is_reported(exported: Exported, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    data = exported.gguf("F32").read_bytes()
    path.write_bytes(data.replace(b"blk.2.attn_gate.weight", b"blk.2.attn_gxte.weight"))
    lines = list(gguf_writer.differing_tensors(path, exported.hf, exported.config, "F32"))
    assert lines == ["blk.2.attn_gate.weight is missing", "blk.2.attn_gxte.weight does not belong there"]
    lines = list(gguf_writer.differing_tensors(exported.gguf("Q8_0"), exported.hf, exported.config, "F32"))
    assert "blk.2.attn_gate.weight is stored as Q8_0, not F32" in lines
    for kind in ("BF16", "Q8_0"):
        shutil.copyfile(exported.gguf(kind), path)
        tensor = next(t for t in gguf.GGUFReader(path, "r+").tensors if t.name == "blk.2.attn_gate.weight")
        tensor.data[7, 1] ^= 0x40
        tensor.data.base.flush()
        lines = list(gguf_writer.differing_tensors(path, exported.hf, exported.config, kind))
        assert lines == ["blk.2.attn_gate.weight differs from model.layers.2.self_attn.gate_proj.weight"]


# --- the proof fails when something is wrong ---


def edited(exported: Exported, path: Path, name: str, change: Any) -> Path:
    """Copy the F32 file and change one tensor in place."""
    shutil.copyfile(exported.gguf("F32"), path)
    tensor = next(t for t in gguf.GGUFReader(path, "r+").tensors if t.name == name)
    change(tensor.data)
    tensor.data.base.flush()
    return path


def test_swapped_experts_fail_by_weights_and_by_kl(exported: Exported, tmp_path: Path) -> None:
    def swap(data: np.ndarray) -> None:
        data[[0, 1]] = data[[1, 0]]

    record = exported.prove_gguf(edited(exported, tmp_path / "x.gguf", "blk.2.ffn_up_exps.weight", swap))
    assert not record["passed"]
    text = "\n".join(record["failures"])
    assert "blk.2.ffn_up_exps.weight differs from model.layers.2.mlp.experts.0.up_proj.weight" in text
    assert "mean KL" in text


def test_lost_expert_bias_fails(exported: Exported, tmp_path: Path) -> None:
    def zero(data: np.ndarray) -> None:
        data[:] = 0

    record = exported.prove_gguf(edited(exported, tmp_path / "x.gguf", "blk.3.exp_probs_b.bias", zero))
    assert any("mean KL" in line for line in record["failures"])


@pytest.mark.parametrize(
    "change", [{"route_scale": 1.0}, {"sliding_window": 16}, {"rope_theta": 9000.0}, {"rms_norm_eps": 1e-3}]
)
def test_wrong_metadata_fails(exported: Exported, tmp_path: Path, change: dict[str, Any]) -> None:
    wrong = exported.config.model_copy(update=change)
    write_files(exported.hf, wrong, {"F32": tmp_path / "x.gguf"}, name="x")
    record = exported.prove_gguf(tmp_path / "x.gguf")
    assert [line.split(" over")[0].split()[:2] for line in record["failures"]][0] == ["mean", "KL"]


def test_wrong_split_fails(exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_writer, "PRE_TOKENIZER", "gpt-2")
    write_files(exported.hf, exported.config, {"F32": tmp_path / "x.gguf"}, name="x")
    record = exported.prove_gguf(tmp_path / "x.gguf")
    assert any(line.startswith("token ids of") for line in record["failures"])
    assert not any("mean KL" in line for line in record["failures"])


def prove_changed_hf(exported: Exported, folder: Path, change: Any) -> list[str]:
    shutil.copytree(exported.hf, folder)
    change(folder)
    record = prove_hf(folder, exported.weights, exported.passages, exported.tokenizer, SMALL_PROOF)
    return record["failures"]


def test_wrong_hf_config_fails(exported: Exported, tmp_path: Path) -> None:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"mup_enabled": False}))

    failures = prove_changed_hf(exported, tmp_path / "hf", change)
    assert any("mean KL" in line for line in failures)
    assert any("chose other experts" in line for line in failures)


def test_wrong_hf_weights_and_tokenizer_fail(exported: Exported, tmp_path: Path) -> None:
    def change(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        one, two = (f"model.layers.1.mlp.experts.{e}.down_proj.weight" for e in (4, 5))
        tensors[one], tensors[two] = tensors[two], tensors[one]
        tensors.pop("model.layers.4.self_attn.k_norm.weight")
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        template = settings["chat_template"].replace("<|im_end|>", "<|im_end|> ")
        (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": template}))

    text = "\n".join(prove_changed_hf(exported, tmp_path / "hf", change))
    assert "transformers reports missing_keys: ['model.layers.4.self_attn.k_norm.weight']" in text
    assert "model.layers.1.mlp.experts.down_proj differs in transformers" in text
    assert "rendered ids of 'one turn' differ" in text


def test_failed_proof_keeps_its_figures(align: Path, tmp_path: Path) -> None:
    impossible = SMALL_PROOF.model_copy(update={"max_kl": {"Q8_0": 1e-12}})
    with pytest.raises(ExportError, match=r"Q8_0: mean KL[^$]*raise the limit"):
        run(ExportConfig(types=("Q8_0",), proof=impossible), workspace(tmp_path, align))
    record = json.loads((tmp_path / "parity.json").read_text())["exports"]["Q8_0"]
    assert not record["passed"]
    assert record["mean_kl"] > 0


def test_routing_that_is_all_ties_proves_nothing(align: Path, tmp_path: Path) -> None:
    config, state = dcp.read_model(align / "preview")
    for name, tensor in state.items():
        if "router" in name or "expert_bias" in name:
            tensor.zero_()
    files = [align / "preview" / name for name in ("tokenizer.json", "tokenizer_config.json")]
    dcp.save(tmp_path / "align" / "preview", {"model": state}, config, {}, files)
    with pytest.raises(ExportError, match="too close to call"):
        run(ExportConfig(types=()), workspace(tmp_path / "export", tmp_path / "align"))


def test_limits_are_set_by_type() -> None:
    proof = Proof(max_kl={"Q4_0": 0.7})
    assert (proof.limit("Q4_0"), proof.limit("F32")) == (0.7, 1e-8)
    with pytest.raises(ConfigError, match="no such type: Q4_9"):
        fill(ExportConfig, {"proof": {"max_kl": {"Q4_9": 0.7}}}, "export")
    with pytest.raises(ConfigError, match="this key was renamed"):
        fill(ExportConfig, {"proof": {"max_kl_q4_0": 0.7}}, "export")


# --- the parts of the proof ---


def test_llama_errors_carry_its_log(exported: Exported, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(exported.gguf("F32").read_bytes().replace(b"blk.3.exp_probs_b.bias", b"blk.3.exp_prxbs_b.bias"))
    with pytest.raises(ArtifactError, match=r"E llama_model_load.*exp_probs_b.bias"):
        ExactLlama(path, 64, tmp_path / "log")
    with ExactLlama(exported.gguf("F32"), 64, tmp_path / "log") as llama:
        with pytest.raises(RequestError, match="refused /completion"):
            llama.log_probabilities([5] * 400, exported.config.vocab_size)
        llama.process.kill()
        llama.process.wait()
        with pytest.raises(ArtifactError, match="died at /tokenize"):
            llama.tokenize("x")


def test_agreement_counts_what_it_should() -> None:
    sure = np.log(np.array([[0.5, 0.3, 0.2]]))
    agreement = reference.Agreement.empty()
    agreement.add(sure, sure)
    agreement.add(sure, np.log(np.array([[0.3, 0.5, 0.2]])))
    assert agreement.kl == [0.0, pytest.approx(0.2 * np.log(5 / 3))]
    assert agreement.best == [True, False]
    agreement.add(sure, np.array([[np.nan, 0.0, 0.0]]))
    assert agreement.kl[2] == reference.FAR
    tie = np.log(np.array([[0.4, 0.4, 0.2]]))
    agreement.add(tie, np.log(np.array([[0.399999, 0.400001, 0.2]])))
    assert agreement.best[3]


@pytest.mark.parametrize(
    ("value", "shown"), [(0.0, 0.0), (3.2e-13, 1e-12), (1e-30, 1e-13), (1.51e-8, 1.6e-8), (0.0123, 0.013), (1.0, 1.0)]
)
def test_figures_do_not_flicker(value: float, shown: float) -> None:
    assert reference.figure(value) == pytest.approx(shown, rel=1e-9)


def test_probes_reach_beyond_the_window(exported: Exported) -> None:
    chosen = probes(exported.passages, 16)
    assert len(chosen) == 16
    assert sum(length > exported.config.sliding_window + 8 for _, length in chosen) >= 8
    assert len({id(passage) for passage, _ in chosen}) >= 8
