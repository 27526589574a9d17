"""Bytes: of one rank in training, of serving, and of GGUF files.

Symbols: d model width, H query width, K key width, k experts per token, i expert width, f dense width.
"""

from __future__ import annotations

import math

from freehold.model.config import ModelConfig, kv_bytes_per_token, parameter_counts
from freehold.planner.config import PlanConfig

GIB = 2**30


def kept_bytes(config: PlanConfig) -> tuple[float, float]:
    """Return the bytes a token leaves behind for the backward pass in one dense and in one MoE layer.

    Counted tensor by tensor. `fused`: what our ops keep on a GPU, `native`: with the CPU kernels (tests compare
    both with what autograd holds). `plain`: every
    operation keeps its inputs, norms also a float32 copy, as in the tracked model of the fake 2048-rank world.
    """
    m, b = config.model, config.bytes_per_value
    d, h, k = m.hidden_size, m.query_width, m.key_width
    top, inner, shared = m.num_experts_per_tok, m.moe_intermediate_size, m.moe_intermediate_size * m.num_shared_experts
    if "shared_experts" in config.parts and not config.parts["shared_experts"]:
        shared = 0
    busy = config.machine.imbalance if config.parallel.expert > 1 else 1.0
    router = 4 * d + 4 * m.num_experts + 32 * top  # float32 scores of a float32 copy of the input, and the choice
    if config.machine.kernels != "plain":
        # h, x, q, k before and after the norm, v, attention's result, gate, their product, o; then h, x, f.
        stream = (6 * d + 5 * h + 3 * k) * b + 4 * (4 + m.num_attention_heads + m.num_key_value_heads)
        routed = top * (2 * d + 2 * inner)  # rows in, gate and up, rows out
    else:
        stream = (14 * d + 7 * h + 5 * k) * b
        routed = top * (2 * d + 4 * inner)
    inside = 2 if config.machine.kernels == "native" else 4  # gate and up; else also silu(gate) and the product
    dense = stream + inside * m.intermediate_size * b
    moe = stream + (routed * busy + inside * shared) * b + router
    return dense, moe


def uneven_experts(config: PlanConfig) -> float:
    """Return the parameters of experts that the fullest rank holds beyond an even share: they are sharded whole."""
    m, p = config.model, config.parallel
    layers = min(math.ceil(m.num_hidden_layers / p.pipeline), m.num_hidden_layers - m.num_dense_layers)
    each = m.num_experts / p.group
    return layers * (math.ceil(each) - each) * parameter_counts(m, config.parts)["expert"]


def training_bytes(config: PlanConfig, *, states: bool = True) -> dict[str, float]:
    """Return the peak bytes of the fullest rank by part; the values add up to `peak`.

    The peak is the worst of four moments: at the loss, in the first and in the last block of the backward pass, and
    at the optimizer's step. With `states=False` gradients and optimizer are not counted: what a forward and backward
    alone needs the first time.
    Not counted: communication library buffers, allocator fragmentation, the device's own context.
    """
    m, p, b = config.model, config.parallel, config.bytes_per_value
    counts = parameter_counts(m, config.parts)
    layers = math.ceil(m.num_hidden_layers / p.pipeline)
    moe_layers = min(layers, m.num_hidden_layers - m.num_dense_layers)
    dense_layers = layers - moe_layers
    expert_layer = counts["expert"] * m.num_experts
    other = counts["attention_per_layer"] + counts["norms_per_layer"]
    small_layer = other + counts["shared_experts"] + counts["router"]
    ends = counts["embedding"] * (2 if p.pipeline == 1 else 1)
    stage = moe_layers * (expert_layer + small_layer) + dense_layers * (other + counts["dense_ffn"]) + ends
    held = counts["total"] / p.group if p.pipeline == 1 else stage / p.group
    muon = held * counts["muon"] / counts["total"] if config.matrices == "muon" else 0.0
    uneven = uneven_experts(config)
    held += uneven
    muon += uneven * (config.matrices == "muon")

    tokens, chunk = config.micro_tokens, config.loss_chunk_tokens or config.micro_tokens
    dense, moe = kept_bytes(config)
    block = max(moe if moe_layers else 0.0, dense if dense_layers else 0.0) * tokens
    boundary = m.hidden_size * b * tokens
    in_flight = min(p.pipeline, config.micro_batches)  # micro-batches whose activations the first stage holds (1F1B)
    whole = (moe_layers * moe + dense_layers * dense) * tokens
    kept = (layers * boundary if p.recompute == "full" else whole) * in_flight + 4 * boundary
    if config.machine.kernels == "plain":
        # Two copies in the compute dtype and two in float32: logits, their gradient, and the softmax between.
        logits = min(chunk, tokens) * m.vocab_size * (2 * b + 2 * 4)
    else:  # a chunk becomes its own gradient in place while the one before is still there; the head's gradient
        logits = min(2 * chunk, tokens) * m.vocab_size * b + counts["head"] * (4 + b)
    busy = config.machine.imbalance if p.expert > 1 else 1.0
    exchange = 0.0
    if p.expert > 1 and moe_layers:
        exchange = 2 * tokens * m.num_experts_per_tok * m.hidden_size * b * busy
    # Gradients of activations that exist together in the backward pass of a block: rows, gate, up and product.
    rows = m.num_experts_per_tok * (2 * m.hidden_size + 3 * m.moe_intermediate_size) * busy if moe_layers else 0.0
    passing = max(rows, 3 * m.intermediate_size if dense_layers else 0) * b * tokens
    widest = max(
        expert_layer / p.expert + small_layer if moe_layers else 0, other + counts["dense_ffn"] if dense_layers else 0
    )
    # With no group to gather from, all weights are here in the compute dtype, next to their float32 masters.
    at_loss = float(ends * b if p.group > 1 else held * b)
    in_block = ends * b + 2 * widest * b if p.group > 1 else at_loss
    passes = min(config.micro_batches, 3)
    if p.group > 1:  # float32 sums of all passes
        summed, before = 4 * held, 4 * held * (passes > 1)
        fresh = summed + widest * b
    else:  # those of a single pass stay as they were computed, and the second pass finds those of the first so
        summed, before = held * (b if passes == 1 else 4), held * (0, b, 4)[passes - 1]
        fresh = before + held * b
    summed, before, fresh = (part * states for part in (summed, before, fresh))
    always = {"masters": 4 * held, "optimizer": (4 * muon + 8 * (held - muon)) * states}
    # Muon turns 2**24 updates or a whole stack of experts at a time, in bfloat16: the kernels in place.
    turning = (2 if config.machine.kernels == "native" else 8) * min(muon, 2**24 + 2 * expert_layer / 3 / p.expert)
    turning *= states
    again = block if p.recompute == "full" else 0.0
    moments = [
        {"weights": at_loss, "gradients": before, "activations": kept, "logits": logits},
        {"weights": in_block, "gradients": before, "activations": kept + again + passing, "all_to_all": exchange},
        {
            "weights": in_block,
            "gradients": fresh,
            "activations": 4 * boundary + block + passing,
            "all_to_all": exchange,
        },
        {"weights": at_loss, "gradients": summed, "optimizer": always["optimizer"] + turning},
    ]
    worst = max(({**always, **moment} for moment in moments), key=lambda parts: sum(parts.values()))
    order = ("weights", "masters", "gradients", "optimizer", "activations", "logits", "all_to_all")
    return {name: worst.get(name, 0.0) for name in order} | {"peak": sum(worst.values())}


NF4_BITS = 4 + 8 / 64 + 32 / (64 * 256)
"""Bits a weight in NF4 with doubly quantized scales: blocks of 64, scales of 8 bits, 256 of them share a float32."""


def cache_bytes(model: ModelConfig, context_tokens: int, bytes_per_value: int = 2) -> float:
    """Return the key-value cache of one sequence: full layers grow, sliding ones stop at their window."""
    sliding = model.num_hidden_layers - model.num_full_layers
    window = 2 * model.key_width * bytes_per_value * sliding * min(model.sliding_window, context_tokens)
    return kv_bytes_per_token(model, bytes_per_value) * context_tokens + window


def serving_bytes(config: PlanConfig, weights: str = "BF16", context_tokens: int = 0, sequences: int = 1) -> float:
    """Return the bytes that weights of a format (`NVFP4`, `FP8`, or a GGUF type) and their caches take."""
    return weight_bytes(config.model, weights, config.parts) + sequences * cache_bytes(
        config.model, context_tokens or 8192
    )


def weight_bytes(model: ModelConfig, weights: str, parts: dict[str, int] | None = None) -> float:
    """Return the bytes of the weights in a format: `NVFP4`, `FP8`, or a GGUF type."""
    m, counts = model, parameter_counts(model, parts)
    if weights in ("NVFP4", "FP8"):
        # As published for Trinity: routed experts and dense feed-forwards packed, the rest in bf16.
        packed = (m.num_hidden_layers - m.num_dense_layers) * counts["expert"] * m.num_experts
        packed += m.num_dense_layers * counts["dense_ffn"]
        bits = 4.5 if weights == "NVFP4" else 8.0
        return packed * bits / 8 + (counts["total"] - packed) * 2
    return gguf_bytes(m, weights)


# Bits a value of llama.cpp's block formats (ggml-common.h: block bytes over block values).
BITS = {"F32": 32, "BF16": 16, "Q8_0": 8.5, "Q6_K": 6.5625, "Q5_K": 5.5, "Q4_K": 4.5, "Q4_0": 4.5,
        "Q3_K": 3.4375, "Q2_K": 2.625, "IQ4_XS": 4.25}  # fmt: skip
BASE = {"Q2_K": "Q2_K", "Q3_K_S": "Q3_K", "Q3_K_M": "Q3_K", "Q3_K_L": "Q3_K", "Q4_K_S": "Q4_K", "Q4_K_M": "Q4_K",
        "Q5_K_S": "Q5_K", "Q5_K_M": "Q5_K", "Q6_K": "Q6_K"}  # fmt: skip


def gguf_bytes(model: ModelConfig, kind: str) -> float:
    """Return the bytes of a GGUF file of type `kind`; metadata (a few megabytes) is not counted.

    Which tensor gets which block format follows llama.cpp's `llama_tensor_get_type` for more than 8 experts.
    """
    m, counts = model, parameter_counts(model)
    base, plain = BASE.get(kind, kind), kind in ("F32", "BF16", "Q8_0", "Q4_0", "Q6_K")
    layers, d = m.num_hidden_layers, m.hidden_size
    key = d * m.key_width

    def more(layer: int) -> bool:
        eighth = layers // 8
        return layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2

    def down(layer: int) -> str:
        if kind in ("Q4_K_M", "Q5_K_M") and more(layer):
            return "Q6_K"
        if kind in ("Q4_K_S", "IQ4_XS") and layer < layers // 8:
            return "Q5_K"
        if kind == "Q3_K_M":
            return "Q5_K" if layer < layers // 16 else "Q4_K"
        return {"Q2_K": "Q3_K", "Q3_K_L": "Q5_K"}.get(kind, base)

    def value(layer: int) -> str:
        if kind in ("Q4_K_M", "Q5_K_M") and more(layer):
            return "Q6_K"
        if kind in ("Q4_K_S", "IQ4_XS") and layer < 4 or kind == "Q3_K_M" and layer < 2:
            return "Q5_K"
        grouped = m.num_attention_heads // m.num_key_value_heads >= 4
        return {"Q2_K": "Q4_K" if grouped else "Q3_K", "Q3_K_M": "Q4_K", "Q3_K_L": "Q5_K"}.get(kind, base)

    output = {"Q2_K": "Q3_K", "Q3_K_M": "Q4_K", "Q3_K_L": "Q5_K"}.get(kind, base)
    bits = counts["embedding"] * BITS[base] + counts["head"] * (BITS[base] if plain else BITS["Q6_K"])
    for layer in range(layers):
        feed = counts["dense_ffn"] if layer < m.num_dense_layers else counts["moe_layer"] - counts["router"]
        bits += feed * (2 * BITS[base] + BITS[down(layer)]) / 3
        bits += d * m.query_width * (2 * BITS[base] + BITS[output]) + key * (BITS[base] + BITS[value(layer)])
        bits += 32 * (counts["norms_per_layer"] + (counts["router"] if layer >= m.num_dense_layers else 0))
    return (bits + 32 * d) / 8
