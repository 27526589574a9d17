"""Muon on sharded matrices: each matrix is put together on one rank, orthogonalised there, and handed out again.

A part of a matrix orthogonalised alone is another update altogether. Expert stacks are sharded between experts, never
within one, so they need no company.

Shapes: m rows, n columns of a whole matrix; a rank holds ceil(m / ranks) rows, the last ones fewer or none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from freehold.parallel.dispatch import exchange

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Orthogonalize = Callable[[Mapping[str, Tensor], int], Iterable[tuple[str, Tensor]]]


class Owners:
    """Deals the matrices of `shapes` (whole, by name) to the ranks of a group by the work they make."""

    def __init__(self, shapes: Mapping[str, torch.Size], group: ProcessGroup) -> None:
        self.shapes, self.group, self.ranks, self.rank = shapes, group, group.size(), group.rank()
        self.owned: list[list[str]] = [[] for _ in range(self.ranks)]
        work = [0] * self.ranks
        matrices = {name: shape for name, shape in shapes.items() if len(shape) == 2}
        for name in sorted(matrices, key=lambda name: (-self._work(matrices[name]), name)):
            owner = work.index(min(work))
            self.owned[owner].append(name)
            work[owner] += self._work(matrices[name])

    def __call__(
        self, updates: Mapping[str, Tensor], steps: int, orthogonalize: Orthogonalize
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield each update orthogonalised, by name: the matrices of expert stacks, of others the rows here."""
        mine = [name for name in self.owned[self.rank] if name in updates]
        by_owner = [[name for name in names if name in updates] for names in self.owned]
        wholes = self._bring(updates, by_owner, mine)
        stacks = {name: update for name, update in updates.items() if len(self.shapes[name]) == 3}
        done = dict(orthogonalize({**wholes, **stacks}, steps))
        yield from ((name, done[name]) for name in stacks)
        yield from self._hand_out(updates, by_owner, [done[name][0] for name in mine])

    def _bring(self, updates: Mapping[str, Tensor], by_owner: list[list[str]], mine: list[str]) -> dict[str, Tensor]:
        """Return the whole matrices that are owned here, in the precision in which they are orthogonalised."""
        pieces = [[precise(updates[name]).flatten() for name in names] for names in by_owner]
        sends = [sum(piece.numel() for piece in each) for each in pieces]
        receives = [sum(self._numel(name, rank) for name in mine) for rank in range(self.ranks)]
        flat = torch.cat([piece for each in pieces for piece in each]) if any(sends) else self._nothing(updates)
        came = exchange(flat, receives, sends, self.group).split(receives)
        parts = [part.split([self._numel(name, rank) for name in mine]) for rank, part in enumerate(came)]
        return {
            name: torch.cat([part[number].view(-1, self.shapes[name][1]) for part in parts])
            for number, name in enumerate(mine)
        }

    def _hand_out(
        self, updates: Mapping[str, Tensor], by_owner: list[list[str]], done: list[Tensor]
    ) -> Iterator[tuple[str, Tensor]]:
        """Send every rank its rows of the matrices owned here; yield the rows that came back."""
        pieces = [[whole[self._rows(len(whole), rank)].flatten() for whole in done] for rank in range(self.ranks)]
        sends = [sum(piece.numel() for piece in each) for each in pieces]
        receives = [sum(updates[name].numel() for name in names) for names in by_owner]
        flat = torch.cat([piece for each in pieces for piece in each]) if any(sends) else self._nothing(updates)
        names = [name for each in by_owner for name in each]
        came = exchange(flat, receives, sends, self.group).split([updates[name].numel() for name in names])
        yield from ((name, part.view_as(updates[name])) for name, part in zip(names, came, strict=True))

    def _rows(self, rows: int, rank: int) -> slice:
        """Return which rows of a matrix lie on a rank: as `torch.chunk` and FSDP cut them."""
        each = -(-rows // self.ranks)
        return slice(min(rank * each, rows), min((rank + 1) * each, rows))

    def _numel(self, name: str, rank: int) -> int:
        rows = self._rows(self.shapes[name][0], rank)
        return (rows.stop - rows.start) * self.shapes[name][1]

    @staticmethod
    def _work(shape: torch.Size) -> int:
        return min(shape) ** 2 * max(shape)

    @staticmethod
    def _nothing(updates: Mapping[str, Tensor]) -> Tensor:
        return precise(next(iter(updates.values())).flatten()[:0])


def precise(update: Tensor) -> Tensor:
    """Return an update in the precision in which it is orthogonalised: bfloat16, but float64 as it is."""
    return update if update.dtype == torch.float64 else update.bfloat16()
