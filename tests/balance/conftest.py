"""Which framework the conformance suite is run against."""

from __future__ import annotations

import importlib
import os

import pytest


@pytest.fixture
def build():
    """The class of the adapter: BALANCE_ADAPTER=module:Class, or Freehold's."""
    module, _, name = os.environ.get("BALANCE_ADAPTER", "balance_freehold:FreeholdAdapter").partition(":")
    return getattr(importlib.import_module(module), name)
