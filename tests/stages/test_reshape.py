"""Scores against brute force, pruned and grown models against the function they come from."""

import itertools
import json

import gguf
import pytest
import tiny
import torch

from freehold import api
from freehold.checkpoint import dcp
from freehold.cli.main import main
from freehold.core.artifact import read_json
from freehold.core.errors import ConfigError, DataError
from freehold.model.afmoe import Afmoe
from freehold.run.ancestry import record_of
from freehold.stages.export.folder import Request, export_folder
from freehold.stages.reshape.config import GrowConfig, PruneConfig
from freehold.stages.reshape.grow import grow
from freehold.stages.reshape.model import build, open_model
from freehold.stages.reshape.prune import at_random, choose, prune, sliced
from freehold.stages.reshape.report import experts_report
from freehold.stages.reshape.scores import chunks_of, fewer_experts, score_experts


@pytest.fixture(scope="module")
def hard():
    """A model with two shared experts, three of eight routed ones a token, and biases that decide."""
    model = tiny.disturb(Afmoe(tiny.hard()))
    return model.config, dict(model.state_dict())


@pytest.fixture(scope="module")
def ids():
    return torch.randint(0, 96, (2, 60), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def brute_force(config, state, ids):
    """Return tokens, mass and summed gate times norm by layer, one token and expert at a time."""
    model, inputs, found = build(config, state), {}, {}
    for name, moe in model.moe_layers().items():
        moe.register_forward_pre_hook(lambda _, args, name=name: inputs.update({name: args[0].flatten(0, 1)}))
    model(ids)
    for name, moe in model.moe_layers().items():
        _, weights, chosen = moe.router(inputs[name], moe.expert_bias)
        sums = torch.zeros(3, config.num_experts, dtype=torch.float64)
        for token, x in enumerate(inputs[name]):
            for expert, gate in zip(chosen[token].tolist(), weights[token].tolist(), strict=True):
                first, second = (moe.experts.gate_up_proj[expert] @ x).chunk(2)
                out = moe.experts.down_proj[expert] @ (torch.nn.functional.silu(first) * second)
                sums[:, expert] += torch.tensor([1.0, gate, gate * float(out.norm())], dtype=torch.float64)
        found[int(name.split(".")[2])] = sums
    return found


def test_scores_are_those_of_brute_force(hard, ids):
    config, state = hard
    scores, expected = score_experts(build(config, state), ids.tolist()), brute_force(config, state, ids)
    assert set(scores.layers) == set(expected)
    for number, layer in scores.layers.items():
        tokens, mass, outputs = expected[number]
        assert torch.equal(layer.tokens, tokens)
        assert torch.allclose(layer.mass, mass, rtol=1e-5)
        assert torch.allclose(layer.outputs, outputs, rtol=1e-4)
        for kind in ("tokens", "mass", "saliency"):
            assert float(layer.share(kind).sum()) == pytest.approx(1)
    lifts = [row["lift"] for row in scores.table(scores).values()]
    assert all(lift in (0.0, 1.0) for row in lifts for lift in row)


@torch.no_grad()
def test_fewer_experts_are_those_with_the_largest_weights(hard, ids):
    config, state = hard
    model = build(config, state)
    plain = model(ids)
    for way, experts in ({"k": 3}, 3.0), ({"mass": 1.0}, 3.0):
        with fewer_experts(model, **way) as used:
            assert torch.allclose(model(ids), plain, atol=1e-5)
        assert used[0] / used[1] == experts
    with fewer_experts(model, mass=0.6) as used:
        model(ids)
    assert 1 < used[0] / used[1] < 3
    # One expert by weight is one expert by choice where the biases decide nothing.
    flat = {name: torch.zeros_like(t) if name.endswith("expert_bias") else t for name, t in state.items()}
    model = build(config, flat)
    with fewer_experts(model, mass=1e-6):
        least = model(ids)
    with fewer_experts(model, k=1):
        assert torch.allclose(model(ids), least, atol=1e-5)
    assert torch.equal(model(ids), build(config, flat)(ids))


@torch.no_grad()
def test_experts_that_nothing_chooses_can_be_sliced_away(hard, ids):
    """Experts, router rows and biases go together: where none of the others is ever chosen, no bit of a logit moves."""
    config, state = hard
    kept = {number: [1, 2, 4, 6, 7] for number in range(1, 5)}
    state = dict(state)
    for number, experts in kept.items():
        bias = torch.full((8,), -100.0)
        bias[experts] = state[f"model.layers.{number}.mlp.expert_bias"][experts]
        state[f"model.layers.{number}.mlp.expert_bias"] = bias
    smaller, tensors = sliced(config, state, kept)
    assert (smaller.num_experts, smaller.route_scale) == (5, config.route_scale)
    assert torch.allclose(build(smaller, tensors)(ids), build(config, state)(ids), atol=1e-6)


def test_pruning_keeps_the_best_and_reports_controls(tiny_checkpoint):
    parent = open_model(tiny_checkpoint)
    rng = torch.Generator().manual_seed(0)
    texts = {name: torch.randint(0, 512, (2, 50), generator=rng).tolist() for name in ("law", "code")}
    config, state, report = prune(parent, texts, PruneConfig(keep=3))
    bits = report["bits_per_token"]
    assert list(bits) == ["all experts", "3 by mass", "3 at random", "all, 1 a token"]
    assert all(set(found) == {"law", "code"} for found in bits.values())
    best = choose(score_experts(parent.model(), texts["law"]), "mass", 3)
    assert report["kept"] == {str(number): experts for number, experts in best.items()}
    assert at_random(parent.config, 3, 0) == at_random(parent.config, 3, 0) != at_random(parent.config, 3, 1)
    Afmoe(config).load_state_dict(state)


def test_pruned_folder_is_a_checkpoint_for_everything(tiny_checkpoint, tmp_path, capsys):
    """It loads, answers, exports to GGUF with its own number of experts, and has its parent's record."""
    text = tmp_path / "law.txt"
    text.write_text("The capital of France is Paris. " * 40, encoding="utf-8")
    assert main(["prune", str(tiny_checkpoint), "--text", str(text), "--output", str(tmp_path / "law"), "keep=2"]) == 0
    assert "2 at random" in capsys.readouterr().out
    model = api.load(tmp_path / "law")
    assert model.config.num_experts == 2
    assert len(model.engine.score([[0, 40, 50, 60]])[0]) == 4
    facts = dcp.check(tmp_path / "law")
    assert (facts["made"]["how"], facts["stage_type"]) == ("pruned", "Pruned")
    record = record_of(tmp_path / "law")
    assert [parent.content_sha256 for parent in record.parents] == [facts["parent"]]
    made = export_folder(tmp_path / "law", Request(("Q8_0",), tmp_path / "out", "law", None, 1, "MIT"))
    (path,) = (tmp_path / "out").glob("*.gguf")
    fields = gguf.GGUFReader(path).fields
    assert made["files"]
    assert fields["afmoe.expert_count"].contents() == 2
    assert main(["prune", str(tiny_checkpoint), "--text", str(text), "--output", str(tmp_path / "law"), "keep=2"]) == 2


@torch.no_grad()
def test_growing_changes_nothing_at_first(hard, ids):
    config, state = hard
    larger, tensors = grow(config, state, GrowConfig(experts=16))
    assert larger.num_experts == 16
    assert larger.num_experts_per_tok == config.num_experts_per_tok
    model = build(larger, tensors)
    assert torch.equal(model(ids), build(config, state)(ids))
    # Let in by balancing, the copies compute something of their own.
    for moe in model.moe_layers().values():
        moe.expert_bias.zero_()
    assert not torch.allclose(model(ids), build(config, state)(ids), atol=1e-3)
    rows = tensors["model.layers.1.mlp.router.gate.weight"]
    assert 0 < float((rows[8:] - rows[:8]).norm() / rows[:8].norm()) < 0.02


@torch.no_grad()
def test_dense_layers_become_experts_that_add_up(ids):
    config = tiny.config(vocab_size=96, num_dense_layers=4, intermediate_size=32)
    state = dict(tiny.disturb(Afmoe(config)).state_dict())
    larger, tensors = grow(config, state, GrowConfig(experts=7))
    assert (larger.num_dense_layers, larger.moe_intermediate_size, larger.num_experts_per_tok) == (1, 4, 7)
    assert torch.allclose(build(larger, tensors)(ids), build(config, state)(ids), atol=2e-5)


def test_grow_verb_proves_and_saves(tiny_checkpoint, tmp_path, capsys):
    assert main(["grow", str(tiny_checkpoint), "--output", str(tmp_path / "g"), "experts=8", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["largest_difference"] == 0.0
    assert dcp.read_config(tmp_path / "g").num_experts == 8


def test_experts_verb_writes_scores_and_picture(tiny_checkpoint, tmp_path, capsys):
    for name in ("law", "all"):
        (tmp_path / f"{name}.txt").write_text(f"The {name} of the land is long. " * 30, encoding="utf-8")
    call = ["experts", str(tiny_checkpoint), "--text", str(tmp_path / "law.txt"), "--reference"]
    assert main([*call, str(tmp_path / "all.txt"), "--output", str(tmp_path / "e.json")]) == 0
    assert "a quarter of the experts" in capsys.readouterr().out
    found = read_json(tmp_path / "e.json")["domains"]["law"]
    assert set(found["layers"]["1"]) == {"tokens", "mass", "saliency", "lift"}
    assert found["fewer"]["k 2"]["experts"] == 2
    assert found["fewer"]["weight 0.6"]["experts"] <= found["fewer"]["weight 0.95"]["experts"] <= 2
    assert (tmp_path / "e.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda c, s: sliced(c, s, {n: [0, 1] for n in range(1, 5)}), ConfigError, "this many experts"),
        (lambda c, s: sliced(c, s, {1: [0, 1, 2]}), ConfigError, "same number of experts"),
        (lambda c, s: grow(c, s, GrowConfig(experts=12)), ConfigError, "multiple of its experts"),
        (lambda c, s: grow(c, s, GrowConfig(experts=16, bias=-0.5)), ConfigError, "at most -1"),
        (lambda c, s: grow(tiny.config(num_dense_layers=4), s, GrowConfig(experts=6)), ConfigError, "does not divide"),
        (lambda c, s: score_experts(build(c, s), [[1]]), DataError, "no text"),
    ],
)
def test_reshaping_mistakes(hard, call, error, says):
    with pytest.raises(error, match=says):
        call(*hard)


def test_reports_need_experts_and_text(tiny_checkpoint, tmp_path, capsys):
    config = tiny.config(vocab_size=96, num_dense_layers=4)
    parent = open_model(tiny_checkpoint)
    dense = type(parent)(tmp_path, config, dict(Afmoe(config).state_dict()), {}, "")
    with pytest.raises(ConfigError, match="has no experts"):
        experts_report(dense, {"law": [[1, 2, 3]]}, None)
    call = ["experts", str(tiny_checkpoint), "--text", str(tmp_path / "gone.txt"), "--output"]
    assert main([*call, str(tmp_path / "e.json")]) == 2
    assert main([*call, str(tmp_path / "e.txt")]) == 2
    assert main(["prune", str(tiny_checkpoint), "--text", str(tmp_path / "gone.txt"), "--output", "x", "keep=9"]) == 2
    assert [len(chunk) for chunk in chunks_of(list(range(1000)), [0], 800)] == [512, 490]
    assert all(chunk[0] == 0 for chunk in itertools.chain(chunks_of(list(range(1000)), [0], 800)))
    capsys.readouterr()
