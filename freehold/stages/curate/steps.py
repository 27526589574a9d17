"""The steps that look at one document at a time, as functions over a batch of records.

A step takes the documents that are still there and returns, for each, why it is dropped, or None; it may change their
text. Steps that compare documents with each other are in `dedup.py` and `bias.py`.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from freehold.core.document import Document
from freehold.guard.personal import EVERYTHING, redact
from freehold.stages.curate.classifier import Model, check_quality
from freehold.stages.curate.config import CurateConfig, KindRules
from freehold.stages.curate.filters import (
    Why,
    check_code,
    check_language,
    check_length,
    check_prose,
    clean_unicode,
)
from freehold.stages.curate.privacy import check_density
from freehold.stages.curate.rules import LIMITS, KindLimits
from freehold.stages.curate.split import place
from freehold.stages.curate.toxicity import check_toxicity
from freehold.text.held_out import Questions
from freehold.text.words import Words, read_batch

# Text read together, characters: the arrays of a batch should stay in the processor's cache.
BATCH_CHARS = 120_000
SAMPLES = 3
SAMPLE_CHARS = 240


@dataclass
class Draft:
    """A document on its way through the steps."""

    row: Document
    rules: KindRules
    text: str
    words: Words | None = None
    size: int | None = None

    @property
    def limits(self) -> KindLimits:
        """Return the limits of the document's kind."""
        return LIMITS[self.row.kind]

    @property
    def hashed(self) -> Words:
        """Return the words, which the quality step reads."""
        assert self.words is not None
        return self.words

    @property
    def size_bytes(self) -> int:
        """Return the length of the text in UTF-8."""
        if self.size is None:
            self.size = len(self.text) if self.text.isascii() else len(self.text.encode())
        return self.size

    def edit(self, text: str) -> None:
        """Replace the text, and forget what was known about it."""
        self.text, self.words, self.size = text, None, None


@dataclass
class Tally:
    """What the steps did to a shard, or to several: everything here follows from the content and can be added up."""

    steps: dict[str, dict[str, Any]] = field(default_factory=dict)
    """{step: {"out": [documents, bytes], "dropped": {reason: n}, "measured": {reason: [documents, characters]}}}"""
    repaired: Counter[str] = field(default_factory=Counter)
    redacted: Counter[str] = field(default_factory=Counter)
    drops: list[dict[str, Any]] = field(default_factory=list)
    samples: dict[str, list[dict[str, Any]]] = field(default_factory=lambda: defaultdict(list))
    """{step and reason: the few with the lowest hash of the id}"""

    def close(self, step: str, left: Iterable[tuple[int, int]]) -> None:
        """Note what a step let through, as (documents, bytes)."""
        out = self.step(step)["out"]
        for documents, size in left:
            out[0] += documents
            out[1] += size

    def step(self, name: str) -> dict[str, Any]:
        """Return the entry of a step."""
        return self.steps.setdefault(name, {"out": [0, 0], "dropped": {}, "measured": {}})

    def drop(self, step: str, row: Any, text: str, why: Why, *, chars: int | None = None) -> None:
        """Note one drop with a sample of the text."""
        reason, detail = why
        dropped = self.step(step)["dropped"]
        dropped[reason] = dropped.get(reason, 0) + 1
        self.drops.append(
            {
                "id": row.id,
                "source": row.source,
                "path": row.path,
                "reason": reason,
                "detail": detail,
                "chars": len(text) if chars is None else chars,
            }
        )
        self.sample(step, row, why, text, None)

    def measure(self, step: str, row: Any, text: str, why: Why, chars: int) -> None:
        """Note what a step would have dropped or cut, `chars` characters."""
        entry = self.step(step)["measured"].setdefault(why[0], [0, 0])
        entry[0] += 1
        entry[1] += chars
        self.sample(step, row, why, text, None)

    def sample(self, step: str, row: Any, why: Why, before: str, after: str | None) -> None:
        """Keep an excerpt of a few documents for each step and reason, without personal data."""
        samples = self.samples[f"{step} {why[0]}"]
        order = place(row.id)
        if len(samples) == SAMPLES and order >= samples[-1]["order"]:
            return
        old, new = excerpts(before, after, mask=step == "privacy")
        sample = {"id": row.id, "source": row.source, "detail": why[1], "before": old, "after": new, "order": order}
        samples[:] = sorted([*samples, sample], key=lambda one: (one["order"], one["id"]))[:SAMPLES]

    def add(self, other: Tally) -> None:
        """Add what was done elsewhere."""
        for name, entry in other.steps.items():
            mine = self.step(name)
            mine["out"] = [a + b for a, b in zip(mine["out"], entry["out"], strict=True)]
            for reason, n in entry["dropped"].items():
                mine["dropped"][reason] = mine["dropped"].get(reason, 0) + n
            for reason, (n, chars) in entry["measured"].items():
                old = mine["measured"].get(reason, [0, 0])
                mine["measured"][reason] = [old[0] + n, old[1] + chars]
        self.repaired.update(other.repaired)
        self.redacted.update(other.redacted)
        self.drops += other.drops
        for name, samples in other.samples.items():
            together = sorted([*self.samples[name], *samples], key=lambda one: (one["order"], one["id"]))
            self.samples[name] = together[:SAMPLES]

    def as_dict(self) -> dict[str, Any]:
        """Return the tally as JSON-able values."""
        return {
            "steps": self.steps,
            "repaired": dict(sorted(self.repaired.items())),
            "redacted": dict(sorted(self.redacted.items())),
            "drops": self.drops,
            "samples": dict(sorted(self.samples.items())),
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Tally:
        """Return the tally that `as_dict` wrote."""
        samples = defaultdict(list, data["samples"])
        steps = {name: data["steps"][name] for name in STEPS if name in data["steps"]}
        return cls(steps, Counter(data["repaired"]), Counter(data["redacted"]), data["drops"], samples)


def excerpts(before: str, after: str | None, mask: bool = False) -> tuple[str, str | None]:
    """Return what to show of a text, or of its change: the place where it begins; personal data replaced.

    All of the text is cleaned before it is cut: half a secret would not be found. With `mask`, where the change itself
    is the removal of personal data, what was there is shown as `x` and `0` only.
    """
    if not mask:
        before = redact(before, EVERYTHING)[0]
    start = 0
    if after is not None:
        after = redact(after, EVERYTHING)[0]
        low, high = 0, min(len(before), len(after))  # the first difference, by halves: slices are compared fast
        while low < high:
            middle = (low + high + 1) // 2
            if before[low:middle] == after[low:middle]:
                low = middle
            else:
                high = middle - 1
        start = max(before.rfind("\n", 0, low) + 1, low - SAMPLE_CHARS // 2)
        after = after[start : start + SAMPLE_CHARS]
    before = before[start : start + SAMPLE_CHARS]
    if mask:
        before = re.sub(r"\d", "0", re.sub(r"[^\W\d_]", "x", before))
    return before, after


@dataclass
class Tools:
    """What the steps need in addition to the documents."""

    config: CurateConfig
    questions: Questions
    model: Model | None
    tally: Tally


Step = Callable[[Sequence[Draft], Tools], list[Why | None]]


def length(batch: Sequence[Draft], tools: Tools) -> list[Why | None]:
    """Drop what is empty, too short, too long or undecodable."""
    return [check_length(draft.text, draft.rules.min_chars, draft.limits.max_chars) for draft in batch]


def unicode(batch: Sequence[Draft], tools: Tools) -> list[Why | None]:
    """Repair wrong decodings, newlines, controls and composition; then look at the length again."""
    for draft in batch:
        clean, repairs = clean_unicode(draft.text)
        if repairs:
            tools.tally.repaired.update(repairs.split())
            tools.tally.sample("unicode", draft.row, (repairs, "repaired"), draft.text, clean)
            draft.edit(clean)
    return length(batch, tools)


def language(batch: Sequence[Draft], tools: Tools) -> list[Why | None]:
    """Drop what is in another language."""
    return [check_language(draft.text, draft.rules.languages) for draft in batch]


def quality(batch: Sequence[Draft], tools: Tools) -> list[Why | None]:
    """Drop what breaks the rules of its kind: running text and source code have rules of their own."""
    why: list[Why | None] = []
    for draft in batch:
        prose, code = (draft.limits.prose, draft.limits.code) if draft.rules.quality else (None, None)
        one = check_prose(draft.text, draft.hashed, prose) if prose else None
        why.append(one or (check_code(draft.text, draft.row.path, code) if code else None))
    return why


def classifier(batch: Sequence[Draft], tools: Tools) -> list[Why | None]:
    """Drop what looks more like the bad sources than like the good ones."""
    assert tools.model is not None
    rows = [(draft.row.source, draft.row.kind) for draft in batch]
    return check_quality(rows, [draft.hashed for draft in batch], tools.model, tools.config.classifier)


def toxicity(batch: Sequence[Draft], tools: Tools) -> list[Why | None]:
    """Drop what has too many toxic passages."""
    kinds = [draft.row.kind for draft in batch]
    return check_toxicity(kinds, [draft.hashed for draft in batch])


def decontamination(batch: Sequence[Draft], tools: Tools) -> list[Why | None]:
    """Drop what holds a held-out question."""
    return tools.questions.in_documents([draft.text for draft in batch], [draft.hashed for draft in batch])


def privacy(batch: Sequence[Draft], tools: Tools) -> list[Why | None]:
    """Replace personal data; drop what holds too much."""
    why: list[Why | None] = []
    for draft in batch:
        clean, found = redact(draft.text, tools.config.privacy.find)
        if found:
            tools.tally.redacted.update(found)
            kinds = " ".join(sorted(found))
            tools.tally.sample("privacy", draft.row, (kinds, "redacted"), draft.text, clean)
            draft.edit(clean)
        why.append(check_density(len(clean), found))
    return why


STEPS: dict[str, Step] = {
    "length": length,
    "unicode": unicode,
    "language": language,
    "quality": quality,
    "classifier": classifier,
    "toxicity": toxicity,
    "decontamination": decontamination,
    "privacy": privacy,
}


def acts(config: CurateConfig) -> dict[str, str]:
    """Return `off`, `measure` or `drop` of each step here."""
    given = {
        "classifier": config.classifier.act,
        "toxicity": config.toxicity.act,
        "decontamination": "drop" if config.decontamination.enabled else "off",
    }
    return {name: given.get(name, "drop") for name in STEPS}


def take(drafts: Sequence[Draft], tools: Tools) -> list[Draft]:
    """Take a batch through every step; returns those that are left, and notes the rest in the tally."""
    doing = acts(tools.config)
    left = list(drafts)
    for name, step in STEPS.items():
        if doing[name] == "off":
            continue
        if name == "quality":
            read(left)
        kept = []
        for draft, why in zip(left, step(left, tools), strict=True):
            if why is None:
                kept.append(draft)
            elif doing[name] == "measure":
                tools.tally.measure(name, draft.row, draft.text, why, len(draft.text))
                kept.append(draft)
            else:
                tools.tally.drop(name, draft.row, draft.text, why)
        left = kept
        tools.tally.close(name, [(len(left), sum(draft.size_bytes for draft in left))])
    read(left)
    return left


def read(drafts: Sequence[Draft]) -> None:
    """Read the words of the documents whose text they are not yet known of."""
    fresh = [draft for draft in drafts if draft.words is None]
    for draft, words in zip(fresh, read_batch([draft.text for draft in fresh]), strict=True):
        draft.words = words
