"""Pre-training: tokens to TrueBase (end of the stable phase) and Base (end of the anneal)."""

CONTRACT = 1
"""Raised when the same inputs give other bytes by intent; see docs/formats.md."""
