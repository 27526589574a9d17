"""Writes GGUF files that llama.cpp's AFMoE loader reads: names, types, metadata and weights, a matrix at a time.

The source is an exported Hugging Face folder, so every format holds the same weights. Tensor names and their
order come from `gguf`'s own AFMOE table; which ones stay in fp32 follows llama.cpp's converter and quantizer.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import MODEL_TENSOR as T
from gguf import GGMLQuantizationType, LlamaFileType
from gguf.quants import dequantize, quant_shape_to_byte_shape, quantize

from freehold.core.errors import ExportError
from freehold.model.config import ModelConfig
from freehold.stages.export.check import PRE_TOKENIZER

FILE_TYPES = {"F32": LlamaFileType.ALL_F32, "BF16": LlamaFileType.MOSTLY_BF16, "Q8_0": LlamaFileType.MOSTLY_Q8_0}

# Our names below a layer -> llama.cpp's tensor. `{e}` stands for each routed expert in turn: one file entry
# per expert here, one stacked tensor there.
ATTENTION = {
    "input_layernorm.weight": T.ATTN_NORM,
    "self_attn.q_proj.weight": T.ATTN_Q,
    "self_attn.k_proj.weight": T.ATTN_K,
    "self_attn.v_proj.weight": T.ATTN_V,
    "self_attn.o_proj.weight": T.ATTN_OUT,
    "self_attn.gate_proj.weight": T.ATTN_GATE,
    "self_attn.q_norm.weight": T.ATTN_Q_NORM,
    "self_attn.k_norm.weight": T.ATTN_K_NORM,
    "post_attention_layernorm.weight": T.ATTN_POST_NORM,
    "pre_mlp_layernorm.weight": T.FFN_NORM,
    "post_mlp_layernorm.weight": T.FFN_POST_NORM,
}
DENSE = {
    "mlp.gate_proj.weight": T.FFN_GATE,
    "mlp.up_proj.weight": T.FFN_UP,
    "mlp.down_proj.weight": T.FFN_DOWN,
}
MOE = {
    "mlp.router.gate.weight": T.FFN_GATE_INP,
    "mlp.expert_bias": T.FFN_EXP_PROBS_B,
    "mlp.experts.{e}.gate_proj.weight": T.FFN_GATE_EXP,
    "mlp.experts.{e}.up_proj.weight": T.FFN_UP_EXP,
    "mlp.experts.{e}.down_proj.weight": T.FFN_DOWN_EXP,
    "mlp.shared_experts.gate_proj.weight": T.FFN_GATE_SHEXP,
    "mlp.shared_experts.up_proj.weight": T.FFN_UP_SHEXP,
    "mlp.shared_experts.down_proj.weight": T.FFN_DOWN_SHEXP,
}


@dataclass(frozen=True)
class Planned:
    """One tensor of a GGUF file and the source tensors it is made of (several only for stacked experts)."""

    name: str
    sources: tuple[str, ...]
    always_f32: bool

    @property
    def stacked(self) -> bool:
        """Whether the sources are laid one after the other along a new first axis."""
        return "_exps." in self.name


def plan_tensors(config: ModelConfig) -> list[Planned]:
    """Return every tensor llama.cpp's loader asks for, in file order."""
    planned = [_planned(T.TOKEN_EMBD, "model.embed_tokens.weight")]
    for layer in range(config.num_hidden_layers):
        table = dict(ATTENTION)
        if layer < config.num_dense_layers:
            table |= DENSE
        else:
            table |= MOE
        for ours, theirs in table.items():
            planned.append(_planned(theirs, f"model.layers.{layer}.{ours}", layer, config.num_experts))
    planned.append(_planned(T.OUTPUT_NORM, "model.norm.weight"))
    planned.append(_planned(T.OUTPUT, "lm_head.weight"))
    return planned


def _planned(tensor: T, source: str, layer: int | None = None, experts: int = 0) -> Planned:
    name = gguf.TENSOR_NAMES[tensor].format(bid=layer) + (".bias" if tensor == T.FFN_EXP_PROBS_B else ".weight")
    sources = tuple(source.replace("{e}", str(e)) for e in range(experts)) if "{e}" in source else (source,)
    # Gains and the selection bias are vectors; llama.cpp computes the router in fp32 and never quantizes it.
    always_f32 = name.endswith(("_norm.weight", ".bias")) or tensor == T.FFN_GATE_INP
    return Planned(name, sources, always_f32)


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor of a GGUF file: rows last but one, the width of a row last, experts first."""
    return {
        t.name: ((len(t.sources),) if t.stacked else ()) + source_shape(config, t.sources[0])
        for t in plan_tensors(config)
    }


def source_shape(config: ModelConfig, name: str) -> tuple[int, ...]:
    """Return the shape of a tensor in Hugging Face form."""
    d, heads, experts = config.hidden_size, config.query_width, config.moe_intermediate_size
    inner = config.intermediate_size
    if ".experts." in name:
        inner = experts
    elif ".shared_experts." in name:
        inner = experts * config.num_shared_experts
    shapes: dict[str, tuple[int, ...]] = {
        "embed_tokens.weight": (config.vocab_size, d), "lm_head.weight": (config.vocab_size, d),
        "self_attn.q_proj.weight": (heads, d), "self_attn.gate_proj.weight": (heads, d),
        "self_attn.k_proj.weight": (config.key_width, d), "self_attn.v_proj.weight": (config.key_width, d),
        "self_attn.o_proj.weight": (d, heads), "q_norm.weight": (config.head_dim,), "k_norm.weight": (config.head_dim,),
        "router.gate.weight": (config.num_experts, d), "expert_bias": (config.num_experts,),
        "gate_proj.weight": (inner, d), "up_proj.weight": (inner, d), "down_proj.weight": (d, inner),
    }  # fmt: skip
    return next((shape for end, shape in shapes.items() if name.endswith(end)), (d,))


class HfWeights:
    """The tensors of a Hugging Face folder by name, read from disk one at a time."""

    def __init__(self, folder: Path) -> None:
        from safetensors import safe_open

        self.folder = folder
        self.files = {}
        for path in sorted(folder.glob("*.safetensors")):
            file = safe_open(path, framework="pt")
            self.files.update(dict.fromkeys(file.keys(), file))

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of one tensor without reading it."""
        return tuple(self.files[name].get_slice(name).get_shape())

    def read(self, name: str) -> np.ndarray:
        """Return one tensor in fp32: exact for the fp32, bf16 and fp16 we write."""
        return self.files[name].get_tensor(name).float().numpy()

    def account(self, planned: list[Planned]) -> None:
        """Raise ExportError naming a tensor that one side has and the other has not."""
        wanted = [source for tensor in planned for source in tensor.sources]
        missing, unused = sorted(set(wanted) - set(self.files)), sorted(set(self.files) - set(wanted))
        if missing:
            raise ExportError(
                "the GGUF file needs a tensor the weights do not have",
                where=self.folder,
                found=f"{missing[0]} is missing" + (f", and {len(missing) - 1} more" if missing[1:] else ""),
                todo="the checkpoint and its config disagree: make the checkpoint again",
            )
        if unused:
            raise ExportError(
                "the weights have a tensor that no GGUF tensor is made of",
                where=self.folder,
                found=unused[0] + (f", and {len(unused) - 1} more" if unused[1:] else ""),
                expected="every tensor used exactly once",
            )


def tensor_type(tensor: Planned, file_type: str) -> GGMLQuantizationType:
    """Return the type a tensor is stored in, in a file of the given type."""
    return GGMLQuantizationType.F32 if tensor.always_f32 else GGMLQuantizationType[file_type]


def write_gguf(path: Path, hf_folder: Path, config: ModelConfig, *, name: str, file_type: str) -> int:
    """Write one GGUF file from an exported Hugging Face folder and return its tensor count.

    Peak memory is one matrix in fp32 (one expert of a stack). ExportError when tensors do not add up.
    """
    weights, planned = HfWeights(hf_folder), plan_tensors(config)
    weights.account(planned)
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.AFMOE])
    try:
        _add_model(writer, config, name, file_type)
        _add_tokenizer(writer, hf_folder, config)
        for tensor in planned:
            shape = weights.shape(tensor.sources[0])
            if tensor.stacked:
                shape = (len(tensor.sources), *shape)
            kind = tensor_type(tensor, file_type)
            stored = shape if kind == GGMLQuantizationType.F32 else quant_shape_to_byte_shape(shape, kind)
            item = np.dtype(np.float32 if kind == GGMLQuantizationType.F32 else np.uint8)
            writer.add_tensor_info(tensor.name, stored, item, int(np.prod(stored)) * item.itemsize, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        assert writer.fout is not None
        file = writer.fout[0]
        writer.write_padding(file, file.tell())
        for tensor in planned:
            for source in tensor.sources:
                file.write(quantize(weights.read(source), tensor_type(tensor, file_type)).tobytes())
            writer.write_padding(file, file.tell())
    finally:
        writer.close()
    return len(planned)


def _add_model(writer: gguf.GGUFWriter, config: ModelConfig, name: str, file_type: str) -> None:
    """Everything llama.cpp's AFMoE loader reads about the model; what it hard-codes was checked before."""
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(name)
    writer.add_file_type(FILE_TYPES[file_type])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_sliding_window(config.sliding_window)
    writer.add_leading_dense_block_count(config.num_dense_layers)
    writer.add_expert_count(config.num_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_expert_shared_count(config.num_shared_experts)
    writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
    writer.add_expert_weights_norm(True)
    writer.add_expert_weights_scale(config.route_scale)


def _add_tokenizer(writer: gguf.GGUFWriter, hf_folder: Path, config: ModelConfig) -> None:
    tokenizer = json.loads((hf_folder / "tokenizer.json").read_text(encoding="utf-8"))
    settings = json.loads((hf_folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    tokens, types = vocabulary(tokenizer, config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(PRE_TOKENIZER)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in tokenizer["model"]["merges"]])
    ids = {text: index for index, text in enumerate(tokens)}
    writer.add_bos_token_id(ids[settings["bos_token"]])
    writer.add_eos_token_id(ids[settings["eos_token"]])
    writer.add_eot_token_id(ids[settings["eos_token"]])
    writer.add_pad_token_id(ids[settings["pad_token"]])
    # As in the HF form: plain text gets a BOS; llama.cpp takes it off a chat template that writes its own.
    writer.add_add_bos_token(tokenizer["post_processor"] is not None)
    writer.add_chat_template(settings["chat_template"])


def vocabulary(tokenizer: dict[str, Any], rows: int) -> tuple[list[str], list[int]]:
    """Return llama.cpp's token list and types, one a row; rows without a token become unused `[PAD<id>]`."""
    added = {entry["id"]: entry for entry in tokenizer["added_tokens"]}
    texts = {index: text for text, index in tokenizer["model"]["vocab"].items()}
    texts |= {index: entry["content"] for index, entry in added.items()}
    tokens, types = [], []
    for index in range(rows):
        if index not in texts:
            kind = gguf.TokenType.UNUSED
        elif index in added:
            kind = gguf.TokenType.CONTROL if added[index]["special"] else gguf.TokenType.USER_DEFINED
        else:
            kind = gguf.TokenType.NORMAL
        tokens.append(texts.get(index, f"[PAD{index}]"))
        types.append(int(kind))
    return tokens, types


def differing_tensors(path: Path, hf_folder: Path, config: ModelConfig, file_type: str) -> Iterator[str]:
    """Yield, for each tensor of a written file that does not hold its source weights, a line saying so.

    Every tensor is read back. F32 must be equal bit by bit, BF16 within half of its last place, Q8_0 within
    half a step (a step is the largest value of a block of 32 over 127).
    """
    weights = HfWeights(hf_folder)
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    planned = plan_tensors(config)
    yield from (f"{tensor.name} is missing" for tensor in planned if tensor.name not in stored)
    yield from (f"{name} does not belong there" for name in sorted(stored.keys() - {t.name for t in planned}))
    for tensor in planned:
        if tensor.name not in stored:
            continue
        kind, found_kind = tensor_type(tensor, file_type), stored[tensor.name].tensor_type
        if found_kind != kind:
            yield f"{tensor.name} is stored as {found_kind.name}, not {kind.name}"
            continue
        parts = stored[tensor.name].data if tensor.stacked else [stored[tensor.name].data]
        for source, part in zip(tensor.sources, parts, strict=True):
            wanted, found = weights.read(source), dequantize(np.asarray(part), kind)
            if wanted.shape != found.shape or (np.abs(found - wanted) > _room(wanted, kind)).any():
                yield f"{tensor.name} differs from {source}"


def _room(values: np.ndarray, kind: GGMLQuantizationType) -> np.ndarray:
    """Return how far from `values` a stored type may lie, element by element."""
    if kind == GGMLQuantizationType.Q8_0:
        largest = np.abs(values).reshape(-1, 32).max(axis=1, keepdims=True)
        # Half a step, and what keeping the step as fp16 adds at full range (2**-25: fp16 subnormals).
        return np.broadcast_to(largest * (0.5 / 127 + 2**-11) + 127 * 2**-25, (largest.size, 32)).reshape(values.shape)
    return np.abs(values) * (2**-8 if kind == GGMLQuantizationType.BF16 else 0.0)
