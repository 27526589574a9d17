"""The walk: one folder a stage, each with its declaration (config.py) and one entry (run.py)."""
