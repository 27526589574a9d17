"""What an AFMoE model is, in Hugging Face's field names; parameters, FLOPs and bytes from numbers alone, without torch.

Shapes and counts of the published models: Arcee Trinity Large technical report (arXiv 2602.17004) and model cards.
"""

from __future__ import annotations

import functools
import math
import random
import statistics
from collections.abc import Mapping
from typing import Any, Literal

import pydantic
from pydantic import Field

from freehold.core.config import Config, fill
from freehold.core.errors import ConfigError

LayerType = Literal["sliding_attention", "full_attention"]

# The published shapes. A field that can be derived from others (route_scale of a new shape, layer_types,
# initializer_range) is absent, so that an override of what it depends on derives it again.
_TRINITY: dict[str, Any] = {"vocab_size": 200192, "head_dim": 128}
SHAPES: dict[str, dict[str, Any]] = {
    "nano": _TRINITY | {
        "num_hidden_layers": 56, "num_dense_layers": 2, "hidden_size": 1024, "intermediate_size": 3072,
        "moe_intermediate_size": 256, "num_attention_heads": 8, "num_key_value_heads": 2, "num_experts": 128,
        "num_experts_per_tok": 8, "route_scale": 2.826, "sliding_window": 2048, "max_position_embeddings": 131072,
    },
    "mini": _TRINITY | {
        "num_hidden_layers": 32, "num_dense_layers": 2, "hidden_size": 2048, "intermediate_size": 6144,
        "moe_intermediate_size": 1024, "num_attention_heads": 32, "num_key_value_heads": 4, "num_experts": 128,
        "num_experts_per_tok": 8, "route_scale": 2.826, "sliding_window": 2048, "max_position_embeddings": 131072,
    },
    # 2.448 is the constant of a top-6 router; the published weights were trained with it at top-4, so it stays.
    "large": _TRINITY | {
        "num_hidden_layers": 60, "num_dense_layers": 6, "hidden_size": 3072, "intermediate_size": 12288,
        "moe_intermediate_size": 3072, "num_attention_heads": 48, "num_key_value_heads": 8, "num_experts": 256,
        "num_experts_per_tok": 4, "route_scale": 2.448, "sliding_window": 4096, "max_position_embeddings": 524288,
    },
    "laptop": {
        "vocab_size": 4096, "num_hidden_layers": 4, "num_dense_layers": 1, "hidden_size": 128,
        "intermediate_size": 384, "moe_intermediate_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1,
        "head_dim": 64, "num_experts": 16, "num_experts_per_tok": 2, "sliding_window": 128,
        "max_position_embeddings": 2048,
    },
    "workstation": {
        "vocab_size": 16384, "num_hidden_layers": 12, "num_dense_layers": 2, "hidden_size": 512,
        "intermediate_size": 1536, "moe_intermediate_size": 256, "num_attention_heads": 8, "num_key_value_heads": 4,
        "head_dim": 64, "num_experts": 64, "num_experts_per_tok": 4, "sliding_window": 256,
        "max_position_embeddings": 1024,
    },
    "trillion": _TRINITY | {
        "num_hidden_layers": 64, "num_dense_layers": 8, "hidden_size": 4096, "intermediate_size": 16384,
        "moe_intermediate_size": 2816, "num_attention_heads": 64, "num_key_value_heads": 8, "num_experts": 512,
        "num_experts_per_tok": 4, "sliding_window": 4096, "max_position_embeddings": 262144,
    },
}  # fmt: skip


class ModelConfig(Config):
    """One AFMoE shape. What this code does not compute (soft variants of HF's fields) is refused, not ignored."""

    preset: str | None = Field(
        None, exclude=True, description="Start from this named shape; other keys override it. None once filled."
    )
    vocab_size: int = Field(ge=32, description="Rows of the embedding and of the head; ids 0-31 are special tokens.")
    hidden_size: int = Field(gt=0, description="Width d of the residual stream.")
    intermediate_size: int = Field(gt=0, description="Width of the dense feed-forward of the first layers.")
    moe_intermediate_size: int = Field(gt=0, description="Width of one routed expert.")
    num_hidden_layers: int = Field(gt=0, le=4096, description="Layers in all, dense ones included.")
    num_dense_layers: int = Field(ge=0, description="Number of first layers with a dense feed-forward.")
    num_attention_heads: int = Field(gt=0, description="Query heads.")
    num_key_value_heads: int = Field(gt=0, description="Key and value heads; divides the query heads.")
    head_dim: int = Field(gt=0, multiple_of=2, description="Width of one head; heads x head_dim need not equal d.")
    num_experts: int = Field(gt=0, le=65_536, description="Routed experts in each MoE layer.")
    num_experts_per_tok: int = Field(gt=0, description="Routed experts each token uses (top-k).")
    num_shared_experts: int = Field(1, gt=0, description="Shared experts, always on, held as one wide expert.")
    route_scale: float = Field(
        0.0, ge=0, description="Factor on the normalised routing weights; computed from (experts, top-k) when absent."
    )
    route_norm: Literal[True] = Field(True, description="Routing weights are normalised to sum 1.")
    score_func: Literal["sigmoid"] = Field("sigmoid", description="Router score of one expert.")
    n_group: Literal[1] = Field(1, description="Expert groups for group-limited routing; 1 = none.")
    topk_group: Literal[1] = Field(1, description="Groups a token may use; 1 = none.")
    sliding_window: int = Field(gt=0, description="Tokens a sliding layer sees, the current one included.")
    global_attn_every_n_layers: int = Field(4, gt=0, description="Every n-th layer attends to everything.")
    layer_types: tuple[LayerType, ...] = Field(
        (), description="Attention of each layer; derived from global_attn_every_n_layers when absent."
    )
    rms_norm_eps: float = Field(1e-5, gt=0, description="Added to the mean square in every RMSNorm.")
    rope_theta: float = Field(10000.0, gt=0, description="Base of the rotary frequencies of sliding layers.")
    max_position_embeddings: int = Field(gt=0, description="Longest context, in tokens, this model is meant for.")
    mup_enabled: bool = Field(True, description="Multiply embeddings by sqrt(d).")
    tie_word_embeddings: Literal[False] = Field(False, description="Embedding and head are two matrices.")
    hidden_act: Literal["silu"] = Field("silu", description="Activation of the gated feed-forwards.")
    attention_bias: Literal[False] = Field(False, description="No linear layer has a bias.")
    attention_dropout: float = Field(0.0, ge=0, le=0, description="Not used by AFMoE; must be 0.")
    initializer_range: float = Field(0.0, ge=0, description="Standard deviation at the start; 0.5/sqrt(d) when absent.")

    @pydantic.model_validator(mode="before")
    @classmethod
    def _derive(cls, data: Any) -> Any:
        """Merge the keys into their preset and fill in what follows from the others."""
        if not isinstance(data, dict):
            return data
        data = {k: v for k, v in data.items() if v is not None}
        name = data.pop("preset", None)
        if name is not None:
            if name not in SHAPES:
                raise ConfigError("no such model preset", where="preset", found=name, expected=", ".join(SHAPES))
            shape = dict(SHAPES[name])
            if any(data.get(key, shape[key]) != shape[key] for key in ("num_experts", "num_experts_per_tok")):
                shape.pop("route_scale", None)  # that constant belongs to the preset's own (experts, top-k)
            data = shape | data
        experts, k = data.get("num_experts"), data.get("num_experts_per_tok")
        if "route_scale" not in data and isinstance(experts, int) and isinstance(k, int) and 0 < k <= experts:
            data["route_scale"] = compute_route_scale(experts, k)
        layers, every = data.get("num_hidden_layers"), data.get("global_attn_every_n_layers", 4)
        if "layer_types" not in data and isinstance(layers, int) and isinstance(every, int) and every > 0:
            data["layer_types"] = tuple(
                "sliding_attention" if (layer + 1) % every else "full_attention" for layer in range(layers)
            )
        width = data.get("hidden_size")
        if "initializer_range" not in data and isinstance(width, int) and width > 0:
            data["initializer_range"] = 0.5 / math.sqrt(width)
        return data

    @pydantic.model_validator(mode="after")
    def _agree(self) -> ModelConfig:
        """Refuse fields that contradict each other."""
        if self.num_experts_per_tok > self.num_experts:
            raise ConfigError(
                "a token cannot use more experts than there are",
                where="num_experts_per_tok",
                found=self.num_experts_per_tok,
                expected=f"at most num_experts = {self.num_experts}",
            )
        if self.route_scale == 0:
            raise ConfigError("the routed experts would not count", where="route_scale", found=0, expected="> 0")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                "query heads must be a multiple of key-value heads",
                where="num_key_value_heads",
                found=f"{self.num_attention_heads} heads over {self.num_key_value_heads}",
                expected=f"a divisor of {self.num_attention_heads}",
            )
        if self.num_dense_layers > self.num_hidden_layers:
            raise ConfigError(
                "more dense layers than layers",
                where="num_dense_layers",
                found=self.num_dense_layers,
                expected=f"at most num_hidden_layers = {self.num_hidden_layers}",
            )
        if len(self.layer_types) != self.num_hidden_layers:
            raise ConfigError(
                "layer_types must name every layer once",
                where="layer_types",
                found=f"{len(self.layer_types)} names",
                expected=f"num_hidden_layers = {self.num_hidden_layers} names",
            )
        return self

    @property
    def query_width(self) -> int:
        """Heads x head_dim; twice d in Mini and Large."""
        return self.num_attention_heads * self.head_dim

    @property
    def key_width(self) -> int:
        """Key-value heads x head_dim."""
        return self.num_key_value_heads * self.head_dim

    @property
    def num_full_layers(self) -> int:
        """Layers that attend to the whole context."""
        return self.layer_types.count("full_attention")


@functools.lru_cache
def compute_route_scale(num_experts: int, num_experts_per_tok: int) -> float:
    """Return the factor that gives the k routing weights unit norm on average: E[1/|g|], to three decimals.

    g = the k largest of N standard-normal logits, through a sigmoid, normalised to sum 1. Reproduces the
    published 2.826 of (128, 8); 2.449 for (256, 6), published as 2.448. Only the k largest are drawn: the
    maximum of n uniform numbers is U**(1/n), and the next is the maximum of n - 1 below it.
    """
    rng, normal, draws = random.Random(0), statistics.NormalDist(), 2000
    total = 0.0
    for _ in range(draws):
        top, scores = 1.0, []
        for left in range(num_experts, num_experts - num_experts_per_tok, -1):
            top *= (1.0 - rng.random()) ** (1.0 / left)
            logit = normal.inv_cdf(min(max(top, 1e-300), 1 - 1e-16))
            scores.append(1.0 / (1.0 + math.exp(-logit)))
        total += sum(scores) / math.hypot(*scores)
    return round(total / draws, 3)


PRESETS: dict[str, ModelConfig] = {name: ModelConfig.model_validate(shape) for name, shape in SHAPES.items()}


def parameter_counts(config: ModelConfig, parts: Mapping[str, int] | None = None) -> dict[str, int]:
    """Return parameters in all, per token, under Muon, and of each part; `expert_bias` is a buffer and not counted.

    `active` is what one token touches, embedding and head included. `parts` replaces what one layer counts
    under a name of the result (`attention_per_layer`, `norms_per_layer`, `dense_ffn`, `expert`, `shared_experts`,
    `router`): so other architectures are counted by the same arithmetic.
    """
    d, layers, parts = config.hidden_size, config.num_hidden_layers, parts or {}
    moe_layers = layers - config.num_dense_layers
    attention = parts.get("attention_per_layer", 3 * d * config.query_width + 2 * d * config.key_width)
    norms = parts.get("norms_per_layer", 4 * d + 2 * config.head_dim)
    dense_ffn = parts.get("dense_ffn", 3 * d * config.intermediate_size)
    expert = parts.get("expert", 3 * d * config.moe_intermediate_size)
    shared = parts.get("shared_experts", expert * config.num_shared_experts)
    router = parts.get("router", d * config.num_experts)
    moe_layer = expert * config.num_experts + shared + router
    embedding = config.vocab_size * d
    always = layers * (attention + norms) + config.num_dense_layers * dense_ffn + moe_layers * (shared + router) + d
    routed = moe_layers * expert * config.num_experts
    active = always + moe_layers * expert * config.num_experts_per_tok
    return {
        "total": always + routed + 2 * embedding,
        "active": active + 2 * embedding,
        "active_with_head": active + embedding,
        "active_no_embedding": active,
        "embedding": embedding,
        "head": embedding,
        "muon": layers * attention + config.num_dense_layers * dense_ffn + moe_layers * (moe_layer - router),
        "attention_per_layer": attention,
        "norms_per_layer": norms,
        "dense_ffn": dense_ffn,
        "expert": expert,
        "shared_experts": shared,
        "router": router,
        "moe_layer": moe_layer,
    }


def flops_per_token(config: ModelConfig, context_tokens: int, parts: Mapping[str, int] | None = None) -> float:
    """Return the FLOPs of training on one token (forward and backward) in sequences of `context_tokens`.

    6 x matrix parameters a token meets (head included, embedding look-up not) + 12 x query width x keys seen,
    averaged over the sequence. A forward pass alone is a third. `parts` as in `parameter_counts`.
    """
    counts = parameter_counts(config, parts)
    norms = config.num_hidden_layers * counts["norms_per_layer"] + config.hidden_size
    seen = 0.0
    for kind in config.layer_types:
        window = min(config.sliding_window, context_tokens) if kind == "sliding_attention" else context_tokens
        seen += (window * (window + 1) / 2 + (context_tokens - window) * window) / context_tokens
    return 6.0 * (counts["active_with_head"] - norms) + 12.0 * config.query_width * seen


def kv_bytes_per_token(config: ModelConfig, bytes_per_value: int = 2) -> int:
    """Return the bytes each further token adds to a cache: full layers only, for sliding layers stop growing."""
    return 2 * config.key_width * bytes_per_value * config.num_full_layers


# Fields of config.json that say nothing about the forward pass of this code, by name.
IGNORED_HF_FIELDS = frozenset({
    "architectures", "auto_map", "dtype", "torch_dtype", "transformers_version", "use_cache", "bos_token_id",
    "eos_token_id", "pad_token_id", "load_balance_coeff", "use_grouped_mm", "output_router_logits", "_name_or_path",
    "return_dict", "output_hidden_states", "output_attentions", "chunk_size_feed_forward", "is_encoder_decoder",
    "id2label", "label2id", "problem_type", "experts_implementation",
})  # fmt: skip
# Fields that are only accepted with the one value that means "not used".
NEUTRAL_HF_FIELDS: dict[str, Any] = {"num_expert_groups": 1, "num_limited_groups": 1, "rope_scaling": None}


def to_hf_dict(config: ModelConfig, dtype: str = "bfloat16") -> dict[str, Any]:
    """Return the content of `config.json` for this shape; readable by transformers, vLLM, llama.cpp and us."""
    fields = config.model_dump(mode="json")
    return {
        "architectures": ["AfmoeForCausalLM"],
        "model_type": "afmoe",
        "dtype": dtype,
        "bos_token_id": 0,
        "eos_token_id": 3,
        "pad_token_id": 12,
        "use_cache": True,
        "rope_scaling": None,
        **fields,
    }


def from_hf_dict(data: dict[str, Any], where: str = "config.json") -> ModelConfig:
    """Return the shape a `config.json` describes; a field we neither know nor may ignore is refused by name."""
    if data.get("model_type") != "afmoe":
        found = data.get("model_type")
        raise ConfigError("not an AFMoE model", where=f"{where}: model_type", found=found, expected="afmoe")
    rest = {k: v for k, v in data.items() if k not in IGNORED_HF_FIELDS and k != "model_type"}
    for key, neutral in NEUTRAL_HF_FIELDS.items():
        if rest.pop(key, neutral) != neutral:
            raise ConfigError("not supported", where=f"{where}: {key}", found=data[key], expected=neutral)
    rope = rest.pop("rope_parameters", None) or {}
    if not isinstance(rope, dict) or rope.get("rope_type", "default") != "default":
        raise ConfigError("not supported", where=f"{where}: rope_parameters", found=rope, expected="rope_type default")
    if "rope_theta" in rope:
        rest["rope_theta"] = rope["rope_theta"]
    # Absent, these have other values in transformers than here: say them rather than guess.
    for key in ("mup_enabled", "route_scale", "num_shared_experts", "layer_types"):
        if rest.get(key) is None and not (key == "layer_types" and "global_attn_every_n_layers" in rest):
            raise ConfigError("a key is missing", where=f"{where}: {key}", expected="a value")
    return fill(ModelConfig, rest, where)
