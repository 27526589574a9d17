"""What a teacher is asked, strategy by strategy, and how far a rewrite may be from its passage.

The strategies are those of the literature; the words are ours, short and plain, and there is no system message, so that
small teachers follow them too:

- question_answer: WRAP (Maini et al. 2024, arXiv:2401.16380) and the diverse question-answer pairs of Nemotron-CC (Su
  et al. 2024, arXiv:2412.02595).
- pedagogical: textbook style, phi-1 (Gunasekar et al. 2023, arXiv:2306.11644) and BeyondWeb (DatologyAI 2025,
  arXiv:2508.10975).
- condensed: `distill` and `extract knowledge` of Nemotron-CC.
- restructured: the knowledge list of Nemotron-CC.

A changed wording gets a new version: answers are kept by the words that were sent, rows name the version.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

Message = dict[str, str]


@dataclass(frozen=True)
class Limits:
    """How far a rewrite may be from its passage; outside of one of them it is dropped with that name.

    The numbers are ours: set by reading what a small teacher wrote (benchmarks/rephrase.py).
    """

    length: tuple[float, float]
    """Words of the rewrite for each word of the passage, least and most."""
    max_copied: float
    """Most eight-word runs taken from the passage, as a share."""
    min_kept: float
    """Least share of the passage's numbers and names that must be in the rewrite."""
    min_words: int = 12
    """Fewest words of a rewrite."""
    max_new_numbers: float = 0.0
    """Most numbers that the passage has not, as a share."""
    max_new_names: float = 0.2
    """Most names that the passage has not, as a share."""
    max_repeated: float = 0.2
    """Most five-word runs that repeat an earlier one, as a share."""


@dataclass(frozen=True)
class Prompt:
    """One strategy: the words sent before the passage, what must be found in the answer, and its limits."""

    version: int
    ask: str
    limits: Limits
    form: Literal["pairs", "list", ""] = ""
    """`pairs`: lines `Question:` and `Answer:` in turn. `list`: at least three lines that begin with a mark."""

    def messages(self, passage: str) -> list[Message]:
        """Return the request's messages for a passage."""
        return [{"role": "user", "content": f"{self.ask}\n\nText: {passage.strip()}"}]


PROMPTS: dict[str, Prompt] = {
    "question_answer": Prompt(
        1,
        "Write three questions about the following text, each with its answer. Begin each question with "
        '"Question: " and each answer, on the next line, with "Answer: ". Questions must be understood without the '
        "text.",
        Limits(length=(0.15, 2.0), max_copied=0.6, min_kept=0.1),
        form="pairs",
    ),
    "pedagogical": Prompt(
        1,
        "Explain the following text to a student, in simple words and full sentences. Add no facts of your own.",
        Limits(length=(0.4, 2.5), max_copied=0.5, min_kept=0.3),
    ),
    "condensed": Prompt(
        1,
        "Rewrite the following text so that it is shorter. Keep all the facts.",
        Limits(length=(0.1, 0.85), max_copied=0.9, min_kept=0.3),
    ),
    "restructured": Prompt(
        1,
        'Write the facts of the following text as a list. Begin each line with "- " and say one fact in it, in a full '
        "sentence.",
        Limits(length=(0.15, 1.5), max_copied=0.8, min_kept=0.3),
        form="list",
    ),
}

_LEAD = re.compile(
    r"^(sure|certainly|of course|here (is|are)|the (condensed|rewritten|shorter))\b[^\n]{0,120}:\s*\n+", re.I
)
_LABEL = re.compile(r"^(text|rewritten text|summary|answer)\s*:\s*\n+", re.I)


# How servers without a parser for reasoning mark a model's thoughts: DeepSeek and Qwen, a habit of others, Mistral,
# Kimi. Harmony (gpt-oss) has channels instead, of which `final` is the answer.
_THOUGHTS = [
    tuple(re.compile(re.escape(tag), re.I) for tag in tags)
    for tags in (
        *((f"<{name}>", f"</{name}>") for name in ("think", "thinking", "thought", "reasoning", "seed:think")),
        ("[THINK]", "[/THINK]"),
        ("\u25c1think\u25b7", "\u25c1/think\u25b7"),
    )
]
_CHANNEL, _FINAL = "<|channel|>", "<|channel|>final<|message|>"
_CONTROL = re.compile(r"<\|(?:end|return|im_end|endoftext|eot_id|end_of_text)\|>\s*\Z")


def without_thoughts(answer: str) -> str:
    """Return the answer without the thoughts before it; thoughts that do not end are all there is.

    An end without a beginning closes thoughts that the prompt began, as templates of thinking models do.
    """
    text = answer
    for begin, end in _THOUGHTS:
        kept, at = "", 0
        while closing := end.search(text, at):
            opening = begin.search(text, at, closing.start())
            kept = kept + text[at : opening.start()] if opening else ""
            at = closing.end()
        opening = begin.search(text, at)
        text = kept + (text[at : opening.start()] if opening else text[at:])
    if _CHANNEL in text:
        text = text.rpartition(_FINAL)[2] if _FINAL in text else ""
    return _CONTROL.sub("", text).strip()


def clean(answer: str) -> str:
    """Return the answer without thoughts, and without what teachers put around it: quotes, fences, `Here is ...:`."""
    text = without_thoughts(answer)
    if text.startswith("```") and text.endswith("```") and "\n" in text:
        text = text.partition("\n")[2].rpartition("```")[0].strip()
    for pattern in (_LEAD, _LABEL):
        text = pattern.sub("", text, count=1).strip()
    if len(text) > 1 and text[0] == text[-1] == '"' and text.count('"') == 2:
        text = text[1:-1].strip()
    return text
