"""Muon on sharded matrices: each matrix is gathered on one rank, orthogonalised there, and scattered again.

A part of a matrix orthogonalised alone is another update altogether. Expert stacks are sharded between experts, never
within one, so they need no exchange. Owner-computes is the scheme of distributed Muon in Moonlight (Liu et al. 2025).

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


class OwnerShards:
    """Assigns matrices to the ranks of a group by cost; `shapes` are those of complete parameters, by name."""

    def __init__(self, shapes: Mapping[str, torch.Size], group: ProcessGroup) -> None:
        self.shapes, self.group, self.ranks, self.rank = shapes, group, group.size(), group.rank()

    def __call__(
        self, updates: Mapping[str, Tensor], orthogonalize: Callable[[Tensor], Tensor]
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield by name each update orthogonalised: matrices [., r, c] of expert stacks, else the rows here [1, ., n].

        Matrices of one shape are orthogonalised in one batch.
        """
        # Every rank computes the same assignment from the shapes alone: nothing is communicated for it.
        by_owner = self._partition(name for name in updates if len(self.shapes[name]) == 2)
        mine = self._gather(updates, by_owner)  # [1, m, n] each
        stacks = {name: update for name, update in updates.items() if len(self.shapes[name]) == 3}
        batches: dict[torch.Size, list[tuple[str, Tensor]]] = {}
        for name, whole in (*mine.items(), *stacks.items()):
            batches.setdefault(whole.shape[1:], []).append((name, whole))
        done: dict[str, Tensor] = {}
        for items in batches.values():
            # Small matrices leave a device idle; a batch of them does not.
            together = orthogonalize(torch.cat([whole for _, whole in items]))  # [matrices, m, n]
            parts = together.split([len(whole) for _, whole in items])
            done |= zip([name for name, _ in items], parts, strict=True)
        yield from ((name, done[name]) for name in stacks)
        yield from self._scatter(updates, by_owner, [done[name][0] for name in mine])

    def _partition(self, names: Iterable[str]) -> list[list[str]]:
        """Return the matrices each rank owns: the costliest first, each to the rank with least to do."""
        # Longest processing time first (Graham 1969): at most 4/3 of the best assignment. Names break ties.
        owned: list[list[str]] = [[] for _ in range(self.ranks)]
        work = [0] * self.ranks
        for name in sorted(names, key=lambda name: (-self._work(self.shapes[name]), name)):
            owner = work.index(min(work))
            owned[owner].append(name)
            work[owner] += self._work(self.shapes[name])
        return owned

    def _gather(self, updates: Mapping[str, Tensor], by_owner: list[list[str]]) -> dict[str, Tensor]:
        """Return the complete matrices [1, m, n] that are owned here."""
        mine = by_owner[self.rank]
        # One flat exchange for all matrices, in the order of the owners: two collectives a step whatever the depth.
        pieces = [updates[name].flatten() for names in by_owner for name in names]
        sends = [sum(updates[name].numel() for name in names) for names in by_owner]
        receives = [sum(self._numel(name, rank) for name in mine) for rank in range(self.ranks)]
        came = exchange(self._together(pieces, updates), receives, sends, self.group).split(receives)
        parts = [part.split([self._numel(name, rank) for name in mine]) for rank, part in enumerate(came)]
        # Rows of a matrix come in rank order, which is their order in the matrix.
        return {
            name: torch.cat([part[number].view(1, -1, self.shapes[name][1]) for part in parts], dim=1)
            for number, name in enumerate(mine)
        }

    def _scatter(
        self, updates: Mapping[str, Tensor], by_owner: list[list[str]], done: list[Tensor]
    ) -> Iterator[tuple[str, Tensor]]:
        """Send every rank its rows of the matrices owned here; yield the rows that came back."""
        # What comes back has the order of `by_owner` too, because every rank sends in the order of its own list.
        pieces = [[whole[self._rows(len(whole), rank)].flatten() for whole in done] for rank in range(self.ranks)]
        sends = [sum(piece.numel() for piece in each) for each in pieces]
        receives = [sum(updates[name].numel() for name in names) for names in by_owner]
        # Rows of one matrix to one rank, rank after rank: the order in which `split` below reads them.
        flat = self._together([piece for each in pieces for piece in each], updates)
        names = [name for each in by_owner for name in each]
        came = exchange(flat, receives, sends, self.group).split([updates[name].numel() for name in names])
        yield from ((name, part.view_as(updates[name])) for name, part in zip(names, came, strict=True))

    def _rows(self, rows: int, rank: int) -> slice:
        """Return which rows of a matrix a rank holds: as `torch.chunk` and FSDP cut them."""
        each = -(-rows // self.ranks)
        return slice(min(rank * each, rows), min((rank + 1) * each, rows))

    def _numel(self, name: str, rank: int) -> int:
        rows = self._rows(self.shapes[name][0], rank)
        return (rows.stop - rows.start) * self.shapes[name][1]

    @staticmethod
    def _work(shape: torch.Size) -> int:
        """Return the multiplications of a Newton-Schulz step, up to a factor."""
        # A Gram matrix of the short side, and two products with it.
        return min(shape) ** 2 * max(shape)

    @staticmethod
    def _together(pieces: list[Tensor], updates: Mapping[str, Tensor]) -> Tensor:
        """Return pieces as one flat tensor, which may be empty."""
        return torch.cat(pieces) if pieces else next(iter(updates.values())).new_empty(0)
