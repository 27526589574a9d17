"""The device of the tests in this folder; they are deselected without `-m cuda`.

pytest -m cuda tests/cuda                             on a machine with a CUDA device
FREEHOLD_TEST_DEVICE=cpu pytest -m cuda tests/cuda    a rehearsal: the same code, what only CUDA has is skipped
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark every test of this folder."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.cuda)


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The device under test."""
    return torch.device(os.environ.get("FREEHOLD_TEST_DEVICE", "cuda"))


@pytest.fixture
def only_cuda(device: torch.device) -> None:
    """Skip in a rehearsal what a CPU does not have."""
    if device.type != "cuda":
        pytest.skip("needs a CUDA device")
