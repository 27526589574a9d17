"""Take-downs that a run was asked for and that its models still hold: no release of them until they are gone.

`freehold takedown --apply` notes the request here and writes the recipe of the run without the rows. The request stays
pending for this run, whose checkpoints keep what they learned; the run made from that recipe never had it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from freehold.core.artifact import read_json, write_json
from freehold.core.config import fill
from freehold.core.errors import DataError, ProofError
from freehold.ledger.reservations import Reservations
from freehold.run.layout import RunFolder
from freehold.run.takedown import takedown
from freehold.run.takedown_answer import Takedown


def note(run_folder: Path, query: str, widen: bool, reservations: Reservations | None = None) -> None:
    """Record a request to remove what `query` names from a run; asking twice records it once."""
    path = RunFolder(run_folder).pending_takedowns
    asked: dict[str, object] = {"query": query, "widen": widen}
    if reservations:
        asked["reservations"] = reservations.model_dump(mode="json")
    noted = _noted(run_folder)
    if asked not in noted:
        write_json(path, {"format_version": 1, "asked": [*noted, asked]})


def answers(run_folder: Path) -> Iterator[tuple[str, Takedown]]:
    """Yield every request that is noted for a run, and what it reaches now."""
    for asked in _noted(run_folder):
        # Where nothing of that name is in the run any more, there is nothing to reach.
        with contextlib.suppress(DataError):
            query = str(asked["query"])
            yield query, takedown(run_folder, query, widen=bool(asked["widen"]), reservations=_reservations(asked))


def affecting(run_folder: Path, checkpoint: str) -> list[str]:
    """Return what was asked to be removed and a checkpoint of the run learned from, or perhaps did."""
    return [
        query
        for query, found in answers(run_folder)
        if checkpoint in {judged.path for judged in found.runs[0].checkpoints} | set(found.runs[0].unknown)
    ]


def refuse(run_folder: Path, checkpoint: str) -> None:
    """Raise ProofError when a take-down of a run is pending that reaches a checkpoint."""
    found = affecting(run_folder, checkpoint)
    if found:
        raise ProofError(
            "a take-down is pending: the model still holds what was asked to be removed",
            where=f"{run_folder}/{checkpoint}",
            found=", ".join(found),
            todo="release the run made from the recipe that `freehold takedown --apply` wrote",
        )


def _reservations(asked: dict[str, object]) -> Reservations | None:
    stated = asked.get("reservations")
    return fill(Reservations, stated, "reservations") if isinstance(stated, dict) else None


def _noted(run_folder: Path) -> list[dict[str, object]]:
    path = RunFolder(run_folder).pending_takedowns
    return list(read_json(path, todo="look why, then remove it").get("asked", [])) if path.exists() else []
