"""ggml's own quantizers, from the library in the pinned xllamacpp wheel, and the weights they are asked about."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import xllamacpp

from freehold.kernels.quantize import TYPES, row_bytes, widen

WIDTH, ROWS = 512, 21
IMPORTANCE = ("none", "ones", "real", "holes")


@functools.cache
def library() -> ctypes.CDLL:
    (path,) = Path(xllamacpp.__file__).parent.glob("xllamacpp*.so")
    found = ctypes.CDLL(str(path))
    found.ggml_quantize_chunk.restype = ctypes.c_size_t
    integers = [ctypes.c_int64] * 3
    found.ggml_quantize_chunk.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *integers, ctypes.c_void_p]
    return found


def quantize(kind: str, rows: np.ndarray, importance: np.ndarray | None) -> np.ndarray:
    """Quantize float32 rows with `ggml_quantize_chunk`."""
    count, width = rows.shape
    result = np.empty((count, row_bytes(kind, width)), np.uint8)
    weights = None if importance is None else importance.ctypes.data
    library().ggml_quantize_chunk(TYPES[kind].number, rows.ctypes.data, result.ctypes.data, 0, count, width, weights)
    return result


def _random(seed: int, *shape: int) -> np.ndarray:
    """Return uniform numbers in [0, 1) from PCG64's raw output, which numpy promises never to change."""
    raw = np.random.PCG64(seed).random_raw(int(np.prod(shape)))
    return (raw >> np.uint64(11)).astype(np.float64).reshape(shape) * 2.0**-53


def _bell(seed: int, *shape: int) -> np.ndarray:
    return _random(seed, *shape, 12).sum(-1) - 6


def round_to_bf16(values: np.ndarray) -> np.ndarray:
    """Return bfloat16 bits, rounded to nearest even."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def distributions() -> Iterator[tuple[str, np.ndarray]]:
    """Yield float32 weights [ROWS, WIDTH] of every kind that has its own branch or has broken a quantizer."""
    bell, uniform = _bell(1, ROWS, WIDTH), _random(2, ROWS, WIDTH)
    powers = (_random(3, ROWS, WIDTH // 32) * 22).astype(int).repeat(32, 1) - 20
    weights = {
        "gaussian": bell * 0.02,
        "bf16": widen(round_to_bf16(bell * 0.02)),
        "heavy tails": bell * 0.01 / (uniform + 0.001),
        "outliers": bell * np.where(uniform < 0.003, 6.0, 0.02),
        "zeros": np.zeros_like(bell),
        "constant": np.full_like(bell, 0.3),
        "negative constant": np.full_like(bell, -0.3),
        "positive": np.abs(bell) + 0.5,
        "sparse": bell * (uniform < 0.05),
        "few levels": np.floor(uniform * 7 - 3) * 0.125,
        "next to zero": bell * 1e-15,
        "tiny": bell * 1e-20,
        "denormal": bell * 1e-40,
        "mixed sizes": bell * np.ldexp(1.0, powers * 3),
    }
    for name, values in weights.items():
        yield name, np.ascontiguousarray(values, np.float32)


def importance(kind: str, width: int = WIDTH) -> np.ndarray | None:
    """Return an importance of each column: none, ones, one of a real shape, or one with columns of zero."""
    spread = _bell(4, width) ** 2 / (_random(5, width) + 0.01)
    values = {"ones": np.ones(width), "real": spread, "holes": np.where(_random(6, width) < 0.3, 0, spread)}
    return None if kind == "none" else values[kind].astype(np.float32)
