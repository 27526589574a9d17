"""Pictures of findings as SVG text: bars with intervals; no package, the same bytes each time."""

from __future__ import annotations

import html
from collections.abc import Sequence

WIDTH, LABEL, ROW, TOP = 640, 190, 22, 34


def bars(title: str, rows: Sequence[tuple[str, float, float, float]], limit: float | None = None) -> str:
    """Return horizontal bars (label, value, low, high) from zero, with their intervals and an optional limit."""
    ends = [0.0, *(x for _, value, low, high in rows for x in (value, _near(low, value), _near(high, value)))]
    ends += [limit, -limit] if limit is not None and min(ends) < 0 else [limit] if limit is not None else []
    least, most = min(ends), max(ends)
    scale = (WIDTH - LABEL - 70) / ((most - least) or 1.0)

    def x(value: float) -> float:
        return round(LABEL + (value - least) * scale, 1)

    height = TOP + ROW * len(rows) + 12
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" font-family="sans-serif" '
        f'font-size="12" role="img"><title>{html.escape(title)}</title>',
        f'<text x="8" y="18" font-weight="bold">{html.escape(title)}</text>',
    ]
    for number, (label, value, low, high) in enumerate(rows):
        y = TOP + number * ROW
        left, right = sorted((x(0), x(value)))
        parts.append(f'<text x="{LABEL - 6}" y="{y + 13}" text-anchor="end">{html.escape(label)}</text>')
        parts.append(f'<rect x="{left}" y="{y + 3}" width="{max(right - left, 1):.1f}" height="12" fill="#4878a8"/>')
        ends_at = x(_near(low, value)), x(_near(high, value))
        parts.append(f'<path d="M{ends_at[0]} {y + 9}H{ends_at[1]}" stroke="#222" stroke-width="1.5"/>')
        parts.append(f'<text x="{max(ends_at[1], right) + 5:.1f}" y="{y + 13}">{value:.3g}</text>')
    limits = [] if limit is None else [limit, -limit] if least < 0 else [limit]
    for at in limits:
        parts.append(f'<path d="M{x(at)} {TOP - 4}V{height - 8}" stroke="#b03030" stroke-dasharray="4 3"/>')
    parts.append(f'<path d="M{x(0)} {TOP - 4}V{height - 8}" stroke="#888"/></svg>\n')
    return "\n".join(parts)


def _near(end: float, value: float) -> float:
    """Return an end of an interval; the value itself where it is unknown."""
    return end if abs(end) < 1e9 else value
