"""Settings of import."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from freehold.core.config import Config
from freehold.ledger.policy import Policy
from freehold.text.source import Evidence


class ImportConfig(Config):
    """A folder in Hugging Face form becomes a checkpoint and a root of lineage."""

    path: Path = Field(description="folder with config.json and safetensors of an AFMoE model")
    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="name of the run folder that the model becomes a root of"
    )
    runs_dir: Path = Field(Path("runs"), description="folder of the run folders")
    licence: str = Field(description="SPDX expression of the weights")
    licence_evidence: Evidence = Field(
        description="what shows that licence: a file of the folder and a quote, or a rule"
    )
    settled: str = Field(
        default="", pattern=r"^$|\S", description="why a licence file that says otherwise does not hold, in your words"
    )
    origin: str = Field(default="", description="where the folder came from: a web address with its revision")
    vendor: str = Field(default="", description="who trained it, for policies that ask")
    country: str = Field(default="", description="country of the vendor, for policies that ask")
    policy: Policy = Field(default=Policy(), description="what may enter")
    check_finite: bool = Field(default=True, description="read every weight once and refuse NaN and infinity")
