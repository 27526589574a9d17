"""The web page at `/`: talk to the model, see its reasoning, its tool calls and its speed."""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path

PAGE = Path(__file__).with_name("page.html")


def page_html() -> bytes:
    """Return the page."""
    return PAGE.read_bytes()


def _allowed(tag: str) -> str:
    """Return the hash of the page's one script or style, by which alone a browser may run it."""
    found = re.search(rf"<{tag}>(.*?)</{tag}>", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert found is not None
    return base64.b64encode(hashlib.sha256(found[1].encode()).digest()).decode()


# Nothing is loaded from anywhere, and nothing but this script runs: what a model writes cannot become a program, and
# no other site can frame the page.
PAGE_HEADERS = {
    "Content-Security-Policy": (
        f"default-src 'none'; script-src 'sha256-{_allowed('script')}'; style-src 'sha256-{_allowed('style')}'; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
