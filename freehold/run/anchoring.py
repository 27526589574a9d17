"""Checkpoints enter the append-only log during training, so that a way cannot be invented after its end.

A thread looks for finished checkpoints and appends them to the log of the keys that the walk will sign with. What was
rolled back stays in the log; the last entry of a step counts.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path

from freehold.core.artifact import MANIFEST
from freehold.core.errors import FreeholdError
from freehold.proof import folder, log
from freehold.proof.trust import canonical
from freehold.run.checkpoints import read_checkpoints
from freehold.run.layout import RELEASE, RunFolder, until
from freehold.run.recipe import StagePlan

EVERY_S = 0.1
"""Between looks at the names of checkpoints: the fastest run keeps one longer than that before it is pruned."""
LABEL = "made on the spot by `freehold run`: they show that files belong together, not who made them"


def anchor(run: RunFolder, into: log.Log) -> int:
    """Enter each finished checkpoint of a run that is not in the log yet; return how many were new."""
    have, new = set(into.entries), 0
    for checkpoint in read_checkpoints(run.root):
        entry = {
            "kind": "checkpoint",
            "run": run.root.name,
            "path": checkpoint.path,
            "step": checkpoint.step,
            "content_sha256": checkpoint.content_sha256,
        }
        if canonical(entry) not in have:
            into.append(entry)
            new += 1
    return new


def open_keys(named: Path | None, run: RunFolder) -> folder.KeyFolder:
    """Return the keys that a recipe names, or the run's own, made when there are none yet."""
    if named is not None:
        return folder.load(named)
    if (run.keys / folder.KEYRING).exists():
        return folder.load(run.keys)
    return folder.create(run.keys, LABEL)


@contextlib.contextmanager
def anchored(stage: StagePlan, keys: Path | None) -> Iterator[None]:
    """Enter checkpoints while a training stage works, and what is left when it ends; other stages pass through."""
    if not stage.stage.trains or RELEASE not in until(stage.head.until):
        yield
        return
    into = open_keys(keys, stage.run).log
    done = threading.Event()

    def watch() -> None:
        before: set[Path] = set()
        while not done.wait(EVERY_S):
            there = set(stage.folder.glob(f"**/step_*/{MANIFEST}"))
            if there <= before:
                continue
            # A checkpoint may be pruned while it is read: the next look finds what is there then.
            with contextlib.suppress(FreeholdError, OSError, KeyError, ValueError):
                anchor(stage.run, into)
                before |= there

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
    anchor(stage.run, into)
