"""The quantizers of quantize.cpp in numpy, with the same bits: for machines without a compiler.

Every array is [values of a block, blocks]: each numpy operation is one step of ggml's scalar code, done for all blocks.
float32 throughout and sums in the order of the values, so that every rounding is ggml's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

F = np.float32
ALL_ZERO, ROUND = F(1e-15), F(12582912)
CHUNK_VALUES = 1 << 20
"""Values searched at a time: bounds the memory of the temporary arrays."""


def quantize(kind: str, rows: np.ndarray, importance: np.ndarray | None) -> np.ndarray:
    """Return finite float32 rows [n, width] as blocks of a type: uint8 [n, row bytes]."""
    values = 256 if kind.endswith("_K") else 32
    count, width = rows.shape
    step = max(1, CHUNK_VALUES // width)
    with np.errstate(all="ignore"):
        parts = [_rows(kind, rows[i : i + step], importance, values) for i in range(0, count, step)]
    return np.concatenate(parts) if parts else np.empty((0, 0), np.uint8)


def _rows(kind: str, rows: np.ndarray, importance: np.ndarray | None, values: int) -> np.ndarray:
    count, width = rows.shape
    x = np.ascontiguousarray(rows.reshape(-1, values).T)
    weights = mean_square = None
    if importance is not None:
        columns = np.ascontiguousarray(importance.reshape(-1, values).T)
        weights = np.tile(columns, count)
        if values == 32 and kind != "Q8_0":
            mean_square = (_in_order(np.ascontiguousarray((rows * rows).T)) / F(width)).repeat(width // values)
    packed = KINDS[kind](x, weights, mean_square)
    return np.ascontiguousarray(packed.T).reshape(count, -1)


# --- arithmetic ------------------------------------------------------------------------------------------------------


def _in_order(x: np.ndarray) -> np.ndarray:
    """Sum over the first axis one after the other; numpy's own sum pairs them."""
    total = np.zeros(x.shape[1:], F)
    for part in x:
        total += part
    return total


def _nearest(x: np.ndarray) -> np.ndarray:
    """Return the nearest integer as float, ties to even; out of range it wraps as ggml's does."""
    bits = (x + ROUND).view(np.uint32)
    return ((bits & np.uint32(0x007FFFFF)) | np.uint32(0x4B000000)).view(F) - ROUND


def _integers(x: np.ndarray) -> np.ndarray:
    return x.astype(np.int32)


def _cut(x: np.ndarray) -> np.ndarray:
    """Return floats cut to integers; what a byte does not hold gives 0."""
    return np.where((x > -128) & (x < 256), x, F(0)).astype(np.int32)


def _inverse(scale: np.ndarray) -> np.ndarray:
    return np.where(scale != 0, F(1) / scale, F(0))


def _half(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the two bytes of a float as fp16, and the value a reader gets back."""
    half = x.astype("<f2")
    return half.view(np.uint8).reshape(-1, 2).T, half.astype(F)


def _weigh(x: np.ndarray, importance: np.ndarray, mean_square: np.ndarray) -> np.ndarray:
    return importance * np.sqrt(mean_square + x * x)


# --- searches --------------------------------------------------------------------------------------------------------


@dataclass
class Found:
    """What a search found, and how its levels are computed again."""

    scale: np.ndarray
    minimum: np.ndarray
    level: Callable[[], np.ndarray]


def _extreme(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the first value of largest magnitude in each block, and which blocks are (next to) zero."""
    size = np.abs(x)
    most = np.take_along_axis(x, size.argmax(0)[None], 0)[0]
    # The sign of a zero block is that of ggml's starting value.
    return np.where(size.max(0) > 0, most, F(0)), size.max(0) < ALL_ZERO


def _ends(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the least and the largest value of each block; of zeros with two signs the first, as ggml compares."""
    return np.take_along_axis(x, x.argmin(0)[None], 0)[0], np.take_along_axis(x, x.argmax(0)[None], 0)[0]


def _search_signed(x: np.ndarray, w: np.ndarray, top: int) -> Found:
    """Find the scale of levels -top .. top - 1 by weighted least squares over 19 attempts (make_qx_quants)."""
    most, empty = _extreme(x)
    wx = w * x
    scale = best = kept = np.zeros_like(most)
    for step in range(-10, 10):
        if step == 0:
            continue
        shifted = F(-top) if step == -10 else -(F(top) + F(0.1) * F(step))
        inverse = shifted / most
        level = np.clip(_nearest(inverse * x), F(-top), F(top - 1))
        sum_lx, sum_l2 = _in_order(wx * level), _in_order(w * level * level)
        attempt = sum_lx / sum_l2
        if step == -10:
            scale, kept = np.where(sum_l2 != 0, attempt, F(0)), inverse
            best = scale * sum_lx
        else:
            better = (sum_l2 > 0) & (sum_lx * sum_lx > best * sum_l2)
            scale, kept = np.where(better, attempt, scale), np.where(better, inverse, kept)
            best = np.where(better, attempt * sum_lx, best)

    def level_again() -> np.ndarray:
        return np.where(empty, F(0), np.clip(_nearest(kept * x), F(-top), F(top - 1)) + F(top))

    return Found(np.where(empty, F(0), scale), np.zeros_like(scale), level_again)


def _search_by_turns(x: np.ndarray, top: int) -> Found:
    """Improve the levels of a plain scale one at a time (make_q3_quants)."""
    most, empty = _extreme(x)
    w = x * x
    wx = w * x
    level = np.clip(_nearest(F(-top) / most * x), F(-top), F(top - 1))
    sum_lx, sum_l2 = _in_order(wx * level), _in_order(w * level * level)
    for _ in range(5):
        changed = False
        for i in range(len(x)):
            lx, l2 = sum_lx - wx[i] * level[i], sum_l2 - w[i] * level[i] * level[i]
            new = np.clip(_nearest(x[i] * l2 / lx), F(-top), F(top - 1))
            take = (lx > 0) & (new != level[i])
            lx, l2 = lx + wx[i] * new, l2 + w[i] * new * new
            take &= (l2 > 0) & (lx * lx * sum_l2 > sum_lx * sum_lx * l2)
            level[i] = np.where(take, new, level[i])
            sum_lx, sum_l2 = np.where(take, lx, sum_lx), np.where(take, l2, sum_l2)
            changed |= bool(take.any())
        if not changed:
            break
    scale = np.where(empty | ~(sum_l2 > 0), F(0), sum_lx / sum_l2)
    return Found(scale, np.zeros_like(scale), lambda: np.where(empty, F(0), level + F(top)))


def _search_with_minimum(x: np.ndarray, w: np.ndarray, top: int, start: float, width: float, steps: int) -> Found:
    """Find scale and minimum of levels 0 .. top by weighted least squares (make_qkx2_quants, make_qkx3_quants)."""
    least, most = _ends(x)
    flat = np.where(least > 0, F(0), least)
    wx = w * x
    # ggml starts these two sums with their first term, not with 0: the same unless that is -0.
    sum_w, sum_x, empty = _in_order(w), _in_order(wx), flat == most
    inverse = F(top) / (most - flat)
    minimum, origin, kept, scale = flat, flat, inverse, F(1) / inverse
    error = _error(x, w, np.clip(_nearest(inverse * (x - flat)), F(0), F(top)), scale, flat)
    for step in range(steps + 1):
        inverse = (F(start) + F(width) * F(step) + F(top)) / (most - minimum)
        level = np.clip(_nearest(inverse * (x - minimum)), F(0), F(top))
        wl = w * level
        sum_l, sum_l2, sum_xl = _in_order(wl), _in_order(wl * level), _in_order(wl * x)
        determinant = sum_w * sum_l2 - sum_l * sum_l
        new_scale = (sum_w * sum_xl - sum_x * sum_l) / determinant
        new_minimum = (sum_l2 * sum_x - sum_l * sum_xl) / determinant
        above = new_minimum > 0
        new_scale, new_minimum = np.where(above, sum_xl / sum_l2, new_scale), np.where(above, F(0), new_minimum)
        new_error = _error(x, w, level, new_scale, new_minimum)
        better = (determinant > 0) & (new_error < error)
        origin, kept = np.where(better, minimum, origin), np.where(better, inverse, kept)
        minimum, scale = np.where(better, new_minimum, minimum), np.where(better, new_scale, scale)
        error = np.where(better, new_error, error)

    def level_again() -> np.ndarray:
        return np.where(empty, F(0), np.clip(_nearest(kept * (x - origin)), F(0), F(top)))

    return Found(np.where(empty, F(0), scale), np.where(empty, flat, minimum), level_again)


def _error(x: np.ndarray, w: np.ndarray, level: np.ndarray, scale: np.ndarray, minimum: np.ndarray) -> np.ndarray:
    off = scale * level + minimum - x
    return _in_order(w * (off * off))


def _search_positive(x: np.ndarray, w: np.ndarray, top: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the scale and the levels 0 .. top of numbers that are not negative (make_qp_quants)."""
    most = np.maximum(x.max(0), F(0))
    empty, inverse = most < ALL_ZERO, F(top) / most
    off = x - F(1) / inverse * _wrapped(_nearest(inverse * x))
    error = _in_order(w * off * off)
    for step in (-4, -3, -2, -1, 1, 2, 3, 4):
        shifted = (F(0.1) * F(step) + F(top)) / most
        off = x - F(1) / shifted * np.minimum(_nearest(shifted * x), F(top))
        new_error = _in_order(w * off * off)
        better = new_error < error
        error, inverse = np.where(better, new_error, error), np.where(better, shifted, inverse)
    level = np.minimum(_nearest(inverse * x), F(top))
    wx = w * x
    sum_lx, sum_l2, kept = _in_order(wx * level), _in_order(w * level * level), _wrapped(level)
    for _ in range(5):
        changed = False
        for i in range(len(x)):
            lx, l2 = sum_lx - wx[i] * kept[i], sum_l2 - w[i] * kept[i] * kept[i]
            new = np.minimum(_nearest(x[i] * l2 / lx), F(top))
            take = (lx > 0) & (l2 > 0) & (new != kept[i])
            lx, l2 = lx + wx[i] * new, l2 + w[i] * new * new
            take &= lx * lx * sum_l2 > sum_lx * sum_lx * l2
            kept[i] = np.where(take, _wrapped(new), kept[i])
            sum_lx, sum_l2 = np.where(take, lx, sum_lx), np.where(take, l2, sum_l2)
            changed |= bool(take.any())
        if not changed:
            break
    scale = np.where(empty | ~(sum_l2 > 0), F(0), sum_lx / sum_l2)
    return scale, np.where(empty, 0, _integers(kept))


def _wrapped(level: np.ndarray) -> np.ndarray:
    """Return levels as ggml keeps them, in an unsigned byte."""
    return (_integers(level) & 255).astype(F)


# --- blocks of 32 ----------------------------------------------------------------------------------------------------


def _pack_small(head: list[np.ndarray], level: np.ndarray, fifth: bool) -> np.ndarray:
    """Return a block: its scales, the fifth bits of its levels, then four bits each."""
    parts = list(head)
    if fifth:
        parts.append(np.packbits(((level >> 4) & 1).astype(np.uint8), axis=0, bitorder="little"))
    parts.append(((level[:16] & 15) | ((level[16:] & 15) << 4)).astype(np.uint8))
    return np.concatenate(parts)


def _symmetric(top: int, x: np.ndarray, importance: np.ndarray | None, mean_square: np.ndarray | None) -> np.ndarray:
    """Q4_0 and Q5_0."""
    if importance is not None and mean_square is not None:
        found = _search_signed(x, _weigh(x, importance, mean_square), top)
        scale, level = found.scale, _integers(found.level())
    else:
        scale = _extreme(x)[0] / F(-top)
        level = np.minimum(_cut(x * _inverse(scale) + F(top + 0.5)), 2 * top - 1)
    return _pack_small([_half(scale)[0]], level, top == 16)


def _minimum(top: int, x: np.ndarray, importance: np.ndarray | None, mean_square: np.ndarray | None) -> np.ndarray:
    """Q4_1 and Q5_1."""
    if importance is not None and mean_square is not None:
        found = _search_with_minimum(x, _weigh(x, importance, mean_square), top, -0.9, 0.05, 36)
        scale, least, level = found.scale, found.minimum, _integers(found.level())
    else:
        least, most = _ends(x)
        scale = (most - least) / F(top)
        level = _cut((x - least) * _inverse(scale) + F(0.5))
        level = np.minimum(level, top) if top == 15 else level
    return _pack_small([_half(scale)[0], _half(least)[0]], level, top == 31)


def _q8_0(x: np.ndarray, importance: np.ndarray | None, mean_square: np.ndarray | None) -> np.ndarray:
    scale = np.abs(x).max(0) / F(127)
    value = x * _inverse(scale)
    level = _cut(value)
    left = value - level.astype(F)
    level = level + (left >= F(0.5)) - (left <= F(-0.5))  # halves go away from zero
    level = np.where(np.abs(value) < 200, level, 0).astype(np.int8)
    return np.concatenate([_half(scale)[0], level.view(np.uint8)])


# --- blocks of 256 ---------------------------------------------------------------------------------------------------


def _twice_mean_square(x: np.ndarray) -> np.ndarray:
    return F(2) * _in_order(x * x) / F(256)


def _requantize(
    x: np.ndarray, scale: np.ndarray, offset: np.ndarray, low: int, high: int, found: np.ndarray
) -> np.ndarray:
    """Return levels of the scale as stored; where it is 0, those the search found."""
    level = np.clip(_nearest((x + offset) / scale), F(low), F(high)) - F(low)
    return _integers(np.where(scale == 0, found, level))


def _k_minimum(top: int, x: np.ndarray, importance: np.ndarray | None, _: np.ndarray | None) -> np.ndarray:
    """Q4_K and Q5_K: 8 sub-blocks of 32 with scales and minima of 6 bits."""
    parts, found, sums = x.reshape(8, 32, -1), [], []
    mean_square = _twice_mean_square(x)
    for j, part in enumerate(parts):
        if importance is not None:
            w = _weigh(part, importance.reshape(8, 32, -1)[j], mean_square)
            sums.append(_in_order(w))
            found.append(_search_with_minimum(part, w, top, -0.9, 0.05, 36))
        else:
            w = np.sqrt(_in_order(part * part) / F(32)) + np.abs(part)
            how = (-1.0, 0.1, 20) if top == 15 else (-0.5, 0.1, 15)
            found.append(_search_with_minimum(part, w, top, *how))
    scales, minima = np.stack([f.scale for f in found]), np.stack([-f.minimum for f in found])
    if importance is not None:
        scale, ls = _search_positive(scales, np.stack(sums), 63)
        minimum, lm = _search_positive(minima, np.stack(sums), 63)
    else:
        (scale, ls), (minimum, lm) = _six_bits(scales), _six_bits(minima)
    if importance is None or top == 31:  # ggml's Q4_K with importance does not limit them
        ls, lm = np.minimum(ls, 63), np.minimum(lm, 63)
    packed, s, m = _pack_six_bits(ls, lm)
    scale_bytes, scale = _half(scale)
    minimum_bytes, minimum = _half(minimum)
    level = np.concatenate(
        [
            _requantize(part, scale * s[j].astype(F), minimum * m[j].astype(F), 0, top, found[j].level())
            for j, part in enumerate(parts)
        ]
    )
    blocks = [scale_bytes, minimum_bytes, packed]
    if top == 31:
        high = ((level >> 4) & 1).astype(np.uint8).reshape(8, 32, -1)
        blocks.append(np.packbits(high, axis=0, bitorder="little")[0])
    pairs = level.reshape(4, 2, 32, -1) & 15
    blocks.append((pairs[:, 0] | (pairs[:, 1] << 4)).astype(np.uint8).reshape(128, -1))
    return np.concatenate(blocks)


def _six_bits(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the scale of the largest value over 63, and each value in its unsigned byte."""
    most = np.maximum(values.max(0), F(0))
    inverse = np.where(most > 0, F(63) / most, F(0))
    return most / F(63), _integers(_nearest(inverse * values)) & 255


def _pack_six_bits(ls: np.ndarray, lm: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the 12 bytes of 8 scales and 8 minima, and both as a reader takes them out."""
    high = (ls[4:] >> 4) << 6, (lm[4:] >> 4) << 6
    packed = np.concatenate([ls[:4] | high[0], lm[:4] | high[1], (ls[4:] & 15) | ((lm[4:] & 15) << 4)]) & 255
    first, second, rest = packed[:4], packed[4:8], packed[8:]
    s = np.concatenate([first & 63, (rest & 15) | ((first >> 6) << 4)])
    m = np.concatenate([second & 63, (rest >> 4) | ((second >> 6) << 4)])
    return packed.astype(np.uint8), s, m


def _q6_k(x: np.ndarray, importance: np.ndarray | None, _: np.ndarray | None) -> np.ndarray:
    parts = x.reshape(16, 16, -1)
    weights = parts * parts if importance is None else importance.reshape(16, 16, -1)
    found = [_search_signed(part, w, 32) for part, w in zip(parts, weights, strict=True)]
    scales = np.stack([f.scale for f in found])
    most = _extreme(scales)[0]
    empty = np.abs(most) < ALL_ZERO
    inverse = F(-128) / most
    zero = np.zeros_like(most)
    scale_bytes, scale = _half(np.where(empty, F(0), F(1) / inverse))
    stored = np.where(empty, 0, np.minimum(_integers(_nearest(inverse * scales)), 127)).astype(np.int8)
    level = np.concatenate(
        [
            _requantize(part, scale * stored[j].astype(F), zero, -32, 31, found[j].level())
            for j, part in enumerate(parts)
        ]
    )
    halves = np.where(empty, 0, level).reshape(2, 4, 32, -1)  # [half, quarter, 32, blocks]
    low, high = halves & 15, halves >> 4
    four = np.stack([low[:, 0] | (low[:, 2] << 4), low[:, 1] | (low[:, 3] << 4)], 1).reshape(128, -1)
    two = (high[:, 0] | (high[:, 1] << 2) | (high[:, 2] << 4) | (high[:, 3] << 6)).reshape(64, -1)
    return np.concatenate([four.astype(np.uint8), two.astype(np.uint8), stored.view(np.uint8), scale_bytes])


def _q3_k(x: np.ndarray, importance: np.ndarray | None, _: np.ndarray | None) -> np.ndarray:
    parts = x.reshape(16, 16, -1)
    if importance is not None:
        weights = _weigh(x, importance, _twice_mean_square(x)).reshape(16, 16, -1)
        found = [_search_signed(part, w, 4) for part, w in zip(parts, weights, strict=True)]
        outer = _search_signed(np.stack([f.scale for f in found]), np.stack([_in_order(w) for w in weights]), 32)
        scale, stored = outer.scale, _integers(outer.level())
    else:
        found = [_search_by_turns(part, 4) for part in parts]
        scales = np.stack([f.scale for f in found])
        most = _extreme(scales)[0]
        inverse = F(-32) / most
        scale = np.where(most == 0, F(0), F(1) / inverse)
        level = _integers(_nearest(inverse * scales)).astype(np.int8).astype(np.int32)
        stored = np.where(most == 0, 0, np.clip(level, -32, 31) + 32)
    scale_bytes, scale = _half(scale)
    zero = np.zeros_like(scale)
    level = np.concatenate(
        [
            _requantize(part, scale * (stored[j] - 32).astype(F), zero, -4, 3, found[j].level())
            for j, part in enumerate(parts)
        ]
    )
    high = np.packbits((level >> 2).astype(np.uint8).reshape(8, 32, -1), axis=0, bitorder="little")[0]
    two = level.reshape(2, 4, 32, -1) & 3
    low = (two[:, 0] | (two[:, 1] << 2) | (two[:, 2] << 4) | (two[:, 3] << 6)).reshape(64, -1)
    top_bits = (stored >> 4).reshape(4, 4, -1)
    packed = [(stored[:8] & 15) | ((stored[8:] & 15) << 4)]
    packed.append(top_bits[0] | (top_bits[1] << 2) | (top_bits[2] << 4) | (top_bits[3] << 6))
    return np.concatenate([high, *(p.astype(np.uint8) for p in (low, *packed)), scale_bytes])


Quantizer = Callable[[np.ndarray, "np.ndarray | None", "np.ndarray | None"], np.ndarray]
KINDS: dict[str, Quantizer] = {
    "Q4_0": lambda *a: _symmetric(8, *a),
    "Q4_1": lambda *a: _minimum(15, *a),
    "Q5_0": lambda *a: _symmetric(16, *a),
    "Q5_1": lambda *a: _minimum(31, *a),
    "Q8_0": _q8_0,
    "Q3_K": _q3_k,
    "Q4_K": lambda *a: _k_minimum(15, *a),
    "Q5_K": lambda *a: _k_minimum(31, *a),
    "Q6_K": _q6_k,
}
