"""The limits of curation that no recipe sets, each with its source; a recipe says only whether a rule applies.

Most follow the heuristics of Gopher (Rae et al. 2021, arXiv:2112.11446, appendix A1) and C4 (Raffel et al. 2020), made
looser where our kinds of documents need it; benchmarks/planted.py measures what they find and what they lose.
"""

from __future__ import annotations

from dataclasses import dataclass

MAX_LINE_CHARS = 1_000_000
"""Longest line: a longer one is data in a text file."""
MAX_LOST = 0.005
"""Most replacement characters, as a share: above it the text was decoded with the wrong table."""
MIN_LANGUAGE_SCORE = 0.30
"""A language found with less is not believed: tables and code score low in any language."""
SURE_LANGUAGE_SCORE = 0.50
"""A text found to be in another language with this is not judged by English words: below it are lists of codes."""
LANGUAGE_SAMPLE_CHARS = 700
"""Characters that the detector reads at the start, in the middle and at the end."""


@dataclass(frozen=True)
class ProseLimits:
    """Limits on running text; a document outside one of them is dropped with its name."""

    min_words: int = 20
    mean_word_chars: tuple[float, float] = (2.5, 9.0)
    """Mean word length, least and most, characters (Gopher: 3 to 10)."""
    min_letters: float = 0.50
    """Least share of letters among the characters that are not space (Gopher asks it of words: 0.8)."""
    max_symbols: float = 0.10
    """Most `#` and ellipses per word (Gopher)."""
    min_stop_words: float = 0.10
    """Least share of the commonest words of the language among all words (Gopher asks for two of eight)."""
    max_bullet_lines: float = 0.90
    """Most lines that start with a bullet, as a share (Gopher)."""
    max_ellipsis_lines: float = 0.30
    """Most lines that end with an ellipsis, as a share (Gopher)."""
    max_duplicate_lines: float = 0.40
    """Most characters in lines seen earlier in the document (Gopher: 0.2, verse and plays repeat more)."""
    max_duplicate_paragraphs: float = 0.20
    """Most characters in paragraphs seen earlier in the document (Gopher)."""
    max_repeated_ngrams: float = 0.35
    """Most five-word runs that repeat an earlier one, as a share (Gopher measures characters: 0.15)."""


@dataclass(frozen=True)
class CodeLimits:
    """Limits on Python source (after The Stack and StarCoder, Li et al. 2023, arXiv:2305.06161)."""

    max_line_chars: int = 2000
    """Longest line (StarCoder: 1000)."""
    max_mean_line_chars: float = 100.0
    """Longest mean line (StarCoder)."""
    min_alphanumeric: float = 0.25
    """Least share of letters and digits among all characters (StarCoder)."""
    max_digits: float = 0.35
    """Most digits among letters and digits: above it the file is a table."""
    max_comment_lines: float = 0.80
    """Most lines that are comments, as a share of non-empty lines (StarCoder)."""


PROSE = ProseLimits()
# Tables, API pages and country files have fewer stop words, more numbers and more repetition.
REFERENCE = ProseLimits(
    mean_word_chars=(2.5, 12.0),
    min_letters=0.40,
    min_stop_words=0.08,
    max_bullet_lines=1.0,
    max_duplicate_lines=0.70,
    max_duplicate_paragraphs=0.60,
    max_repeated_ngrams=0.75,
)
# Signatures, formulas and doctest output are part of a good docstring.
DOCSTRING = ProseLimits(
    min_words=10,
    mean_word_chars=(1.5, 12.0),
    min_letters=0.30,
    max_symbols=0.30,
    min_stop_words=0.04,
    max_bullet_lines=1.0,
    max_ellipsis_lines=0.60,
    max_duplicate_lines=0.70,
    max_duplicate_paragraphs=0.60,
    max_repeated_ngrams=0.75,
)
CODE = CodeLimits()


@dataclass(frozen=True)
class KindLimits:
    """The limits of one kind of document."""

    prose: ProseLimits | None = None
    code: CodeLimits | None = None
    max_chars: int = 4_000_000
    """Longest document: a longer one is a dump."""
    cut: bool = True
    """Whether repeated lines and passages may be cut out of documents of this kind."""


LIMITS: dict[str, KindLimits] = {
    "prose": KindLimits(PROSE),
    "reference": KindLimits(REFERENCE),
    # What a cut leaves of a signature is no documentation, and of a module no program.
    "docstring": KindLimits(DOCSTRING, cut=False),
    "code": KindLimits(code=CODE, max_chars=1_000_000, cut=False),
    # Exercises repeat their wording on purpose.
    "generated": KindLimits(cut=False),
}

SHINGLE_WORDS = 5
"""Words in a shingle (as datatrove and RefinedWeb take them, within Broder 1997's 3 to 10)."""
NEAR_MIN_WORDS = 20
"""Shorter documents are compared exactly only: one word changes their similarity too much."""
CONTAINED_SHARE = 0.80
"""Least share of a document's runs of NGRAM_WORDS words that others hold (Broder 1997, containment)."""
NGRAM_WORDS = 13
"""Words in a run that is hashed (Brown et al. 2020 take 13 for the same question)."""
MATCH_WORDS = 50
"""Words of the shortest passage that is surely found (Lee et al. 2022: 50 tokens)."""
LINE_CHARS = 30
"""Shorter lines are part of the language, not headers or menus."""

JUDGED_KINDS = ("prose", "reference", "docstring")
"""Kinds that the classifier and the model of toxicity are asked about."""
BUCKETS_LOG2 = 18
"""log2 of the classifier's number of weights."""
SNIPPET_WORDS = 200
"""Words of a training example of the classifier: documents are cut up, so that long ones do not decide alone."""
MAX_SNIPPETS = 4_000
"""Most training examples of each side."""
CLASSIFIER_STEPS = 100
"""Steps of full-batch Adam."""
CLASSIFIER_RATE = 0.3
"""Learning rate of those steps."""
CLASSIFIER_DECAY = 1e-4
"""Weight of the squared weights in the loss."""
PASSAGE_WORDS = 50
"""Words of a passage whose toxicity is asked: the model was made for comments."""
TOXIC = 0.95
"""Probability from which a passage is toxic: high, for the model was made for short comments."""
MAX_TOXIC_SHARE = 0.20
"""Most toxic passages of a document, as a share."""
BIAS_WINDOW_WORDS = 10
"""Words to each side of a group's name that count as near it."""
MAX_LOG_ODDS = 1.5
"""Largest |log odds ratio| between two groups of one axis that is accepted: 4.5 times as often."""
MAX_FINDINGS_PER_1000_CHARS = 5.0
"""More personal data than this for each 1000 characters is an address list, not a text."""
MIN_FINDINGS_TO_DROP = 10
"""Fewer findings never drop a document."""
MIN_VALIDATION_DOCUMENTS = 2
"""Fewest documents held out of a source, never more than half of them."""
LARGE_BYTES = 60_000
"""Documents above this are held out only when no smaller one is left: one play would be the whole validation."""
MOST_DROPPED = 0.30
"""Share of a source's documents above which their loss is a warning: the rules may be those of another kind."""
