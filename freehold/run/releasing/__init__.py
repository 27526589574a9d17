"""Release: everything the walk made, as one signed folder that a stranger can check off line.

It reads the whole run, so it is in this room, not among the stages that know no run folder.
"""

CONTRACT = 1
"""Raised when the same inputs and keys give other bytes by intent; see docs/formats.md."""
