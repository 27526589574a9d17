"""Serving: an OpenAI-compatible HTTP server over a checkpoint, an export, or a GGUF file."""
