"""Saving while training continues: the state is copied first, then written by a thread; the next save waits for it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from freehold.checkpoint import dcp
from freehold.model.config import ModelConfig


class Saver:
    """Writes checkpoints, in the background when asked to; one at a time.

    What is written is the state at the moment of the call, whatever happens to it afterwards. Copies take the memory
    of the state once more. Of several ranks all make the same calls in the same order.
    """

    def __init__(self, *, background: bool) -> None:
        self.background = background
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        # Collectives of the thread must not mix with those of training.
        several = background and dist.is_initialized() and dist.get_world_size() > 1
        self._group = dist.new_group(backend="gloo") if several else None

    def save(
        self,
        folder: Path,
        state: dcp.State,
        config: ModelConfig,
        facts: dict[str, Any],
        copy: Iterable[Path] = (),
        then: Callable[[], None] = lambda: None,
    ) -> None:
        """Write a checkpoint (see `dcp.save`), and then call `then`.

        In the background this returns as soon as the state is copied; what goes wrong is raised by the next call of
        `save` or `wait`.
        """
        self.wait()
        if not self.background:
            dcp.save(folder, state, config, facts, copy)
            then()
            return
        copied = {part: {name: t.detach().cpu().clone() for name, t in each.items()} for part, each in state.items()}
        files = list(copy)

        def write() -> None:
            try:
                dcp.save(folder, copied, config, facts, files, self._group)
                then()
            except BaseException as error:
                self._error = error

        self._thread = threading.Thread(target=write, name=f"save {folder.name}")
        self._thread.start()

    def wait(self) -> None:
        """Wait for a save that is under way; raise what it met."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error
