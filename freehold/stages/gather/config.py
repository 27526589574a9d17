"""What a recipe may set for `freehold gather`: the sources, their rights, their sizes, and the policy."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, SerializeAsAny, model_validator

from freehold.conversations.formats import Format
from freehold.core.config import Config, fill
from freehold.core.errors import ConfigError
from freehold.core.extensions import OWN, check_name, declared, load, provider
from freehold.ledger.policy import Policy
from freehold.ledger.reservations import Reservations
from freehold.text.making import GENERATORS
from freehold.text.reading import READERS
from freehold.text.source import Generated, SourceBase

Kind = Literal["prose", "code", "docstring", "reference"]
# Keys or columns of a row's own rights: the names of these fields everywhere else in Freehold.
LICENCE_KEY, EVIDENCE_KEY = "licence", "licence_evidence"
MAX_UNPACKED_BYTES = 4_000_000_000
"""Ten times the largest archive of the shipped recipes, unpacked."""
GENERAL = ("auto", "docstrings", "html", "pdf", "python", "text")
"""The readers of general formats; the others are entry points of packages."""


class FileSource(SourceBase):
    """A source whose documents are in files."""

    members: tuple[str, ...] = Field(default=("*",), description="globs of the files to read; `*` also matches `/`")
    exclude: tuple[str, ...] = Field(default=(), description="globs of files to skip")
    reader: str = Field(
        default="text",
        description="how a file becomes documents: text, html, pdf, python, docstrings, auto (by its ending: .html, "
        ".py, .pdf, else text), or an entry point of freehold.readers: bible, botocore, dictd, factbook, your own",
    )
    provider: str = Field(
        default="", description="version of the package that has the reader; filled in where it is not Freehold"
    )
    select: str = Field(
        default="", description="CSS selector of the main text for the html reader; empty: main, article or body"
    )
    content: Kind = Field(default="prose", description="what the documents are, for the filters of curate")
    separator: str = Field(
        default="",
        description="words between the documents of one file, such as `<|endoftext|>`, for the text reader; "
        "`max_document_bytes` is then the limit of a document, and a file may be of any size",
    )
    cut_bytes: int | None = Field(default=None, gt=0, description="end longer documents at a paragraph before this")

    @model_validator(mode="after")
    def _one_reader_separates(self) -> FileSource:
        if self.separator and self.reader != "text":
            raise ValueError(f"`separator` is for the reader `text`; `{self.reader}` finds documents by itself")
        return self


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
    reader: str = "python"
    content: Kind = "code"
    members: tuple[str, ...] = ("*.py",)
    exclude: tuple[str, ...] = (
        "test/*", "*/test/*", "*/tests/*", "*/idle_test/*", "site-packages/*", "dist-packages/*",
        "encodings/*", "_sysconfigdata*", "pydoc_data/*", "config-*", "__phello__*", "sitecustomize.py",
        "idlelib/*", "turtledemo/*", "lib2to3/*", "distutils/*", "ensurepip/*",
    )  # fmt: skip


class Archive(FileSource):
    """Files inside an archive in `corpus_dir`; nothing is unpacked to disk."""

    file: str = Field(description="name of the archive below corpus_dir")
    sha256: str = Field(pattern="^[0-9a-f]{64}$", description="SHA-256 of the archive")
    max_unpacked_bytes: int = Field(
        default=MAX_UNPACKED_BYTES, gt=0, description="an archive that unpacks to more than this is refused as a bomb"
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
    """One document a row; its keys `licence` and `licence_evidence` are its own rights, else the recipe's hold."""

    path: str = Field(description="the file")
    origin: str = Field(default="", description="where it came from")
    content: Kind = Field(default="prose", description="what the documents are")
    text_key: str = Field(default="text", description="key or column of the text")
    address_key: str = Field(default="url", description="key or column of the web address, for `reservations`")
    max_unpacked_bytes: int = Field(
        default=MAX_UNPACKED_BYTES, gt=0, description="files that unpack to more text than this are refused as bombs"
    )


class JsonLines(Rows):
    """A JSONL file, one object a line, compressed or not; or every `*.jsonl` below a folder."""

    kind: Literal["jsonl"] = "jsonl"


class Parquet(Rows):
    """A parquet file, or every `*.parquet` below a folder."""

    kind: Literal["parquet"] = "parquet"


class Warc(FileSource):
    """The pages of web archives: a WARC file, compressed or not, or every one below a folder.

    A page's address, day and HTTP headers come with it: what its site reserved in headers or in the page is skipped,
    and counted by site. `members` and `exclude` are globs over addresses.
    """

    kind: Literal["warc"] = "warc"
    path: str = Field(description="the file, or the folder of files named .warc, .warc.gz, .warc.zst")
    origin: str = Field(default="", description="which crawl it is")
    reader: str = Field(
        default="auto", description="how a page becomes a document; auto: html, pdf or text by its media type"
    )
    max_unpacked_bytes: int = Field(
        default=100_000_000_000, gt=0, description="archives whose records have more than this are refused as bombs"
    )


class Conversations(SourceBase):
    """A file of conversations, preferences or tasks: JSON lines or one JSON array, compressed or not, or parquet.

    A row's keys `licence` and `licence_evidence` are its own rights, else the recipe's hold. Conversations and pairs
    are for align; tasks are held out for evaluate, and curate drops what holds one of their questions.
    """

    kind: Literal["conversations"] = "conversations"
    path: str = Field(description="the file")
    origin: str = Field(default="", description="where it came from")
    format: Literal["auto", Format] = Field(
        default="auto",
        description="messages (OpenAI), sharegpt, alpaca, prompt_completion, preference (chosen, rejected), unpaired "
        "(prompt, completion, label), task (prompt, answer), choice_task (prompt, choices, answer); auto: by the keys "
        "of its rows, one format a file",
    )
    max_refused: float = Field(
        default=0.05, ge=0, le=1, description="share of rows that may be refused before gather stops"
    )


Source = Annotated[
    Package | Stdlib | Sdist | Debian | Folder | Warc | JsonLines | Parquet | Conversations | SerializeAsAny[Generated],
    Field(discriminator="kind"),
]


class GatherConfig(Config):
    """gather: sources become documents with evidence of their licence."""

    sources: dict[str, Source] = Field(description="the sources by name; the name is that of the files written")
    reservations: Reservations | None = Field(
        default=None, description="what sites reserve today; documents that a site reserves are skipped, and counted"
    )
    policy: Policy = Field(default=Policy(), description="what may enter")
    corpus_dir: str = Field(default="corpus", description="folder with downloaded archives and packages")
    pinned: bool = Field(
        default=True,
        description="false: take Debian packages of other versions than the recipe's, and record version and hash",
    )

    @model_validator(mode="before")
    @classmethod
    def _extend(cls, data: Any) -> Any:
        """Fill the settings of generators, which they declare themselves, and the versions of other packages."""
        sources = data.get("sources") if isinstance(data, dict) else None
        if not isinstance(sources, dict):
            return data
        return data | {"sources": {name: _extended(f"gather.sources.{name}", one) for name, one in sources.items()}}

    @model_validator(mode="after")
    def _names(self) -> GatherConfig:
        if not self.sources:
            raise ValueError("at least one source")
        for name, source in self.sources.items():
            if not name.replace("_", "").replace("-", "").isalnum():
                raise ValueError(f"`{name}`: a source's name is made of letters, digits, `_` and `-`")
            if isinstance(source, Generated):
                for key, (used, reader) in generator_of(source, name).uses(source).items():
                    found = self.sources.get(used)
                    if not isinstance(found, FileSource) or found.reader != reader:
                        raise ValueError(f"`{name}.{key}` names `{used}`, which is no source read by {reader}")
        return self

    @classmethod
    def model_json_schema(cls, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Return the JSON Schema, the settings of every installed generator among those of generated sources."""
        schema = super().model_json_schema(*args, **kwargs)
        shown = schema["$defs"]["Generated"]["properties"]
        for name in sorted(declared(GENERATORS)):
            settings = _generator(name, "generator").Settings.model_json_schema()["properties"]
            shown |= {key: one for key, one in settings.items() if key not in shown}
        return schema


def generator_of(source: Generated, name: str) -> Any:
    """Return the generator of a source: a module or object that follows `freehold.text.making.Generator`."""
    return _generator(source.generator, f"gather.sources.{name}.generator")


def _generator(name: str, where: str) -> Any:
    return load(GENERATORS, name, where, ("Settings", "requires", "uses", "make"))


def _extended(where: str, data: Any) -> Any:
    """Return the data of a source with what its reader or generator adds."""
    if not isinstance(data, dict):
        return data
    if data.get("kind") == "generated":
        name = str(data.get("generator", Generated.model_fields["generator"].default))
        settings = _generator(name, f"{where}.generator").Settings
        return fill(settings, data | _provided(GENERATORS, name, data, where), where)
    reader = str(data.get("reader", "text"))
    if reader in GENERAL:
        return data
    names = declared(READERS)
    check_name(READERS, reader, [*names, *GENERAL], f"{where}.reader")
    return data | _provided(READERS, reader, data, where)


def _provided(group: str, name: str, data: dict[str, Any], where: str) -> dict[str, str]:
    """Return `{provider: name==version}` where the code is another package's: another version makes other bytes.

    Raises ConfigError when the recipe wants another version than the one installed.
    """
    entry = declared(group)[name]
    if entry.dist is None or entry.dist.name == OWN:
        return {}
    found, wanted = provider(entry), data.get("provider")
    if wanted and wanted != found:
        raise ConfigError(
            f"`{name}` of {group} comes from another version than the recipe says",
            where=f"{where}.provider",
            found=found,
            expected=wanted,
            todo=f"pip install {wanted}, or change `provider`",
        )
    return {"provider": found}


def plan(config: GatherConfig) -> list[str]:
    """Return the lines a dry run prints: sources, sizes, and what has to be there."""
    lines = []
    for name, source in config.sources.items():
        size = f"up to {source.max_bytes / 1e6:.1f} MB" if source.max_bytes else "everything"
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
        case Folder() | Warc() | JsonLines() | Parquet() | Conversations():
            return source.path
        case Generated():
            return f"made by the generator {source.generator}"
