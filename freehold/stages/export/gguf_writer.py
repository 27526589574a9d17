"""What is in a GGUF file that llama.cpp's AFMoE loader reads: names, shapes, metadata; and the check of a written one.

The source is a Hugging Face folder, so every format holds the same weights. Tensor names come from `gguf`'s own AFMOE
table, their types from mix.py; stream.py writes the data.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import MODEL_TENSOR as T
from gguf import GGMLQuantizationType, LlamaFileType
from gguf.gguf_writer import WriterState
from gguf.quants import dequantize, quant_shape_to_byte_shape

from freehold.core.errors import ExportError
from freehold.model.config import ModelConfig
from freehold.stages.export.check import PRE_TOKENIZER
from freehold.stages.export.mix import MIXES, Choice, choose_types
from freehold.stages.export.shards import Shards

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

    @property
    def stacked(self) -> bool:
        """Whether the sources are stacked along a new first axis."""
        return "_exps." in self.name


def plan_tensors(config: ModelConfig) -> list[Planned]:
    """Return every tensor llama.cpp's loader asks for."""
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
    return Planned(name, sources)


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


def header(
    hf_folder: Path,
    config: ModelConfig,
    choices: Mapping[str, Choice],
    *,
    name: str,
    file_type: str,
    extra: Mapping[str, str | int] | None = None,
) -> bytes:
    """Return everything of a GGUF file before its data: metadata, tokenizer, and the tensors in the order of `choices`.

    `extra` are further keys: text, or unsigned 32-bit numbers.
    """
    writer = gguf.GGUFWriter(None, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.AFMOE])
    _add_model(writer, config, name, file_type)
    _add_tokenizer(writer, hf_folder, config)
    for key, value in (extra or {}).items():
        writer.add_string(key, value) if isinstance(value, str) else writer.add_uint32(key, value)
    shapes = tensor_shapes(config)
    for tensor, choice in choices.items():
        kind = GGMLQuantizationType[choice.type]
        stored = shapes[tensor] if kind == GGMLQuantizationType.F32 else quant_shape_to_byte_shape(shapes[tensor], kind)
        item = np.dtype(np.float32 if kind == GGMLQuantizationType.F32 else np.uint8)
        writer.add_tensor_info(tensor, stored, item, math.prod(stored) * item.itemsize, raw_dtype=kind)
    # The writer only knows files; given an open one it writes there.
    file = io.BytesIO()
    writer.fout, writer.state = [file], WriterState.EMPTY  # type: ignore[list-item]
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.write_padding(file, len(file.getbuffer()))
    return file.getvalue()


def _add_model(writer: gguf.GGUFWriter, config: ModelConfig, name: str, file_type: str) -> None:
    """Everything llama.cpp's AFMoE loader reads about the model; what it hard-codes was checked before."""
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(name)
    writer.add_file_type(LlamaFileType(MIXES[file_type][1]))
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
    special = {key: _token_text(settings.get(key)) for key in ("bos_token", "eos_token", "pad_token")}
    for key in special:
        if special[key] not in ids:
            raise ExportError(
                "the tokenizer does not name a special token", where=hf_folder / "tokenizer_config.json",
                found=f"{key}: {special[key]}", expected="a token of tokenizer.json", todo="name it there",
            )  # fmt: skip
    writer.add_bos_token_id(ids[special["bos_token"]])
    writer.add_eos_token_id(ids[special["eos_token"]])
    writer.add_eot_token_id(ids[special["eos_token"]])
    writer.add_pad_token_id(ids[special["pad_token"]])
    # As in the HF form: plain text gets a BOS; llama.cpp takes it off a chat template that writes its own.
    writer.add_add_bos_token(tokenizer.get("post_processor") is not None)
    template = hf_folder / "chat_template.jinja"
    writer.add_chat_template(
        template.read_text(encoding="utf-8") if template.exists() else settings.get("chat_template") or ""
    )


def _token_text(entry: Any) -> str:
    """Return a special token of tokenizer_config.json, which may be text or an object."""
    return str(entry.get("content") if isinstance(entry, dict) else entry)


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


def differing_tensors(
    path: Path, hf_folder: Path, config: ModelConfig, file_type: str, errors: dict[str, float] | None = None
) -> Iterator[str]:
    """Yield, for each tensor of a written file that does not hold its source weights, a line saying so.

    Every tensor is read back with gguf's own decoder. F32 must be equal bit by bit, BF16 within half of its last place,
    Q8_0 within half a step of each block, other types within the usual error of the type over a whole matrix. `errors`
    gets the relative root mean square error of each tensor.
    """
    shards = Shards(hf_folder)
    reader = gguf.GGUFReader(path)
    stored = {tensor.name: tensor for tensor in reader.tensors}
    planned = plan_tensors(config)
    choices = choose_types(
        tensor_shapes(config), file_type, layers=config.num_hidden_layers, experts=config.num_experts,
        importance=reader.get_field("quantize.imatrix.file") is not None,
    )  # fmt: skip
    yield from (f"{tensor.name} is missing" for tensor in planned if tensor.name not in stored)
    yield from (f"{name} does not belong there" for name in sorted(stored.keys() - {t.name for t in planned}))
    for tensor in planned:
        if tensor.name not in stored:
            continue
        kind, found_kind = GGMLQuantizationType[choices[tensor.name].type], stored[tensor.name].tensor_type
        if found_kind != kind:
            yield f"{tensor.name} is stored as {found_kind.name}, not {kind.name}"
            continue
        parts = stored[tensor.name].data if tensor.stacked else [stored[tensor.name].data]
        sums = np.zeros(2)
        for source, part in zip(tensor.sources, parts, strict=True):
            wanted, found = shards.read(source), dequantize(np.asarray(part), kind)
            if not _same(wanted, found, kind):
                yield f"{tensor.name} differs from {source}"
            if wanted.shape == found.shape:
                squares = (np.square(found - wanted, dtype=np.float64), np.square(wanted, dtype=np.float64))
                sums += [part.sum() for part in squares]
        if errors is not None:
            errors[tensor.name] = float(np.sqrt(sums[0] / sums[1])) if sums[1] else 0.0
    shards.close()


LARGEST_ERROR = {
    "Q6_K": 0.05,
    "Q5_K": 0.09,
    "Q5_1": 0.09,
    "Q5_0": 0.1,
    "Q4_K": 0.16,
    "Q4_1": 0.16,
    "Q4_0": 0.2,
    "Q3_K": 0.3,
}
"""Root mean square error over that of the weights, about twice what bell-shaped weights have; others: above 1."""


def _same(wanted: np.ndarray, found: np.ndarray, kind: GGMLQuantizationType) -> bool:
    if wanted.shape != found.shape:
        return False
    if kind.name in LARGEST_ERROR:
        off = np.square(found - wanted, dtype=np.float64).mean()
        return bool(off <= LARGEST_ERROR[kind.name] ** 2 * np.square(wanted, dtype=np.float64).mean())
    return not (np.abs(found - wanted) > _room(wanted, kind)).any()


def _room(values: np.ndarray, kind: GGMLQuantizationType) -> np.ndarray:
    """Return how far from `values` a stored type may be, element by element."""
    if kind == GGMLQuantizationType.Q8_0:
        largest = np.abs(values).reshape(-1, 32).max(axis=1, keepdims=True)
        # Half a step, and what keeping the step as fp16 adds at full range (2**-25: fp16 subnormals).
        return np.broadcast_to(largest * (0.5 / 127 + 2**-11) + 127 * 2**-25, (largest.size, 32)).reshape(values.shape)
    rounding = {GGMLQuantizationType.BF16: 2**-8, GGMLQuantizationType.F16: 2**-10}.get(kind, 0.0)
    return np.abs(values) * rounding + (2**-24 if kind == GGMLQuantizationType.F16 else 0)
