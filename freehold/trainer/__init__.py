"""The one training loop and its loss."""

CONTRACT = 1
"""Raised when the same inputs give other bytes by intent; see docs/formats.md."""
