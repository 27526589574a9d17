"""Conversations, preferences and tasks as users write them: formats detected, messages brought into one form."""

CONTRACT = 1
"""Raised when the same inputs give other bytes by intent; see docs/formats.md."""
