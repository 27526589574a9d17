"""Worlds of real processes, opened at first use and shared by the tests of a file.

Not of a session: every mesh leaves threads of gloo behind that wake up all the time, and the rest of the suite waits.
"""

from __future__ import annotations

import pytest
from ranks import Ranks


@pytest.fixture(scope="module")
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
