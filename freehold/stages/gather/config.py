"""What can be told to `freehold gather`: the sources, their rights, their sizes, and the policy."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from freehold.core.config import Config
from freehold.ledger.policy import Policy

Kind = Literal["prose", "code", "docstring", "reference"]
Reader = Literal["text", "auto", "html", "pdf", "python", "docstrings", "dictd", "bible", "factbook", "botocore"]


class Evidence(Config):
    """What shows the licence of the content: a line quoted from a file of the source, or a rule of law, or both."""

    file: str = Field(default="", description="file of the source that holds the quote; `*` matches anything")
    quote: str = Field(default="", description="words found in that file (checked; line breaks do not matter)")
    rule: str = Field(default="", description="law or public statement, when the source itself does not say it")

    @model_validator(mode="after")
    def _whole(self) -> Evidence:
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
        description="ISO date on which this version was first obtained; empty: the day it came to this machine, so "
        "that rows gathered after another day's installation are other rows",
    )
    settled: str = Field(
        default="",
        pattern=r"^$|\S",
        description="why what speaks against the licence does not hold, in the words of who looked into it",
    )
    refused: Literal["stop", "drop"] = Field(
        default="stop",
        description="stop: a row the policy does not let through stops gather; drop: it is left out, and named",
    )
    max_bytes: int | None = Field(
        default=None, gt=0, description="UTF-8 bytes of text to take: documents are chosen by the hash of their id"
    )
    min_bytes: int = Field(default=0, ge=0, description="fewer bytes than this is an error: the source has changed")
    max_document_bytes: int = Field(
        default=8_000_000, gt=0, description="a file larger than this is skipped, and named in sources.json"
    )


class FileSource(SourceBase):
    """A source whose documents lie in files."""

    members: tuple[str, ...] = Field(default=("*",), description="globs of the files to read; `*` also matches `/`")
    exclude: tuple[str, ...] = Field(default=(), description="globs of files to leave out")
    reader: Reader = Field(
        default="text", description="how a file becomes documents; auto: by its ending (.html, .py, .pdf, else text)"
    )
    select: str = Field(
        default="", description="CSS selector of the main text for the html reader; empty: main, article or body"
    )
    content: Kind = Field(default="prose", description="what the documents are, for the filters of curate")
    cut_bytes: int | None = Field(default=None, gt=0, description="end longer documents at a paragraph before this")


class Package(FileSource):
    """Files of an installed distribution, checked against the hashes in its RECORD."""

    kind: Literal["package"] = "package"
    distribution: str = Field(min_length=1, description="name of the distribution, as pip knows it")
    version: str = Field(description="the version the recipe was written for; another one is an error")
    members_sha256: str = Field(
        default="",
        description="digest over (path, sha256) of the files read; empty for distributions whose files are not the "
        "same on every platform",
    )


class Stdlib(FileSource):
    """Python files of the running interpreter's standard library.

    It is not pinned: the patch version is the machine's, and a recipe that only runs on one patch version would
    run almost nowhere. Version and digest of what was read are recorded instead.
    """

    kind: Literal["stdlib"] = "stdlib"
    reader: Reader = "python"
    content: Kind = "code"
    members: tuple[str, ...] = ("*.py",)
    exclude: tuple[str, ...] = (
        "test/*", "*/test/*", "*/tests/*", "*/idle_test/*", "site-packages/*", "dist-packages/*",
        "encodings/*", "_sysconfigdata*", "pydoc_data/*", "config-*", "__phello__*", "sitecustomize.py",
        "idlelib/*", "turtledemo/*", "lib2to3/*", "distutils/*", "ensurepip/*",
    )  # fmt: skip


class Archive(FileSource):
    """Files inside an archive that lies in `corpus_dir`; nothing is unpacked to disk."""

    file: str = Field(description="name of the archive below corpus_dir")
    sha256: str = Field(pattern="^[0-9a-f]{64}$", description="SHA-256 of the archive")
    max_unpacked_bytes: int = Field(
        default=4_000_000_000, gt=0, description="an archive that unpacks to more than this is refused as a bomb"
    )


class Sdist(Archive):
    """A Python distribution as a file: a source archive (.tar.gz, .tar.xz, .tar.bz2, .zip) or a wheel (.whl)."""

    kind: Literal["sdist"] = "sdist"
    distribution: str = Field(min_length=1, description="name of the distribution")
    version: str = Field(description="its version")


class Debian(Archive):
    """Files of a Debian package (.deb) with the copyright file in it; nothing is installed."""

    kind: Literal["debian"] = "debian"
    package: str = Field(min_length=1, description="name of the package")
    version: str = Field(description="its version, as apt names it")
    upstream: dict[str, str] = Field(
        default={},
        description="regular expressions over installed paths and what stands for them in the source package, where "
        "the globs of the copyright file apply",
    )

    @model_validator(mode="after")
    def _patterns(self) -> Debian:
        for pattern, replacement in self.upstream.items():
            try:
                re.sub(pattern, replacement, "")
            except (re.error, IndexError) as error:
                message = f"`{pattern}`: `{replacement}` is no regular expression with a replacement: {error}"
                raise ValueError(message) from None
        return self


class Folder(FileSource):
    """The user's own text files below a folder; links are not followed."""

    kind: Literal["folder"] = "folder"
    path: str = Field(description="the folder")
    origin: str = Field(default="", description="where it came from: a package, a web address, `own work`")
    members: tuple[str, ...] = ("*.txt", "*.md")


class Rows(SourceBase):
    """One document a row, each with its own rights; what a row does not say comes from the recipe."""

    path: str = Field(description="the file")
    origin: str = Field(default="", description="where it came from")
    content: Kind = Field(default="prose", description="what the documents are")
    text_key: str = Field(default="text", description="key or column of the text")
    licence_key: str = Field(default="licence", description="key or column of the row's licence")
    evidence_key: str = Field(default="licence_evidence", description="key or column of what shows it")


class JsonLines(Rows):
    """A JSONL file, one object a line."""

    kind: Literal["jsonl"] = "jsonl"


class Parquet(Rows):
    """A parquet file, or every `*.parquet` below a folder."""

    kind: Literal["parquet"] = "parquet"


class Generated(SourceBase):
    """Text, conversations and held-out tasks that Freehold makes itself from facts and task generators."""

    kind: Literal["generated"] = "generated"
    licence: str = "LicenseRef-Freehold-Generated"
    licence_evidence: Evidence | None = Evidence(rule="written by this program; rows name what they were made from")
    max_bytes: int | None = 2_400_000
    factbook: str | None = Field(default=None, description="name of the factbook source whose facts become questions")
    wordnet: str | None = Field(
        default=None, description="name of a WordNet source (reader: dictd) whose definitions become questions"
    )
    wordnet_bytes: int = Field(default=0, ge=0, description="text of such questions with their answers, at most")
    wordnet_conversations: int = Field(default=0, ge=0, description="further conversations: such a question, answered")
    conversations: int = Field(default=12_000, ge=0, description="how many conversations to write, at most")
    worked_bytes: int = Field(default=0, ge=0, description="text of exercises with every step written out, ours")
    story_bytes: int = Field(default=0, ge=0, description="text of small stories with questions about them, ours")
    worked_conversations: int = Field(
        default=0, ge=0, description="further conversations: such an exercise, its steps as reasoning"
    )
    tool_conversations: int = Field(default=0, ge=0, description="further conversations: the assistant calls tools")
    held_out_share: float = Field(default=0.2, gt=0, lt=1, description="share of facts kept out of everything written")
    reasoning_items: int = Field(default=300, ge=0, description="held-out items of tasks/reasoning.jsonl")
    factbook_items: int = Field(default=150, ge=0, description="items of each tasks/factbook_*.jsonl")
    reasoning: dict[str, dict[str, bool | int]] = Field(
        default={
            "base_conversion": {"min_base": 2, "max_base": 10, "min_value": 1, "max_value": 100},
            "basic_arithmetic": {
                "min_terms": 2,
                "max_terms": 3,
                "min_digits": 1,
                "max_digits": 2,
                "allow_parentheses": False,
                "allow_negation": False,
            },  # fmt: skip
            "chain_sum": {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 2},
            "count_bits": {"min_n": 1, "max_n": 255},
            "gcd": {"min_numbers": 2, "max_numbers": 2, "min_value": 1, "max_value": 60},
            "lcm": {"min_numbers": 2, "max_numbers": 2, "min_value": 1, "max_value": 30},
            "leg_counting": {"min_animals": 1, "max_animals": 2, "min_instances": 1, "max_instances": 5},
            "letter_counting": {"min_words": 1, "max_words": 1},
            "prime_factorization": {"min_value": 2, "max_value": 200},
            "products": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2},
            "simple_equations": {"min_value": 1, "max_value": 20},
            "spell_backward": {"min_word_len": 3, "max_word_len": 6},
        },
        description="reasoning-gym tasks and their settings",
    )


Source = Annotated[
    Package | Stdlib | Sdist | Debian | Folder | JsonLines | Parquet | Generated, Field(discriminator="kind")
]


class GatherConfig(Config):
    """gather: sources become documents with evidence of their licence."""

    sources: dict[str, Source] = Field(description="the sources by name; the name is that of the files written")
    policy: Policy = Field(default=Policy(), description="what may enter")
    corpus_dir: str = Field(default="corpus", description="folder with downloaded archives and packages")
    pinned: bool = Field(
        default=True,
        description="false: take Debian packages of other versions than the recipe's, and record version and hash",
    )

    @model_validator(mode="after")
    def _names(self) -> GatherConfig:
        if not self.sources:
            raise ValueError("at least one source")
        for name, source in self.sources.items():
            if not name.replace("_", "").replace("-", "").isalnum():
                raise ValueError(f"`{name}`: a source's name is made of letters, digits, `_` and `-`")
            if isinstance(source, Generated):
                for key in ("wordnet_bytes", "wordnet_conversations"):
                    if getattr(source, key) and source.wordnet is None:
                        raise ValueError(f"`{name}.{key}` needs `{name}.wordnet`, the source whose words are asked")
                for key, reader in (("factbook", "factbook"), ("wordnet", "dictd")):
                    asked = getattr(source, key)
                    found = self.sources.get(asked or "")
                    if asked is not None and (not isinstance(found, FileSource) or found.reader != reader):
                        raise ValueError(f"`{name}.{key}` names `{asked}`, which is no source read by {reader}")
        return self


def plan(config: GatherConfig) -> list[str]:
    """Return the lines a dry run prints: sources, sizes, and what has to be there."""
    lines = []
    for name, source in config.sources.items():
        size = f"up to {source.max_bytes / 1e6:.1f} MB" if source.max_bytes else "all of it"
        lines.append(f"{name}: {_origin(source, config.corpus_dir)}, {size}, {source.licence or 'NO LICENCE GIVEN'}")
    capped = sum(s.max_bytes or 0 for s in config.sources.values())
    lines.append(f"{len(config.sources)} sources, at most {capped / 1e6:.1f} MB from those with a cap")
    return lines


def _origin(source: Source, corpus_dir: str) -> str:
    match source:
        case Package():
            return f"{source.distribution}=={source.version}"
        case Stdlib():
            return "standard library"
        case Sdist() | Debian():
            return str(Path(corpus_dir) / source.file)
        case Folder() | JsonLines() | Parquet():
            return source.path
        case Generated():
            return f"generated, {source.conversations:,} conversations"
