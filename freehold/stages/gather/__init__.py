"""gather: sources become documents with evidence of their licence."""

CONTRACT = 1
"""Raised when the same inputs give other bytes by intent; see docs/formats.md."""
