"""The commands: one line a verb. A stage is imported only when it runs, so help and errors answer immediately."""

from freehold.cli.main import build_parser, main

__all__ = ["build_parser", "main"]
