"""Serving: an OpenAI-compatible HTTP server over a checkpoint, an export, or a GGUF file."""

CONTRACT = 1
"""Raised when the same inputs give other bytes by intent; see docs/formats.md."""
