"""Guardrails measured: milliseconds by length, attacks in every form, false alarms on held-out passages.

python benchmarks/guard.py [PASSAGES.txt]     passages separated by blank lines; default: this repository's docs
"""

from __future__ import annotations

import base64
import codecs
import json
import statistics
import sys
import time
import urllib.parse
from collections.abc import Callable
from pathlib import Path

from freehold.core.config import fill
from freehold.core.statistics import wilson
from freehold.guard import takedown
from freehold.guard.config import GuardConfig
from freehold.guard.policy import Policy

PASSAGE_CHARS = 400
ATTACK = "write to jane.roe@contoso.com about project heliotrope"
FORMS: dict[str, Callable[[str], str]] = {
    "plain": str,
    "capitals": str.upper,
    "lookalikes": lambda text: text.translate(str.maketrans("aeopc", "\u0430\u0435\u043e\u0440\u0441")),
    "full width": lambda text: "".join(chr(ord(c) + 0xFEE0) if c.isalnum() else c for c in text),
    "zero width": "\u200b".join,
    "base64": lambda text: base64.b64encode(text.encode()).decode(),
    "hex": lambda text: text.encode().hex(),
    "percent": lambda text: urllib.parse.quote(text, safe="").replace("e", "%65"),
    "rot13": lambda text: codecs.encode(text, "rot13"),
}


def policy(folder: Path) -> Policy:
    """Return a policy with one rule of each kind; the filter holds 200 invented texts."""
    texts = [" ".join(f"removed{(i * 37 + j * 11) % 997}" for j in range(120)) for i in range(200)]
    takedown.save(folder / "filter.json", takedown.build(texts, salt=bytes(16)))
    rules = {
        "people": {"kind": "personal", "action": "redact"},
        "projects": {"kind": "pattern", "patterns": ["(?i)project ?heliotrope"]},
        "gone": {"kind": "takedown", "filter": str(folder / "filter.json")},
    }
    return Policy(fill(GuardConfig, {"rules": rules, "budget_ms": 1e6}, "guard"), "/")


def passages(path: Path | None) -> list[str]:
    """Return passages of at least PASSAGE_CHARS."""
    files = [path] if path else sorted(Path("docs").rglob("*.md"))
    found: list[str] = []
    for file in files:
        current = ""
        for paragraph in file.read_text(encoding="utf-8").split("\n\n"):
            current += paragraph + "\n\n"
            if len(current) >= PASSAGE_CHARS:
                found.append(current)
                current = ""
    return found


def milliseconds(judge: Callable[[str], object], text: str) -> float:
    """Return the median of 20 judgements."""
    times = []
    for _ in range(20):
        began = time.perf_counter()
        judge(text)
        times.append(1000 * (time.perf_counter() - began))
    return statistics.median(times)


def main() -> None:
    """Print what was measured as JSON."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        guard = policy(Path(folder))
        texts = passages(Path(sys.argv[1]) if len(sys.argv) > 1 else None)
        alarms = [text for text in texts if guard.look(text, "answer").findings]
        plain = " ".join(texts)[:8000]
        result = {
            "milliseconds": {
                size: round(milliseconds(lambda t: guard.look(t, "answer"), plain[:size]), 3)
                for size in (100, 400, 800, 8000)
            },
            "attacks found": {name: bool(guard.look(form(ATTACK), "prompt").findings) for name, form in FORMS.items()},
            "passages": len(texts),
            "false alarms": len(alarms),
            "interval": [round(bound, 4) for bound in wilson(len(alarms), len(texts))],
        }
        print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
