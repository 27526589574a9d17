"""Pre-training: tokens to TrueBase (end of the stable phase) and Base (end of the anneal)."""
