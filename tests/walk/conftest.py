"""One run of the tiny recipe for the tests of this folder, made by the command line."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def walked(tmp_path_factory) -> Path:
    """Return the folder that holds the run `tiny`, finished, and `said.txt`, what was printed."""
    folder = tmp_path_factory.mktemp("runs")
    command = [sys.executable, "-m", "freehold.cli", "run", "recipes/tiny.yaml", f"runs_dir={folder}"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    (folder / "said.txt").write_text(result.stdout)
    return folder
