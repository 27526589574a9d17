"""Names the documents of a skipped step, so that someone can look at them or leave them to quarantine."""

from __future__ import annotations

import json

from freehold.core.log import Log
from freehold.trainer.job import Job

# The documents of every batch that was skipped; a recipe can exclude them (`pretrain.quarantine`).
QUARANTINE = "log/quarantine.jsonl"


def quarantine(job: Job, log: Log, step: int, why: str) -> None:
    """Warn of a skipped step with its documents and licences, and append them to the quarantine file."""
    found = job.documents_of(step)
    # The trace knows licences; where there is none, the order at least knows ids.
    if not found:
        pieces = {(p.source, p.document_id) for p in job.order.documents(step)}
        found = [{"id": document, "source": source, "licence": None} for source, document in sorted(pieces)]
    names = ", ".join(f"{d['source']}:{d['id']}" + (f" ({d['licence']})" if d["licence"] else "") for d in found)
    log.warn(f"step {step} skipped: {why}; documents: {names}")
    path = job.folder / QUARANTINE
    path.parent.mkdir(exist_ok=True)
    # Appended: a resumed run keeps what an earlier attempt found.
    with path.open("a", encoding="utf-8") as file:
        for document in found:
            file.write(json.dumps({"step": step, "why": why, **document}) + "\n")
