"""Quantizes rows of weights into GGUF blocks, bit for bit as ggml does on x86-64 without contraction. Needs no torch.

C++ built on first use (`quantize.cpp`), or numpy with the same bits where there is no compiler.
"""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from freehold.kernels import build, quantize_numpy

SOURCE = Path(__file__).with_name("quantize.cpp")
# A contracted multiply-add rounds once instead of twice: other bits than ggml's (llama.cpp#25353).
FLAGS = ("-O3", "-march=native", "-std=c++17", "-ffp-contract=off", "-fno-math-errno", "-Wno-psabi", "-shared", "-fPIC")


@dataclass(frozen=True)
class BlockType:
    """How a GGUF type stores a block of values: ggml's number, sizes, and where its fp16 scales are."""

    number: int
    values: int
    bytes: int
    scales: tuple[int, ...]


TYPES = {
    "Q4_0": BlockType(2, 32, 18, (0,)),
    "Q4_1": BlockType(3, 32, 20, (0, 2)),
    "Q5_0": BlockType(6, 32, 22, (0,)),
    "Q5_1": BlockType(7, 32, 24, (0, 2)),
    "Q8_0": BlockType(8, 32, 34, (0,)),
    "Q3_K": BlockType(11, 256, 110, (108,)),
    "Q4_K": BlockType(12, 256, 144, (0, 2)),
    "Q5_K": BlockType(13, 256, 176, (0, 2)),
    "Q6_K": BlockType(14, 256, 210, (208,)),
}


class NotFiniteError(ValueError):
    """A row holds a NaN or an infinity, before or after it was quantized."""

    def __init__(self, row: int, when: str) -> None:
        self.row, self.when = row, when
        super().__init__(f"row {row} is not finite {when}")


@functools.cache
def _library() -> ctypes.CDLL | str:
    """Return the loaded quantizers, or why there are none."""
    try:
        return build.load(SOURCE, FLAGS, "quantize")
    except (build.UnavailableError, OSError) as problem:
        return str(problem)


def describe() -> str:
    """Return what quantizes on this machine, with the reason where it is numpy."""
    library = _library()
    return f"numpy ({library})" if isinstance(library, str) else f"C++ ({Path(library._name).stem})"


def row_bytes(kind: str, width: int) -> int:
    """Return the size of a quantized row of `width` values."""
    return width // TYPES[kind].values * TYPES[kind].bytes


def quantize(kind: str, rows: np.ndarray, importance: np.ndarray | None = None) -> np.ndarray:
    """Return rows [n, width], float32 or bfloat16 bits in uint16, as blocks of a type: uint8 [n, row bytes].

    `importance` is float32 [width], the mean square of each input. Callers in several threads run in parallel.
    Raises NotFiniteError with the first row that holds, or whose scales become, a NaN or an infinity.
    """
    layout = TYPES[kind]
    if rows.shape[1] % layout.values:
        raise ValueError(f"{kind} needs rows of whole {layout.values}s, not of {rows.shape[1]}")
    rows = np.ascontiguousarray(rows)
    if importance is not None:
        importance = np.ascontiguousarray(importance, dtype=np.float32)
        if importance.shape != rows.shape[1:]:
            raise ValueError(f"the importance holds {importance.shape} values, the rows {rows.shape[1:]}")
    result = _in_cpp(layout, rows, importance)
    if result is None:
        result = _in_numpy(kind, rows, importance)
    invalid = first_invalid_row(kind, result)
    if invalid is not None:
        raise NotFiniteError(invalid, f"as {kind}: its scale does not fit fp16")
    return result


def _in_cpp(layout: BlockType, rows: np.ndarray, importance: np.ndarray | None) -> np.ndarray | None:
    library = _library()
    if isinstance(library, str):
        return None
    count, width = rows.shape
    result = np.empty((count, width // layout.values * layout.bytes), np.uint8)
    bad = ctypes.c_int64(-1)
    weights = None if importance is None else importance.ctypes.data
    narrow = int(rows.dtype == np.uint16)
    library.freehold_quantize(
        layout.number, narrow, rows.ctypes.data, count, width, weights, result.ctypes.data, ctypes.addressof(bad)
    )
    if bad.value >= 0:
        raise NotFiniteError(bad.value, "in the weights")
    return result


def _in_numpy(kind: str, rows: np.ndarray, importance: np.ndarray | None) -> np.ndarray:
    values = widen(rows)
    finite = np.isfinite(values).all(axis=1)
    if not finite.all():
        raise NotFiniteError(int(finite.argmin()), "in the weights")
    return quantize_numpy.quantize(kind, values, importance)


def widen(rows: np.ndarray) -> np.ndarray:
    """Return bfloat16 bits (uint16) as float32; other arrays as float32."""
    if rows.dtype == np.uint16:
        return (rows.astype(np.uint32) << 16).view(np.float32)
    return rows.astype(np.float32, copy=False)


def first_invalid_row(kind: str, blocks: np.ndarray) -> int | None:
    """Return the first row of uint8 [n, row bytes] with a scale that is not finite, as ggml's validation finds it."""
    layout = TYPES[kind]
    split = blocks.reshape(len(blocks), -1, layout.bytes)
    scales = np.stack([split[..., at : at + 2] for at in layout.scales], axis=-2)
    bits = np.ascontiguousarray(scales).view("<u2")
    invalid = ((bits & 0x7C00) == 0x7C00).any(axis=(1, 2, 3))
    return int(invalid.argmax()) if invalid.any() else None
