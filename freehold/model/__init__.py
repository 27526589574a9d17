"""AFMoE on one device: plain PyTorch that knows no files, no ranks and no text."""

CONTRACT = 1
"""Raised when the same inputs give other bytes by intent; see docs/formats.md."""
