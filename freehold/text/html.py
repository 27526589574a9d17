"""HTML becomes plain text: fragments in data files, and the main text of a page."""

from __future__ import annotations

import html
import re

BLOCK = re.compile(r"</?(?:p|div|br|ul|ol|dl|dt|dd|table|tr|h[1-6]|note|important|pre|section|title)\b[^<>]*>", re.I)
ITEM = re.compile(r"<li\b[^<>]*>(?:\s*<p>)?", re.I)
TAG = re.compile(r"</?[A-Za-z][A-Za-z0-9]*(?:\s[^<>]*)?/?>")
LISTING = re.compile(r"<pre\b[^<>]*>(.*?)</pre>", re.I | re.S)
CELL = re.compile(r"</t[dh]>", re.I)
DROPPED = re.compile(r"<(script|style)\b.*?</\1>", re.I | re.S)


def strip_html(text: str) -> str:
    """Return the text of an HTML fragment: paragraphs on lines of their own, list items behind dashes."""
    if "<" in text:
        text = DROPPED.sub(" ", text)
        text = ITEM.sub("\n- ", text)
        text = BLOCK.sub("\n", text)
        text = TAG.sub("", text)
    text = html.unescape(text).replace("\u00a0", " ")
    lines = [" ".join(line.split()) for line in text.split("\n")]
    return "\n".join(line for line in lines if line and line != "-")


def page_text(text: str) -> str:
    """Return the text of a page's HTML: blocks a blank line apart, list items close together, listings as they are."""
    blocks: list[str] = []
    for number, piece in enumerate(LISTING.split(text)):
        if number % 2:
            listing = html.unescape(TAG.sub("", piece)).replace("\u00a0", " ").strip("\n")
            blocks += [listing] if listing.strip() else []
            continue
        # In a page a line break is a space, and cells stand apart.
        lines = strip_html(CELL.sub(" ", " ".join(piece.split()))).split("\n")
        for line in filter(None, lines):
            if blocks and line.startswith("- ") and blocks[-1].startswith("- "):
                blocks[-1] += f"\n{line}"
            else:
                blocks.append(line)
    return "\n\n".join(blocks)
