"""Import a published AFMoE model: rights, hashes and names checked, the weights kept where they are."""

CONTRACT = 1
"""Raised when the same inputs give other bytes by intent; see docs/formats.md."""
