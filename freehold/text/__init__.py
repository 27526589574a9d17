"""Text before it is curated: what a source declares, how files are read, and what other packages add."""
