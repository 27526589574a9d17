"""Curate: documents in, cleaner documents out, and every drop with its reason."""
