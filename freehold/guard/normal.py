"""Text as detectors read it: one form for letters that look the same, nothing invisible, encodings opened.

Only detectors see this form. Each of its characters knows where it comes from, so what is found can be cut out of the
text that a user wrote or the model said.
"""

from __future__ import annotations

import base64
import binascii
import codecs
import re
import unicodedata
import urllib.parse
from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

Span = tuple[int, int]

# Letters of other scripts that are drawn as a Latin one (after Unicode's confusables, those of common fonts).
_LOOKALIKES = {
    "Latin": str.maketrans(
        "АВЕЅІЈКМНОРСТУХаеѕіјорсухԁԛԝһΑΒΕΖΗΙΚΜΝΟΡΤΥΧανορτυχιıɡɑℓ",
        "ABESIJKMHOPCTYXaesijopcyxdqwhABEZHIKMNOPTYXavoptuxiigal",
    )
}
_DECODED_MOST = 20_000
"""Characters of one encoded run that are opened: more takes time, and says the same."""
_BASE64 = re.compile(r"[A-Za-z0-9+/_-]{16,}+={0,2}")
_HEX = re.compile(r"(?<![0-9A-Za-z])(?:[0-9A-Fa-f]{2}[ :]?){8,}(?![0-9A-Za-z])")
_PERCENT = re.compile(r"(?:%[0-9A-Fa-f]{2}[^\s%]{0,50}+){1,}+")
_BEFORE_CHARS = 200
"""How far before its first sign a percent-encoded run can begin."""


class Form(NamedTuple):
    """One way to read a text."""

    text: str
    starts: list[int] | None
    """Where each character comes from; None: characters are where they are in the text"""
    ends: list[int] | None
    within: Span | None = None
    """The run that was opened; what is found in it stands for all of the run."""

    def origin(self, span: Span) -> Span:
        """Return where in the text a span of this form comes from."""
        if self.within is not None:
            return self.within
        if self.starts is None or self.ends is None:
            return span
        return self.starts[span[0]], self.ends[span[1] - 1]


def forms(text: str) -> Iterator[Form]:
    """Yield a text as it is, in one form for letters, and what is encoded in it."""
    yield Form(text, None, None)
    plain = text
    if not text.isascii():
        normal = _normalised(text)
        if normal.text != text:
            yield normal
            plain = normal.text
    else:
        normal = Form(text, None, None)
    turned = codecs.encode(plain, "rot13")
    yield Form(turned, normal.starts, normal.ends)
    for start, end, inside in _opened(plain):
        yield Form(inside, None, None, normal.origin((start, end)))


def _normalised(text: str) -> Form:
    """Return the text in NFKC, without characters of format, with lookalikes as Latin letters."""
    out, starts, ends = [], [], []
    for start, end in _clusters(text):
        for character in _form_of(text[start:end]):
            out.append(character)
            starts.append(start)
            ends.append(end)
    return Form("".join(out), starts, ends)


def _clusters(text: str) -> Iterator[Span]:
    """Yield each character with the marks on it: they are composed together."""
    start = 0
    for at in range(1, len(text) + 1):
        if at == len(text) or not unicodedata.combining(text[at]):
            yield start, at
            start = at


@lru_cache(maxsize=4096)
def _form_of(cluster: str) -> str:
    if cluster.isascii():
        return cluster
    folded = unicodedata.normalize("NFKC", cluster).translate(_LOOKALIKES["Latin"])
    # Format characters (zero width, direction, soft hyphens) and variation selectors are not seen.
    return "".join(c for c in folded if unicodedata.category(c) != "Cf" and not "\ufe00" <= c <= "\ufe0f")


def _opened(text: str) -> Iterator[tuple[int, int, str]]:
    """Yield where an encoded run begins and ends, with what is in it."""
    for match in _BASE64.finditer(text):
        yield from _if_text(match.span(), _base64(match[0][:_DECODED_MOST]))
    for match in _HEX.finditer(text):
        digits = re.sub("[ :]", "", match[0][:_DECODED_MOST])
        yield from _if_text(match.span(), bytes.fromhex(digits[: len(digits) // 2 * 2]))
    for match in _PERCENT.finditer(text):
        start = match.start()
        while start > max(0, match.start() - _BEFORE_CHARS) and not text[start - 1].isspace():
            start -= 1
        run = text[start : match.end()][:_DECODED_MOST]
        yield from _if_text((start, match.end()), urllib.parse.unquote_to_bytes(run))


def _base64(run: str) -> bytes:
    try:
        plain = run.rstrip("=").replace("-", "+").replace("_", "/")
        return base64.b64decode(plain + "=" * (-len(plain) % 4))
    except (binascii.Error, ValueError):
        return b""


def _if_text(span: Span, data: bytes) -> Iterator[tuple[int, int, str]]:
    """Yield an opened run if it can be read; a random one decodes to controls and broken UTF-8."""
    inside = data.decode("utf-8", errors="replace").strip("\ufffd")
    if inside and sum(c.isprintable() or c in "\n\t" for c in inside) >= 0.9 * len(inside) and "\ufffd" not in inside:
        yield *span, inside
