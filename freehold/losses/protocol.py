"""What the training loop needs of a loss: its columns, what divides its sums, and the sums themselves.

A loss is a sum over the positions (or pairs, or rollouts) of a whole optimizer step divided by their number. The
number is known before the first forward pass, from the packed batch alone, so micro-batches and ranks add up.

Shapes: B rows, T tokens a row, d hidden width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

from torch import Tensor

Scale = float | Tensor
"""1 / count. A tensor where only the device knows the count: such a loss may read nothing from the device."""


class LossSums(NamedTuple):
    """What one forward pass adds to the step."""

    total: Tensor
    """Scalar with a gradient, already scaled: what `backward` starts from."""
    sums: Mapping[str, Tensor]
    """Detached float64 scalars by metric name, not scaled: the loop divides them by their counts to report them."""


class Loss(Protocol):
    """A loss as the loop sees it.

    Everything that a stage learns from is a column of its batch: an array [B, T] that is a field of the `Batch` (or of
    a subclass with more fields: reference log-probabilities, advantages, pair numbers).
    """

    @property
    def reports(self) -> Mapping[str, str]:
        """Metric name -> name of the count that divides it. The guards watch the first one."""
        ...

    def counts(self, batch: Any) -> dict[str, int]:
        """Return what this process's part of a step adds to each count."""
        ...

    def __call__(
        self, hidden: Tensor, head: Tensor, columns: Mapping[str, Tensor], scales: Mapping[str, Scale]
    ) -> LossSums:
        """Return the sums over hidden states [B, T, d] with head weight [V, d] and columns [B, T]; scales by count."""
        ...
