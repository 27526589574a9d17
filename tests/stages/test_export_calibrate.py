"""Importance matrices of our own engine: what is summed, what idle experts get, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch

from freehold.cli.main import main
from freehold.core.errors import ExportError
from freehold.model.afmoe import Afmoe
from freehold.stages.export import calibrate, gguf_writer
from freehold.stages.export.imatrix import Importance
from freehold.stages.export.reference import watch_routing

CONFIG = tiny.config(num_experts=6)
CHUNKS = [[int(i) for i in torch.randint(64, (40,), generator=torch.Generator().manual_seed(n))] for n in range(3)]


@pytest.fixture
def model() -> Afmoe:
    return tiny.disturb(Afmoe(CONFIG)).eval()


def test_sums_are_those_of_every_token_and_its_experts(model: Afmoe) -> None:
    found = calibrate.collect(model, CHUNKS)
    inputs = {}
    watched = {
        "norm": "layers.2.input_layernorm",
        "moe": "layers.2.pre_mlp_layernorm",
        "out": "layers.2.self_attn.o_proj",
    }

    def keep(name: str, into: dict) -> object:
        return lambda module, given, output: into.setdefault(name, []).append(given[0] if name == "out" else output)

    handles = [
        model.get_submodule(f"model.{path}").register_forward_hook(keep(n, inputs)) for n, path in watched.items()
    ]
    chosen = []
    with torch.inference_mode():
        for ids in CHUNKS:
            with watch_routing(model) as seen:
                model(torch.tensor([ids]))
            chosen.append(seen[1][2])  # layer 2 is the second with experts
    for handle in handles:
        handle.remove()
    flat = {name: torch.cat([x.flatten(0, -2) for x in parts]).double() for name, parts in inputs.items()}
    for part in ("q", "k", "v", "gate"):
        torch.testing.assert_close(found.sums[f"blk.2.attn_{part}.weight"][0], flat["norm"].square().sum(0))
    torch.testing.assert_close(found.sums["blk.2.attn_output.weight"][0], flat["out"].square().sum(0))
    picked = torch.cat(chosen)
    experts = model.model.layers["2"].mlp.experts
    for expert in range(6):
        rows = flat["moe"][(picked == expert).any(-1)]
        assert int(found.counts["blk.2.ffn_up_exps.weight"][expert]) == len(rows)
        torch.testing.assert_close(found.sums["blk.2.ffn_up_exps.weight"][expert], rows.square().sum(0))
        gate, up = (rows.float() @ experts.gate_up_proj[expert].T).chunk(2, -1)
        inner = (torch.nn.functional.silu(gate) * up).double()
        torch.testing.assert_close(found.sums["blk.2.ffn_down_exps.weight"][expert], inner.square().sum(0))
    assert torch.equal(found.sums["blk.2.ffn_gate_exps.weight"], found.sums["blk.2.ffn_up_exps.weight"])


def test_every_quantized_weight_of_the_layers_moved(model: Afmoe, tmp_path: Path) -> None:
    found = calibrate.collect(model, CHUNKS)
    assert all(int(counts.sum()) > 0 for counts in found.counts.values())
    calibrate.write_imatrix(tmp_path / "x.gguf", found, dataset="test", chunks=3)
    without = Importance(tmp_path / "x.gguf").check(gguf_writer.tensor_shapes(CONFIG))
    routers = {f"blk.{layer}.ffn_gate_inp.weight" for layer in (1, 2, 3)}
    assert set(without) == {"token_embd.weight", "output.weight"} | routers


def test_idle_expert_gets_a_labelled_prior(model: Afmoe, tmp_path: Path) -> None:
    model.moe_layers()["model.layers.1.mlp"].expert_bias[4] = -100
    found = calibrate.collect(model, CHUNKS)
    filled = calibrate.write_imatrix(tmp_path / "x.gguf", found, dataset="test", chunks=3)
    assert "blk.1.ffn_up_exps.weight:4" in filled
    imatrix = Importance(tmp_path / "x.gguf")
    assert imatrix.prior_only == filled
    assert imatrix.idle() == 0
    name = "blk.1.ffn_up_exps.weight"
    mean = (found.sums[name].sum(0) / found.counts[name].sum()).float().numpy()
    np.testing.assert_array_equal(imatrix.row(name, 4), mean)
    report = calibrate.report(found, 5)
    assert report["layers"]["1"]["idle"] == [4]
    assert sum(report["layers"]["1"]["tokens"]) == 120 * 2
    assert sum(report["layers"]["2"]["mass"]) == pytest.approx(1, abs=1e-4)


def test_too_little_text_is_refused(model: Afmoe) -> None:
    report = calibrate.report(calibrate.collect(model, CHUNKS[:1]), 1000)
    with pytest.raises(ExportError, match=r"(?s)too little text.*layer \d.*at least 1000"):
        calibrate.check_floor(report)
    calibrate.check_floor({**report, "floor_tokens": 0})


def test_chunks_begin_with_bos_and_keep_the_limit(tiny_tokenizer) -> None:
    text = tiny_tokenizer.encode("The capital of France is Paris. " * 500)
    chunks = calibrate.make_chunks(tiny_tokenizer, text, 1500, 200)
    assert {chunk[0] for chunk in chunks} == {tiny_tokenizer.bos}
    assert max(map(len, chunks)) == 200
    assert sum(map(len, chunks)) == 1500


def test_calibrate_writes_matrix_report_and_picture(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(tiny_checkpoint, tmp_path / "model"))
    text = tmp_path / "text.txt"
    text.write_text("The capital of Peru is Lima. " * 200)
    out = tmp_path / "im.gguf"
    assert (
        main(["calibrate", str(folder), "--text", str(text), "--output", str(out), "--tokens", "2000", "--json"]) == 0
    )
    report = json.loads(capsys.readouterr().out)
    assert report["tokens"] == 2000
    assert json.loads((tmp_path / "im.json").read_text()) == report
    assert (tmp_path / "im.png").read_bytes().startswith(b"\x89PNG")
    assert main(["export", str(folder), "--types", "Q4_0", "--imatrix", str(out), "--output", str(tmp_path / "o")]) == 0
    card = json.loads((tmp_path / "o" / "model-Q4_0.card.json").read_text())
    assert card["calibration"]["text"] == "text.txt, and sample conversations"
    assert "| experts |" in (tmp_path / "o" / "model-Q4_0.card.md").read_text()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "no text to calibrate on"),
        (["--text", "BINARY"], "a text cannot be read"),
        (["--text", "none.txt"], "a text cannot be read"),
        (["--tokens", "0"], "not what a calibration can do"),
    ],
)
def test_wrong_calibration_is_refused(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], said: str
) -> None:
    folder = Path(shutil.copytree(tiny_checkpoint, tmp_path / "model"))
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    given = [str(tmp_path / "binary") if part == "BINARY" else part for part in options]
    assert main(["calibrate", str(folder), "--output", str(tmp_path / "x.gguf"), *given]) == 2
    assert said in capsys.readouterr().err


def test_rare_experts_are_served_first() -> None:
    counts = np.array([[8, 0, 0], [7, 1, 0], [0, 0, 2], [0, 8, 0]])
    order = calibrate.rare_first(counts)
    assert order == [0, 3, 2, 1]
    lengths = [8, 8, 2, 8]
    assert calibrate.tokens_until(counts, lengths, 2) == 26
    assert calibrate.tokens_until(counts[order], [lengths[i] for i in order], 2) == 18
    assert calibrate.tokens_until(counts, lengths, 100) is None


def test_chosen_chunks_reach_the_floor_sooner(model: Afmoe) -> None:
    kept, saved = calibrate.choose(model, CHUNKS, tokens=80, floor=4)
    assert len(kept) == 2
    assert all(chunk in CHUNKS for chunk in kept)
    first, ours = saved["tokens_to_floor_in_text_order"], saved["tokens_to_floor_rare_first"]
    assert first is not None
    assert ours is not None
    assert ours <= first
