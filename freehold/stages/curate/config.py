"""What curation can be told: one set of rules for each kind of document, then duplicates, privacy and the split."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from freehold.core.config import Config

Act = Literal["off", "measure", "drop"]
"""Whether a step is left out, only counts what it would drop, or drops it."""


class ProseRules(Config):
    """Limits on running text (after Gopher and C4); a document outside one of them is dropped with its name."""

    min_words: int = Field(default=20, description="fewest words")
    mean_word_chars: tuple[float, float] = Field(
        default=(2.5, 9.0), description="mean word length, least and most, characters"
    )
    min_letters: float = Field(
        default=0.50, description="least share of letters among the characters that are not space"
    )
    max_symbols: float = Field(default=0.10, description="most `#` and ellipses per word")
    min_stop_words: float = Field(
        default=0.10, description="least share of the commonest English words among all words"
    )
    max_bullet_lines: float = Field(default=0.90, description="most lines that start with a bullet, as a share")
    max_ellipsis_lines: float = Field(default=0.30, description="most lines that end with an ellipsis, as a share")
    max_duplicate_lines: float = Field(
        default=0.40, description="most characters in lines seen earlier in the document"
    )
    max_duplicate_paragraphs: float = Field(
        default=0.20, description="most characters in paragraphs seen earlier in it"
    )
    max_repeated_ngrams: float = Field(
        default=0.35, description="most five-word runs that repeat an earlier one, as a share"
    )


class ReferenceRules(ProseRules):
    """Looser limits for tables, API pages and country files: fewer stop words, more numbers and repetition."""

    mean_word_chars: tuple[float, float] = Field(default=(2.5, 12.0), description="as in prose")
    min_letters: float = Field(default=0.40, description="as in prose")
    min_stop_words: float = Field(default=0.08, description="as in prose")
    max_bullet_lines: float = Field(default=1.0, description="as in prose")
    max_duplicate_lines: float = Field(default=0.70, description="as in prose")
    max_duplicate_paragraphs: float = Field(default=0.60, description="as in prose")
    max_repeated_ngrams: float = Field(default=0.75, description="as in prose")


class DocstringRules(ReferenceRules):
    """Looser still: signatures, formulas and doctest output are part of a good docstring."""

    min_words: int = Field(default=10, description="as in prose")
    mean_word_chars: tuple[float, float] = Field(default=(1.5, 12.0), description="as in prose")
    min_letters: float = Field(default=0.30, description="as in prose")
    min_stop_words: float = Field(default=0.04, description="as in prose")
    max_symbols: float = Field(default=0.30, description="as in prose")
    max_ellipsis_lines: float = Field(default=0.60, description="as in prose")


class CodeRules(Config):
    """Limits on Python source."""

    check_parses: bool = Field(
        default=True, description="drop what `ast.parse` refuses (files named *.py and unnamed ones)"
    )
    max_line_chars: int = Field(default=2000, description="longest line")
    max_mean_line_chars: float = Field(default=100.0, description="longest mean line")
    min_alphanumeric: float = Field(default=0.25, description="least share of letters and digits among all characters")
    max_digits: float = Field(
        default=0.35, description="most digits among letters and digits: above it the file is a table"
    )
    max_comment_lines: float = Field(
        default=0.80, description="most lines that are comments, as a share of non-empty lines"
    )
    drop_generated: bool = Field(default=True, description="drop files whose first lines say a program wrote them")


class KindRules(Config):
    """What happens to documents of one kind; a rule set that is null is not applied."""

    min_chars: int = Field(default=200, ge=0, description="shortest document, characters")
    max_chars: int = Field(default=4_000_000, gt=0, description="longest document, characters")
    max_line_chars: int = Field(default=1_000_000, gt=0, description="longest line, characters")
    languages: tuple[str, ...] | None = Field(
        default=("en",), description="languages let through (ISO 639-1), null = any"
    )
    min_language_score: float = Field(
        default=0.30, description="a language found with less is not believed", ge=0.0, le=1.0
    )
    prose: ProseRules | None = Field(default=ProseRules(), description="limits on running text")
    code: CodeRules | None = Field(default=None, description="limits on source code")
    near_duplicates: bool = Field(
        default=True, description="whether near and contained duplicates of this kind are looked for"
    )
    cut: bool = Field(
        default=True, description="whether repeated lines and passages may be cut out of documents of this kind"
    )


class ReferenceKind(KindRules):
    """Reference pages: country files, API documentation."""

    languages: tuple[str, ...] | None = Field(default=None, description="languages let through, null = any")
    prose: ReferenceRules | None = Field(default=ReferenceRules(), description="limits on running text")


class DocstringKind(KindRules):
    """Docstrings: short, with examples."""

    min_chars: int = Field(default=80, ge=0, description="shortest document, characters")
    languages: tuple[str, ...] | None = Field(default=None, description="languages let through, null = any")
    prose: DocstringRules | None = Field(default=DocstringRules(), description="limits on running text")
    cut: bool = Field(default=False, description="as above: what is left of a cut signature is no documentation")


class CodeKind(KindRules):
    """Source files."""

    min_chars: int = Field(default=100, ge=0, description="shortest document, characters")
    max_chars: int = Field(default=1_000_000, gt=0, description="longest document, characters")
    languages: tuple[str, ...] | None = Field(default=None, description="languages let through, null = any")
    prose: ProseRules | None = Field(default=None, description="limits on running text")
    code: CodeRules | None = Field(default=CodeRules(), description="limits on source code")
    cut: bool = Field(default=False, description="as above: what is left of a cut module does not run")


class GeneratedKind(KindRules):
    """Our own generated text: known to be clean, and alike by design."""

    min_chars: int = Field(default=1, ge=0, description="shortest document, characters")
    languages: tuple[str, ...] | None = Field(default=None, description="languages let through, null = any")
    prose: ProseRules | None = Field(default=None, description="limits on running text")
    near_duplicates: bool = Field(
        default=False, description="whether near and contained duplicates of this kind are looked for"
    )
    cut: bool = Field(default=False, description="as above: exercises repeat their wording on purpose")


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
    shingle_words: int = Field(default=5, ge=1, description="words in a shingle")
    permutations: int = Field(default=128, ge=8, description="numbers in a sketch")
    bands: int = Field(
        default=32, ge=1, description="bands of a sketch (a divisor of permutations); more find more pairs"
    )
    threshold: float = Field(
        default=0.80, gt=0.0, le=1.0, description="least Jaccard similarity of shingles to be a duplicate"
    )
    min_words: int = Field(default=20, ge=1, description="shorter documents are compared exactly only")


class Overlap(Config):
    """Text that stands in another document too: found by winnowed runs of words, then compared word by word.

    Runs of `ngram_words` words are hashed and thinned out so that each run of `match_words` words keeps at least one
    (Schleimer, Wilkerson & Aiken 2003, "Winnowing").
    """

    contained: Act = Field(
        default="drop", description="documents most of which stands in others that stay (Broder 1997, containment)"
    )
    contained_share: float = Field(
        default=0.80, gt=0.0, le=1.0, description="least share of a document's runs of ngram_words words in others"
    )
    passages: Act = Field(
        default="off", description="word-for-word passages of others: cut out of what stays (after Lee et al. 2022)"
    )
    ngram_words: int = Field(default=13, ge=4, description="words in a run that is hashed")
    match_words: int = Field(default=50, ge=8, description="words of the shortest passage that is surely found")

    @model_validator(mode="after")
    def _one_run_fits(self) -> Overlap:
        if self.match_words < self.ngram_words:
            raise ValueError("`match_words` must be at least `ngram_words`")
        return self


class RepeatedLines(Config):
    """Lines that stand in many documents: headers, footers, menus (C4 and CCNet cut such lines and paragraphs)."""

    act: Act = Field(default="off", description="cut them out of every document but the first")
    min_chars: int = Field(default=30, ge=1, description="shorter lines are part of the language")
    min_documents: int = Field(default=20, ge=2, description="fewest documents a line must stand in")


class Classifier(Config):
    """Logistic regression on hashed words and pairs of words, trained on sources that the recipe calls good and bad."""

    act: Act = Field(default="off", description="drop documents that look more like the bad sources")
    good: tuple[str, ...] = Field(default=(), description="sources whose documents are examples of quality")
    bad: tuple[str, ...] = Field(default=(), description="sources whose documents are examples of what is not wanted")
    kinds: tuple[str, ...] = Field(default=("prose", "reference", "docstring"), description="kinds that are judged")
    threshold: float = Field(default=0.5, ge=0.0, le=1.0, description="least probability of being good to stay")
    buckets_log2: int = Field(default=18, ge=8, le=24, description="log2 of the number of weights")
    snippet_words: int = Field(default=200, ge=10, description="words of a training example: documents are cut up")
    max_snippets: int = Field(default=4_000, ge=2, description="most training examples of each side")
    steps: int = Field(default=100, ge=1, description="steps of full-batch Adam")
    learning_rate: float = Field(default=0.3, gt=0.0, description="of those steps")
    decay: float = Field(default=1e-4, ge=0.0, description="weight of the squared weights in the loss")

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
    kinds: tuple[str, ...] = Field(default=("prose", "reference", "docstring"), description="kinds that are judged")
    passage_words: int = Field(default=50, ge=5, description="words of a passage; the model was made for comments")
    threshold: float = Field(default=0.95, ge=0.0, le=1.0, description="probability from which a passage is toxic")
    max_share: float = Field(default=0.20, ge=0.0, le=1.0, description="most toxic passages, as a share")


class Bias(Config):
    """How often words for groups of people stand near words for what is said of them, before and after curation."""

    act: Act = Field(default="measure", description="drop documents that push an association over max_log_odds")
    window_words: int = Field(default=10, ge=1, description="words to each side that count as near")
    max_log_odds: float = Field(
        default=1.5, gt=0.0, description="largest |log odds ratio| between two groups of one axis that is let be"
    )
    min_pairs: int = Field(default=50, ge=1, description="associations seen less often are not acted on")
    max_dropped: float = Field(default=0.02, ge=0.0, le=1.0, description="most documents dropped, as a share")


class Privacy(Config):
    """Regular expressions for personal data: what is found is replaced, what is full of it is dropped."""

    find: tuple[Literal["email", "phone", "ip", "iban", "card", "ssn", "secret"], ...] = Field(
        default=("email", "phone", "ip", "iban", "card", "ssn", "secret"),
        description="what to look for; iban: bank accounts; secret: private keys and tokens of well-known services",
    )
    max_per_1000_chars: float = Field(
        default=5.0, gt=0.0, description="more findings than this per 1000 characters: dropped"
    )
    min_to_drop: int = Field(default=10, ge=1, description="fewer findings never drop a document")


class Split(Config):
    """Which documents are kept back for validation: by hash of the id, source by source."""

    validation_fraction: float = Field(default=0.03, ge=0.0, lt=1.0, description="share of each source's documents")
    min_documents: int = Field(default=2, ge=0, description="fewest per source (never more than half of them)")
    max_bytes: int = Field(
        default=130_000, gt=0, description="most UTF-8 bytes per source, once min_documents are chosen"
    )
    large_bytes: int = Field(
        default=60_000, gt=0, description="documents above this are chosen only when no smaller is left"
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
    """What `freehold curate` can be told."""

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
        default=16_000_000, gt=0, description="text worked on at once and finished for good: a killed run goes on there"
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
        f"{near.shingle_words}-word shingles, Jaccard >= {near.threshold} (pairs looked at from about {even:.2f})"
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
