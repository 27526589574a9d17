"""The type of every tensor in each mix: llama.cpp's choices, and the sizes they come to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from freehold.model.config import PRESETS, ModelConfig
from freehold.run.recipe import resolve
from freehold.stages.export import gguf_writer, mix
from freehold.stages.export.mix import MIXES, Choice, choose_types

SMALL: dict[str, Any] = {
    "hidden_size": 256, "intermediate_size": 512, "moe_intermediate_size": 256, "num_hidden_layers": 16,
    "num_dense_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "num_experts": 32,
    "num_experts_per_tok": 2, "sliding_window": 64, "max_position_embeddings": 256, "vocab_size": 640,
}  # fmt: skip


def types(config: ModelConfig, file_type: str, importance: bool = False) -> dict[str, Choice]:
    return choose_types(
        gguf_writer.tensor_shapes(config), file_type,
        layers=config.num_hidden_layers, experts=config.num_experts, importance=importance,
    )  # fmt: skip


def layers_of(choices: dict[str, Choice], part: str, kind: str) -> list[int]:
    return [mix.layer_of(name) for name, choice in choices.items() if part in name and choice.type == kind]


@pytest.mark.parametrize(("preset", "more"), [("nano", 28), ("mini", 16), ("large", 30)])
def test_half_of_the_layers_get_more_bits(preset: str, more: int) -> None:
    config = PRESETS[preset]
    for file_type, base in (("Q4_K_M", "Q4_K"), ("Q5_K_M", "Q5_K")):
        choices = types(config, file_type)
        chosen = layers_of(choices, "attn_v", "Q6_K")
        assert len(chosen) == more
        assert chosen[:3] == [0, 1, 2]
        assert chosen[-1] == config.num_hidden_layers - 1
        down = sorted(set(layers_of(choices, "ffn_down", "Q6_K")))
        assert down == chosen
        assert choices["output.weight"].type == "Q6_K"
        assert choices["token_embd.weight"].type == base
        assert choices["blk.9.attn_output.weight"].type == choices["blk.9.attn_gate.weight"].type == base


SIZES = {
    "nano": {"BF16": 12.25, "Q8_0": 6.52, "Q6_K": 5.04, "Q5_K_M": 4.38, "Q4_K_M": 3.75, "Q4_0": 3.52, "Q3_K_M": 2.99},
    "mini": {"BF16": 52.3, "Q8_0": 27.8, "Q6_K": 21.5, "Q5_K_M": 18.6, "Q4_K_M": 15.8, "Q4_0": 14.8, "Q3_K_M": 12.5},
    "large": {"BF16": 797, "Q8_0": 424, "Q6_K": 327, "Q5_K_M": 282, "Q4_K_M": 240, "Q4_0": 224.5, "Q3_K_M": 189},
}


@pytest.mark.parametrize("preset", SIZES)
def test_sizes_of_the_published_models(preset: str) -> None:
    """Decimal GB, derived by hand from llama.cpp's rules; a wrong rule moves every one of them."""
    shapes = gguf_writer.tensor_shapes(PRESETS[preset])
    for file_type, gigabytes in SIZES[preset].items():
        size = mix.file_bytes(shapes, types(PRESETS[preset], file_type)) / 1e9
        assert size == pytest.approx(gigabytes, rel=0.004), file_type


def test_importance_protects_the_first_layers_of_q4_0() -> None:
    config = PRESETS["large"]
    assert layers_of(types(config, "Q4_0"), "ffn_down", "Q4_1") == []
    choices = types(config, "Q4_0", importance=True)
    assert sorted(set(layers_of(choices, "ffn_down", "Q4_1"))) == list(range(60 // 8))
    assert layers_of(choices, "attn", "Q4_1") == []
    size = mix.file_bytes(gguf_writer.tensor_shapes(config), choices) / 1e9
    assert size == pytest.approx(224.7, rel=0.001)


def test_q3_k_m_by_order_of_visit_and_by_layer() -> None:
    choices = types(PRESETS["nano"], "Q3_K_M")
    assert layers_of(choices, "attn_v", "Q5_K") == [0, 1]
    assert sorted(set(layers_of(choices, "ffn_down", "Q5_K"))) == [0, 1, 2]
    assert choices["blk.40.ffn_down_exps.weight"].type == choices["blk.40.attn_output.weight"].type == "Q4_K"
    assert choices["blk.40.ffn_down_shexp.weight"].type == "Q4_K"
    assert choices["blk.40.ffn_up_exps.weight"].type == choices["blk.40.attn_k.weight"].type == "Q3_K"


def test_exactly_eight_experts_are_a_case_of_their_own() -> None:
    for experts, attn_v, attn_k, output in ((8, "Q8_0", "Q8_0", "Q5_K"), (9, "Q6_K", "Q4_K", "Q4_K")):
        choices = types(ModelConfig.model_validate(SMALL | {"num_experts": experts}), "Q4_K_M")
        found = [choices[f"blk.0.{part}.weight"].type for part in ("attn_v", "attn_k", "attn_output")]
        assert found == [attn_v, attn_k, output]


@pytest.mark.parametrize("file_type", MIXES)
def test_router_gains_and_biases_stay_in_float(file_type: str) -> None:
    choices = types(PRESETS["mini"], file_type)
    in_float = [n for n in choices if n.endswith(("_norm.weight", ".bias")) or "ffn_gate_inp" in n]
    assert {choices[name].type for name in in_float} == {"F32"}
    assert len(choices) - len(in_float) == 2 + 32 * 5 + 2 * 3 + 30 * 6


@pytest.mark.parametrize(
    ("width", "wanted"),
    [
        (128, {"Q3_K_M": "Q4_0", "Q4_K_M": "Q5_0", "Q5_K_M": "Q5_1", "Q6_K": "Q8_0", "Q8_0": "Q8_0", "Q4_0": "Q4_0"}),
        (48, dict.fromkeys(("Q3_K_M", "Q4_K_M", "Q5_K_M", "Q6_K", "Q8_0", "Q4_0"), "F16")),
    ],
)
def test_rows_that_a_type_cannot_hold_fall_back(width: int, wanted: dict[str, str]) -> None:
    config = ModelConfig.model_validate(SMALL | {"hidden_size": width})
    for file_type, kind in wanted.items():
        choice = types(config, file_type)["blk.3.attn_q.weight"]
        assert choice.type == kind
        assert choice.instead_of == ("" if kind == MIXES[file_type][0] else MIXES[file_type][0])
        head = types(config, file_type)["output.weight"].type
        assert head == ("F16" if width == 48 else "Q8_0")


def test_quant_recipe_holds_every_k_type() -> None:
    plan = resolve(Path(__file__).parents[2] / "recipes" / "quant.yaml")
    config = plan.stages["pretrain"].config.model
    assert config.num_experts == 32
    for file_type in plan.stages["export"].config.types:
        assert not [name for name, choice in types(config, file_type).items() if choice.instead_of], file_type


def test_files_are_ordered_by_layer_then_name() -> None:
    names = list(types(PRESETS["nano"], "Q8_0"))
    assert names[:4] == ["output.weight", "output_norm.weight", "token_embd.weight", "blk.0.attn_gate.weight"]
    assert names.index("blk.2.ffn_up_shexp.weight") < names.index("blk.10.attn_gate.weight")
