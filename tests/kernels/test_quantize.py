"""The quantizers: ggml's bits from C++ and numpy, on every machine, and refusal of what is not finite."""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import ggml
import numpy as np
import pytest

from freehold.kernels import build, quantize, quantize_numpy
from freehold.kernels.quantize import TYPES, NotFiniteError

GOLDEN = json.loads((Path(__file__).parent / "quantize_golden.json").read_text())
CASES = [(kind, importance) for kind in TYPES for importance in ggml.IMPORTANCE]


def digest(kind: str, importance: str, quantizer) -> str:
    """Return the SHA-256 of every distribution's blocks."""
    hashed = hashlib.sha256()
    for _, rows in ggml.distributions():
        hashed.update(quantizer(kind, rows, ggml.importance(importance)).tobytes())
    return hashed.hexdigest()


@pytest.mark.parametrize(("kind", "importance"), CASES)
def test_bits_equal_ggml(kind: str, importance: str) -> None:
    weights = ggml.importance(importance)
    for name, rows in ggml.distributions():
        wanted = ggml.quantize(kind, rows, weights)
        assert np.array_equal(quantize.quantize(kind, rows, weights), wanted), name
        assert np.array_equal(quantize_numpy.quantize(kind, rows, weights), wanted), f"{name} in numpy"


@pytest.mark.parametrize(("kind", "importance"), CASES)
def test_golden_hashes_hold(kind: str, importance: str) -> None:
    """The hashes are ggml's (see benchmarks/quantize.py), so the proof holds without its library."""
    assert digest(kind, importance, quantize.quantize) == GOLDEN[kind][importance]


def test_no_compiler_option_changes_the_bits(tmp_path: Path) -> None:
    """A build without AVX and with little optimisation gives the same bits as the native one."""
    if quantize.describe().startswith("numpy"):
        pytest.skip(quantize.describe())
    plain = [f for f in quantize.FLAGS if f not in ("-O3", "-march=native")] + ["-O1"]
    library = tmp_path / "plain.so"
    subprocess.run([*build._compiler(), *plain, str(quantize.SOURCE), "-o", str(library)], check=True)
    function = ctypes.CDLL(str(library)).freehold_quantize
    function.argtypes = quantize._library().freehold_quantize.argtypes  # type: ignore[union-attr]

    def plainly(kind: str, rows: np.ndarray, importance: np.ndarray | None) -> np.ndarray:
        result = np.empty((len(rows), quantize.row_bytes(kind, rows.shape[1])), np.uint8)
        weights, bad = None if importance is None else importance.ctypes.data, ctypes.c_int64()
        where = (rows.ctypes.data, *rows.shape, weights, result.ctypes.data, ctypes.addressof(bad))
        function(TYPES[kind].number, 0, *where)
        return result

    for kind in TYPES:
        for importance in ("none", "real"):
            assert digest(kind, importance, plainly) == GOLDEN[kind][importance], kind


@pytest.mark.parametrize("kind", TYPES)
def test_cutting_rows_changes_no_bits(kind: str) -> None:
    rows, weights = dict(ggml.distributions())["heavy tails"], ggml.importance("real")
    together = quantize.quantize(kind, rows, weights)
    parts = [quantize.quantize(kind, rows[a:b], weights) for a, b in ((0, 1), (1, 16), (16, 21))]
    assert np.array_equal(np.concatenate(parts), together)


@pytest.mark.parametrize("kind", TYPES)
def test_bfloat16_is_read_directly(kind: str) -> None:
    rows = dict(ggml.distributions())["bf16"]
    assert np.array_equal(quantize.quantize(kind, ggml.round_to_bf16(rows)), quantize.quantize(kind, rows))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("native", ["1", "0"])
def test_weights_that_are_not_finite_are_refused(value: float, native: str, monkeypatch) -> None:
    monkeypatch.setenv("FREEHOLD_NATIVE", native)
    quantize._library.cache_clear()
    try:
        assert quantize.describe().startswith("numpy") or native == "1"
        for kind in TYPES:
            rows = np.ones((40, 256), np.float32)
            rows[23, 200] = value
            with pytest.raises(NotFiniteError) as caught:
                quantize.quantize(kind, rows)
            assert caught.value.row == 23
            assert str(caught.value) == "row 23 is not finite in the weights"
    finally:
        quantize._library.cache_clear()


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0", "Q6_K", "Q4_K"])
def test_scale_beyond_fp16_is_refused(kind: str) -> None:
    rows = np.ones((5, 256), np.float32)
    rows[3] *= 1e12
    rows[3, ::2] *= -1
    with pytest.raises(NotFiniteError, match=f"row 3 is not finite as {kind}"):
        quantize.quantize(kind, rows)


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="Q4_K needs rows of whole 256s, not of 96"):
        quantize.quantize("Q4_K", np.ones((2, 96), np.float32))
    with pytest.raises(ValueError, match="the importance holds"):
        quantize.quantize("Q4_0", np.ones((2, 96), np.float32), np.ones(64, np.float32))


def test_quantizing_imports_no_torch() -> None:
    code = "import sys; import numpy as np; from freehold.kernels import quantize; "
    code += "quantize.quantize('Q8_0', np.ones((2, 64), np.float32)); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], env=os.environ, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
