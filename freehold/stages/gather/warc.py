"""Pages of web archives (WARC, ISO 28500), with their address, their day and their HTTP headers.

An archive is read twice: once to find its pages and hash them, then page by page in the order that the source wants,
each found by the place of its record. Nothing is unpacked to disk.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from freehold.core.artifact import sha256_file
from freehold.core.errors import DataError
from freehold.ledger.reservations import host_and_path
from freehold.stages.gather.config import Warc
from freehold.stages.gather.origins import Origin, too_large
from freehold.stages.gather.paths import Changed, name_below, rows_files, wanted
from freehold.text.reading import Member, Web, encodable

HEADER_BYTES = 1 << 18
TEXT_MEDIA = {
    "text/html": "html", "application/xhtml+xml": "html", "text/plain": "text", "text/markdown": "text",
    "application/pdf": "pdf",
}  # fmt: skip
"""Media types whose payload is text, and the reader of each."""


def find_pages(name: str, source: Warc) -> Origin:
    """Return the pages of a source's archives; what is no text, no answer of success or too large is noted.

    Raises DataError when the archives unpack to more than they may.
    """
    files = rows_files(source)
    origin = Origin(name, source.origin or Path(source.path).name, "", (), [], source.acquired)
    left = source.max_unpacked_bytes
    for path in files:
        place = name_below(path, source.path)
        origin.containers[place] = sha256_file(path)
        for number, record in enumerate(_records(path, place, 0, origin.skipped), 1):
            left -= record.content_length
            if left < 0:
                raise _too_much(path, source)
            try:
                _take(path, f"{place}/{number}", record, source, origin)
                record.reader.consume()
            except OSError as error:  # of a payload that is not what its headers say
                origin.skipped.append((f"{place}/{number}", f"cannot be read: {str(error)[:200]}"))
    return origin


def _take(path: Path, place: str, record: Any, source: Warc, origin: Origin) -> None:
    """Add the page of a record to the members of a source, or note why it is none."""
    web = web_of(record)
    origin.paths.append(web.address)
    if not wanted(web.address, source):
        return
    data, reason = b"", _no_page(record, web)
    if not reason:
        data = record.reader.read(source.max_document_bytes + 1)
        if len(data) > source.max_document_bytes:
            reason = too_large(len(data), source.max_document_bytes)
    if reason:
        origin.skipped.append((place, f"{web.address[:200]}: {reason}"))
        return
    digest = hashlib.sha256(data).hexdigest()
    read = functools.partial(_read, path, record.stream_pos, record.record_id, digest)
    origin.members.append(Member(place, digest, len(data), read, web=web))


def web_of(record: Any) -> Web:
    """Return what a record says of its page."""
    address = str(record.headers.get("WARC-Target-URI") or "").strip("<> ")
    http = record.http_headers
    headers: dict[str, str] = {}
    for key, value in http.to_tuples() if http else ():
        key = key.lower()
        headers[key] = f"{headers[key]}, {value}" if key in headers else value
    media = str(record.http_content_type if http else record.headers.get("Content-Type") or "")
    day = record.record_date.date().isoformat() if record.record_date else ""
    charset = str(record.http_charset or "") if http else ""
    return Web(address, day, media.partition(";")[0].strip().lower(), charset, headers)


def _no_page(record: Any, web: Web) -> str:
    """Return why a record is no page; empty when it is one."""
    status = record.http_headers.status_code if record.http_headers else None
    if record.is_http and status != 200:
        return f"HTTP status {status}" if status else "no HTTP answer in it: it is damaged"
    if not encodable(web.address) or not host_and_path(web.address)[0]:
        return "no web address"
    return "" if web.media in TEXT_MEDIA else f"no text: {web.media or 'no media type'}"


def _records(path: Path, place: str, start: int, skipped: list[tuple[str, str]]) -> Iterator[Any]:
    """Yield the records of an archive that hold pages, from a place on; damage ends it and is noted."""
    from fastwarc.warc import ArchiveIterator, WarcRecordType

    kinds = WarcRecordType.response | WarcRecordType.resource | WarcRecordType.conversion
    try:
        with path.open("rb") as file:
            file.seek(start)
            yield from ArchiveIterator(file, record_types=kinds, auto_decode="all", max_header_len=HEADER_BYTES)
    except (OSError, ValueError) as error:
        skipped.append((place, f"damaged, read as far as it goes: {str(error)[:200]}"))


def _read(path: Path, start: int, identity: str, sha256: str, limit: int) -> bytes | None:
    """Return the payload of one record; Changed when the archive has another one there now."""
    for record in _records(path, path.name, start, []):
        data: bytes = record.reader.read(limit + 1)
        if len(data) > limit:
            return None
        if record.record_id == identity and hashlib.sha256(data).hexdigest() == sha256:
            return data
        break
    raise Changed(
        "a page of a web archive is not where it was",
        where=path,
        found=f"another record at byte {start:,}",
        expected=f"{identity}, sha256 {sha256[:16]}",
        todo="wait until nothing writes there; where all records are compressed as one stream, compress each alone: "
        "fastwarc recompress",
    )


def _too_much(path: Path, source: Warc) -> DataError:
    return DataError(
        "web archives unpack to more than they may",
        where=path,
        expected=f"at most max_unpacked_bytes = {source.max_unpacked_bytes:,}",
        todo="look at what they hold; raise max_unpacked_bytes when that is right",
    )
