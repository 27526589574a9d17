"""Small pieces of a page: charts as SVG, tables, pictures as data; no script, and every text is escaped.

What comes from outside (names of sources, licences, answers) can hold anything, so nothing is put into the page but
through `escape`. The page's own policy lets it load nothing and run nothing.
"""

from __future__ import annotations

import base64
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

from freehold.core.table import Table
from freehold.run.series import thin

WIDTH, HEIGHT, LEFT, BOTTOM = 520, 200, 56, 22
MOST_POINTS = 600
"""Of a curve: about one for each pixel it is drawn with."""
COLOURS = ("#1f5fa8", "#c25b12", "#2b7a3d", "#8a3ea8", "#a81f3f", "#5b6470")
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
STYLE = """
:root { color-scheme: light dark; font: 15px/1.45 system-ui, sans-serif }
body { margin: 0 auto; max-width: 1120px; padding: 1rem }
h1 { margin-bottom: 0 } h2 { border-top: 1px solid #8884; margin: 2rem 0 .5rem; padding-top: .75rem }
nav a { margin-right: 1rem }
.charts { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(480px, 1fr)) }
figure { margin: 0 } figcaption { font-weight: 600 } svg { height: auto; max-width: 100% }
svg text { fill: currentColor; font-size: 11px } .grid { stroke: currentColor; opacity: .15 }
table { border-collapse: collapse; display: block; margin: .5rem 0 1rem; overflow-x: auto }
td, th { border-bottom: 1px solid #8883; padding: .2rem .6rem; text-align: right; vertical-align: top }
td.left, th.left { text-align: left } .heat { image-rendering: pixelated; width: 100% }
pre { overflow-x: auto } .note { opacity: .75 } .bad { color: #c0392b; font-weight: 600 } .good { color: #2b7a3d }
a:focus, summary:focus, [tabindex]:focus { outline: 3px solid #1f5fa8; outline-offset: 2px }
"""


@dataclass(frozen=True)
class Curve:
    """One line of a chart."""

    name: str
    steps: np.ndarray
    values: np.ndarray


def chart(title: str, curves: Sequence[Curve], *, zero: bool = False, marks: Sequence[tuple[int, str]] = ()) -> str:
    """Return a chart of curves over steps as a figure; empty text when there is nothing to draw.

    `marks` are vertical lines (step, text). With `zero` the axis begins at 0. Values that are no numbers are skipped.
    """
    drawn = []
    for curve in curves:
        fine = np.isfinite(curve.values)
        if fine.any():
            drawn.append(Curve(curve.name, *thin(curve.steps[fine], curve.values[fine], MOST_POINTS)))
    if not drawn:
        return ""
    low = min(float(curve.values.min()) for curve in drawn)
    high = max(float(curve.values.max()) for curve in drawn)
    low = min(low, 0.0) if zero else low
    first, last = min(float(c.steps[0]) for c in drawn), max(float(c.steps[-1]) for c in drawn)
    across, up = max(last - first, 1.0), max(high - low, 1e-12)

    def x(steps: np.ndarray) -> np.ndarray:
        return LEFT + (steps - first) / across * (WIDTH - LEFT - 8)

    def y(values: np.ndarray) -> np.ndarray:
        return HEIGHT - BOTTOM - (values - low) / up * (HEIGHT - BOTTOM - 10)

    parts = [_grid(low, high, first, last)]
    for step, text in marks:
        at = float(x(np.array([step], dtype=float))[0])
        parts.append(
            f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="10" y2="{HEIGHT - BOTTOM}" stroke-dasharray="4 3">'
            f"<title>{escape(text)}</title></line>"
        )
    for number, curve in enumerate(drawn):
        points = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x(curve.steps), y(curve.values), strict=True))
        colour, last_value = COLOURS[number % len(COLOURS)], float(curve.values[-1])
        parts.append(
            f'<polyline fill="none" stroke="{colour}" stroke-width="1.5" points="{points}">'
            f"<title>{escape(curve.name)}: {last_value:.4g} at step {int(curve.steps[-1]):,}</title></polyline>"
        )
    names = " ".join(
        f'<span style="color:{COLOURS[n % len(COLOURS)]}">{escape(c.name)} {float(c.values[-1]):.4g}</span>'
        for n, c in enumerate(drawn)
    )
    label = f"{title}: " + ", ".join(f"{c.name} ends at {float(c.values[-1]):.4g}" for c in drawn[:6])
    return (
        f"<figure><figcaption>{escape(title)}</figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" tabindex="0" aria-label="{escape(label)}">'
        f"{''.join(parts)}</svg>"
        f'<div class="note">{names}</div></figure>'
    )


def _grid(low: float, high: float, first: float, last: float) -> str:
    lines = []
    for share in (0.0, 0.5, 1.0):
        at = HEIGHT - BOTTOM - share * (HEIGHT - BOTTOM - 10)
        lines.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - 8}" y1="{at:.1f}" y2="{at:.1f}"/>')
        lines.append(f'<text x="{LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{low + share * (high - low):.4g}</text>')
    lines.append(f'<text x="{LEFT}" y="{HEIGHT - 6}">{first:,.0f}</text>')
    lines.append(f'<text x="{WIDTH - 8}" y="{HEIGHT - 6}" text-anchor="end">step {last:,.0f}</text>')
    return "".join(lines)


def heat(title: str, load: np.ndarray) -> str:
    """Return expert load [bins, E], relative to an equal share, as a picture: time to the right, experts downwards."""
    share = np.clip(load.T, 0.0, 2.0) / 2.0  # [E, bins]; 1 is an equal share, 2 and more is the end of the scale
    pixels = np.empty((*share.shape, 3), np.uint8)
    pixels[..., 0] = np.clip(share * 2 - 1, 0, 1) * 224 + 31  # red: too much
    pixels[..., 1] = (1 - np.abs(share - 0.5) * 2) * 180 + 50
    pixels[..., 2] = np.clip(1 - share * 2, 0, 1) * 224 + 31  # blue: too little
    source = base64.b64encode(png(pixels)).decode()
    worst = float(load[-1].max()) if len(load) else 0.0
    text = f"{title}: expert load over time; at the end the fullest expert has {worst:.2f} times an equal share"
    return (
        f"<figure><figcaption>{escape(title)}</figcaption>"
        f'<img class="heat" height="{max(24, min(4 * share.shape[0], 256))}" alt="{escape(text)}" '
        f'src="data:image/png;base64,{source}"></figure>'
    )


def png(pixels: np.ndarray) -> bytes:
    """Return an RGB picture [height, width, 3] as PNG (RFC 2083), the same bytes each time."""
    height, width, _ = pixels.shape
    raw = b"".join(b"\x00" + row.tobytes() for row in pixels)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(raw, 9)) + chunk(b"IEND", b"")


def table(made: Table) -> str:
    """Return a table."""
    head = "".join(_cell("th", cell, i in made.left) for i, cell in enumerate(made.header))
    body = "".join(
        "<tr>" + "".join(_cell("td", cell, i in made.left) for i, cell in enumerate(row)) + "</tr>" for row in made.rows
    )
    note = f'<p class="note">{escape(made.note)}</p>' if made.note else ""
    return f"<h3>{escape(made.title)}</h3><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{note}"


def _cell(kind: str, text: str, left: bool) -> str:
    return f"<{kind}{' class=left' if left else ''}>{escape(str(text))}</{kind}>"


def section(name: str, title: str, *parts: str) -> str:
    """Return a section with an anchor; empty when it holds nothing."""
    body = "".join(parts)
    return f'<section id="{name}"><h2>{escape(title)}</h2>{body}</section>' if body else ""


def document(title: str, sections: Sequence[tuple[str, str, str]], *, note: str = "", refresh_s: int = 0) -> str:
    """Return the page: sections as (anchor, title, HTML), those without content skipped.

    With `refresh_s` it loads itself again after that many seconds.
    """
    kept = [(name, text, body) for name, text, body in sections if body]
    links = "".join(f'<a href="#{name}">{escape(text)}</a>' for name, text, _ in kept)
    again = f'<meta http-equiv="refresh" content="{refresh_s}">' if refresh_s else ""
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">{again}'
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head><body>'
        f'<h1>{escape(title)}</h1><p class="note">{escape(note)}</p><nav>{links}</nav>'
        + "".join(section(name, text, body) for name, text, body in kept)
        + "</body></html>\n"
    )
