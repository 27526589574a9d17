"""Evaluate checkpoints: bits per byte of held-out text beside xz and zstd, and tasks before and after alignment."""
