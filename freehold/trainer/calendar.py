"""What is due after a step: a log point, a validation, a checkpoint, a stop."""

from __future__ import annotations

from dataclasses import dataclass

from freehold.parallel.mesh import World
from freehold.trainer.job import Job
from freehold.trainer.signals import StopSignals


@dataclass(frozen=True)
class Due:
    """What happens after a step."""

    log: bool
    validate: bool
    save: bool
    phase: str | None
    """The phase that ends here."""
    stop: bool
    """The user asked for it."""

    @property
    def reads(self) -> bool:
        """Return whether figures must be on the host now."""
        return self.log or self.validate or self.save


class Calendar:
    """Answers from the schedule alone, except for the user's wish to stop."""

    def __init__(self, job: Job, world: World, *, deferred: bool) -> None:
        self.config, self.world, self.deferred = job.trainer, world, deferred
        self.ends = {end: name for name, end in job.schedule.ends().items()}

    def after(self, done: int, signals: StopSignals) -> Due:
        """Return what is due after `done` steps, the same on every rank."""
        config, phase = self.config, self.ends.get(done)
        log = phase is not None or done % config.log_every_steps == 0
        every = config.validate_every_steps
        # The end of a phase is always measured: it is what a named checkpoint is quoted with.
        validate = phase is not None or bool(every and done % every == 0)
        save = phase is not None or done % config.checkpoint_every_steps == 0
        # To agree on a stop takes a collective and a read of the device: where reads are deferred, not at every step.
        asks = not self.deferred or log or validate or save
        stop = asks and self.world.any(signals.asked)
        # A stop is logged and saved like a phase end, so that nothing is lost.
        return Due(log or stop, validate, save or stop, phase, stop)
