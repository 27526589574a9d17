from __future__ import annotations

import pytest

from freehold.text.html import strip_html


@pytest.mark.parametrize(
    ("html", "text"),
    [
        ("<p>One</p><p>Two &amp; three</p>", "One\nTwo & three"),
        ("a<br/>b<br>c", "a\nb\nc"),
        ("<ul> <li> <p>x</p> </li><li>y</li></ul>", "- x\n- y"),
        ('see <a href="http://x/?a=1">this</a> and <code>f(x)</code>', "see this and f(x)"),
        ("1 < 2 and &lt;tag&gt;", "1 < 2 and <tag>"),
        ("<script>alert(1)</script>kept", "kept"),
        ("no\u00a0break  spaces", "no break spaces"),
        ("", ""),
    ],
)
def test_strips_html(html: str, text: str) -> None:
    assert strip_html(html) == text
