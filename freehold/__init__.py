"""Freehold: own a Trinity-class language model outright, from licensed text to a served, explained model.

Importing the package never imports torch; `freehold.load(path)` does, when it is called.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from freehold.core import environment
from freehold.core.version import VERSION

if TYPE_CHECKING:
    from pathlib import Path

    from freehold.api import Loaded

__version__ = VERSION


def load(path: str | Path, *, dtype: Literal["float32", "bfloat16"] = "float32", **options: Any) -> Loaded:
    """Open a Freehold checkpoint or an HF AFMoE folder; the options are those of `freehold.api.load`."""
    environment.prepare()  # before PyTorch is imported, which reads the environment
    from freehold import api

    return api.load(path, dtype=dtype, **options)
