"""What every reader of text shares: words, language, held-out questions. Never imports torch."""

from __future__ import annotations

Why = tuple[str, str]
"""Why a text is dropped: a fixed reason, which reports count, and what was found in this text."""
