"""A model made from another one, as a checkpoint that every stage takes: weights in HF form, and its parent's facts.

The optimizer's state is not carried over: its shapes are another model's.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from freehold.checkpoint import dcp, hf
from freehold.core.artifact import (
    MANIFEST,
    atomic_folder,
    hash_files,
    read_json,
    read_manifest,
    sha256_json,
    write_atomic,
    write_json,
    write_manifest,
)
from freehold.core.config import to_yaml
from freehold.core.errors import ArtifactError
from freehold.model.afmoe import Afmoe
from freehold.model.config import ModelConfig

FACTS = "trainer.json"
TEXT_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja",
    "generation_config.json",
)  # fmt: skip


@dataclass(frozen=True)
class Opened:
    """A model's shape, tensors and facts."""

    folder: Path
    config: ModelConfig
    state: dict[str, Tensor]
    facts: dict[str, Any]
    sha256: str
    """Its content, for lineage."""

    def model(self) -> Afmoe:
        """Return the model, in fp32."""
        return build(self.config, self.state)


def open_model(folder: Path) -> Opened:
    """Read a checkpoint of ours or an HF folder, every tensor in fp32."""
    known = (folder / MANIFEST).exists()
    config, state = dcp.read_model(folder) if known else hf.load_hf(folder)
    facts = read_json(folder / FACTS) if (folder / FACTS).exists() else {}
    sha256 = read_manifest(folder)["content_sha256"] if known else sha256_json(hash_files(folder))
    return Opened(folder, config, {name: t.float() for name, t in state.items()}, facts, sha256)


def build(config: ModelConfig, state: Mapping[str, Tensor]) -> Afmoe:
    """Return a model that holds these tensors, not copies of them."""
    with torch.device("meta"):
        model = Afmoe(config)
    model.load_state_dict(dict(state), assign=True)
    return model.eval()


def save_model(
    folder: Path, parent: Opened, config: ModelConfig, state: Mapping[str, Tensor], made: dict[str, Any],
    record: dict[str, Any] | None,
) -> None:  # fmt: skip
    """Write the new model; `made` says how, `record` is its parent's record of rights. ArtifactError for a folder."""
    if folder.exists():
        raise ArtifactError("there is something of this name already", where=folder, todo="give another --output")
    kept: dict[str, Any] = {
        key: parent.facts[key] for key in ("begins_with", "context_tokens", "tokenizer_sha256") if key in parent.facts
    }
    facts: dict[str, Any] = {
        "tokenizer_sha256": "",
        **kept,
        # What it was trained on is what its parent was: steps and tokens count on from there.
        "step": parent.facts.get("step", 0),
        "tokens": parent.facts.get("tokens", 0),
        "stage": made["how"],
        "stage_type": made["how"].capitalize(),
        "phase": "",
        "parent": parent.sha256,
        "skipped_steps": [],
        "made": made,
        **({"record": record} if record else {}),
    }
    with atomic_folder(folder) as temporary:
        hf.save_hf(temporary, config, state, dtype=torch.float32)
        for name in TEXT_FILES:
            if (parent.folder / name).is_file():
                shutil.copyfile(parent.folder / name, temporary / name)
        write_json(temporary / FACTS, facts)
        # The whole shape: a scale of routing that is derived again from other numbers would be another function.
        section = {"model": config.model_dump(mode="json"), "parent": str(folder)}
        write_atomic(temporary / "recipe.yaml", to_yaml({"pretrain": section}))
        write_manifest(
            temporary, kind="checkpoint", counts={"tensors": hf.count_tensors(config)}, files=hash_files(temporary)
        )
