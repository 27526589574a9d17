"""HTML becomes plain text: fragments in data files, and the main text of a page."""

from __future__ import annotations

import html
import re

# Tags that begin and end a line of their own.
BLOCK = re.compile(
    r"</?(?:p|div|br|hr|ul|ol|dl|dt|dd|table|caption|tr|h[1-6]|note|important|pre|section|title|article|header|footer|main"
    r"|blockquote|figure|figcaption|address|details|summary|center|fieldset|legend|form)\b[^<>]*>",
    re.I,
)
ITEM = re.compile(r"<li\b[^<>]*>(?:\s*<p>)?", re.I)
TAG = re.compile(r"</?[A-Za-z][A-Za-z0-9]*(?:\s[^<>]*)?/?>")
LISTING = re.compile(r"<(pre)\b[^<>]*>", re.I)
CELL = re.compile(r"</t[dh]>", re.I)
DROPPED = re.compile(r"<(script|style)\b", re.I)
# Struck and inserted text stand next to each other: `<del>10</del><ins>80</ins>` is not 1080.
REVISED = re.compile(r"</?(?:del|ins|s|strike)\b[^<>]*>", re.I)
FRACTION = re.compile(r"(\d?)<sup>\s*(\d+)\s*</sup>\s*[/\u2044]\s*<sub>\s*(\d+)\s*</sub>", re.I)
RAISED = re.compile(r"<(sup|sub)\b[^<>]*>((?:(?!</?su[pb]\b).)*?)</\1>", re.I | re.S)
# Written close to what they belong to: 1st, 2e, Mme, TM.
ORDINAL = re.compile(r"(?:st|nd|rd|th|er|re|e|o|a|me|mes|lle|tm|sm|[®™©°ªº*†‡′″]+)\Z", re.I)
# Inside a listing a line ends where one of these elements does.
LINE_TAG = re.compile(r"<(/?)(?:div|p|li|tr|section|table|ol|ul)\b[^<>]*>", re.I)
LINE_SPAN = re.compile(
    r"<span\b[^<>]{0,200}(?:class=[\"']?(?:[^\"'<>]{0,100}\s)?(?:line|code-line|cl)[\"'\s>]|display:\s*block)", re.I
)
BETWEEN_CELLS = re.compile(r"</t[dh]>(?=\s*<t[dh]\b)", re.I)
# How deep superscripts of superscripts are read, and how far back their base is looked for.
DEPTH, BASE_CHARS = 4, 200


def strip_html(text: str) -> str:
    """Return the text of an HTML fragment: paragraphs on lines of their own, list items behind dashes."""
    if "<" in text:
        text = " ".join(_split(text, DROPPED)[::2])
        text = raised(text)
        text = REVISED.sub(" ", text)
        text = ITEM.sub("\n- ", text)
        text = BLOCK.sub("\n", text)
        text = TAG.sub("", CELL.sub(" ", text))
    text = html.unescape(text).replace("\u00a0", " ")
    lines = [" ".join(line.split()) for line in text.split("\n")]
    return "\n".join(line for line in lines if line and line != "-")


def _split(text: str, opening: re.Pattern[str]) -> list[str]:
    """Return the text between the elements that an opening tag finds, and what is in them, in turn; in linear time."""
    pieces, place = [], 0
    while found := opening.search(text, place):
        # Without a closing tag none of this name follows: the rest is searched once, not for each opening tag.
        closing = re.compile(f"</{found[1]}>", re.I).search(text, found.end())
        if closing is None:
            break
        pieces += [text[place : found.start()], text[found.end() : closing.start()]]
        place = closing.end()
    return [*pieces, text[place:]]


def raised(text: str) -> str:
    """Return HTML with superscripts and subscripts in plain form where their base would swallow them.

    `10<sup>23</sup>` becomes `10^23`, `log<sub>2</sub>8` becomes `log_2 8`, a link to a note `[3]`; `H<sub>2</sub>O`
    and `1<sup>st</sup>` stay close, as they are written without markup.
    """
    text = FRACTION.sub(lambda m: f"{m[1]}{' ' if m[1] else ''}{m[2]}/{m[3]}", text)
    for _ in range(DEPTH):
        text, count = RAISED.subn(_raise, text)
        if not count:
            break
    return text


def _base(before: str) -> str:
    """Return the last character of text before some place in HTML; empty at the beginning of a block."""
    for tag in reversed(list(TAG.finditer(before))):
        if tag.end() != len(before):
            break
        if BLOCK.match(tag[0]) or ITEM.match(tag[0]) or tag[0].lower().startswith(("<td", "<th", "</td", "</th")):
            return ""
        before = before[: tag.start()]
    return html.unescape(before)[-1:]


def _raise(found: re.Match[str]) -> str:
    start, end = found.span()
    before, after = _base(found.string[max(0, start - BASE_CHARS) : start]), found.string[end : end + 1]
    body = " ".join(html.unescape(TAG.sub("", found[2])).split())
    if not body or not (before and (before.isalnum() or before in ")]}")):
        return html.escape(body, quote=False)
    if re.search(r"<a\b[^<>]*href\s*=\s*[\"']?[^\"'<>\s]*#", found[2], re.I):
        return body if body.startswith(("[", "(")) else f"[{body}]"
    if ORDINAL.match(body) or body.startswith(("[", "(")):
        return html.escape(body, quote=False)
    mark = "^" if found[1].lower() == "sup" else "_"
    if mark == "_" and body.isdigit() and not before.isdigit() and not after.isdigit():
        return body  # H2O: the letters around keep the number apart
    plain = body if re.fullmatch(r"[-+\u2212]?[\w.,]+", body) else f"({body})"
    return html.escape(f"{mark}{plain}", quote=False) + (" " if after.isalnum() else "")


def listing_text(markup: str) -> str:
    """Return the text of a `<pre>` element: each line on a line of its own, whatever ends it in the markup."""
    text = re.sub(r"<br\s*/?>", "\n", BETWEEN_CELLS.sub(" ", raised(markup)), flags=re.I)
    if "\n" not in text.strip("\n"):  # lines that only the elements around them keep apart
        text = re.sub(LINE_SPAN, lambda m: f"\n{m[0]}", text)
    # An element that ends on a line end does not make another.
    text = LINE_TAG.sub(lambda m: "\x00" if m[1] else "\x01", text)
    text = re.sub(r"\n?[\x00\x01]*\x00[\x00\x01]*\n?|(?<=[^\n])\x01+", "\n", text).replace("\x01", "")
    return html.unescape(TAG.sub("", text)).replace("\u00a0", " ").strip("\n")


def page_text(text: str) -> str:
    """Return the text of a page's HTML: blocks a blank line apart, list items close together, listings as they are."""
    blocks: list[str] = []
    for number, piece in enumerate(_split(text, LISTING)):
        if number % 2:
            listing = listing_text(piece)
            blocks += [listing] if listing.strip() else []
            continue
        # In a page a line break is a space.
        lines = strip_html(" ".join(piece.split())).split("\n")
        for line in filter(None, lines):
            if blocks and line.startswith("- ") and blocks[-1].startswith("- "):
                blocks[-1] += f"\n{line}"
            else:
                blocks.append(line)
    return "\n\n".join(blocks)
