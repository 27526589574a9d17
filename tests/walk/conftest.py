"""One finished run of the tiny recipe for all tests of the walk; copy it before changing it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import tiny


@pytest.fixture(scope="session")
def runs(tmp_path_factory) -> Path:
    """The folder of a run from text to the answer of its server; `said.txt` is what the command printed."""
    folder = tmp_path_factory.mktemp("runs")
    command = [sys.executable, "-m", "freehold.cli", "run", str(tiny.RECIPE), f"runs_dir={folder}"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    (folder / "said.txt").write_text(result.stdout)
    return folder
