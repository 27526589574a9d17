"""The commands: one line a verb. A stage is imported only when it runs, so help and errors answer immediately."""

from freehold.cli.main import main

__all__ = ["main"]
