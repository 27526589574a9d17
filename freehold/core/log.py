"""One console voice and one metrics file for every stage."""

from __future__ import annotations

import contextlib
import json
import math
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from freehold.core.errors import ArtifactError

T = TypeVar("T")


CONTROL = {n: "\ufffd" for n in (*range(0x20), 0x7F, *range(0x80, 0xA0)) if chr(n) not in "\n\t"}


def printable(text: str) -> str:
    """Return text that a terminal shows and does not obey: control codes but line break and tab are replaced.

    File names, licences and what a model says come from outside; an escape sequence could clear the screen, set the
    title or write to the clipboard.
    """
    return text.translate(CONTROL)


class Log:
    """Says lines to the console and to `log/attempt_N.txt`, and appends to `metrics.jsonl`.

    With `folder=None` nothing is written to disk. Each construction on a folder opens a new
    attempt, so a resumed stage never overwrites the log of the one that was killed.
    """

    def __init__(self, folder: Path | None = None, *, quiet: bool = False) -> None:
        self.folder, self.quiet = folder, quiet
        self._text = None
        self._live = False
        if folder is not None:
            logs = folder / "log"
            logs.mkdir(parents=True, exist_ok=True)
            number = 1 + sum(1 for _ in logs.glob("attempt_*.txt"))
            self._text = (logs / f"attempt_{number}.txt").open("a", encoding="utf-8")

    def say(self, message: str) -> None:
        """Print one line, and keep it."""
        self._print(message)
        if self._text is not None:
            with contextlib.suppress(OSError):
                self._text.write(time.strftime("%H:%M:%S ") + message + "\n")
                self._text.flush()

    def warn(self, message: str) -> None:
        """Say a line that the user should not miss."""
        self.say(f"warning: {message}")

    def live(self, message: str) -> None:
        """Show a line that the next one overwrites; terminals only, nothing is kept."""
        if not self.quiet and sys.stderr.isatty():
            print("\r\x1b[2K" + message, end="", file=sys.stderr, flush=True)
            self._live = True

    def metrics(self, step: int, values: dict[str, Any]) -> None:
        """Append one line to `metrics.jsonl`; names have slashes (`loss/mean`), values are numbers or lists."""
        if self.folder is None:
            return
        clean = {k: (None if isinstance(v, float) and not math.isfinite(v) else v) for k, v in values.items()}
        line = (json.dumps({"step": step, **clean}) + "\n").encode()
        with (self.folder / "metrics.jsonl").open("ab", buffering=0) as file:
            before = file.seek(0, 2)
            try:
                written = file.write(line)
            except OSError:
                written = 0
            if written != len(line):  # a full disk: hours of work must not end because a curve lacks a point
                file.truncate(before)
                self._print(f"warning: the metrics of step {step} could not be written")

    def rewind(self, step: int) -> None:
        """Drop metrics of steps after `step`: a resumed run will write them again."""
        if self.folder is None or not (self.folder / "metrics.jsonl").exists():
            return
        path = self.folder / "metrics.jsonl"
        kept = [row for row in read_metrics(path) if row["step"] <= step]
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
        temporary.replace(path)

    def track(self, items: Iterable[T], what: str, total: int | None = None, unit: str = "") -> Iterator[T]:
        """Yield `items`, showing progress: live on a terminal, a plain line every ten seconds elsewhere."""
        if total is None and hasattr(items, "__len__"):
            total = len(items)  # type: ignore[arg-type]
        start = last_live = last_plain = time.monotonic()
        for count, item in enumerate(items):
            yield item
            now = time.monotonic()
            if now - last_live >= 0.2:
                done = count + 1
                line = f"  {what}: {done:,}" + (f"/{total:,}" if total else "") + (f" {unit}" if unit else "")
                if total:
                    line += f", {(now - start) / done * (total - done):.0f} s left"
                self.live(line)
                last_live = now
                if not sys.stderr.isatty() and now - last_plain >= 10:
                    self.say(line)
                    last_plain = now
        self.live("")

    def close(self) -> None:
        """Close the attempt's text file."""
        if self._text is not None:
            self._text.close()
            self._text = None

    def _print(self, message: str) -> None:
        if self.quiet:
            return
        if self._live:
            print("\r\x1b[2K", end="", file=sys.stderr)
            self._live = False
        with contextlib.suppress(OSError):  # stderr may be a file on a full disk
            print(printable(message), file=sys.stderr, flush=True)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read a `metrics.jsonl`; a last line cut off by a kill is skipped. ArtifactError when it is something else."""
    rows = []
    if path.exists():
        try:
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    row = json.loads(line)
                except json.JSONDecodeError:
                    break
                if not isinstance(row["step"], int):
                    raise TypeError("a step is not a number")
                rows.append(row)
        except (UnicodeDecodeError, TypeError, KeyError) as error:
            raise ArtifactError(
                "damaged metrics",
                where=path,
                found=error,
                expected='lines of {"step": ...}',
                todo="remove the file: only the curves of the report are lost",
            ) from error
    return rows
