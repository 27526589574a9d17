"""The settings of `freehold tokenize`."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from freehold.core.config import Config


class TokenizeConfig(Config):
    """The tokenizer to train, or the one to use, and how fast."""

    vocab_size: int = Field(8192, ge=288, description="tokens: 32 specials, 256 bytes, the rest merges")
    train_bytes: int = Field(
        16_000_000, gt=0, description="most text the tokenizer is trained on, sampled from each source in proportion"
    )
    digit_groups: bool = Field(
        False, description="make every string of one to three digits a token (1,100 of them), as Trinity does"
    )
    tokenizer: Path | None = Field(
        None, description="a folder with tokenizer.json to use as it is; nothing is trained then"
    )
    threads: int = Field(2, ge=1, description="threads that encode; the result is the same for any number")


def plan(config: TokenizeConfig) -> list[str]:
    """Return what this configuration implies, for --dry-run."""
    width = 2 if config.vocab_size <= 1 << 16 else 4
    if config.tokenizer:
        return [f"tokenizer: {config.tokenizer}, used as it is"]
    digits = 1100 if config.digit_groups else 0
    return [
        f"tokenizer: {config.vocab_size:,} tokens = 32 specials + 256 bytes + {config.vocab_size - 288:,} merges"
        + (f" ({digits:,} of them digits)" if digits else ""),
        f"trained on at most {config.train_bytes:,} bytes; shards hold {width} bytes a token",
    ]
