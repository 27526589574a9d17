"""The generator of the shipped recipes, as its entry point names it: config.py has its settings, generate.py makes."""

from __future__ import annotations

from collections.abc import Mapping

from freehold.corpora.config import GYM, Settings
from freehold.text.making import Made, Material, Use

__all__ = ["Settings", "make", "requires", "uses"]

requires = (GYM,)


def uses(settings: Settings) -> Mapping[str, Use]:
    """Return the sources whose facts and words become questions."""
    named = {"factbook": (settings.factbook, "factbook"), "wordnet": (settings.wordnet, "dictd")}
    return {key: Use(source, reader) for key, (source, reader) in named.items() if source is not None}


def make(settings: Settings, materials: Mapping[str, Material], name: str, seed: int) -> Made:
    """Return the text, conversations and held-out tasks; a pure function of the arguments."""
    from freehold.corpora import generate  # reads and writes rows: not needed to fill a recipe

    return generate.make(settings, materials, name, seed)
