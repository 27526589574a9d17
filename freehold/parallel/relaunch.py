"""Whether a run that broke off starts again, and after which pause. Imports no torch."""

from __future__ import annotations

import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from freehold.core.machine import FULL
from freehold.parallel.config import SuperviseConfig
from freehold.parallel.verdict import End

MIN_FREE_BYTES = 1 << 20
"""Below this a rank may fail without room to say why."""
LONGEST_PAUSE_S = 60.0


@dataclass(frozen=True)
class Decision:
    """What follows a failed world."""

    give_up: bool
    pause_s: float


class Patience:
    """Counts the worlds that ended without progress; a new checkpoint resets the count."""

    def __init__(self, config: SuperviseConfig, folder: Path, newest_step: int) -> None:
        self.config, self.folder, self.newest_step = config, folder, newest_step
        self.futile = self.full_times = 0
        self.full_since = 0.0

    @property
    def failures(self) -> int:
        """Return how many worlds in a row ended without a new checkpoint."""
        return self.futile + self.full_times

    def after(self, end: End, newest_step: int) -> Decision:
        """Return what to do after a world that failed and left `newest_step` as the newest checkpoint."""
        gained, self.newest_step = newest_step > self.newest_step, newest_step
        # Any progress makes the run worth another try, however often it failed before.
        if gained:
            self.futile = self.full_times = 0
        if disk_full(end, self.folder):
            return self._wait_for_room()
        self.futile += not gained
        # What the user got wrong would be wrong again.
        give_up = end.error is not None or self.futile > self.config.max_relaunches
        # Doubled each time: what failed for lack of a resource may find it a minute later.
        return Decision(give_up, min(2.0 ** min(self.futile - 1, 6) - 1, LONGEST_PAUSE_S) if self.futile else 0.0)

    def _wait_for_room(self) -> Decision:
        # No mistake in the recipe, and someone may make room: such a world uses up time, not a relaunch.
        if not self.full_times:
            self.full_since = time.monotonic()
        self.full_times += 1
        left_s = self.config.disk_wait_s - (time.monotonic() - self.full_since)
        return Decision(left_s <= 0, min(2.0 ** min(self.full_times, 6), LONGEST_PAUSE_S, max(left_s, 0.0)))


def disk_full(end: End, folder: Path) -> bool:
    """Return whether a world ended for lack of disk space."""
    if end.error is None:
        # On a disk without a free byte a rank cannot even write its error.
        return shutil.disk_usage(folder).free < MIN_FREE_BYTES
    return any(os.strerror(number) in str(end.error.get("what")) for number in FULL)
