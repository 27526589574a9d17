"""The settings of curation: a few for each kind of document, then duplicates, privacy and the split.

The limits themselves are constants in `rules.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from freehold.core.config import Config
from freehold.stages.curate.rules import SHINGLE_WORDS

Act = Literal["off", "measure", "drop"]
"""Whether a step is skipped, only counts what it would drop, or drops it."""


class KindRules(Config):
    """What happens to documents of one kind."""

    min_chars: int = Field(default=200, ge=0, description="shortest document, characters")
    languages: tuple[str, ...] | None = Field(
        default=("en",), description="languages let through (ISO 639-1), null = any"
    )
    quality: bool = Field(
        default=True, description="apply the limits of this kind on running text or source code (rules.py)"
    )
    near_duplicates: bool = Field(default=True, description="look for near and contained duplicates of this kind")


class ReferenceKind(KindRules):
    """Reference pages: country files, API documentation."""

    languages: tuple[str, ...] | None = Field(default=None, description="languages let through, null = any")


class DocstringKind(KindRules):
    """Docstrings: short, with examples."""

    min_chars: int = Field(default=80, ge=0, description="shortest document, characters")
    languages: tuple[str, ...] | None = Field(default=None, description="languages let through, null = any")


class CodeKind(KindRules):
    """Source files."""

    min_chars: int = Field(default=100, ge=0, description="shortest document, characters")
    languages: tuple[str, ...] | None = Field(default=None, description="languages let through, null = any")


class GeneratedKind(KindRules):
    """Our own generated text: known to be clean, and similar by design."""

    min_chars: int = Field(default=1, ge=0, description="shortest document, characters")
    languages: tuple[str, ...] | None = Field(default=None, description="languages let through, null = any")
    near_duplicates: bool = Field(default=False, description="look for near and contained duplicates of this kind")


class Kinds(Config):
    """The rules of each kind that a Document can have."""

    prose: KindRules = Field(default=KindRules(), description="speeches, plays, books, articles, manuals")
    reference: ReferenceKind = Field(default=ReferenceKind(), description="country files, API pages")
    docstring: DocstringKind = Field(default=DocstringKind(), description="docstrings")
    code: CodeKind = Field(default=CodeKind(), description="source files")
    generated: GeneratedKind = Field(default=GeneratedKind(), description="text of our own generators")


class NearDuplicates(Config):
    """MinHash with banded lookup; every candidate pair is verified on its true Jaccard similarity."""

    enabled: bool = Field(default=True, description="look for near duplicates at all")
    permutations: int = Field(default=128, ge=8, description="numbers in a sketch")
    bands: int = Field(
        default=32, ge=1, description="bands of a sketch (a divisor of permutations); more find more pairs"
    )
    threshold: float = Field(
        default=0.80, gt=0.0, le=1.0, description="least Jaccard similarity of shingles to be a duplicate"
    )


class Overlap(Config):
    """Text that other documents have too: found by winnowed runs of words, then compared word by word.

    Runs of NGRAM_WORDS words are hashed and thinned out so that each run of MATCH_WORDS words keeps at least one
    (Schleimer, Wilkerson & Aiken 2003, "Winnowing").
    """

    contained: Act = Field(
        default="drop", description="documents that others which stay contain for the most part (Broder 1997)"
    )
    passages: Act = Field(
        default="off", description="word-for-word passages of others: cut out of what stays (after Lee et al. 2022)"
    )


class RepeatedLines(Config):
    """Lines that many documents have: headers, footers, menus (C4 and CCNet cut such lines and paragraphs)."""

    act: Act = Field(default="off", description="cut them out of every document but the first")
    min_documents: int = Field(default=20, ge=2, description="fewest documents that have the line")


class Classifier(Config):
    """Logistic regression on hashed words and pairs of words, trained on sources that the recipe calls good and bad."""

    act: Act = Field(default="off", description="drop documents that look more like the bad sources")
    good: tuple[str, ...] = Field(default=(), description="sources whose documents are examples of quality")
    bad: tuple[str, ...] = Field(default=(), description="sources whose documents are examples of what is not wanted")
    threshold: float = Field(default=0.5, ge=0.0, le=1.0, description="least probability of being good to stay")

    @model_validator(mode="after")
    def _has_examples(self) -> Classifier:
        if self.act != "off" and not (self.good and self.bad):
            raise ValueError("a classifier needs sources under `good` and under `bad`")
        if set(self.good) & set(self.bad):
            raise ValueError(f"both good and bad: {', '.join(sorted(set(self.good) & set(self.bad)))}")
        return self


class Toxicity(Config):
    """The linear model of alt-profanity-check (extra `toxicity`), asked passage by passage."""

    act: Act = Field(default="off", description="drop documents with too many toxic passages")


class Bias(Config):
    """How often words for groups of people are near words for what is said of them, before and after curation."""

    act: Act = Field(default="measure", description="drop documents that push an association over the limit")
    min_pairs: int = Field(default=50, ge=1, description="associations seen less often are not acted on")
    max_dropped: float = Field(default=0.02, ge=0.0, le=1.0, description="most documents dropped, as a share")


class Privacy(Config):
    """Personal data by pattern and checksum: what is found is replaced, what holds too much is dropped."""

    find: tuple[Literal["email", "phone", "ip", "iban", "card", "ssn", "secret"], ...] = Field(
        default=("email", "phone", "ip", "iban", "card", "ssn", "secret"),
        description="what to look for; iban: bank accounts; secret: private keys and tokens of well-known services",
    )


class Split(Config):
    """Which documents are held out for validation: by hash of the id, source by source."""

    validation_fraction: float = Field(default=0.03, ge=0.0, lt=1.0, description="share of each source's documents")
    max_bytes: int = Field(
        default=130_000, gt=0, description="most UTF-8 bytes per source, once two documents are chosen"
    )
    conversation_fraction: float = Field(
        default=0.02, ge=0.0, lt=1.0, description="share of each source's conversations"
    )


class Decontamination(Config):
    """Training text that holds a held-out question, or a run of words that only it has, is dropped."""

    enabled: bool = Field(default=True, description="compare with the questions of the gathered tasks")


class Exclusion(Config):
    """Rows that must not be in the corpus whatever the rules say: what a take-down asks for."""

    sources: tuple[str, ...] = Field(default=(), description="sources of which nothing stays")
    documents: tuple[str, ...] = Field(default=(), description="ids of documents and conversations")
    file: Path | None = Field(default=None, description="text file with further ids, one a line")
    file_sha256: str = Field(default="", description="SHA-256 of that file, so that its content is part of the recipe")

    @model_validator(mode="after")
    def _pinned(self) -> Exclusion:
        if self.file and not self.file_sha256:
            raise ValueError("`file` needs `file_sha256`: another file must be another recipe")
        return self


class CurateConfig(Config):
    """The settings of `freehold curate`."""

    kinds: Kinds = Field(default=Kinds(), description="rules by kind of document")
    near_duplicates: NearDuplicates = Field(default=NearDuplicates(), description="near duplicates")
    overlap: Overlap = Field(default=Overlap(), description="contained documents and repeated passages")
    lines: RepeatedLines = Field(default=RepeatedLines(), description="lines that many documents have")
    classifier: Classifier = Field(default=Classifier(), description="trained judgement of quality")
    toxicity: Toxicity = Field(default=Toxicity(), description="toxic text")
    bias: Bias = Field(default=Bias(), description="groups of people and what is said near them")
    privacy: Privacy = Field(default=Privacy(), description="personal data")
    decontamination: Decontamination = Field(
        default=Decontamination(), description="held-out questions in training text"
    )
    split: Split = Field(default=Split(), description="train and validation")
    exclude: Exclusion = Field(
        default=Exclusion(), description="rows taken out last, once duplicates and the split are decided"
    )
    priority: tuple[str, ...] = Field(
        default=(), description="sources whose copy of a duplicate is kept first; the others follow by name"
    )
    engine: Literal["local", "ray"] = Field(
        default="local", description="where shards are worked on: here, or on a Ray cluster that shares this disk"
    )
    workers: int = Field(default=1, ge=1, description="processes of the local engine")
    shard_bytes: int = Field(
        default=16_000_000, gt=0, description="text of one shard: a killed run resumes after the last finished one"
    )
    memory_bytes: int | None = Field(
        default=None,
        ge=1_000_000,
        description="memory for sorting hashes of the whole corpus; null takes what it needs",
    )


def plan(config: CurateConfig) -> list[str]:
    """Return what this configuration implies, for --dry-run."""
    near, split = config.near_duplicates, config.split
    # The similarity at which a pair is as likely as not to share a band of equal numbers.
    rows = near.permutations / near.bands
    even = (1 - 0.5 ** (1 / near.bands)) ** (1 / rows)
    dedup = (
        f"{SHINGLE_WORDS}-word shingles, Jaccard >= {near.threshold} (pairs looked at from about {even:.2f})"
        if near.enabled
        else "exact only"
    )
    acts = {
        "contained documents": config.overlap.contained,
        "repeated passages": config.overlap.passages,
        "repeated lines": config.lines.act,
        "classifier": config.classifier.act,
        "toxicity": config.toxicity.act,
        "bias": config.bias.act,
    }
    return [
        f"duplicates: {dedup}",
        ", ".join(f"{name}: {act}" for name, act in acts.items()),
        f"personal data: {', '.join(config.privacy.find) or 'not looked for'}",
        f"validation: {split.validation_fraction:.0%} of each source by document, at most {split.max_bytes:,} bytes",
    ]
