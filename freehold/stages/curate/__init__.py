"""Curate: documents in, cleaner documents out, and every drop with its reason."""

CONTRACT = 1
"""Raised when the same inputs give other bytes by intent; see docs/formats.md."""
