"""What every source of text declares, whatever it is read from or made by: its rights and its size."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from freehold.core.config import Config
from freehold.ledger.policy import Origin


class Evidence(Config):
    """What shows the licence of the content: a line quoted from a file of the source, or a rule of law, or both."""

    file: str = Field(default="", description="file of the source that holds the quote; `*` matches anything")
    quote: str = Field(default="", description="words found in that file (checked; line breaks do not matter)")
    rule: str = Field(default="", description="law or public statement, when the source itself does not say it")

    @model_validator(mode="after")
    def _both_or_neither(self) -> Evidence:
        if bool(self.file.strip()) != bool(self.quote.strip()):
            raise ValueError("a file and a quote from it go together")
        return self

    def __str__(self) -> str:
        return "; ".join(filter(None, [self.rule, self.file and f'{self.file}: "{self.quote}"']))


class SourceBase(Config):
    """What every source says, whatever it is read from."""

    licence: str = Field(
        default="",
        description="SPDX expression of the text itself; `wrapper` when the text is the package's own work, so that "
        "what the package declares holds for it (evidence is still needed); `detect` to take it, file by file, from "
        "SPDX tags, Debian's copyright file, Creative Commons links, licence files and metadata",
    )
    licence_evidence: Evidence | None = Field(default=None, description="what shows that licence")
    acquired: str = Field(
        default="",
        pattern=r"^(\d{4}-\d{2}-\d{2})?$",
        description="ISO date on which this version was first obtained; empty: the day on which gather read it, which "
        "cards take from its manifest, so that rows are the same whatever the day",
    )
    made_by: Origin = Field(default=Origin(), description="who made it and where, for policies that ask")
    settled: str = Field(
        default="",
        pattern=r"^$|\S",
        description="why what speaks against the licence does not hold, in the words of who looked into it",
    )
    refused: Literal["stop", "drop"] = Field(
        default="stop",
        description="stop: a row the policy does not let through stops gather; drop: it is skipped, and named",
    )
    max_bytes: int | None = Field(
        default=None, gt=0, description="UTF-8 bytes of text to take: documents are chosen by the hash of their id"
    )
    min_bytes: int = Field(default=0, ge=0, description="fewer bytes than this is an error: the source has changed")
    max_document_bytes: int = Field(
        default=8_000_000, gt=0, description="a file larger than this is skipped, and named in sources.json"
    )


class Generated(SourceBase):
    """Text, conversations and held-out tasks that a generator makes; each generator adds settings of its own."""

    kind: Literal["generated"] = "generated"
    generator: str = Field(default="exercises", description="which generator: an entry point of freehold.generators")
    provider: str = Field(
        default="", description="version of the package that has the generator; filled in where it is not Freehold"
    )
    licence: str = "LicenseRef-Freehold-Generated"
    licence_evidence: Evidence | None = Evidence(rule="written by this program; rows name what they were made from")
