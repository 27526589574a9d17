"""Text to ids and back, and the one chat template. Never imports torch."""
