"""Reads importance matrices in llama.cpp's GGUF form: for each weight, the mean square of every input, by expert.

Only headers stay in memory; a slab's row is read when it is needed. Format: llama.cpp tools/imatrix.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from freehold.core.errors import ExportError

SUMS, COUNTS = ".in_sum2", ".counts"
PRIOR = "freehold.prior"
"""Key that lists `weight:expert` of experts that saw no token and have a neutral guess."""
REMEDY = "make the importance matrix again from this model"


class Importance:
    """An importance matrix by the GGUF name of a weight."""

    def __init__(self, path: Path) -> None:
        """Open a file; ExportError when it is not an importance matrix in GGUF form."""
        self.path = path
        try:
            reader = gguf.GGUFReader(path)
            kind = self._text(reader, "general.type")
        except (OSError, ValueError, KeyError, IndexError, OverflowError) as problem:
            raise ExportError(
                "not a GGUF file, or damaged", where=path, found=problem, expected="an importance matrix", todo=REMEDY
            ) from problem
        if kind != "imatrix":
            raise ExportError("not an importance matrix", where=path, found=f"general.type {kind!r}", todo=REMEDY)
        found = {tensor.name: tensor for tensor in reader.tensors}
        self.names = sorted(n.removesuffix(SUMS) for n in found if n.endswith(SUMS))
        unpaired = [n for n in self.names if n + COUNTS not in found]
        other = [t.name for t in found.values() if t.tensor_type != gguf.GGMLQuantizationType.F32]
        if unpaired or other or not self.names:
            raise ExportError(
                "an importance matrix without sums and counts in F32",
                where=path,
                found=(unpaired + other)[:1],
                todo=REMEDY,
            )
        self._sums = {n: (found[n + SUMS].data_offset, found[n + SUMS].n_elements) for n in self.names}
        self._counts = {n: np.array(found[n + COUNTS].data, np.float32).reshape(-1) for n in self.names}
        self.dataset = self._text(reader, "imatrix.datasets")
        guessed = self._value(reader, PRIOR)
        self.prior_only = list(guessed) if isinstance(guessed, list) else []
        """Experts, as `weight:expert`, that have a neutral guess in place of calibration."""
        self.chunks = int(self._value(reader, "imatrix.chunk_count") or 0)
        # The reader maps the file, and touched pages count as memory: rows are read one at a time instead.
        self._handle = os.open(path, os.O_RDONLY)

    def close(self) -> None:
        """Close the file."""
        os.close(self._handle)

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
        """Return the matrices it has no entry for; ExportError when an entry has another shape or is not finite."""
        for name in self.names:
            if name not in shapes:
                raise self._of_another_model(f"an entry {name}", "only weights of this model")
            experts, width = (shapes[name][0] if len(shapes[name]) == 3 else 1), shapes[name][-1]
            found = int(self._sums[name][1]), self._counts[name].size
            if found != (experts * width, experts):
                raise self._of_another_model(f"{name}: {found[0]} sums, {found[1]} counts", f"{experts} x {width}")
            for expert in range(experts):
                self.row(name, expert)
        return [name for name, shape in shapes.items() if len(shape) > 1 and name not in self._sums]

    def row(self, name: str, expert: int) -> np.ndarray | None:
        """Return the mean square of each input of a matrix, float32 [width]; ones for an expert that saw nothing."""
        if name not in self._sums:
            return None
        counts, (start, values) = self._counts[name], self._sums[name]
        size = int(values) // counts.size * 4
        sums = np.frombuffer(os.pread(self._handle, size, int(start) + expert * size), "<f4")
        count = np.float32(counts[expert])
        if not (np.isfinite(sums).all() and np.isfinite(count) and (sums >= 0).all() and count >= 0):
            raise ExportError(
                "an importance matrix holds values that cannot be mean squares",
                where=f"{self.path}: {name}, expert {expert}", found="NaN, infinite or negative", todo=REMEDY,
            )  # fmt: skip
        return sums / count if count > 0 else np.ones_like(sums)

    def idle(self) -> int:
        """Return how many matrices saw no token: all their inputs count the same."""
        return sum(int((counts == 0).sum()) for counts in self._counts.values())

    def sha256(self) -> str:
        """Return the hash of the file."""
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def _of_another_model(self, found: str, expected: str) -> ExportError:
        return ExportError(
            "the importance matrix is of another model", where=self.path, found=found, expected=expected, todo=REMEDY
        )

    @staticmethod
    def _value(reader: gguf.GGUFReader, key: str) -> Any:
        field = reader.get_field(key)
        return None if field is None else field.contents()

    def _text(self, reader: gguf.GGUFReader, key: str) -> str:
        value = self._value(reader, key)
        return str(value[0] if isinstance(value, list) and value else value or "")
