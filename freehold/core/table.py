"""A small table of results: built once, shown as Markdown in files and by `freehold.run.report` on a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Table:
    """Cells are text already; the first column is set left, the others right unless `left` says otherwise."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""
    left: Sequence[int] = (0,)
    """Columns that hold words, not numbers."""

    def markdown(self, level: int = 2) -> str:
        """Return heading, table and note as Markdown."""
        rule = [":--" if i in self.left else "--:" for i in range(len(self.header))]
        cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in [self.header, *self.rows]]
        lines = ["| " + " | ".join(row) + " |" for row in [cells[0], rule, *cells[1:]]]
        note = f"\n{self.note}\n" if self.note else ""
        return f"{'#' * level} {self.title}\n\n" + "\n".join(lines) + "\n" + note

    def text(self) -> str:
        """Return title, table and note as aligned plain text."""
        lines = [self.header, *self.rows]
        widths = [max(len(row[i]) for row in lines) for i in range(len(self.header))]
        body = [
            "  ".join(
                c.ljust(w) if i in self.left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))
            )
            for row in lines
        ]
        body.insert(1, "-" * (sum(widths) + 2 * (len(widths) - 1)))
        return "\n".join(
            [self.title, *(f"  {line}".rstrip() for line in body), *([self.note] if self.note else []), ""]
        )
