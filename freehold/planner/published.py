"""Runs that others published, as plans, and their figures to compare with ours; every figure has its source.

AFMoE shapes come from `freehold.model.config`. The others are written in the same fields, `parts` saying what their
layers count where they differ. Devices, degrees and MFU, where no one published them, are our assumptions; see
docs/plan.md.
"""

from __future__ import annotations

from typing import Any, NamedTuple

TRINITY = "Trinity Large technical report, arXiv 2602.17004"
CONFIG_JSON = "counted from huggingface.co/arcee-ai config.json; the report rounds it"
DEEPSEEK = "DeepSeek-V3 technical report, arXiv 2412.19437"
GPT_OSS = "gpt-oss model card, arXiv 2508.10925"
OLMO = "muxup.com/2025q4/minipost-olmo3-training-cost (Olmo 3 report)"
GLM = "GLM-4.5 report, arXiv 2508.06471, table 1"
MIXTRAL = "Mixtral of Experts, arXiv 2401.04088; mistral.ai announcement"


class Published(NamedTuple):
    """A figure somebody published: our name for it, its value, how far ours may be off, and where it stands."""

    figure: str
    value: float
    tolerance: float
    source: str


_HSDP = {"shard": 128, "recompute": "full"}
# 33 days include every stop; what the kernels reach while they compute is not published. The value below makes the
# days come out at 33, and the plan prints the utilisation that follows (run/mfu). Rent x overhead: see docs/plan.md.
_LARGE_MACHINE = {"device": "b300", "mfu": 0.183, "overhead": 2.05}

PRESETS: dict[str, dict[str, Any]] = {
    "nano": {
        "model": {"preset": "nano"}, "tokens": 10e12, "parallel": {**_HSDP, "replicate": 4},
        "batch": {"context_tokens": 4096, "sequences": 8192, "micro_sequences": 16},
        "machine": {"device": "h200", "mfu": 0.3},
    },
    "mini": {
        "model": {"preset": "mini"}, "tokens": 10e12, "parallel": {**_HSDP, "replicate": 4},
        "batch": {"context_tokens": 4096, "sequences": 8192, "micro_sequences": 16},
        "machine": {"device": "h200", "mfu": 0.3},
    },
    "large": {
        "model": {"preset": "large"}, "tokens": 17e12, "parallel": {**_HSDP, "replicate": 16, "expert": 8},
        "batch": {"context_tokens": 8192, "sequences": 16384, "micro_sequences": 4}, "machine": _LARGE_MACHINE,
    },
    # Our own design; tokens are our choice. Utilisation, price and overhead are those of `large`.
    "trillion": {
        "model": {"preset": "trillion"}, "tokens": 30e12, "parallel": {**_HSDP, "replicate": 32, "expert": 8},
        "batch": {"context_tokens": 8192, "sequences": 16384, "micro_sequences": 4}, "machine": _LARGE_MACHINE,
    },
    "laptop": {
        "model": {"preset": "laptop"}, "tokens": 800 * 4096,
        "machine": {"device": "cpu", "mfu": 0.2, "kernels": "native"},
        "batch": {"context_tokens": 512, "sequences": 8, "micro_sequences": 8},
    },
    "workstation": {
        "model": {"preset": "workstation"}, "tokens": 2e9, "machine": {"device": "h100"},
        "batch": {"context_tokens": 1024, "sequences": 256, "micro_sequences": 8},
    },
    # Latent attention: the counts are of its five matrices; head_dim 160 = (192 + 128) / 2, so that query width x keys
    # is its arithmetic. FP8 run, counted against the bf16 peak; MFU as derived by others from the same report
    # (besthub.dev/articles/how-efficient-is-deepseek-v3-calculating-its-mfu-around-37-05584f170e39).
    "deepseek-v3": {
        "model": {
            "vocab_size": 129280, "hidden_size": 7168, "num_hidden_layers": 61, "num_dense_layers": 3,
            "intermediate_size": 18432, "moe_intermediate_size": 2048, "num_attention_heads": 128,
            "num_key_value_heads": 128, "head_dim": 160, "num_experts": 256, "num_experts_per_tok": 8,
            "sliding_window": 4096, "global_attn_every_n_layers": 1, "max_position_embeddings": 131072,
        },
        "parts": {"attention_per_layer": 187_105_280, "norms_per_layer": 2 * 7168 + 1536 + 512},
        "tokens": 14.8e12, "matrices": "adamw", "batch": {"context_tokens": 4096, "sequences": 15360},
        "parallel": {"shard": 128, "expert": 64, "pipeline": 16},
        # At most 4 machines for 8 experts (node-limited routing). The 37 % are of the whole run: communication,
        # bubble (DualPipe) and stops are inside.
        "machine": {
            "device": "h800", "mfu": 0.37, "overlap": 1.0, "bubble": 0.0, "dispatch": 0.5,
            "interruptions_per_device_hour": 0.0,
        },
    },
    "mixtral-8x7b": {
        "model": {
            "vocab_size": 32000, "hidden_size": 4096, "num_hidden_layers": 32, "num_dense_layers": 0,
            "intermediate_size": 14336, "moe_intermediate_size": 14336, "num_attention_heads": 32,
            "num_key_value_heads": 8, "head_dim": 128, "num_experts": 8, "num_experts_per_tok": 2,
            "sliding_window": 32768, "global_attn_every_n_layers": 1, "max_position_embeddings": 32768,
        },
        "parts": {
            "attention_per_layer": 2 * 4096 * 4096 + 2 * 4096 * 1024, "norms_per_layer": 2 * 4096, "shared_experts": 0,
        },
        "matrices": "adamw", "batch": {"context_tokens": 8192, "sequences": 128},
        "parallel": {"shard": 32, "expert": 8, "pipeline": 4, "recompute": "full"}, "machine": {"device": "h100"},
    },
    "glm-4.5": {
        "model": {
            "vocab_size": 151552, "hidden_size": 5120, "num_hidden_layers": 92, "num_dense_layers": 3,
            "intermediate_size": 12288, "moe_intermediate_size": 1536, "num_attention_heads": 96,
            "num_key_value_heads": 8, "head_dim": 128, "num_experts": 160, "num_experts_per_tok": 8,
            "sliding_window": 4096, "global_attn_every_n_layers": 1, "max_position_embeddings": 131072,
        },
        # Biases on q, k, v; norms of q and k.
        "parts": {
            "attention_per_layer": 2 * 5120 * 12288 + 2 * 5120 * 1024 + 12288 + 2 * 1024,
            "norms_per_layer": 2 * 5120 + 2 * 128,
        },
        "tokens": 23e12, "batch": {"context_tokens": 4096, "sequences": 16384, "micro_sequences": 2},
        "parallel": {**_HSDP, "replicate": 16, "expert": 8}, "machine": {"device": "h800"},
    },
    "gpt-oss-120b": {
        "model": {
            "vocab_size": 201088, "hidden_size": 2880, "num_hidden_layers": 36, "num_dense_layers": 0,
            "intermediate_size": 2880, "moe_intermediate_size": 2880, "num_attention_heads": 64,
            "num_key_value_heads": 8, "head_dim": 64, "num_experts": 128, "num_experts_per_tok": 4,
            "sliding_window": 128, "global_attn_every_n_layers": 2, "max_position_embeddings": 131072,
        },
        # Every linear map has a bias; one sink a head.
        "parts": {
            "attention_per_layer": 2 * 2880 * 4096 + 2 * 2880 * 512 + 4096 + 2 * 512 + 2880 + 64,
            "norms_per_layer": 2 * 2880, "shared_experts": 0,
            "expert": 3 * 2880 * 2880 + 3 * 2880, "router": 128 * 2880 + 128,
        },
        "matrices": "adamw", "batch": {"context_tokens": 4096, "sequences": 1024, "micro_sequences": 8},
        "parallel": {"shard": 128, "expert": 8, "recompute": "full"}, "machine": {"device": "h100"},
    },
    # MFU: what OLMo-core's own page gives for its 13B on H100 (pypi.org/project/ai2-olmo-core/1.2.0: 41-42 %).
    "olmo-3-7b": {
        "model": {
            "vocab_size": 100278, "hidden_size": 4096, "num_hidden_layers": 32, "num_dense_layers": 32,
            "intermediate_size": 11008, "moe_intermediate_size": 1, "num_attention_heads": 32,
            "num_key_value_heads": 32, "head_dim": 128, "num_experts": 1, "num_experts_per_tok": 1,
            "sliding_window": 4096, "max_position_embeddings": 65536,
        },
        "parts": {"attention_per_layer": 4 * 4096 * 4096, "norms_per_layer": 4 * 4096},
        "matrices": "adamw", "batch": {"context_tokens": 8192}, "parallel": {"replicate": 8, "shard": 64},
        "machine": {"device": "h100", "mfu": 0.41, "overlap": 0.95},
    },
    "olmo-3-32b": {
        "model": {
            "vocab_size": 100278, "hidden_size": 5120, "num_hidden_layers": 64, "num_dense_layers": 64,
            "intermediate_size": 27648, "moe_intermediate_size": 1, "num_attention_heads": 40,
            "num_key_value_heads": 8, "head_dim": 128, "num_experts": 1, "num_experts_per_tok": 1,
            "sliding_window": 4096, "max_position_embeddings": 65536,
        },
        "parts": {"attention_per_layer": 2 * 5120 * 5120 + 2 * 5120 * 1024, "norms_per_layer": 2 * 5120 + 5120 + 1024},
        "matrices": "adamw", "batch": {"context_tokens": 8192}, "parallel": {"replicate": 16, "shard": 64},
        "machine": {"device": "h100", "mfu": 0.41, "overlap": 0.95},
    },
}  # fmt: skip

_GGUF = "huggingface.co/mradermacher/Trinity-Large-Thinking-GGUF"
PUBLISHED: dict[str, list[Published]] = {
    "nano": [Published("parameters/total", 6.120e9, 0.001, CONFIG_JSON)],
    "mini": [Published("parameters/total", 26.124e9, 0.001, CONFIG_JSON)],
    "large": [
        Published("parameters/total", 398.635e9, 0.001, CONFIG_JSON),
        Published("run/days", 33, 0.05, TRINITY),
        Published("run/cost", 20e6, 0.1, "arcee.ai/blog/trinity-large: all-in, four models, people included"),
        *(
            Published(f"files/{kind}", size * 1e9, 0.005, _GGUF)
            for kind, size in (
                ("Q2_K", 144.9), ("Q3_K_S", 171.8), ("Q3_K_M", 189.4), ("Q3_K_L", 206.0), ("IQ4_XS", 212.7),
                ("Q4_K_S", 225.0), ("Q4_K_M", 239.7), ("Q5_K_S", 274.4), ("Q5_K_M", 282.2),
            )
        ),
        # Quoted for Q4_K_M and Q3_K_M; the files that hold every weight are 4 and 8 % larger.
        Published("files/Q4_K_M", 230e9, 0.05, "quoted size of the Q4_K_M GGUF"),
        Published("files/Q3_K_M", 175e9, 0.09, "quoted size of the Q3_K_M GGUF"),
        Published("serve/BF16", 955e9, 0.2, "vLLM recipe: device memory asked for, with headroom"),
        Published("serve/NVFP4", 239e9, 0.15, "vLLM recipe, with an fp8 cache"),
    ],
    "trillion": [Published("run/cost", 60e6, 1.0, "press figure; tokens and shape were not published with it")],
    "deepseek-v3": [
        Published("parameters/total", 671e9, 0.005, DEEPSEEK),
        Published("parameters/active", 37e9, 0.02, DEEPSEEK),
        Published("run/device_hours", 2.788e6, 0.05, DEEPSEEK),
        Published("run/rent", 5.576e6, 0.05, DEEPSEEK),
    ],
    "mixtral-8x7b": [
        Published("parameters/total", 46.7e9, 0.005, MIXTRAL),
        Published("parameters/active", 12.9e9, 0.015, MIXTRAL),
    ],
    "glm-4.5": [  # their counts take in the MTP layer (not planned here) and skip embedding and head
        Published("parameters/total", 355e9, 0.01, GLM),
        Published("parameters/active", 32e9, 0.04, GLM),
    ],
    "gpt-oss-120b": [
        Published("parameters/total", 116.83e9, 0.001, GPT_OSS),
        Published("parameters/active", 5.13e9, 0.005, GPT_OSS),
    ],
    "olmo-3-7b": [Published("step/tokens_per_device", 7700, 0.2, OLMO)],
    "olmo-3-32b": [Published("step/tokens_per_device", 1900, 0.2, OLMO)],
}  # fmt: skip
