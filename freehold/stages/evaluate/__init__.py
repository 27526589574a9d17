"""Evaluate checkpoints: bits per byte of held-out text beside xz and zstd, and tasks before and after alignment."""

CONTRACT = 1
"""Raised when the same inputs give other bytes by intent; see docs/formats.md."""
