"""The planner against what was published, tracked, counted by autograd, and against its own arithmetic."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from freehold import cli
from freehold.core.config import fill, merge
from freehold.core.errors import ConfigError
from freehold.kernels import cpu
from freehold.model.afmoe import Afmoe
from freehold.model.config import PRESETS as SHAPES
from freehold.model.config import flops_per_token, parameter_counts
from freehold.parallel.mesh import place_of
from freehold.planner import adapting, estimate, memory, serving, show, whole
from freehold.planner.config import PlanConfig, plan_of_recipe
from freehold.planner.hardware import DEVICES, INTERRUPTIONS_PER_DEVICE_HOUR
from freehold.planner.published import PRESETS, PUBLISHED
from freehold.run.recipe import resolve

GIB = 2**30
RECIPES = Path(__file__).resolve().parents[2] / "recipes"


def plan_of(name: str, **change: object) -> PlanConfig:
    return fill(PlanConfig, merge({"name": name, **PRESETS[name]}, change), "plan")


def figures_of(name: str, **change: object) -> dict[str, estimate.Figure]:
    return estimate.estimate(plan_of(name, **change))["figures"]


# --- compared with what was published ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_figures_come_out(name):
    figures = figures_of(name)
    for row in PUBLISHED[name]:
        ours = figures[row.figure].value
        assert ours == pytest.approx(row.value, rel=row.tolerance), f"{row.figure}: {row.source}"


@pytest.mark.parametrize(
    ("name", "replicate", "total", "rank", "master_gib"),
    [
        ("large", 16, 398_635_272_192, 3_114_338_064, 11.60),
        ("mini", 4, 26_123_970_560, 204_093_520, 0.76),
        ("nano", 2, 6_119_996_416, 47_812_472, 0.18),
    ],
)
def test_fake_world_totals(name, replicate, total, rank, master_gib):
    """As a 2048-rank world of meta tensors counted them; masters alone, with AdamW twice that again."""
    figures = figures_of(name, parallel={"replicate": replicate}, matrices="adamw")
    assert figures["parameters/rank"].value == rank
    assert figures["parameters/total"].value == pytest.approx(total, rel=1e-6)
    assert figures["memory/masters"].value / GIB == pytest.approx(master_gib, abs=0.01)
    assert figures["memory/optimizer"].value == pytest.approx(2 * figures["memory/masters"].value)


@pytest.mark.parametrize(
    ("layers", "recompute", "tracked_gib"),
    [(10, "none", 46.26), (14, "none", 58.75), (14, "full", 23.24), (22, "full", 25.32), (60, "full", 35.0),
     (60, "none", 200.0)],
)  # fmt: skip
def test_memory_of_the_tracked_world(layers, recompute, tracked_gib):
    """FSDPMemTracker's peak of Large, one sequence of 8192, whole logits, plain operations (60: extrapolated)."""
    config = plan_of(
        "large",
        model={"num_hidden_layers": layers},
        parallel={"recompute": recompute},
        batch={"sequences": 2048, "micro_sequences": 1},
        machine={"kernels": "plain", "imbalance": 1.0},
        loss_chunk_tokens=0,
    )
    assert memory.training_bytes(config, states=False)["peak"] / GIB == pytest.approx(tracked_gib, rel=0.03)


def test_large_in_33_days_says_which_utilisation_that_is():
    figures = figures_of("large")
    assert figures["run/days"].value == pytest.approx(33, abs=0.5)
    assert figures["run/mfu"].value == pytest.approx(0.118, abs=0.002)
    # 17T / 33 days / 2048 devices, stops included.
    through = figures["step/tokens_per_device"].value * figures["risk/goodput"].value
    assert through == pytest.approx(2911, rel=0.01)
    assert figures["run/device_hours"].value == pytest.approx(1.62e6, rel=0.01)


@pytest.mark.parametrize("name", ["nano", "mini"])
def test_the_small_ones_fit_512_h200(name):
    plan = estimate.estimate(plan_of(name))
    assert plan["config"]["machine"]["device"] == "h200"
    assert plan_of(name).parallel.devices == 512
    assert plan["problems"] == []
    assert 1 < plan["figures"]["run/days"].value < 60


def test_trillion_is_a_trillion_on_4096_devices():
    config, figures = plan_of("trillion"), figures_of("trillion")
    assert config.parallel.devices == 4096
    assert (config.model.num_experts, config.model.num_experts_per_tok) == (512, 4)
    assert figures["parameters/total"].value == pytest.approx(1e12, rel=0.01)
    assert 30e6 < figures["run/cost"].value < 120e6
    assert estimate.estimate(config)["problems"] == []


def test_cache_of_large_at_262144_tokens():
    """15 GiB in global layers and about 0.7 GiB in windows."""
    assert memory.cache_bytes(SHAPES["large"], 262_144) / GIB == pytest.approx(15 + 0.7, abs=0.05)


@pytest.mark.parametrize(
    ("how", "total_gb"),
    [
        ({"experts": "BF16"}, 824), ({"experts": "Q8_0"}, 458), ({"experts": "Q4_0"}, 262), ({"experts": "NF4"}, 243.6),
        ({"experts": "Q3_K"}, 210), ({"experts": "Q2_K"}, 170), ({"experts": "NF4", "share": 0.1}, 229),
        ({"experts": "NF4", "kept": 0.5}, 134.5), ({"experts": "NF4", "offload": True}, 49.3),
    ],
)  # fmt: skip
def test_adapters_of_large_by_format_and_place(how, total_gb):
    """As counted by hand from parameters, bits and 16 bytes of state; rank 16, 4 on an expert."""
    plan = adapting.adapter_plan(plan_of("large"), **how)
    assert plan.device == pytest.approx(total_gb * 1e9, rel=0.015)
    assert (plan.host > 200e9) == bool(how.get("offload"))


def test_rank_of_an_expert_follows_the_experts_a_token_uses():
    config = plan_of("large")
    assert (adapting.expert_rank(config.model, 16), adapting.expert_rank(config.model, 2)) == (4, 1)
    same, active = (sum(adapting.adapter_parameters(config.model, 16, rule).values()) for rule in ("same", "active"))
    assert same == pytest.approx(4.08e9, rel=0.03)
    assert active == pytest.approx(1.07e9, rel=0.03)
    said = adapting.qlora_answer(config)
    assert all(part in said for part in ("262 GB", "243.7 GB", "134.", "202 GB", "48 GB"))
    shown = [table.text() for table in adapting.adapt_tables(config)]
    assert "8 x 141 GB" in shown[0]
    assert "routed" in shown[1]


# --- serving ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", serving.PUBLISHED_SERVING, ids=lambda row: f"{row.model}-{row.context_tokens}")
def test_published_speeds_come_out(row):
    seconds = serving.step_seconds(SHAPES[row.model], row.weights, row.setup, row.sequences, row.context_tokens)
    assert row.sequences / seconds == pytest.approx(row.tokens_s, rel=serving.SERVE_ERROR)


def test_machines_that_hold_large():
    """The published 4 x 80 GB and a host with 384 GB hold it at Q4_K_M; two 80 GB GPUs do not."""
    fits = {s.name: serving.serve_row(SHAPES["large"], "Q4_K_M", s, 1, 8192).fits for s in serving.SETUPS}
    assert fits["4 x 80 GB (H100)"]
    assert fits["host with 384 GB"]
    assert not fits["2 x 80 GB (H100)"]
    assert memory.cache_bytes(SHAPES["large"], 1_000_000) == pytest.approx(61e9, rel=0.04)


def test_serving_follows_batch_and_context():
    model, setup = SHAPES["large"], serving.SETUPS[6]
    one, many = (serving.read_bytes(model, "BF16", n) for n in (1, 10_000))
    counts = parameter_counts(model)
    assert one == pytest.approx(2 * counts["active_with_head"], rel=0.01)
    assert many == pytest.approx(2 * (counts["total"] - counts["embedding"]), rel=0.01)
    rates = [serving.serve_row(model, "FP8", setup, n, 8192).tokens_s for n in (1, 8, 32)]
    assert rates == sorted(rates)
    short, long = (serving.serve_row(model, "FP8", setup, 32, n) for n in (8192, 131_072))
    assert short.tokens_s > long.tokens_s
    assert short.needed_bytes < long.needed_bytes
    rows = serving.serving(model)
    assert {row.context_tokens for row in rows} == {8192, 131_072, 524_288}
    assert [table.title for table in serving.serve_tables("large", SHAPES)][-1] == "Tokens a second compared"
    assert serving.serve_json("large", SHAPES)["rows"]


# --- the whole --------------------------------------------------------------------------------------------------------


def test_whole_has_a_source_and_an_error_for_every_part():
    items = whole.whole(plan_of("large"), SHAPES["mini"])
    assert [item.what for item in items] == [
        "curation, on Ray", "synthesis", "the run", "alignment rollouts", "evaluation"
    ]  # fmt: skip
    assert all(item.source and 0 < item.error < 1 and item.usd > 0 for item in items)
    assert "1.2e-06 USD a token" in whole.whole_table(plan_of("large"), SHAPES["mini"]).text()


def test_presets_in_one_table():
    rows = {row[0]: row for row in whole.presets_table().rows}
    assert set(rows) == set(PRESETS)
    assert [rows[name][3] for name in ("large", "deepseek-v3", "glm-4.5", "olmo-3-7b")] == [
        "1.56%", "3.12%", "5.00%", "dense"
    ]  # fmt: skip
    assert rows["large"][6] == "11.8%"
    assert "90%" in whole.presets_table().note


def test_more_bandwidth_between_machines_is_a_key():
    slow, fast = (figures_of("trillion", machine={"network": n})["step/time"].value for n in (1.0, 2.0))
    assert fast < slow
    assert len(whole.interconnect(plan_of("trillion")).rows) == 2


def test_commands_of_serving_adapters_and_the_whole(capsys):
    for call, says in (
        (["large", "--serve"], "Which machines hold it"),
        (["large", "--adapt"], "QLoRA in 100 to 150 GB?"),
        (["large", "--whole"], "All parts of a model"),
        (["all"], "Presets"),
    ):
        assert cli.main(["plan", *call]) == 0
        assert says in capsys.readouterr().out
        assert cli.main(["plan", *call, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)
    assert cli.main(["plan", "deepseek-v3", "--serve"]) == 2
    assert "another architecture" in capsys.readouterr().err


# --- what autograd keeps --------------------------------------------------------------------------------------------


def kept_by_autograd(model_config: dict, tokens: int = 48) -> float:
    """Return the bytes a token leaves saved for the backward pass, without parameters."""
    config = fill(type(SHAPES["laptop"]), model_config, "model")
    model = Afmoe(config)
    model.init_weights(torch.Generator().manual_seed(0))
    model = model.to_compute(torch.bfloat16).train()
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage  # held, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.hidden(torch.arange(tokens)[None] % config.vocab_size)
    return sum(storage.nbytes() for storage in kept.values()) / tokens


@pytest.mark.parametrize(
    "shape",
    [
        # Widths the CPU kernels refuse, so that the operations counted are those of a GPU.
        {"hidden_size": 200, "head_dim": 20, "num_attention_heads": 10, "num_key_value_heads": 5,
         "intermediate_size": 600, "moe_intermediate_size": 100, "num_experts": 8, "num_experts_per_tok": 2},
        {"hidden_size": 100, "head_dim": 20, "num_attention_heads": 10, "num_key_value_heads": 2,
         "intermediate_size": 300, "moe_intermediate_size": 60, "num_experts": 16, "num_experts_per_tok": 4,
         "num_shared_experts": 2},
        # And widths they take: what this machine has decides which count holds.
        {"hidden_size": 160, "head_dim": 32, "num_attention_heads": 4, "num_key_value_heads": 2,
         "intermediate_size": 480, "moe_intermediate_size": 96, "num_experts": 8, "num_experts_per_tok": 2},
    ],
)  # fmt: skip
def test_kept_bytes_are_what_autograd_keeps(shape):
    base = {"vocab_size": 64, "sliding_window": 32, "max_position_embeddings": 128, **shape}
    layers = [{"num_hidden_layers": 1, "num_dense_layers": 1}, {"num_hidden_layers": 2, "num_dense_layers": 2}]
    layers.append({"num_hidden_layers": 2, "num_dense_layers": 1})
    one, dense, moe = (kept_by_autograd({**base, **n}) for n in layers)
    d = shape["hidden_size"]
    kernels = "native" if cpu.available(torch.empty(1, d, dtype=torch.bfloat16), d) else "fused"
    planned = memory.kept_bytes(
        fill(PlanConfig, {"model": {**base, **layers[2]}, "machine": {"kernels": kernels}}, "plan")
    )
    assert planned[0] == pytest.approx(dense - one, rel=0.03)
    assert planned[1] == pytest.approx(moe - one, rel=0.03)


# --- arithmetic -----------------------------------------------------------------------------------------------------


def test_parts_add_up_and_recompute_saves():
    for name in PRESETS:
        parts = memory.training_bytes(plan_of(name))
        assert parts.pop("peak") == pytest.approx(sum(parts.values())), name
        figures = figures_of(name)
        assert figures["memory/peak_recompute_full"].value < figures["memory/peak_recompute_none"].value, name


def test_sharding_divides_the_states():
    one, two = (memory.training_bytes(plan_of("mini", parallel={"shard": n})) for n in (64, 128))
    assert one["masters"] == pytest.approx(2 * two["masters"])
    assert one["optimizer"] == pytest.approx(2 * two["optimizer"])


def test_time_follows_its_inputs():
    slow, fast = (figures_of("large", machine={"mfu": mfu}) for mfu in (0.1, 0.2))
    assert slow["step/arithmetic"].value == pytest.approx(2 * fast["step/arithmetic"].value)
    hidden, shown = (figures_of("large", machine={"overlap": share}) for share in (1.0, 0.0))
    assert hidden["step/exposed"].value == 0
    assert shown["step/exposed"].value == pytest.approx(shown["step/communication"].value)
    dear = figures_of("large", machine={"usd_hour": 12.0})
    assert dear["run/cost"].value == pytest.approx(2 * figures_of("large")["run/cost"].value)


def test_arithmetic_is_the_models_own_flops():
    config, figures = (
        plan_of("mini", parallel={"recompute": "none"}),
        figures_of("mini", parallel={"recompute": "none"}),
    )
    flops = flops_per_token(config.model, 4096) * 8192 * 4096
    assert figures["step/flops"].value == flops
    assert figures["step/arithmetic"].value == pytest.approx(flops / 512 / (0.3 * DEVICES["h200"].flops))


def test_pipeline_bubble_of_1f1b():
    figures = figures_of("mini", parallel={"replicate": 1, "pipeline": 4}, batch={"micro_sequences": 4})
    passes = 8192 // (128 * 4)
    assert figures["step/bubble"].value == pytest.approx(figures["step/arithmetic"].value * 3 / passes)


def test_experts_are_sharded_whole():
    """64 expert ranks have 8 of 512 experts each: of 64 ranks that share them the fullest holds one, not an eighth."""
    config = plan_of("trillion", parallel={"replicate": 1, "shard": 4096, "expert": 64})
    counts = parameter_counts(config.model)
    routed = 56 * 512 * counts["expert"]
    held = (counts["total"] - routed) / 4096 + 56 * counts["expert"]
    assert memory.training_bytes(config)["masters"] == pytest.approx(4 * held, rel=1e-9)
    assert estimate.estimate(config)["figures"]["parameters/rank"].value == math.ceil(held)
    even = plan_of("trillion", parallel={"replicate": 8, "shard": 512, "expert": 64})  # one of 512 experts a rank
    assert memory.training_bytes(even)["masters"] == pytest.approx(4 * counts["total"] / 512, rel=1e-9)


def test_chunks_of_a_row_are_on_neighbours_as_in_the_mesh():
    whole = plan_of("large", batch={"context_tokens": 32768}, parallel={"shard": 32, "context": 4})
    assert [place_of(rank, whole.parallel)[:3] for rank in range(5)] == [(0, 0, 0)] * 4 + [(0, 0, 1)]
    assert next(row.link for row in estimate.traffic(whole) if row.axis == "context") == "node"


def test_traffic_by_axis():
    config = plan_of("large", machine={"imbalance": 1.0}, parallel={"recompute": "none"})
    rows = {row.axis: row for row in estimate.traffic(config)}
    assert {name: (row.link, row.ranks) for name, row in rows.items()} == {
        "shard": ("network", 128),
        "shard of experts": ("network", 16),
        "expert": ("node", 8),
        "replicate": ("network", 16),
        "muon": ("network", 128),
    }
    # Two passes of 4 x 8192 tokens, 4 rows of 3072 bf16 values each, there and back, forward and backward, 54 layers.
    assert rows["expert"].received_bytes == 2 * 4 * 8192 * 4 * 3072 * 2 * 7 / 8 * 4 * 54
    assert not estimate.traffic(plan_of("laptop"))


def test_rows_between_machines_cross_the_network_alone():
    """64 expert ranks on 8 machines: 56 of a rank's 63 partners are elsewhere, and no two want the same rows."""
    row = next(r for r in estimate.traffic(plan_of("large", parallel={"expert": 64})) if r.axis == "expert")
    assert row.link == "network"
    assert row.seconds == pytest.approx(row.received_bytes * 56 / 63 / DEVICES["b300"].network_bytes_s)


def test_context_ranks_exchange_keys_and_values():
    whole = plan_of("large", batch={"context_tokens": 32768}, parallel={"shard": 32, "context": 4})
    row = next(r for r in estimate.traffic(whole) if r.axis == "context")
    assert row.ranks == 4
    assert row.received_bytes > 0
    assert whole.micro_tokens == 4 * 8192
    assert whole.chunk_tokens == 8192


def test_checkpoint_interval_loses_least():
    """Young and Daly: no other interval loses less to saving and to work done twice."""
    figures = figures_of("large")
    write, between = figures["risk/checkpoint_write"].value, figures["risk/between_stops"].value * 3600
    every = figures["risk/checkpoint_every"].value * 60

    def lost(interval: float) -> float:
        return write / interval + interval / 2 / between

    assert lost(every) < min(lost(every * 0.9), lost(every * 1.1))
    assert figures["risk/goodput"].value == pytest.approx(1 - lost(every) - 600 / between)
    hours_of_16384 = 1 / INTERRUPTIONS_PER_DEVICE_HOUR / 16384
    assert hours_of_16384 == pytest.approx(3.1, abs=0.05)


def test_a_run_that_never_advances_is_refused():
    with pytest.raises(ConfigError, match="never advance"):
        figures_of("large", machine={"storage_bytes_s": 1e5})


def test_no_failures_no_checkpoint_interval():
    figures = figures_of("large", machine={"interruptions_per_device_hour": 0})
    assert figures["risk/goodput"].value == 1
    assert "risk/checkpoint_every" not in figures


# --- what does not fit, and what would ------------------------------------------------------------------------------


def test_a_misfit_says_what_would_fit():
    change = {"parallel": {"recompute": "none"}, "machine": {"device": "h200"}}
    (sentence,) = estimate.estimate(plan_of("large", **change))["problems"]
    assert "Memory does not fit" in sentence
    assert "It fits with parallel.recompute=full" in sentence
    assert estimate.fits(plan_of("large", **merge(change, {"parallel": {"recompute": "full"}})))


def test_a_misfit_is_given_more_devices():
    change = {"parallel": {"replicate": 1, "shard": 1, "expert": 1}, "machine": {"device": "h100"}}
    (sentence,) = estimate.estimate(plan_of("mini", **change))["problems"]
    assert "devices with parallel.replicate=" in sentence
    settings = [word.partition("=")[0] for word in sentence.split() if "=" in word]
    degrees = ("replicate", "shard", "expert", "context", "pipeline", "recompute")
    assert settings == [*(f"parallel.{name}" for name in degrees), "batch.sequences", "batch.micro_sequences"]


@pytest.mark.parametrize("name", ["mixtral-8x7b", "glm-4.5"])
def test_degrees_we_chose_fit(name):
    assert estimate.fits(plan_of(name))


def test_a_misfit_that_nothing_mends_says_so():
    # One row alone is too long for every device there could be.
    change = {
        "batch": {"context_tokens": 2**34, "sequences": 512, "micro_sequences": 1},
        "parallel": {"recompute": "full"},
    }
    (sentence,) = estimate.estimate(plan_of("mini", **change))["problems"]
    assert "take a larger device" in sentence


def test_no_proposal_that_would_never_advance():
    """Stops so frequent that only few devices get anywhere; what has more is not proposed, and no error either."""
    config = plan_of("nano", parallel={"replicate": 1, "shard": 4}, machine={"interruptions_per_device_hour": 0.5})
    assert estimate.search(config)
    assert estimate.search(config, devices=4096) == []


def test_search_proposes_degrees_that_fit():
    config = plan_of("mini", parallel={"replicate": 1, "shard": 64})
    found = estimate.search(config)
    assert found
    speeds = [estimate.estimate(c)["figures"]["step/tokens_per_device"].value for c in found]
    assert speeds == sorted(speeds, reverse=True)
    for other in found:
        assert other.parallel.devices == 64
        assert estimate.fits(other)
    assert speeds[0] >= estimate.estimate(config)["figures"]["step/tokens_per_device"].value


# --- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "where", "said"),
    [
        ({"machine": {"devices": 1000}}, "parallel", "do not multiply to the devices"),
        ({"parallel": {"expert": 24, "shard": 48}}, "parallel.expert", "do not divide evenly"),
        ({"parallel": {"expert": 64, "shard": 96}}, "parallel.expert", "part of shard x context"),
        ({"parallel": {"context": 4}}, "parallel.context", "shorter than the window"),
        ({"parallel": {"pipeline": 61}}, "parallel.pipeline", "more stages than layers"),
        ({"batch": {"sequences": 1000}}, "batch.sequences", "rows of a step"),
        ({"machine": {"device": "h1000"}}, "machine.device", "no such device"),
        ({"parallel": {"recompute": "some"}}, "plan.parallel.recompute", "not a valid value"),
        ({"parallel": {"tensor": 2}}, "plan.parallel.tensor", "unknown key"),
        ({"parts": {"attention": 2}}, "plan.parts.attention", "unknown key"),
    ],
)
def test_bad_degrees(change, where, said):
    with pytest.raises(ConfigError, match=said) as error:
        plan_of("large", **change)
    assert error.value.where == where


def test_a_mesh_larger_than_any_machine_is_fine():
    plan = estimate.estimate(plan_of("large", parallel={"replicate": 128}, batch={"sequences": 65536}))
    assert plan["figures"]["run/days"].value < 33


# --- the command ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PRESETS)
def test_every_number_has_a_unit_and_an_error(name):
    plan = estimate.estimate(plan_of(name))
    for key, figure in plan["figures"].items():
        assert figure.unit, key
        assert math.isfinite(figure.value), key
        assert 0 <= figure.error < 1, key
    for table in show.tables(plan):
        assert all(len(row) == len(table.header) and all(row) for row in table.rows), table.title


def test_command_prints_json_and_a_picture(tmp_path, capsys):
    assert cli.main(["plan", "large", "parallel.replicate=8", "--json", "--picture", str(tmp_path / "p.png")]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["config"]["parallel"]["replicate"] == 8
    assert plan["figures"]["parameters/total"] == {"value": 398635272192, "unit": "parameters", "error": 0.0}
    assert {row["figure"] for row in plan["published"]} >= {"run/days", "files/Q4_K_M"}
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


def test_another_shape_is_not_compared():
    assert show.comparison(estimate.estimate(plan_of("nano")))
    assert show.comparison(estimate.estimate(plan_of("nano", model={"num_experts": 64}))) == []


def test_command_on_a_recipe(capsys):
    assert cli.main(["plan", str(RECIPES / "laptop.yaml"), "--search"]) == 0
    text = capsys.readouterr().out
    assert "The run" in text
    assert "Degrees that fit" in text
    pretrain = resolve(RECIPES / "laptop.yaml").stages["pretrain"].config
    config = fill(PlanConfig, plan_of_recipe("laptop", pretrain.model_dump(mode="json")), "plan")
    assert config.model == pretrain.model
    assert config.tokens == sum(phase.steps for phase in pretrain.phases.values()) * pretrain.batch.step_tokens
    assert config.micro_sequences == pretrain.batch.micro
    assert config.newton_schulz_steps == pretrain.optim.newton_schulz_steps


def test_muon_costs_what_its_iterations_do():
    three, five = (estimate.muon_flops(plan_of("laptop", newton_schulz_steps=n)) for n in (3, 5))
    assert 0 < three == pytest.approx(0.6 * five)


def test_command_refuses_what_it_does_not_know(capsys):
    assert cli.main(["plan", "lage"]) == 2
    assert "did you mean `large`?" in capsys.readouterr().err
    assert cli.main(["plan", "large", "parallel.shard=64", "machine.devices=2048"]) == 2
    assert "do not multiply" in capsys.readouterr().err
