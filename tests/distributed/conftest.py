"""Worlds of real processes, opened at first use and shared by all tests of a session."""

from __future__ import annotations

import pytest
from ranks import Ranks


@pytest.fixture(scope="session")
def ranks():
    """Call as `ranks(4)`: four open processes; `ranks(4).run(function, *args)` runs it on each."""
    worlds: dict[int, Ranks] = {}

    def get(size: int) -> Ranks:
        if size not in worlds or not worlds[size].is_open:
            worlds[size] = Ranks(size)
        return worlds[size]

    yield get
    for world in worlds.values():
        world.close()
