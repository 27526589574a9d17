"""Token shards, packing, and a data order that is a pure function of seed and step."""

CONTRACT = 1
"""Raised when the same inputs give other bytes by intent; see docs/formats.md."""
