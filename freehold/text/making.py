"""Text that is made, not read: what a generator gets and what it returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar

from freehold.text.reading import Member
from freehold.text.source import Generated

if TYPE_CHECKING:  # its parquet library takes a while to import, and a dry run only asks for settings
    from freehold.core.document import Conversation, Document

S = TypeVar("S", bound=Generated)

GENERATORS = "freehold.generators"
"""The group of entry points that generators are declared in."""


class Use(NamedTuple):
    """A source of the recipe that a generator makes text from."""

    source: str
    """Its name in the recipe."""
    reader: str
    """The reader it must have, so that its files are of the form the generator expects."""


class Requirement(NamedTuple):
    """A distribution that a generator imports; another version would make other text."""

    distribution: str
    version: str
    install: str
    """The line to type when it is missing."""


@dataclass(frozen=True)
class Material:
    """The files of a source that a generator uses, and the terms that everything made of them is under."""

    version: str
    acquired: str
    members: list[Member]
    limit_bytes: int
    licence: str
    """The strictest of its files, as an SPDX expression."""
    doubt: str
    """Empty, or what speaks against that licence: rows made from it carry it, with low confidence."""


@dataclass(frozen=True)
class Made:
    """Everything one generator makes."""

    documents: list[Document]
    conversations: list[Conversation]
    tasks: dict[str, list[dict[str, Any]]]
    """Held-out items of `tasks/<name>.jsonl`."""
    record: dict[str, Any] = field(default_factory=dict)
    """What sources.json keeps about the making: seeds."""


class Generator(Protocol[S]):
    """What an entry point of `freehold.generators` names: a module or an object that makes text.

    Rights: each row carries its own. What was made from a source or with a package is under the strictest of all
    terms (`freehold.ledger.licence.strictest`), names it in `synthetic_from`, and passes its `doubt` on.
    Errors: contradicting settings are a validator of `Settings`; what is missing on the machine is a DataError.
    """

    Settings: type[S]
    """What the recipe may set, a subclass of `Generated`."""
    requires: tuple[Requirement, ...]
    """What must be installed."""

    def uses(self, settings: S) -> Mapping[str, Use]:
        """Return which sources are used, by the key of the settings that names them."""
        ...

    def make(self, settings: S, materials: Mapping[str, Material], name: str, seed: int) -> Made:
        """Return the documents, conversations and tasks of the source called `name`: a pure function of its arguments.

        `materials` has the sources of `uses` by key; one that the policy refused and the recipe drops is missing.
        """
        ...
