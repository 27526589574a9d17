"""What a model from outside must not be: larger than its files, not finite, or other bytes than its manifest says."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from freehold.core.artifact import MANIFEST, read_json, read_manifest, verify_files
from freehold.core.errors import ArtifactError, CheckpointError

if TYPE_CHECKING:  # exports that stream read sizes here, without torch
    from torch import Tensor

FINITE_VALUES = 1 << 24
"""Values looked at together, so that the check of a large tensor needs little memory."""


def check_config_size(data: dict[str, Any], tensors: int, values: int, where: object, experts: int) -> None:
    """Refuse a config.json whose sizes cannot be those of the weights on disk, before anything is made from it.

    `tensors`, `values`: how many there are on disk. `experts`: the largest number of experts all layers can have.
    """
    layers, routed = data.get("num_hidden_layers"), data.get("num_experts")
    sizes = {
        "num_hidden_layers": (layers, tensors),
        "num_experts": (routed, experts),
        "hidden_size": (data.get("hidden_size"), values),
        "vocab_size": (data.get("vocab_size"), values),
    }
    if isinstance(layers, int) and isinstance(routed, int) and isinstance(data.get("num_dense_layers"), int):
        sizes["num_experts in all layers"] = (max(0, layers - data["num_dense_layers"]) * routed, experts)
    for key, (found, limit) in sizes.items():
        if isinstance(found, int) and found > limit:
            raise CheckpointError(
                "config.json describes a larger model than the weights are", where=f"{where}: {key}", found=found,
                expected=f"at most {limit:,}: {tensors:,} tensors with {values:,} values are there",
                todo="config and weights are not of one model: make or download the checkpoint again",
            )  # fmt: skip


def check_finite(tensors: Mapping[str, Tensor], where: object) -> None:
    """Raise CheckpointError naming the first tensor that holds a NaN or an infinity."""
    import torch

    for name, tensor in tensors.items():
        if tensor.is_floating_point():
            for part in tensor.reshape(-1).split(FINITE_VALUES):
                if not torch.isfinite(part).all():
                    raise CheckpointError(
                        "the weights are not finite", where=f"{where}: {name}", found="NaN or infinity",
                        todo="use an earlier checkpoint, or download this one again",
                    )  # fmt: skip


def check_exported_hashes(folder: Path) -> None:
    """Compare a Hugging Face folder with the manifest of the export it is part of, where there is one."""
    folder = folder.resolve()
    path = folder.parent / MANIFEST
    if not path.is_file() or read_json(path, CheckpointError, None).get("kind") != "export":
        return
    prefix = folder.name + "/"
    try:
        files = read_manifest(folder.parent)["files"]
        ours = {name.removeprefix(prefix): record for name, record in files.items() if name.startswith(prefix)}
        verify_files(folder, {"files": ours})
    except ArtifactError as error:
        raise CheckpointError(
            f"damaged export: {error.what}", where=error.where, found=error.found, expected=error.expected,
            todo="export again, or copy the folder again",
        ) from error  # fmt: skip
