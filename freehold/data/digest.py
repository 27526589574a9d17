"""A sum over all rows a run read: equal sums mean the same rows in the same steps, however they were sharded."""

from __future__ import annotations

import hashlib

import numpy as np

from freehold.data.packing import Batch


class DataSum:
    """Adds up a 64-bit hash of (step, place in the step, input ids, targets) of each row, modulo 2**64.

    Addition does not care which rank read a row, so the sum over all ranks is that of one process; a row that is read
    twice, skipped, or moved to another step changes it. It is computed from the rows themselves, not from the order.
    """

    def __init__(self) -> None:
        self.value = 0

    def add(self, step: int, batch: Batch, first_row: int = 0) -> None:
        """Take the rows of a step that this rank reads; `first_row` is the place of the first of them in the step."""
        for row, (ids, targets) in enumerate(zip(batch.input_ids, batch.targets, strict=True), first_row):
            # Step and place are hashed with the row: two rows that changed places would leave a plain sum as it was.
            digest = hashlib.blake2b(np.array([step, row], "<i8").tobytes(), digest_size=8)
            digest.update(np.ascontiguousarray(ids, "<i8").tobytes())
            digest.update(np.ascontiguousarray(targets, "<i8").tobytes())
            self.value += int.from_bytes(digest.digest(), "little")
        # Sums of ranks are reduced as 64-bit integers, which wrap in the same way.
        self.value %= 1 << 64
