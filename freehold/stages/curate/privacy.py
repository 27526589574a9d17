"""Documents that are mostly personal data: address lists, logs of mails. What is personal: `guard/personal.py`."""

from __future__ import annotations

from collections.abc import Mapping

from freehold.stages.curate.rules import MAX_FINDINGS_PER_1000_CHARS, MIN_FINDINGS_TO_DROP
from freehold.text import Why


def check_density(chars: int, found: Mapping[str, int]) -> Why | None:
    """Drop a document that is mostly personal data: an address list, a log of mails."""
    total = sum(found.values())
    if total >= MIN_FINDINGS_TO_DROP and 1000 * total > MAX_FINDINGS_PER_1000_CHARS * chars:
        return "pii", f"{total} findings in {chars} characters: " + ", ".join(f"{k} {n}" for k, n in found.items())
    return None
