"""Which type each tensor of a file gets: the mixes of llama.cpp's quantizer, for AFMoE. Needs no torch.

The rules are those of `src/llama-quant.cpp` (llama.cpp of November 2026, MIT licence): tensors are visited by layer
number, then name; some layers get more bits; rows that a type cannot hold get another type.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from freehold.stages.export.types import TENSOR_TYPES

MIXES: dict[str, tuple[str, int]] = {
    "F32": ("F32", 0),
    "BF16": ("BF16", 32),
    "Q8_0": ("Q8_0", 7),
    "Q6_K": ("Q6_K", 18),
    "Q5_K_M": ("Q5_K", 17),
    "Q4_K_M": ("Q4_K", 15),
    "Q4_0": ("Q4_0", 2),
    "Q3_K_M": ("Q3_K", 12),
}
"""File type: the type of most of its tensors, and llama.cpp's number for `general.file_type`."""
FALLBACK = {"Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
"""Types of 256 values: the type of 32 that stands in where a row is no multiple of 256."""
MIXTRAL_EXPERTS = 8
"""llama.cpp gives models with exactly this many experts a mix of their own."""


@dataclass(frozen=True)
class Choice:
    """The type of one tensor, and the one its rows could not be held in ("" when they could)."""

    type: str
    instead_of: str = ""


def visiting_order(name: str) -> tuple[int, str]:
    """Return the sort key of llama.cpp's loader: layer number (-1 outside of layers), then name."""
    return layer_of(name), name


def layer_of(name: str) -> int:
    """Return the layer a tensor of a GGUF file belongs to, -1 for embedding, head and final norm."""
    return int(name.split(".")[1]) if name.startswith("blk.") else -1


def stays_in_float(name: str, shape: tuple[int, ...]) -> bool:
    """Whether llama.cpp never quantizes a tensor: vectors, gains, biases, and the router."""
    is_matrix = sum(1 for size in shape[:-1] if size > 1) > 0
    return not is_matrix or not name.endswith("weight") or name.endswith(("_norm.weight", "ffn_gate_inp.weight"))


def choose_types(
    shapes: Mapping[str, tuple[int, ...]], file_type: str, *, layers: int, experts: int, importance: bool = False
) -> dict[str, Choice]:
    """Return the type of each tensor (GGUF name: shape, rows last but one) in a file of `file_type`, in file order.

    `importance` says whether an importance matrix is used: it changes Q4_0. What stays in float is F32.
    """
    base, values = MIXES[file_type][0], {}
    values_seen = 0
    total = Counter(_category(name) for name in shapes)["attn_v"]
    for name in sorted(shapes, key=visiting_order):
        shape = shapes[name]
        if stays_in_float(name, shape):
            values[name] = Choice("F32")
        elif not TENSOR_TYPES[base].quantized:
            values[name] = Choice(base)
        else:
            category = _category(name)
            if category == "attn_v":
                wanted = _attn_v(file_type, base, values_seen, total, experts)
                values_seen += 1
            else:
                wanted = _other(file_type, base, category, layer_of(name), layers, experts, importance, shape[-1])
            values[name] = _fitting(wanted, shape[-1])
    return values


def _category(name: str) -> str:
    for part in ("attn_v", "attn_k", "attn_output"):
        if name.endswith(f".{part}.weight"):
            return part
    if name == "output.weight":
        return "head"
    return "ffn_down" if "ffn_down" in name else "other"


def _more_bits(layer: int, layers: int) -> bool:
    """Whether a layer is among the first eighth, the last eighth, or every third between them."""
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2


def _attn_v(file_type: str, base: str, seen: int, total: int, experts: int) -> str:
    if experts == MIXTRAL_EXPERTS:
        return "Q8_0"
    if file_type == "Q3_K_M":
        return "Q5_K" if seen < 2 else "Q4_K"
    return "Q6_K" if file_type in ("Q4_K_M", "Q5_K_M") and _more_bits(seen, total) else base


def _other(
    file_type: str, base: str, category: str, layer: int, layers: int, experts: int, importance: bool, width: int
) -> str:
    if category == "head":
        # The head's width is compared with the block of the base type, not with that of Q6_K.
        return "Q8_0" if base == "Q8_0" or not TENSOR_TYPES[base].fits(width) else "Q6_K"
    if category == "attn_k" and experts == MIXTRAL_EXPERTS:
        return "Q8_0"
    if category == "attn_output" and file_type in ("Q3_K_M", "Q4_K_M") and experts == MIXTRAL_EXPERTS:
        return "Q5_K"
    if category == "attn_output" and file_type == "Q3_K_M":
        return "Q4_K"
    if category == "ffn_down":
        return _ffn_down(file_type, base, layer, layers, importance)
    return base


def _ffn_down(file_type: str, base: str, layer: int, layers: int, importance: bool) -> str:
    if file_type == "Q3_K_M":
        return "Q5_K" if layer < layers // 16 else "Q4_K"
    if file_type in ("Q4_K_M", "Q5_K_M") and _more_bits(layer, layers):
        return "Q6_K"
    if file_type == "Q4_0" and importance and layer < layers // 8:
        return "Q4_1"
    return base


def _fitting(wanted: str, width: int) -> Choice:
    """Return the type, or the one llama.cpp takes where rows are not whole blocks; F16 where none fits."""
    if TENSOR_TYPES[wanted].fits(width):
        return Choice(wanted)
    other = FALLBACK.get(wanted, wanted)
    return Choice(other if TENSOR_TYPES[other].fits(width) else "F16", instead_of=wanted)


def file_bytes(shapes: Mapping[str, tuple[int, ...]], choices: Mapping[str, Choice]) -> int:
    """Return the bytes of all tensors of a file, alignment aside."""
    total = 0
    for name, shape in shapes.items():
        rows = 1
        for size in shape[:-1]:
            rows *= size
        total += rows * TENSOR_TYPES[choices[name].type].row_bytes(shape[-1])
    return total
