"""Audit a model by what is known of its training: memorisation, sources, leaks, bias, alignment, experts."""

CONTRACT = 1
"""Raised when the same inputs give other bytes by intent; see docs/formats.md."""
