"""Settings of a chat in the terminal; imports without torch."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from freehold.core.config import Config
from freehold.guard.config import GuardConfig


class ChatConfig(Config):
    """A chat in the terminal."""

    path: Path = Field(description="Run folder, checkpoint or HF folder.")
    system: str | None = Field(None, description="System message the conversation begins with.")
    temperature: float | None = Field(
        None,
        ge=0,
        le=2,
        description="0 = always the most probable token; default: as the model's generation config says.",
    )
    max_tokens: int | None = Field(
        None, gt=0, description="Longest answer, in tokens; default: until the context is full."
    )
    seed: int | None = Field(None, description="The same seed gives the same answers; default: other ones each time.")
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="Number format to compute in.")
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="Where it computes; auto = CUDA if there is some, and says so."
    )
    guard: GuardConfig = Field(
        default_factory=GuardConfig, description="Policies on what is asked and answered: docs/guardrails.md."
    )
    show_reasoning: bool = Field(True, description="Show what the model thinks before it answers, dimmed.")


def plan(config: ChatConfig) -> list[str]:
    """Return what --dry-run says."""
    return [f"talks to {config.path}"]
