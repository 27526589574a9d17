"""An adapter as a GGUF file that llama.cpp loads next to its base (`--lora`)."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
from torch import Tensor

from freehold.checkpoint.adapter import Adapter, uniform
from freehold.model.config import ModelConfig

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.gate_proj": "attn_gate",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.shared_experts.gate_proj": "ffn_gate_shexp",
    "mlp.shared_experts.up_proj": "ffn_up_shexp",
    "mlp.shared_experts.down_proj": "ffn_down_shexp",
    "mlp.router.gate": "ffn_gate_inp",
}
"""Our matrix of a layer -> llama.cpp's."""
ARCHITECTURE = "afmoe"


def tensors_of(adapter: Adapter, config: ModelConfig) -> dict[str, tuple[Tensor, Tensor]]:
    """Return A and B of every matrix by llama.cpp's name; stacks of experts are one tensor each."""
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for name, pair in adapter.pairs.items():
        layer, _, path = name.removeprefix("model.layers.").partition(".")
        prefix = f"blk.{layer}."
        if path == "mlp.experts.gate_up_proj":
            inner = config.moe_intermediate_size
            found[f"{prefix}ffn_gate_exps"] = (pair.a, pair.b[:, :inner])
            found[f"{prefix}ffn_up_exps"] = (pair.a, pair.b[:, inner:])
        elif path == "mlp.experts.down_proj":
            found[f"{prefix}ffn_down_exps"] = (pair.a, pair.b)
        else:
            found[f"{prefix}{NAMES[path]}"] = (pair.a[0], pair.b[0])
    return found


def write(path: Path, adapter: Adapter, config: ModelConfig, *, alpha: float, name: str) -> int:
    """Write an adapter for llama.cpp; return the tensors written. llama.cpp scales by alpha / rank of each tensor."""
    even = uniform(adapter, alpha)
    writer = gguf.GGUFWriter(path, ARCHITECTURE)
    writer.add_type("adapter")
    writer.add_name(name)
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", alpha)
    # Of ours: llama.cpp does not read it, our own readers refuse another base by it.
    writer.add_string("adapter.freehold.base_sha256", str(adapter.facts.get("base_sha256", "")))
    tensors = tensors_of(even, config)
    for tensor, (a, b) in sorted(tensors.items()):
        for side, values in (("lora_a", a), ("lora_b", b)):
            writer.add_tensor(f"{tensor}.weight.{side}", np.ascontiguousarray(values.float().numpy()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return 2 * len(tensors)


def base_of(path: Path) -> str:
    """Return the fingerprint of the base that a GGUF adapter says it was made for; empty when it says none."""
    field = gguf.GGUFReader(path).get_field("adapter.freehold.base_sha256")
    return "" if field is None else str(field.contents())
