"""Export: Hugging Face form and GGUF, proven against the model or refused."""

CONTRACT = 2
"""Raised when the same inputs give other bytes by intent; see docs/formats.md."""
