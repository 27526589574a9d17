"""A model that is not trained itself: read tensor by tensor from a checkpoint or a Hugging Face folder, and named.

The name is a fingerprint of its weights as they are published (matrices in bfloat16, gains and biases in float32), so a
checkpoint of ours and the folder exported from it are the same base.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from freehold.checkpoint import dcp, hf
from freehold.core.artifact import sha256_json
from freehold.core.errors import ConfigError
from freehold.kernels import grouped
from freehold.model.afmoe import Afmoe
from freehold.model.config import ModelConfig

STACKS = {"gate_up_proj": "gate_up_blocks", "down_proj": "down_blocks"}
"""Stacks of routed experts -> where a model keeps them as blocks."""


def shape_of(folder: Path) -> ModelConfig:
    """Return the shape of the model in a folder; reads none of its weights."""
    return dcp.read_config(folder) if is_native(folder) else hf.check_hf(folder)


def is_native(folder: Path) -> bool:
    """Return whether a folder holds tensors as we train them, not as they are published."""
    return (folder / dcp.STATE).exists()


def stream(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor of a model by our name, one in memory at a time."""
    if is_native(folder):
        for name in sorted(dcp.read_names(folder)["model"]):
            yield name, _one(folder, name)
        return
    yield from hf.stream_hf(folder)[1]


def _one(folder: Path, name: str) -> Tensor:
    def only(key: str, size: torch.Size, dtype: torch.dtype) -> Tensor | None:
        return torch.empty(size, dtype=dtype) if key == f"model/{name}" else None

    return dcp.load(folder, ["model"], verify=False, empty=only)["model"][name]


class Fingerprint:
    """Collects the hashes of a model's tensors; `value` is the same whatever form and dtype they were read from."""

    def __init__(self) -> None:
        self._digests: dict[str, str] = {}

    def add(self, name: str, tensor: Tensor) -> None:
        """Add one tensor by our name."""
        exact = tensor.detach().to(torch.bfloat16 if tensor.ndim > 1 else torch.float32).contiguous()
        digest = hashlib.sha256(str(tuple(exact.shape)).encode())
        # Row by row of the first dimension: a stack of experts is hashed without a second copy.
        for part in exact if exact.ndim > 1 else (exact,):
            digest.update(part.contiguous().view(torch.uint8).numpy().data)
        self._digests[name] = digest.hexdigest()

    @property
    def value(self) -> str:
        """Return one hash over all of them."""
        return sha256_json(dict(sorted(self._digests.items())))


def fingerprint(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Return the fingerprint of a model's tensors by our names."""
    found = Fingerprint()
    for name, tensor in tensors:
        found.add(name, tensor)
    return found.value


def build(
    folder: Path, config: ModelConfig, dtype: torch.dtype, quantize: str = "", found: Fingerprint | None = None
) -> Afmoe:
    """Return a frozen model in the dtype to compute in, its routed experts as blocks of `quantize` where it is given.

    Peak memory is the finished model and one tensor. `found` collects the fingerprint of what was read.
    Raises CheckpointError when the tensors are not those of the shape, ConfigError when the experts' width is no whole
    number of blocks.
    """
    with torch.device("meta"):
        model = Afmoe(config)
    names = set()
    for name, tensor in stream(folder):
        names.add(name)
        if found is not None:
            found.add(name, tensor)
        place(model, name, tensor, dtype, quantize)
    with torch.device("meta"):
        dcp.match_keys(names, Afmoe(config).state_dict(), folder)
    return model.requires_grad_(False)


def place(model: Afmoe, name: str, tensor: Tensor, dtype: torch.dtype, quantize: str = "") -> None:
    """Put one tensor into a model that has no memory yet; see `build`."""
    path, _, last = name.rpartition(".")
    module = model.get_submodule(path)
    if quantize and path.endswith(".experts") and last in STACKS:
        try:
            blocks = grouped.pack(quantize, tensor)
        except ValueError as error:
            raise ConfigError(
                "the experts are no whole number of blocks wide",
                where=f"quantize: {name}",
                found=error,
                todo="choose Q4_0, whose blocks have 32 values",
            ) from error
        delattr(module, last)
        setattr(module, STACKS[last], blocks)
    elif last == "expert_bias":
        module.register_buffer(last, tensor.float())
    else:
        kind = dtype if tensor.ndim > 1 else torch.float32
        setattr(module, last, nn.Parameter(tensor.to(kind), requires_grad=False))
