"""Settings of the release stage; imports without torch."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from freehold.core.config import Config


class ReleaseConfig(Config):
    """How the walk signs what it made."""

    keys: Path | None = Field(
        None,
        description="Folder of keys (`freehold keys new`). Default: keys/ of the run, made on the spot and labelled.",
    )
    name: str = Field("", description="Versioned name of the model; default: that of the export.")
    statements: Path | None = Field(
        None, description="YAML file of what no ledger can know: provider, purpose (docs/rights.md)."
    )
    detached: bool = Field(False, description="Whether only the hashes of the model's files are released.")


def plan(config: ReleaseConfig) -> list[str]:
    """Return what --dry-run says."""
    keys = f"the keys in {config.keys}" if config.keys else "keys made on the spot"
    files = "hashes of the model's files" if config.detached else "the model's files"
    return [f"signs a release with {keys}: {files}, cards, bill of materials, proofs"]
