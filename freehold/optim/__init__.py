"""Muon and AdamW, the schedule, and expert balancing."""

CONTRACT = 1
"""Raised when the same inputs give other bytes by intent; see docs/formats.md."""
