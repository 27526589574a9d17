"""Hugging Face form, both ways: a folder of safetensors and `config.json` that transformers, vLLM and llama.cpp read.

In memory the experts of a layer are stacked; on disk each has tensors of its own. The key table says how, as
operations that can be undone, and every tensor must appear in it: what is missing, left over or misshapen is
refused by name.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from freehold.checkpoint.limits import check_config_size, check_exported_hashes, check_finite
from freehold.core.artifact import read_json, write_json
from freehold.core.errors import CheckpointError
from freehold.model.afmoe import Afmoe
from freehold.model.config import ModelConfig, from_hf_dict, to_hf_dict

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


class Operation(Protocol):
    """One step from memory to disk that can be undone."""

    def apply(self, tensors: list[Tensor]) -> list[Tensor]:
        """Go towards the disk."""
        ...

    def undo(self, tensors: list[Tensor]) -> list[Tensor]:
        """Go towards memory."""
        ...


@dataclass(frozen=True)
class Unstack:
    """[n, ...] becomes n tensors [...]."""

    def apply(self, tensors: list[Tensor]) -> list[Tensor]:
        """Take the stack apart."""
        return [part for tensor in tensors for part in tensor.unbind(0)]

    def undo(self, tensors: list[Tensor]) -> list[Tensor]:
        """Stack again."""
        return [torch.stack(tensors)]


@dataclass(frozen=True)
class Split:
    """[parts x r, c] becomes `parts` tensors [r, c]."""

    parts: int

    def apply(self, tensors: list[Tensor]) -> list[Tensor]:
        """Cut each tensor."""
        return [part for tensor in tensors for part in tensor.chunk(self.parts)]

    def undo(self, tensors: list[Tensor]) -> list[Tensor]:
        """Join each run of `parts` tensors."""
        return [torch.cat(tensors[i : i + self.parts]) for i in range(0, len(tensors), self.parts)]


@dataclass(frozen=True)
class Entry:
    """One tensor in memory and what it is called on disk, after `operations`; none of them means a plain rename."""

    ours: str
    theirs: tuple[str, ...]
    shape: torch.Size
    operations: tuple[Operation, ...] = ()

    def to_disk(self, tensor: Tensor) -> dict[str, Tensor]:
        """Return the tensors on disk, by name (views where possible)."""
        tensors = [tensor]
        for operation in self.operations:
            tensors = operation.apply(tensors)
        return dict(zip(self.theirs, tensors, strict=True))

    def from_disk(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return the tensor in memory."""
        parts = [tensors[name] for name in self.theirs]
        for operation in reversed(self.operations):
            parts = operation.undo(parts)
        return parts[0]

    def shapes(self) -> dict[str, torch.Size]:
        """Return the shape each tensor on disk must have."""
        return {name: part.shape for name, part in self.to_disk(torch.empty(self.shape, device="meta")).items()}


def key_table(config: ModelConfig) -> list[Entry]:
    """Return an entry for every tensor of a model of this shape, in the model's order."""
    with torch.device("meta"):
        model = Afmoe(config)
    table = []
    for name, tensor in model.state_dict().items():
        stem, _, last = name.rpartition(".")
        experts = [f"{stem}.{expert}" for expert in range(config.num_experts)]
        if last == "gate_up_proj":
            theirs = [f"{expert}.{part}.weight" for expert in experts for part in ("gate_proj", "up_proj")]
            table.append(Entry(name, tuple(theirs), tensor.shape, (Unstack(), Split(2))))
        elif stem.endswith(".experts"):
            table.append(Entry(name, tuple(f"{e}.{last}.weight" for e in experts), tensor.shape, (Unstack(),)))
        else:
            table.append(Entry(name, (name,), tensor.shape))
    return table


def save_hf(
    folder: Path,
    config: ModelConfig,
    state_dict: Mapping[str, Tensor],
    dtype: torch.dtype = torch.bfloat16,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Write `config.json` and the weights; matrices in `dtype`, gains and expert biases in fp32.

    Holds one shard in memory next to the state dict. More than one shard gets an index, as HF does it.
    Raises CheckpointError when the state dict is not exactly a model of this shape.
    """
    table = key_table(config)
    _account(
        {entry.ours: entry.shape for entry in table}, {k: v.shape for k, v in state_dict.items()}, "the state dict"
    )
    shards: list[list[tuple[Entry, str]]] = [[]]
    filled = total = 0
    for entry in table:
        for name, shape in entry.shapes().items():
            size = shape.numel() * (dtype if len(shape) > 1 else torch.float32).itemsize
            if filled and filled + size > max_shard_bytes:
                shards.append([])
                filled = 0
            shards[-1].append((entry, name))
            filled, total = filled + size, total + size
    folder.mkdir(parents=True, exist_ok=True)
    (folder / INDEX).unlink(missing_ok=True)  # of an earlier save, it would hide this one
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = SINGLE if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        tensors: dict[str, Tensor] = {}
        for entry in dict.fromkeys(entry for entry, _ in shard):
            parts = entry.to_disk(state_dict[entry.ours].detach())
            for name in (name for owner, name in shard if owner is entry):
                part = parts[name]
                kind = dtype if part.ndim > 1 else torch.float32
                # A copy: safetensors refuses tensors that share memory.
                tensors[name] = part.to("cpu", kind, copy=True).contiguous()
        save_file(tensors, folder / file, metadata={"format": "pt"})
        _follow_umask(folder / file)
        weight_map |= dict.fromkeys(tensors, file)
    if len(shards) > 1:
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    write_json(folder / "config.json", to_hf_dict(config, str(dtype).removeprefix("torch.")))


def _follow_umask(path: Path) -> None:
    """Give a file the mode that any new file has here: safetensors writes for the owner alone."""
    plain = path.with_name(path.name + ".mode")
    plain.touch()
    path.chmod(plain.stat().st_mode & 0o777)
    plain.unlink()


def load_hf(folder: Path) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Return the shape and the tensors of a folder in HF form, under our names, in the dtypes on disk.

    Expert biases come back in fp32. Raises CheckpointError naming what is missing, left over, misshapen, not finite, or
    other bytes than the manifest of the export records.
    """
    config, weights = stream_hf(folder)
    return config, dict(weights)


def stream_hf(folder: Path) -> tuple[ModelConfig, Iterator[tuple[str, Tensor]]]:
    """Return the shape and an iterator over what `load_hf` returns: one tensor of ours in memory at a time."""
    data = read_json(folder / "config.json", CheckpointError, None)
    with _opened(folder) as (where, files):
        config, table = _accounted(data, folder, where)
    check_exported_hashes(folder)
    return config, _entries(folder, table, files)


def _entries(folder: Path, table: list[Entry], files: Mapping[str, str]) -> Iterator[tuple[str, Tensor]]:
    for entry in table:
        # Opened for each: pages of a mapped file count as memory of the process until it is closed.
        with contextlib.ExitStack() as stack:
            opened = {file: stack.enter_context(safe_open(folder / file, framework="pt"))
                      for file in dict.fromkeys(files[name] for name in entry.theirs)}  # fmt: skip
            tensor = entry.from_disk({name: opened[files[name]].get_tensor(name) for name in entry.theirs})
            tensor = tensor.float() if entry.ours.endswith(".expert_bias") else tensor
            check_finite({entry.ours: tensor}, folder)
            yield entry.ours, tensor


def check_hf(folder: Path) -> ModelConfig:
    """Return the shape of a folder in HF form, whose tensors have the right names and shapes; reads none of them."""
    data = read_json(folder / "config.json", CheckpointError, None)
    with _opened(folder) as (where, _):
        return _accounted(data, folder, where)[0]


def tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a folder in HF form by their names there, one in memory at a time."""
    for file in files_of(folder):
        with safe_open(folder / file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                yield name, opened.get_tensor(name)


def files_of(folder: Path) -> list[str]:
    """Return the names of a folder's files of weights, in order."""
    return _indexed(folder / INDEX) if (folder / INDEX).exists() else [SINGLE]


def count_tensors(config: ModelConfig) -> int:
    """Return how many tensors a model of this shape has on disk."""
    return sum(len(entry.theirs) for entry in key_table(config))


@contextlib.contextmanager
def _opened(folder: Path) -> Iterator[tuple[dict[str, safe_open], dict[str, str]]]:
    """Open the files of weights; yield by tensor the open file that holds it, and the name of that file."""
    with contextlib.ExitStack() as stack:
        where: dict[str, safe_open] = {}
        files: dict[str, str] = {}
        for file in files_of(folder):
            if not (folder / file).is_file():
                raise CheckpointError("a file of weights is missing", where=folder, found="nothing", expected=file)
            try:
                opened = stack.enter_context(safe_open(folder / file, framework="pt"))
            except SafetensorError as error:
                raise CheckpointError("not a safetensors file", where=folder / file, found=error) from error
            where |= dict.fromkeys(opened.keys(), opened)
            files |= dict.fromkeys(opened.keys(), file)
        yield where, files


def _accounted(data: dict[str, Any], folder: Path, where: dict[str, safe_open]) -> tuple[ModelConfig, list[Entry]]:
    """Return shape and key table of a folder whose tensors are exactly those of its config.json (`data`)."""
    shapes = {k: torch.Size(f.get_slice(k).get_shape()) for k, f in where.items()}
    values = sum(shape.numel() for shape in shapes.values())
    check_config_size(data, len(shapes), values, folder / "config.json", experts=len(shapes))
    config = from_hf_dict(data, str(folder / "config.json"))
    table = key_table(config)
    _account({name: shape for entry in table for name, shape in entry.shapes().items()}, shapes, folder)
    return config, table


def _account(expected: Mapping[str, torch.Size], found: Mapping[str, torch.Size], where: object) -> None:
    """Refuse unless both have the same names and shapes; the error names the first that differs and how many do."""
    for what, names in (
        ("a tensor is missing", [name for name in expected if name not in found]),
        ("a tensor belongs to no part of the model", [name for name in found if name not in expected]),
    ):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise CheckpointError(what, where=where, found=f"{names[0]}{more}", expected=f"{len(expected)} tensors")
    for name, shape in expected.items():
        if found[name] != shape:
            raise CheckpointError(
                "a tensor has another shape", where=f"{where}: {name}", found=list(found[name]), expected=list(shape)
            )


def _indexed(path: Path) -> list[str]:
    """Return the files an index names, in order; CheckpointError unless each is in the same folder."""
    found = read_json(path, CheckpointError, None).get("weight_map")
    names = sorted({str(name) for name in found.values()}) if isinstance(found, dict) else []
    strange = [name for name in names if Path(name).name != name or not name.endswith(".safetensors")]
    if strange or not names:
        raise CheckpointError(
            "not an index of weights",
            where=path,
            found=strange[0] if strange else f"weight_map: {found}",
            expected="weight_map: {tensor: a .safetensors file next to the index, ...}",
        )
    return names
