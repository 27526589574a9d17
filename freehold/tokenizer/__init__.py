"""Text to ids and back, and the one chat template. Never imports torch."""

CONTRACT = 1
"""Raised when the same inputs give other bytes by intent; see docs/formats.md."""
