"""One run of the tiny recipe for the tests of this folder, made by the command line."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock


@pytest.fixture(scope="session")
def walked(tmp_path_factory) -> Path:
    """Return the folder that holds the run `tiny`, finished, and `said.txt`, what was printed."""
    # The workers of pytest-xdist share one run: the first makes it, the others wait.
    worker = "PYTEST_XDIST_WORKER" in os.environ
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if worker else base) / "walked"
    with FileLock(f"{folder}.lock"):
        if not (folder / "said.txt").exists():
            make_run(folder)
    return folder


def make_run(folder: Path) -> None:
    """Run the tiny recipe to its end; `said.txt` is written last."""
    folder.mkdir()
    command = [sys.executable, "-m", "freehold.cli", "run", "recipes/tiny.yaml", f"runs_dir={folder}"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    (folder / "said.txt").write_text(result.stdout)
