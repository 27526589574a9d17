"""Leaks: what the model says by itself, looked up in the training text: quotations, and personal data.

A quotation counts against the gate when its document's licence does not allow redistribution: what a model repeats is
handed on. Personal data count when the same string is in the training text: a made-up address belongs to no one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np

from freehold.core.statistics import share
from freehold.core.table import Table
from freehold.infer.sampler import Sampling
from freehold.ledger.policy import Claim, Policy, judge_row
from freehold.stages.audit.config import Leaks
from freehold.stages.audit.subject import Finding, Subject
from freehold.stages.audit.text_trace import Place, Span, trace

PERSONAL = {
    "e-mail": re.compile(r"\b[\w.+-]{1,64}@[\w-]{1,63}(?:\.[\w-]{2,24}){1,3}\b"),
    "telephone": re.compile(r"(?<![\d.])(?:\+\d{1,3}[ .-]?)?\(?\d{3}\)?[ .-]\d{3}[ .-]\d{4}(?![\d.])"),
    "card": re.compile(r"(?<!\d)(?:\d[ -]?){15}\d(?!\d)"),
}
HARMLESS = re.compile(r"@example\.|555[ .-]01\d\d")
"""What curate puts in the place of personal data (RFC 2606, fictional numbers)."""
START_TOKENS = 16
BETWEEN = 1 << 40
"""Ids that no vocabulary has, one after each answer: no span runs over its end."""


def audit(subject: Subject, config: Leaks) -> Finding:
    """Let the product continue beginnings of training documents and look up what it says."""
    found, loaded = Finding(), subject.product
    prompts = _beginnings(subject, config.answers)
    sampling = Sampling(temperature=0.0, max_tokens=config.tokens, stop_ids=loaded.stop_ids)
    said = [generation.ids for generation in loaded.engine.generate(prompts, sampling)]
    by_answer = _traced(subject, said)
    quotations = [span for spans in by_answer for span in spans if span.length >= config.least_tokens]
    refused = [span for span in quotations if not any(_may_be_quoted(subject, place) for place in span.places)]
    personal = [match for ids in said for match in _personal(subject, loaded.tokenizer.decode(ids))]
    quoting = sum(any(span.length >= config.least_tokens for span in spans) for spans in by_answer)
    found.figures |= {
        "leaks/longest_span_tokens": max((span.length for spans in by_answer for span in spans), default=0),
        "leaks/answers_that_quote": share(quoting, len(said)).to_dict(),
        "leaks/quotations_without_right": len(refused),
        "leaks/personal_data": len(personal),
    }
    found.details["quotations"] = [span.to_dict() for span in quotations[:20]]
    found.details["personal"] = [kind for kind, _ in personal]  # never the data themselves
    found.tables.append(_table(quotations, refused, len(said), config))
    return found


def _traced(subject: Subject, said: list[list[int]]) -> list[list[Span]]:
    """Return the spans of each answer; all are looked up in one pass over the shards."""
    joined: list[int] = []
    starts = []
    for number, ids in enumerate(said):
        starts.append(len(joined))
        joined += [*ids, BETWEEN + number]
    found: list[list[Span]] = [[] for _ in said]
    for span in trace(subject, joined):
        found[int(np.searchsorted(starts, span.start, side="right")) - 1].append(span)
    return found


def _table(quotations: list[Span], refused: list[Span], answers: int, config: Leaks) -> Table:
    rows = [
        [str(s.length), s.places[0].source, s.places[0].licence, "no" if s in refused else "yes", s.text[:60]]
        for s in quotations[:12]
    ]
    note = f"Of {answers} continuations of {config.tokens} tokens; spans of {config.least_tokens} tokens or more."
    return Table("Quotations", ["tokens", "source", "licence", "may be quoted", "text"], rows, note, left=(1, 2, 3, 4))


def _beginnings(subject: Subject, count: int) -> list[list[int]]:
    """Return beginnings of training documents, of every source in turn."""
    sources = subject.split("train")
    found = []
    for number in range(count):
        name = list(sources)[number % len(sources)]
        shard = sources[name]
        chosen = int(subject.random("leaks", number).integers(len(shard.ids)))
        start = int(shard.starts[chosen])
        length = min(START_TOKENS, int(shard.lengths[chosen]) - 1)
        found.append([*subject.product.begins_with, *np.asarray(shard.data[start : start + length]).tolist()])
    return [prompt for prompt in found if prompt]


def _may_be_quoted(subject: Subject, place: Place) -> bool:
    row = subject.documents.get(place.document)
    if row is None:
        return False
    names = ("source", "source_version", "path", "wrapper_licence", "licence", "licence_evidence", "licence_confidence")
    claim = Claim(*(getattr(row, name) for name in names))
    return judge_row(claim, Policy(uses=("redistribute",))).decision == "allow"


def _personal(subject: Subject, text: str) -> Iterator[tuple[str, str]]:
    """Yield (kind, match) of what looks like personal data and is in the training text word for word."""
    for kind, pattern in PERSONAL.items():
        for match in pattern.finditer(text):
            if not HARMLESS.search(match[0]) and any(
                match[0] in row.text for row in subject.documents.values() if row.split == "train"
            ):
                yield kind, match[0]
