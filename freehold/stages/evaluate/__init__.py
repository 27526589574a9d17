"""Evaluate checkpoints: bits per byte of held-out text next to xz and zstd, tasks before and after alignment."""

CONTRACT = 1
"""Raised when the same inputs give other bytes by intent; see docs/formats.md."""
