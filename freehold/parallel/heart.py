"""What a rank tells of itself: which step it has done, and what it is doing. Imports no torch.

A beat is a small file that is replaced; nobody waits for it to reach the disk. It goes where the supervisor said, or
nowhere: a run that nobody watches writes none.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

FOLDER = "FREEHOLD_HEARTBEAT"
"""The environment variable that names the folder of the beats."""
DUMP = signal.SIGUSR1
"""The signal that makes a rank write the stack of each of its threads to its stderr."""


class Heart:
    """Writes the beats of one rank; does nothing when no supervisor asked for them."""

    def __init__(self) -> None:
        folder = os.environ.get(FOLDER)
        self.path = None if folder is None else Path(folder) / f"rank_{os.environ.get('RANK', '0')}.json"
        if self.path is not None:
            faulthandler.enable()
            faulthandler.register(DUMP, file=sys.stderr, all_threads=True)

    def beat(self, step: int, doing: str, **figures: Any) -> None:
        """Say that `step` steps are done and what comes now: `start`, `step`, `save`, `validate` or `done`."""
        if self.path is not None:
            temporary = self.path.with_suffix(".tmp")
            temporary.write_text(json.dumps({"step": step, "doing": doing, **figures}), encoding="utf-8")
            temporary.replace(self.path)


def read_beat(path: Path) -> dict[str, Any]:
    """Return a rank's last beat; empty before its first."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}
