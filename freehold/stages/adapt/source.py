"""The model that is adapted: where it is, what it is, and what text it learned from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from freehold import api
from freehold.checkpoint import base as frozen
from freehold.checkpoint import dcp
from freehold.core.artifact import MANIFEST, read_json, read_manifest
from freehold.core.errors import CheckpointError, ConfigError
from freehold.model.config import ModelConfig
from freehold.tokenizer.bpe import END_OF_TEXT, Tokenizer

OWN_TEXT = "tokenize/tokens"
"""Where a run keeps the tokens that its models learned from."""


@dataclass(frozen=True)
class Base:
    """A finished model; its weights are read when they are needed."""

    folder: Path
    config: ModelConfig
    begins_with: tuple[int, ...]
    parent: str
    """content_sha256 of the checkpoint; of a plain folder empty"""
    tokens: int
    own_text: Path | None
    """The tokens of its own run, where it is in one."""

    @property
    def begin(self) -> int:
        """Return the id that a text begins with."""
        return next(iter(self.begins_with), END_OF_TEXT)


def open_base(path: Path | None, tokenizer: Tokenizer) -> Base:
    """Return the base a recipe names; ConfigError without one, CheckpointError when it is of another tokenizer."""
    if path is None:
        raise ConfigError(
            "no model to adapt is named",
            where="adapt.base",
            expected="a checkpoint, a run folder, or an AFMoE folder in Hugging Face form",
        )
    folder = api.find_model(path)
    checkpoint = (folder / MANIFEST).exists() and read_manifest(folder)["kind"] == "checkpoint"
    facts: dict[str, Any] = dcp.check(folder) if checkpoint else {}
    config = frozen.shape_of(folder)
    theirs = facts.get("tokenizer_sha256") or Tokenizer.load(folder).sha256
    if theirs != tokenizer.sha256:
        raise CheckpointError(
            "the base was trained with another tokenizer",
            where=folder,
            found=theirs[:16],
            expected=tokenizer.sha256[:16],
            todo=f"use the base's own: tokenize.tokenizer={folder}",
        )
    return Base(
        folder=folder,
        config=config,
        begins_with=api.text_beginning(folder, tokenizer),
        parent=read_manifest(folder)["content_sha256"] if checkpoint else "",
        tokens=int(facts.get("tokens", 0)),
        own_text=_own_text(folder),
    )


def _own_text(folder: Path) -> Path | None:
    """Return the tokens of the run that a model is in; None where it stands alone."""
    for run in folder.resolve().parents[:3]:
        if (run / OWN_TEXT / "index.json").exists():
            return run / OWN_TEXT
    return None


def name_of(base: Base) -> str:
    """Return what peft looks for: the Hugging Face folder of the base's run where there is one, else the base."""
    for run in base.folder.resolve().parents[:3]:
        if (run / "export" / "hf" / "config.json").exists() and _exported(run, base.folder):
            return _relative(run / "export" / "hf")
    return _relative(base.folder)


def _exported(run: Path, folder: Path) -> bool:
    """Whether a run's export was made from this checkpoint."""
    manifest = run / "export" / MANIFEST
    named = read_json(manifest).get("config", {}).get("checkpoint", "") if manifest.exists() else ""
    return folder.resolve() in (run / "export" / "hf", run / str(named))


def _relative(path: Path) -> str:
    here = Path.cwd()
    return path.relative_to(here).as_posix() if path.is_relative_to(here) else path.as_posix()
