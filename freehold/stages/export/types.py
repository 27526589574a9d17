"""The types a GGUF file stores tensors in, and their sizes. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass

from freehold.kernels.quantize import TYPES


@dataclass(frozen=True)
class TensorType:
    """A type of ggml: its number in files, and how many bytes hold how many values."""

    name: str
    number: int
    values: int
    bytes: int

    @property
    def quantized(self) -> bool:
        """Whether values share scales, so that a row must be a whole number of blocks."""
        return self.values > 1

    def fits(self, width: int) -> bool:
        """Whether a row of this many values is a whole number of blocks."""
        return width % self.values == 0

    def row_bytes(self, width: int) -> int:
        """Return the bytes of one row."""
        return width // self.values * self.bytes


TENSOR_TYPES = {
    "F32": TensorType("F32", 0, 1, 4),
    "F16": TensorType("F16", 1, 1, 2),
    "BF16": TensorType("BF16", 30, 1, 2),
    **{name: TensorType(name, block.number, block.values, block.bytes) for name, block in TYPES.items()},
}
