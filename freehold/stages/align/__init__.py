"""Alignment: Base and conversations to Preview."""

CONTRACT = 1
"""Raised when the same inputs give other bytes by intent; see docs/formats.md."""
