"""Reads the weights of a native checkpoint slab by slab, as the Hugging Face form would hold them. Needs no torch."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np

from freehold.checkpoint.metadata import DataFiles, TensorEntry, read_metadata
from freehold.kernels.quantize import widen
from freehold.stages.export.shards import Stored

EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(gate|up|down)_proj\.weight")


def to_bf16(values: np.ndarray) -> np.ndarray:
    """Return finite float32 values as bfloat16 bits (uint16), rounded to nearest even."""
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


class Masters:
    """The tensors of a native checkpoint by their names in Hugging Face form; matrices in bfloat16, or float32.

    Experts, stacked in the checkpoint, appear one by one. Reading is safe in several threads.
    """

    def __init__(self, folder: Path, *, exact: bool = False) -> None:
        """Read and check the metadata; CheckpointError when they are damaged or hostile. `exact`: round nothing."""
        self.folder, self.exact = folder, exact
        entries = {key[6:]: entry for key, entry in read_metadata(folder).items() if key.startswith("model/")}
        self.entries: dict[str, TensorEntry] = entries
        self._data = DataFiles(folder / "state")
        self.tensors: dict[str, Stored] = {}
        for name, entry in entries.items():
            for theirs, shape in _split(name, entry.shape):
                self.tensors[theirs] = Stored(name, 0, "F32" if exact or len(shape) < 2 else "BF16", shape)

    def close(self) -> None:
        """Close all files."""
        self._data.close()

    def fingerprint(self) -> list[list[Any]]:
        """Return what changes when a file is replaced: name, size and time of change of each."""
        paths = sorted((self.folder / "state").iterdir())
        return [["exact", self.exact], *([p.name, p.stat().st_size, p.stat().st_mtime_ns] for p in paths)]

    def read_rows(self, name: str, first: int, count: int) -> np.ndarray:
        """Return rows of a tensor [count, width]: bfloat16 as uint16 bits, else float32. A vector is one row."""
        ours, expert, skipped = self._place(name)
        entry = self.entries[ours]
        first = skipped + first
        if expert is not None:
            first += expert * entry.shape[1]
        values = self._data.read_rows(entry, first, count)
        if entry.dtype == "bfloat16":
            return values
        values = widen(values)
        # What is not finite stays as it is, so that it is found and named where rows are encoded.
        rounds = len(self.tensors[name].shape) > 1 and not self.exact and bool(np.isfinite(values).all())
        return to_bf16(values) if rounds else values

    def read(self, name: str) -> np.ndarray:
        """Return a whole tensor in float32."""
        shape = self.tensors[name].shape
        return widen(self.read_rows(name, 0, int(np.prod(shape[:-1])))).reshape(shape)

    def _place(self, name: str) -> tuple[str, int | None, int]:
        """Return our tensor, the expert in it, and the first row of a part: up follows gate in one matrix."""
        found = EXPERT.fullmatch(name)
        if found is None:
            return name, None, 0
        experts, number, part = found.groups()
        rows = self.tensors[name].shape[0] if part == "up" else 0
        return f"{experts}.{'down' if part == 'down' else 'gate_up'}_proj", int(number), rows


def _split(name: str, shape: tuple[int, ...]) -> list[tuple[str, tuple[int, ...]]]:
    """Return name and shape of each tensor that one of ours becomes in Hugging Face form."""
    stem, _, last = name.rpartition(".")
    if len(shape) != 3 or not stem.endswith(".experts"):
        return [(name, shape)]
    if last == "gate_up_proj":
        half = (shape[1] // 2, shape[2])
        return [(f"{stem}.{e}.{part}_proj.weight", half) for e in range(shape[0]) for part in ("gate", "up")]
    return [(f"{stem}.{e}.{last}.weight", shape[1:]) for e in range(shape[0])]
