"""Documents to token ids: trains the tokenizer, writes shards with a document index."""

CONTRACT = 1
"""Raised when the same inputs give other bytes by intent; see docs/formats.md."""
