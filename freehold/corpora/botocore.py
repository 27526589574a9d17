"""A reader of botocore's descriptions of web services: one document a service."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from freehold.text.html import strip_html
from freehold.text.reading import Member, Part, Reading

many_per_file = False
# Documentation shorter than this says little by itself.
MIN_API_CHARS = 120


def read(members: list[Member], reading: Reading) -> Iterator[Part]:
    """Yield the newest description of each service."""
    return reading.each(_newest(members), lambda member, text: service(member, text, reading))


def service(member: Member, text: str, reading: Reading) -> Iterator[Part]:
    """Yield what its API description says, each block of sentences once in all services."""
    model = json.loads(text)
    title = model.get("metadata", {}).get("serviceFullName", "")
    opening = strip_html(model.get("documentation", ""))
    blocks = [opening if opening.startswith(title) else f"{title}\n\n{opening}"]
    said: set[str] = set()
    for name, html_text in _documentation(model):
        plain = strip_html(html_text)
        if len(plain) >= MIN_API_CHARS and plain not in reading.said and plain not in said:
            said.add(plain)
            blocks.append(f"{name}\n\n{plain}")
    reading.said |= said
    yield Part(member, "", "\n\n\n".join(block.strip() for block in blocks) + "\n")


def _newest(members: list[Member]) -> list[Member]:
    """Return the newest description of each service; paths are `.../<service>/<date>/<file>`."""
    newest: dict[str, str] = {}
    for member in members:
        service = member.path.rsplit("/", 2)[0]
        newest[service] = max(newest.get(service, ""), member.path)
    return [member for member in members if member.path in newest.values()]


def _documentation(model: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for name, operation in model.get("operations", {}).items():
        yield name, operation.get("documentation", "")
    for name, shape in model.get("shapes", {}).items():
        yield name, shape.get("documentation", "")
    for name, shape in model.get("shapes", {}).items():  # last: the most, and the most similar
        for member, inner in shape.get("members", {}).items():
            yield f"{name}.{member}", inner.get("documentation", "")
