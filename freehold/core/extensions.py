"""What other packages add to Freehold: objects found by name through the entry points they declare.

Freehold's own readers and generators are declared in `pyproject.toml` the same way, so there is one way to add one.
Nothing is imported before it is asked for by name. See docs/extending.md.
"""

from __future__ import annotations

import difflib
import importlib.metadata
from collections.abc import Iterable
from typing import Any

from freehold.core.errors import ConfigError

OWN = "freehold"


def declared(group: str) -> dict[str, importlib.metadata.EntryPoint]:
    """Return the entry points of a group by name.

    Raises ConfigError when Freehold's own are missing (it runs from a source tree that was never installed, or whose
    metadata is older than the source), and when two packages declare the same name.
    """
    found: dict[str, importlib.metadata.EntryPoint] = {}
    for entry in importlib.metadata.entry_points(group=group):
        if entry.name in found:
            raise ConfigError(
                "two packages declare the same name",
                where=group,
                found=f"`{entry.name}` in {provider(found[entry.name])} and in {provider(entry)}",
                todo="uninstall one of them",
            )
        found[entry.name] = entry
    if not any(entry.dist is not None and entry.dist.name == OWN for entry in found.values()):
        raise ConfigError(
            f"the entry points {group} of Freehold itself are missing",
            found="Freehold runs from a source tree without current package metadata",
            expected=f"an installed distribution `{OWN}` that declares {group}",
            todo="install it from the source tree: pip install --no-deps -e .",
        )
    return found


def provider(entry: importlib.metadata.EntryPoint) -> str:
    """Return the distribution that declares an entry point: `name==version`."""
    return f"{entry.dist.name}=={entry.dist.version}" if entry.dist is not None else entry.value


def check_name(group: str, name: str, known: Iterable[str], where: str) -> None:
    """Raise ConfigError, listing the known names, when `name` is none of them."""
    known = sorted(known)
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
        raise ConfigError(
            f"no such {group.rpartition('.')[2].removesuffix('s')}",
            where=where,
            found=name,
            expected=", ".join(known),
            todo=f"did you mean `{near[0]}`?" if near else f"install the package that declares it under {group}",
        )


def load(group: str, name: str, where: str, needs: tuple[str, ...] = ()) -> Any:
    """Return the object that an entry point names; it must have the attributes `needs`.

    Raises ConfigError when the name is unknown, when its module cannot be imported, and when an attribute is missing.
    """
    entries = declared(group)
    check_name(group, name, entries, where)
    entry = entries[name]
    try:
        found = entry.load()
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"`{name}` of {group} cannot be imported",
            where=where,
            found=f"{type(error).__name__}: {error}",
            expected=f"{entry.value} of {provider(entry)}",
            todo="install that package again, with what it requires",
        ) from error
    missing = [attribute for attribute in needs if not hasattr(found, attribute)]
    if missing:
        raise ConfigError(
            f"`{name}` of {group} does not follow the protocol",
            where=where,
            found=f"{entry.value} of {provider(entry)} has no {', '.join(missing)}",
            expected=f"{', '.join(needs)}; see docs/extending.md",
        )
    return found
