"""Shapes, what follows from them, what is refused; without torch."""

from __future__ import annotations

import subprocess
import sys
import time
from typing import Any

import pytest
import transformers

from freehold.core.config import fill
from freehold.core.errors import ConfigError
from freehold.model.config import (
    PRESETS,
    SHAPES,
    ModelConfig,
    compute_route_scale,
    flops_per_token,
    from_hf_dict,
    kv_bytes_per_token,
    parameter_counts,
    to_hf_dict,
)

# Published or derived from published shapes; parameters in the unit they are quoted in.
PUBLISHED = {
    "nano": (6.120, 0.614, 0.819, 1.024, 3.67, 0.786, 101.6, 9.44, 205.0, 5.70, 14336),
    "mini": (26.124, 2.655, 3.065, 3.475, 27.26, 6.291, 811.9, 37.75, 410.0, 25.30, 16384),
    "large": (398.635, 12.142, 12.757, 13.372, 62.92, 28.312, 7277, 113.2, 615.0, 397.4, 61440),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_counts_of_the_published_models(name: str) -> None:
    total, bare, head, active, attention, expert, moe, dense, embedding, muon, kv = PUBLISHED[name]
    counts = parameter_counts(PRESETS[name])
    for key, billions in (
        ("total", total), ("active_no_embedding", bare), ("active_with_head", head), ("active", active),
    ):  # fmt: skip
        assert counts[key] / 1e9 == pytest.approx(billions, abs=5.1e-4), key
    for key, millions in (
        ("attention_per_layer", attention), ("expert", expert), ("dense_ffn", dense), ("moe_layer", moe),
        ("embedding", embedding), ("head", embedding),
    ):  # fmt: skip
        assert counts[key] / 1e6 == pytest.approx(millions, rel=7e-4), key
    assert counts["muon"] / 1e9 == pytest.approx(muon, rel=1e-3)
    assert kv_bytes_per_token(PRESETS[name]) == kv


def test_published_shapes_in_detail() -> None:
    nano, mini, large = (PRESETS[name] for name in ("nano", "mini", "large"))
    assert [c.num_full_layers for c in (nano, mini, large)] == [14, 8, 15]
    assert [c.query_width for c in (nano, mini, large)] == [1024, 4096, 6144]
    assert [c.route_scale for c in (nano, mini, large)] == [2.826, 2.826, 2.448]
    assert [round(c.initializer_range, 3) for c in (nano, mini, large)] == [0.016, 0.011, 0.009]
    assert [c.sliding_window for c in (nano, mini, large)] == [2048, 2048, 4096]


def test_own_shapes() -> None:
    laptop, trillion = PRESETS["laptop"], PRESETS["trillion"]
    assert parameter_counts(trillion)["total"] / 1e12 == pytest.approx(1, rel=0.01)
    assert (trillion.num_experts, trillion.num_experts_per_tok) == (512, 4)
    assert laptop.route_scale == compute_route_scale(16, 2)
    for name in ("laptop", "workstation", "trillion"):
        config = PRESETS[name]
        widths = (config.hidden_size, config.intermediate_size, config.moe_intermediate_size, config.query_width)
        rows = 128 if name == "laptop" else 256  # docs/decisions/0008: Q8_0 needs 32, K-quants 256
        assert not any(width % rows for width in widths), name
        assert config.num_hidden_layers % 4 == 0
        assert config.mup_enabled
        full = [i for i, kind in enumerate(config.layer_types) if kind == "full_attention"]
        assert full == list(range(3, config.num_hidden_layers, 4))


def test_counts_equal_the_built_model(hard: ModelConfig) -> None:
    from freehold.model.afmoe import Afmoe

    for config in (hard, PRESETS["laptop"]):
        assert sum(p.numel() for p in Afmoe(config).parameters()) == parameter_counts(config)["total"]


def test_flops_count_the_visible_keys_only() -> None:
    shape = PRESETS["laptop"].model_dump() | {
        "vocab_size": 8192, "hidden_size": 256, "intermediate_size": 768, "num_attention_heads": 4,
        "num_key_value_heads": 2, "initializer_range": None, "num_hidden_layers": 8, "layer_types": None,
        "num_experts": 32, "num_experts_per_tok": 4, "moe_intermediate_size": 128,
    }  # fmt: skip
    config = ModelConfig(**shape)
    # 6N = 49.69M (norms included there), attention 3.64M: taken from an independent count of this shape.
    assert flops_per_token(config, 512) / 1e6 == pytest.approx(53.34, rel=2e-3)
    assert flops_per_token(config, 64) < flops_per_token(config, 128)
    beyond = flops_per_token(config, 2048) - flops_per_token(config, 1024)
    full_only = 12 * 256 * 2 * 512
    assert beyond == pytest.approx(full_only, rel=0.05)


def test_route_scale_reproduces_the_published_constants_quickly() -> None:
    compute_route_scale.cache_clear()
    start = time.perf_counter()
    assert compute_route_scale(128, 8) == 2.826
    assert time.perf_counter() - start < 0.2
    assert compute_route_scale(256, 6) in (2.448, 2.449)
    assert compute_route_scale(256, 4) == 2.0
    assert compute_route_scale(7, 7) > compute_route_scale(7, 3)
    assert compute_route_scale(5, 1) == 1.0


def test_preset_with_overrides_derives_what_depends_on_them() -> None:
    config = fill(ModelConfig, {"preset": "laptop", "vocab_size": 4096, "num_hidden_layers": 8, "num_experts": 32}, "")
    assert (config.vocab_size, len(config.layer_types)) == (4096, 8)
    assert config.route_scale == compute_route_scale(32, 2)
    assert fill(ModelConfig, {"preset": "mini"}, "") == PRESETS["mini"]
    smaller = fill(ModelConfig, {"preset": "mini", "num_experts": 64}, "")
    assert smaller.route_scale == compute_route_scale(64, 8) != 2.826
    assert fill(ModelConfig, {"preset": "mini", "num_experts": 64, "route_scale": 2.5}, "").route_scale == 2.5
    assert fill(ModelConfig, config.model_dump(mode="json"), "") == config


BAD: list[tuple[dict[str, Any], str]] = [
    ({"num_experts_per_tok": 17}, "num_experts_per_tok"),
    ({"num_key_value_heads": 3}, "num_key_value_heads"),
    ({"hidden_size": 0}, "hidden_size"),
    ({"moe_intermediate_size": -1}, "moe_intermediate_size"),
    ({"head_dim": 63}, "head_dim"),
    ({"layer_types": ["full_attention"]}, "layer_types"),
    ({"layer_types": ["full_attention", "global", "full_attention", "full_attention"]}, "layer_types"),
    ({"num_dense_layers": 5}, "num_dense_layers"),
    ({"vocab_size": 31}, "vocab_size"),
    ({"route_norm": False}, "route_norm"),
    ({"score_func": "softmax"}, "score_func"),
    ({"route_scale": 0}, "route_scale"),
    ({"route_scale": -1.0}, "route_scale"),
    ({"n_group": 2}, "n_group"),
    ({"tie_word_embeddings": True}, "tie_word_embeddings"),
    ({"hidden_act": "gelu"}, "hidden_act"),
    ({"attention_bias": True}, "attention_bias"),
    ({"attention_dropout": 0.1}, "attention_dropout"),
    ({"num_shared_experts": 0}, "num_shared_experts"),
    ({"sliding_window": 0}, "sliding_window"),
    ({"global_attn_every_n_layers": 0}, "global_attn_every_n_layers"),
    ({"hiden_size": 8}, "hidden_size"),
    ({"preset": "lptop"}, "laptop"),
]


@pytest.mark.parametrize(("change", "named"), BAD, ids=[str(change) for change, _ in BAD])
def test_shapes_that_make_no_sense_are_refused_by_name(change: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        fill(ModelConfig, {"preset": "laptop"} | change, "model")


def test_config_json_goes_both_ways_and_transformers_agrees() -> None:
    for name, config in PRESETS.items():
        data = to_hf_dict(config)
        assert from_hf_dict(data) == config, name
        theirs = transformers.AfmoeConfig(**data)
        for key in SHAPES["mini"].keys() | {"layer_types", "rms_norm_eps", "mup_enabled", "num_shared_experts"}:
            expected = getattr(config, key)
            assert getattr(theirs, key) == (list(expected) if isinstance(expected, tuple) else expected), (name, key)
        assert theirs.rope_parameters["rope_theta"] == config.rope_theta
    # transformers writes null for what we omit, and its own form of RoPE.
    again = transformers.AfmoeConfig(**to_hf_dict(PRESETS["nano"])).to_dict()
    assert from_hf_dict(again) == PRESETS["nano"]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model_type": "llama"}, "model_type"),
        ({"attention_sinks": True}, "attention_sinks"),
        ({"num_limited_groups": 2}, "num_limited_groups"),
        ({"rope_scaling": {"type": "yarn"}}, "rope_scaling"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_parameters"),
        ({"mup_enabled": None}, "mup_enabled"),
        ({"route_scale": None}, "route_scale"),
    ],
)
def test_a_config_json_we_cannot_obey_is_refused_by_name(change: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        from_hf_dict(to_hf_dict(PRESETS["laptop"]) | change)


def test_importing_the_config_needs_no_torch_and_no_numpy() -> None:
    code = "import sys, freehold.model.config; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
