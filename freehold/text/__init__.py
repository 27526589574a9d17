"""What every stage that reads text shares: sources and their files, words, languages, held-out questions."""

from __future__ import annotations

Why = tuple[str, str]
"""Why a text is dropped: a fixed reason, which reports count, and what was found in this text."""
