from __future__ import annotations

import pytest

from freehold.text.html import page_text, strip_html


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
        ("one<hr>two<blockquote>three</blockquote>four", "one\ntwo\nthree\nfour"),
        ("<table><tr><td>17</td><td>30</td></tr></table>", "17 30"),
    ],
)
def test_strips_html(html: str, text: str) -> None:
    assert strip_html(html) == text


@pytest.mark.parametrize(
    ("html", "text"),
    [
        ("6.022 &times; 10<sup>23</sup> of them", "6.022 × 10^23 of them"),
        ("100 km<sup>2</sup>, 2<sup>10</sup>=1024", "100 km^2, 2^10=1024"),
        ("10<sup>&minus;3</sup>m and x<sup>n+1</sup>", "10^−3 m and x^(n+1)"),
        ("<i>x</i><sup>2</sup>, &pi;<sup>2</sup>, (a+b)<sup>2</sup>", "x^2, π^2, (a+b)^2"),
        ("2<sup>2<sup>3</sup></sup> and 10<sup><em>5</em></sup>", "2^(2^3) and 10^5"),
        ("H<sub>2</sub>O, C<sub>60</sub>, log<sub>2</sub>8, 101<sub>2</sub>", "H2O, C60, log_2 8, 101_2"),
        ("1<sup>1</sup>/<sub>2</sub> cups, <sup>3</sup>/<sub>4</sub>", "1 1/2 cups, 3/4"),
        ("the 1<sup>st</sup> M<sup>me</sup> of Brand<sup>TM</sup>", "the 1st Mme of BrandTM"),
        ("in 1987<sup><a href='#n1'>2</a></sup> and 5<sup><a href='p#n3'>[3]</a></sup>", "in 1987[2] and 5[3]"),
        ("<p><sup>1</sup> A note</p>", "1 A note"),
        ("a price of <del>10</del><ins>80</ins>", "a price of 10 80"),
        ("5<sup>&lt;9</sup>", "5^(<9)"),
    ],
)
def test_raised_numbers_stay_apart_from_their_base(html: str, text: str) -> None:
    assert strip_html(html) == text


@pytest.mark.parametrize(
    ("html", "text"),
    [
        ("<h1>A</h1>\n<p>one\ntwo</p>", "A\n\none two"),
        ("<pre>def f():\n    return &lt;1\n</pre><p>x</p>", "def f():\n    return <1\n\nx"),
        ("<ul><li>a</li><li>b</li></ul><p>c</p>", "- a\n- b\n\nc"),
        ("<table><tr><td>a</td><td>b</td></tr><tr><td>c</td></tr></table>", "a b\n\nc"),
    ],
)
def test_text_of_a_page(html: str, text: str) -> None:
    assert page_text(html) == text


@pytest.mark.parametrize(
    "inside",
    [
        "for n in x:<br>    print(n)",
        "for n in x:<BR/>\n    print(n)".replace("\n", ""),
        '<code><div class="line">for n in x:</div><div class="line">    print(n)</div></code>',
        "<div>for n in x:\n</div><div>    print(n)\n</div>",
        "<p>for n in x:</p>\n<p>    print(n)</p>",
        '<span class="line">for n in x:</span><span class="line">    print(n)</span>',
        '<span class="line">for n in x:</span>\n<span class="line">    print(n)</span>',
        '<span style="display: block">for n in x:</span><span style="display: block">    print(n)</span>',
        "<ol><li>for n in x:</li><li>    print(n)</li></ol>",
        "<table><tr><td>for n in x:</td></tr><tr><td>    print(n)</td></tr></table>",
    ],
)
def test_listing_keeps_its_lines(inside: str) -> None:
    assert page_text(f"<p>a</p><pre>{inside}</pre>") == "a\n\nfor n in x:\n    print(n)"


def test_listing_keeps_blank_lines_and_cells_apart() -> None:
    assert page_text("<pre>a\n\n\nb</pre>") == "a\n\n\nb"
    assert page_text("<pre><div>a</div><div><br></div><div>b</div></pre>") == "a\n\nb"
    assert page_text("<pre><table><tr><td>1</td><td>x = 1</td></tr></table></pre>") == "1 x = 1"
