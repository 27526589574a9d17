"""What training minimises: functions of a packed batch, one module for each."""

CONTRACT = 1
"""Raised when the same inputs give other bytes by intent; see docs/formats.md."""
