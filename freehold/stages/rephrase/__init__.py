"""Documents to rewritten documents: a teacher model says again what a document says, and checks judge it."""

CONTRACT = 1
"""Raised when the same inputs give other bytes by intent; see docs/formats.md."""
