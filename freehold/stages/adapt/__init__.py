"""Adaptation: a finished model and new data to an adapter, or to a model of its own."""

CONTRACT = 1
"""Raised when the same inputs give other bytes by intent; see docs/formats.md."""
