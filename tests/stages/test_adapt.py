"""Adaptation: coverage that fails a run, adapters as others read them, drift that a planted router shows."""

import dataclasses
import json

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from freehold.checkpoint import adapter as adapters
from freehold.checkpoint import base as frozen
from freehold.checkpoint import hf
from freehold.checkpoint.adapter import Adapter, Pair
from freehold.core.config import fill
from freehold.core.errors import CheckpointError, ConfigError
from freehold.core.log import Log
from freehold.losses.cross_entropy import CrossEntropy
from freehold.model import adapted
from freehold.model.afmoe import Afmoe
from freehold.model.groups import ADAPTABLE, group_of
from freehold.optim.config import NoBalanceConfig, OptimConfig
from freehold.stages.adapt import gguf, measure
from freehold.stages.adapt.config import AdaptConfig
from freehold.stages.adapt.coverage import CoverageError, Watch
from freehold.stages.adapt.train import HeldRouting, router_hash
from freehold.trainer.drift import compare, heat_map, routings_of, smallest_set
from freehold.trainer.job import Job
from freehold.trainer.loop import Trainer

RANKS = {group: 2 if group.startswith("experts") else 4 for group in ADAPTABLE if group != "router"}
CONFIG = tiny.config(hidden_size=32, num_experts=5, moe_intermediate_size=32)
IDS = torch.randint(32, 64, (2, 24), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def base_state():
    """The weights of a base, as they are published."""
    state = tiny.disturb(Afmoe(CONFIG)).state_dict()
    return {name: t.bfloat16().float() if t.ndim > 1 else t.clone() for name, t in state.items()}


@pytest.fixture(scope="module")
def folder(base_state, tmp_path_factory):
    """The base in Hugging Face form."""
    where = tmp_path_factory.mktemp("base")
    hf.save_hf(where, CONFIG, base_state)
    return where


def model_of(base_state, ranks=RANKS):
    model = Afmoe(CONFIG)
    model.load_state_dict(base_state)
    adapted.attach(model, ranks, 32, torch.Generator().manual_seed(1))
    return model


def random_adapter(base_state, **facts) -> tuple[Afmoe, Adapter]:
    """Return a model with factors far from zero, and the same as an adapter."""
    model = model_of(base_state)
    g = torch.Generator().manual_seed(2)
    for factors in adapted.attached(model).values():
        torch.nn.init.normal_(factors.b, std=0.05, generator=g)
    return model, adapters.of_model(model, facts)


def trainer(folder, model, watch=None, **changes) -> Trainer:
    changes = {
        "model": CONFIG, "balance": NoBalanceConfig(), "optim": OptimConfig(matrices="adamw", lr=1e-2),
        "build": lambda: model, "watch": watch, **changes,
    }  # fmt: skip
    job: Job = dataclasses.replace(tiny.job(folder, tiny.phases(adapt=3)), **changes)
    return Trainer(job, Log(folder, quiet=True), seed=0)


# --- training and coverage -------------------------------------------------------------------------------------------


def test_every_planned_group_trains_and_the_rest_stays(tmp_path, base_state):
    model = model_of(base_state)
    watch = Watch(model, 3, tuple(RANKS))
    router = router_hash(model)
    trainer(tmp_path, model, watch).run()
    rows = {row["group"]: row for row in watch.table(RANKS, "none")}
    assert all(rows[group]["state"] == "adapted" and rows[group]["moved"] for group in RANKS)
    assert {rows[group]["state"] for group in ("router", "bias", "embedding", "head", "norms")} == {"frozen"}
    assert router_hash(model) == router
    frozen_now = {n: p for n, p in model.named_parameters() if "factors" not in n}
    assert all(torch.equal(p, base_state[n]) for n, p in frozen_now.items())


def test_idle_experts_are_not_asked_to_move(base_state):
    model = model_of(base_state)
    watch = Watch(model, 1, tuple(RANKS))
    masters = {n: p.detach() + 1.0 for n, p in model.named_parameters() if p.requires_grad}
    for name, master in masters.items():
        if ".experts." in name:
            master[3] -= 1.0
    loads = {name: torch.tensor([1, 1, 1, 0, 1]) for name in model.moe_layers()}
    watch(0, masters, loads)
    busy = {name: torch.ones(5, dtype=torch.int64) for name in loads}
    with pytest.raises(CoverageError, match="did not"):
        Watch(model, 1, tuple(RANKS))(0, masters, busy)


def test_hole_in_a_planned_group_fails_the_run(tmp_path, base_state):
    model = model_of(base_state)
    for name, factors in adapted.attached(model).items():
        if group_of(name) == "shared.up":
            factors.enabled = False  # planned, but no part of the forward pass
    with pytest.raises(CoverageError) as error:
        trainer(tmp_path, model, Watch(model, 3, tuple(RANKS))).run()
    assert "shared.up" in str(error.value)


def test_group_without_trained_parameters_fails_the_run(tmp_path, base_state):
    model = model_of(base_state, {"attention.q": 2})
    with pytest.raises(CoverageError, match="planned to train"):
        trainer(tmp_path, model, Watch(model, 2, ("attention.q", "experts.down"))).run()


def test_resumed_adaptation_ends_with_the_same_bits(tmp_path, base_state):
    through = trainer(tmp_path / "a", model_of(base_state))
    through.run()
    for _ in range(2):
        again = trainer(tmp_path / "b", model_of(base_state))
        again.restore()
        while again.step < (2 if again.step == 0 else 3):
            again.train_step(again.next_batch())
        again.checkpoints.save_step()
    for name, master in through.state.masters.items():
        assert torch.equal(master, again.state.masters[name]), name


def test_model_of_which_nothing_trains_is_refused(tmp_path, base_state):
    model = Afmoe(CONFIG).requires_grad_(False)
    with pytest.raises(CheckpointError, match="no parameter"):
        trainer(tmp_path, model)


def test_held_routing_starts_at_no_change_and_pulls_back(base_state):
    loss, model = HeldRouting(CrossEntropy(), 1.0), model_of(base_state)
    loss.watch(model)
    ids = IDS
    columns = {
        "input_ids": ids, "targets": ids.roll(-1, 1), "document_ids": torch.zeros_like(ids, dtype=torch.int32),
        "old": torch.tensor([[True], [False]]).expand_as(ids),
    }  # fmt: skip
    scales = {"targets": 1 / ids.numel(), "old": 1 / 72}

    def divergence() -> torch.Tensor:
        hidden = model.hidden(ids, document_ids=columns["document_ids"])
        found = loss(hidden, model.lm_head.weight, columns, scales)
        found.total.backward()
        return found.sums["loss/router_kl"]

    assert divergence() == pytest.approx(0, abs=1e-4)
    for factors in adapted.attached(model).values():
        torch.nn.init.normal_(factors.b, std=0.05)
    assert divergence() > 1e-3


# --- what is written and read ----------------------------------------------------------------------------------------


def test_adapter_written_and_read_back_is_the_same(tmp_path, base_state):
    model, adapter = random_adapter(base_state, base_sha256="a" * 64)
    counts = adapters.save(tmp_path, adapter, CONFIG, alpha=32, base="runs/laptop/export/hf")
    settings = json.loads((tmp_path / adapters.CONFIG).read_text())
    assert (settings["r"], settings["lora_alpha"], settings["rank_pattern"]) == (4, 32, {})
    assert "self_attn.gate_proj.weight" in settings["target_parameters"]
    tensors = load_file(tmp_path / adapters.WEIGHTS)
    assert counts["tensors"] == len(tensors)
    assert {t.shape[0] for k, t in tensors.items() if "lora_A" in k} == {4}
    other = Afmoe(CONFIG)
    other.load_state_dict(base_state)
    adapters.put_on(other, adapters.read(tmp_path, CONFIG))
    assert torch.allclose(other(IDS), model(IDS), atol=2e-5)


def test_half_adapted_experts_are_filled_with_zeros(tmp_path, base_state):
    model = model_of(base_state, {"experts.down": 2})
    adapters.save(tmp_path, adapters.of_model(model), CONFIG, alpha=32, base="b")
    keys = load_file(tmp_path / adapters.WEIGHTS)
    assert sum(".gate_proj.lora_B" in key for key in keys) == 3 * CONFIG.num_experts
    read = adapters.read(tmp_path, CONFIG)
    assert not any(pair.b.any() for name, pair in read.pairs.items() if name.endswith("gate_up_proj"))


@pytest.mark.parametrize("both", [True, False], ids=["both stacks", "down alone"])
def test_stacked_layout_of_peft_is_read(tmp_path, base_state, both):
    model, adapter = random_adapter(base_state)
    tensors, expected = {}, {}
    for name, pair in adapter.pairs.items():
        stem, _, last = name.rpartition(".")
        if not stem.endswith(".experts") or not (both or last == "down_proj"):
            continue
        expected[name] = pair
        inner = ".base_layer" if both and last == "gate_up_proj" else ""
        experts, rank, ins = pair.a.shape
        # B: the expert runs fastest over the columns.
        b = pair.b.permute(1, 2, 0).reshape(pair.b.shape[1], rank * experts)
        tensors[f"base_model.model.{stem}{inner}.lora_A.weight"] = pair.a.reshape(experts * rank, ins).clone()
        tensors[f"base_model.model.{stem}{inner}.lora_B.weight"] = b.contiguous()
    save_file(tensors, tmp_path / adapters.WEIGHTS)
    (tmp_path / adapters.CONFIG).write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 32}))
    found = adapters.read(tmp_path, CONFIG)
    assert found.pairs.keys() == expected.keys()
    for name, pair in expected.items():
        assert torch.equal(found.pairs[name].a, pair.a)
        assert torch.equal(found.pairs[name].b, pair.b)
        assert found.pairs[name].scale == pair.scale


def spoiled(tmp_path, base_state, change):
    _, adapter = random_adapter(base_state)
    adapters.save(tmp_path, adapter, CONFIG, alpha=32, base="b")
    tensors = load_file(tmp_path / adapters.WEIGHTS)
    settings = json.loads((tmp_path / adapters.CONFIG).read_text())
    change(tensors, settings)
    save_file(tensors, tmp_path / adapters.WEIGHTS)
    (tmp_path / adapters.CONFIG).write_text(json.dumps(settings))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda t, s: [t.pop(k) for k in list(t) if ".experts.4." in k], "another number of experts"),
        (lambda t, s: t.pop(next(k for k in t if "lora_B" in k)), "one of two factors is missing"),
        (lambda t, s: t.pop(next(k for k in t if ".experts.1.up_proj.lora_A" in k)), "one of two factors"),
        (lambda t, s: t.update({"base_model.model.lm_head.lora_A.weight": torch.zeros(4, 16)}), "factors is missing"),
        (lambda t, s: t.update({"something.else": torch.zeros(1)}), "belongs to no matrix"),
        (lambda t, s: s.update(use_dora=True), "not a plain low-rank adapter"),
        (lambda t, s: s.update(peft_type="IA3"), "not a LoRA adapter"),
    ],
)
def test_damaged_or_foreign_adapter_is_refused(tmp_path, base_state, change, match):
    spoiled(tmp_path, base_state, change)
    with pytest.raises(CheckpointError, match=match):
        adapters.read(tmp_path, CONFIG)


def test_adapter_of_another_base_or_tokenizer_is_refused(tmp_path):
    adapter = Adapter({}, {"base_sha256": "a" * 64, "tokenizer_sha256": "b" * 64})
    adapters.check_base(adapter, "a" * 64, "b" * 64, tmp_path)
    adapters.check_base(Adapter({}), "c" * 64, "d" * 64, tmp_path)  # another tool's says nothing
    with pytest.raises(CheckpointError, match="another base"):
        adapters.check_base(adapter, "c" * 64, "b" * 64, tmp_path)
    with pytest.raises(CheckpointError, match="another tokenizer"):
        adapters.check_base(adapter, "a" * 64, "d" * 64, tmp_path)


def test_adapter_of_another_width_or_expert_count_is_refused(base_state):
    _, adapter = random_adapter(base_state)
    for other in (tiny.config(num_experts=4, moe_intermediate_size=32), tiny.config(num_experts=5)):
        with pytest.raises(CheckpointError, match="another shape"):
            adapters.put_on(Afmoe(other), adapter)
    with pytest.raises(CheckpointError, match="no such matrix"):
        adapters.put_on(Afmoe(CONFIG), Adapter({"model.layers.9.mlp.router.gate": next(iter(adapter.pairs.values()))}))


def test_gguf_adapter_holds_every_matrix_and_its_base(tmp_path, base_state):
    from gguf import GGUFReader

    _, adapter = random_adapter(base_state, base_sha256="c" * 64)
    path = tmp_path / "adapter.gguf"
    written = gguf.write(path, adapter, CONFIG, alpha=32, name="x")
    tensors = {t.name: t for t in GGUFReader(path).tensors}
    assert len(tensors) == written == 2 * (4 * 5 + 3 + 3 * 3 + 3 * 3)
    assert list(tensors["blk.1.ffn_gate_exps.weight.lora_a"].shape) == [32, 4, 5]
    assert gguf.base_of(path) == "c" * 64


def test_merge_rounds_once_and_counts(base_state):
    model, adapter = random_adapter(base_state)
    done = adapters.Merged()
    merged = {name: adapters.merge(name, tensor, adapter, done) for name, tensor in base_state.items()}
    assert done.matrices == len(adapter.pairs)
    name = "model.layers.1.mlp.experts.down_proj"
    pair = adapter.pairs[name]
    exact = base_state[name].double() + pair.scale * (pair.b.double() @ pair.a.double())
    assert (merged[name].double() - exact).abs().max() <= exact.abs().max() * 2**-8
    other, base = Afmoe(CONFIG), Afmoe(CONFIG)
    other.load_state_dict({k: v.float() for k, v in merged.items()})
    base.load_state_dict(base_state)
    answer = model(IDS)
    assert (other(IDS) - answer).norm() < 0.5 * (base(IDS) - answer).norm()
    assert 0 <= done.record()["vanished_share"] < 1


def test_soup_is_the_exact_weighted_sum(base_state):
    _, first = random_adapter(base_state, base_sha256="a")
    second = Adapter({n: Pair(p.a + 0.1, p.b * 2, p.scale) for n, p in first.pairs.items()}, first.facts)
    mixed = adapters.soup([(first, 0.25), (second, 0.75)])
    name = "model.layers.1.mlp.experts.gate_up_proj"
    sums = [w * a.pairs[name].scale * a.pairs[name].b @ a.pairs[name].a for a, w in ((first, 0.25), (second, 0.75))]
    assert torch.allclose(mixed.pairs[name].b @ mixed.pairs[name].a, sums[0] + sums[1], atol=1e-5)
    with pytest.raises(CheckpointError, match="different bases"):
        adapters.soup([(first, 1.0), (Adapter(first.pairs, {"base_sha256": "b"}), 1.0)])
    with pytest.raises(CheckpointError, match="trained the router"):
        adapters.soup([(first, 1.0), (Adapter(first.pairs, {"base_sha256": "a", "router": "lora"}), 1.0)])


def test_base_is_the_same_from_a_folder_and_in_blocks(folder, base_state):
    found = frozen.Fingerprint()
    model = frozen.build(folder, CONFIG, torch.float32, "", found)
    assert all(torch.equal(t, base_state[n]) for n, t in model.state_dict().items())
    assert found.value == frozen.fingerprint(base_state.items())
    assert found.value != frozen.fingerprint({**base_state, "model.norm.weight": torch.zeros(32)}.items())
    packed = frozen.build(folder, CONFIG, torch.float32, "Q4_0")
    assert not any(".experts.gate_up_proj" in name for name, _ in packed.named_parameters())
    with pytest.raises(ConfigError, match="whole number of blocks"):
        frozen.build(folder, CONFIG, torch.float32, "Q4_K")


# --- drift -----------------------------------------------------------------------------------------------------------


def drift_of(model, base, batches):
    return compare(routings_of(base), routings_of(model), model.moe_layers(), batches, base.moe_layers())


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_planted_router_damage_fails_the_gate(base_state, seed):
    base, model = Afmoe(CONFIG), Afmoe(CONFIG)
    base.load_state_dict(base_state)
    model.load_state_dict(base_state)
    batches = [tiny.order().batch(0)]
    with torch.no_grad():
        same = drift_of(model, base, batches)
        g = torch.Generator().manual_seed(seed)
        for layer in model.moe_layers().values():
            layer.router.gate.weight.add_(torch.randn(layer.router.gate.weight.shape, generator=g))
        broken = drift_of(model, base, batches)
    limits = AdaptConfig()
    assert not measure.problems(limits, {**same.record(), "bpb_rise": 0.0})
    assert (same.mean("overlap"), same.mean("router_overlap"), same.mean("kl")) == (1, 1, 0)
    assert measure.problems(limits, {**broken.record(), "bpb_rise": 0.0})
    assert broken.mean("router_overlap") < 0.9
    assert heat_map(broken, "x").count("<rect") == 3 * CONFIG.num_experts


def test_frozen_router_drifts_by_its_inputs_alone(base_state):
    model, _ = random_adapter(base_state)

    def base(ids, documents):
        with adapted.disabled(model):
            return routings_of(model)(ids, documents)

    drift = compare(base, routings_of(model), model.moe_layers(), [tiny.order().batch(0)])
    assert drift.mean("overlap") < 1
    assert drift.mean("router_overlap") == 1


def test_smallest_set_has_the_share():
    assert smallest_set(torch.tensor([0.1, 0.6, 0.3]), 0.5) == [1]
    assert smallest_set(torch.tensor([0.1, 0.6, 0.3]), 0.9) == [1, 2]


# --- settings --------------------------------------------------------------------------------------------------------


def test_presets_fill_what_the_recipe_leaves_open():
    learn, special = AdaptConfig(), fill(AdaptConfig, {"preset": "specialise", "rank": 8}, "adapt")
    assert (learn.replayed_rows, special.replayed_rows) == (2, 0)
    assert "router" not in learn.adapted
    assert special.adapted == ("experts.gate_up", "experts.down")
    assert special.ranks(2) == {"experts.gate_up": 4, "experts.down": 4}
    assert special.ranks(16) == {"experts.gate_up": 1, "experts.down": 1}
    assert fill(AdaptConfig, {"preset": "own"}, "adapt").adapted == ()
    assert fill(AdaptConfig, learn.model_dump(mode="json"), "adapt") == learn


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"groups": ["gate_proj"]}, "matches no matrix"),
        ({"groups": ["head"]}, "low rank"),
        ({"groups": ["router"]}, "router: lora"),
        ({"preset": "own", "quantize": "Q4_0"}, "blocks"),
        ({"router": "replay_kl", "replay": {"share": 0}}, "old text"),
        ({"balance": {"kind": "smebu"}}, "bias"),
        ({"replay": {"share": 0.99}}, "no row"),
    ],
)
def test_settings_that_contradict_are_refused(settings, match):
    with pytest.raises(ConfigError, match=match):
        fill(AdaptConfig, settings, "adapt")
