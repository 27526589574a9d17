"""What a rank reports about itself: which step it has done, and what it is doing. Imports no torch.

A beat is a record of fixed size that is written over the last one: that needs no space on a disk that has become full,
and no rank waits for the disk. It goes where the supervisor said; a run without a supervisor writes none.
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
RECORD_BYTES = 512
DUMP = signal.SIGUSR1
"""The signal that makes a rank write the stack of each of its threads to its stderr."""


class Heartbeat:
    """Writes the beats of one rank; does nothing when no supervisor asked for them."""

    def __init__(self) -> None:
        folder = os.environ.get(FOLDER)
        self.file: int | None = None
        if folder is not None:
            path = Path(folder) / f"rank_{os.environ.get('RANK', '0')}.json"
            self.file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            # A hanging rank cannot answer in Python; this handler runs in C and needs no lock.
            faulthandler.enable()
            faulthandler.register(DUMP, file=sys.stderr, all_threads=True)

    def beat(self, step: int, doing: str, **figures: Any) -> None:
        """Say that `step` steps are done and what comes now: `start`, `step`, `save`, `validate` or `done`."""
        if self.file is not None:
            record = json.dumps({"pid": os.getpid(), "step": step, "doing": doing, **figures})
            # Padded and at offset 0: a shorter record leaves nothing of the longer one before it.
            os.pwrite(self.file, record.ljust(RECORD_BYTES).encode(), 0)


def read_beat(path: Path) -> dict[str, Any]:
    """Return a rank's last beat; empty before its first, or when it is being written this moment."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}
