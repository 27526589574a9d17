"""The two ways a training run ends early."""

from freehold.core.errors import FreeholdError


class TrainingError(FreeholdError):
    """A run that cannot continue as its recipe says."""


class Interrupted(KeyboardInterrupt):
    """Raised after a clean checkpoint when the user asked to stop."""
