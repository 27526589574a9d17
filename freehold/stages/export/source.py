"""Opens what is to become GGUF files: a checkpoint of ours, or any Hugging Face folder of an AFMoE model. No torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from freehold.checkpoint.limits import check_config_size
from freehold.checkpoint.metadata import STATE
from freehold.core.artifact import MANIFEST, read_json, read_manifest, verify_files
from freehold.core.errors import ArtifactError, CheckpointError, ExportError
from freehold.model.config import ModelConfig, from_hf_dict
from freehold.stages.export.check import check, check_tokenizer
from freehold.stages.export.masters import Masters
from freehold.stages.export.shards import Shards

Weights = Shards | Masters


@dataclass(frozen=True)
class Source:
    """A model whose config, tokenizer and headers were checked; close its weights."""

    folder: Path
    config: ModelConfig
    weights: Weights


def is_model_folder(path: Path) -> bool:
    """Whether a folder holds one model, not a run."""
    return (path / "config.json").is_file()


def open_source(folder: Path, *, exact: bool = False) -> Source:
    """Open a model folder. `exact` keeps float32 masters of a checkpoint of ours unrounded.

    ConfigError for a config.json that is not AFMoE's, CheckpointError or ExportError for weights that are damaged, of
    another size, or that llama.cpp cannot express.
    """
    if not is_model_folder(folder):
        raise ExportError(
            "not a model folder", where=folder, found="no config.json", expected="a run, a checkpoint, or a Hugging "
            "Face folder", todo="give the folder with config.json and the weights",
        )  # fmt: skip
    data = read_json(folder / "config.json", ExportError, "download or export this folder again")
    native = (folder / STATE).exists()
    if native:
        _check_small_files(folder)
    weights: Weights = Masters(folder, exact=exact) if native else Shards(folder)
    try:
        values = sum(math.prod(tensor.shape) for tensor in weights.tensors.values())
        count = len(weights.tensors)
        check_config_size(data, count, values, folder / "config.json", experts=count)
        config = from_hf_dict(data, str(folder / "config.json"))
        reasons = check(config)
        reasons += check_tokenizer(
            read_json(folder / "tokenizer.json", ExportError, "copy the tokenizer there"), config
        )
        if reasons:
            raise ExportError("this model cannot be exported", where=folder, found="\n            ".join(reasons))
    except BaseException:
        weights.close()
        raise
    return Source(folder, config, weights)


def _check_small_files(folder: Path) -> None:
    """Compare a checkpoint with its manifest: the small files by hash, the data by size, so that nothing is read twice.

    Damage inside the data shows when a file is proven, or by `freehold verify`.
    """
    try:
        files = read_manifest(folder, kind="checkpoint")["files"]
        for name, record in files.items():
            if name.endswith(".distcp"):
                found = (folder / name).stat().st_size if (folder / name).is_file() else 0
                if found != record["bytes"]:
                    raise CheckpointError(
                        "a file of the checkpoint is missing or truncated", where=folder / name,
                        found=f"{found:,} bytes", expected=f"{record['bytes']:,} bytes", todo="use another checkpoint",
                    )  # fmt: skip
        small = {name: record for name, record in files.items() if not name.endswith(".distcp")}
        verify_files(folder, {"files": small})
    except ArtifactError as error:
        raise CheckpointError(
            f"damaged or unfinished checkpoint: {error.what}", where=error.where or folder / MANIFEST,
            found=error.found, expected=error.expected, todo="use another checkpoint",
        ) from error  # fmt: skip
