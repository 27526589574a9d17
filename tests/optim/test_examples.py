"""The worked examples in docstrings say what the code does."""

import doctest
import importlib

import pytest


@pytest.mark.parametrize("name", ["optim.balance", "optim.muon", "trainer.monitor"])
def test_worked_example(name):
    found = doctest.testmod(importlib.import_module(f"freehold.{name}"))
    assert found.attempted > 0
    assert found.failed == 0
