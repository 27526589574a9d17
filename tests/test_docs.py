"""The documents say what is so: links, commands, recipes and dependencies are compared with the code."""

from __future__ import annotations

import argparse
import importlib.metadata
import re
import shlex
import shutil
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from freehold import cli
from freehold.core.document import Conversation, Document
from freehold.run.layout import WALK
from freehold.run.recipe import resolve

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("benchmarks/*.md")])
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.M | re.S)
COMMAND = re.compile(r"(?:^\s*|`|bin/|: |\$ |\| )freehold ([a-z]+(?:-[a-z]+)*)([^`\n]*)")

PLACEHOLDERS = {"STAGE": "gather", "N": "1"}
"""Words that stand for one of a few; any other capitals are as good a path or name as any."""


def page_id(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def verbs() -> dict[str, argparse.ArgumentParser]:
    actions = cli.build_parser()._actions
    return dict(next(a for a in actions if isinstance(a, argparse._SubParsersAction)).choices)


def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def anchors(path: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", FENCE.sub("", text_of(path)), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def commands(path: Path) -> list[tuple[str, str]]:
    """Return (verb, the rest of the line up to a comment) of each command a page shows; prose is none."""
    text = re.sub(r" *\\\n *", " ", text_of(path))
    lines = [line for line in text.splitlines() if line.startswith("    ") or "`" in line]
    lines += [line for _, block in FENCE.findall(text) for line in block.splitlines()]
    return [(verb, re.split(r"\s{2,}|\s#", rest)[0]) for line in lines for verb, rest in COMMAND.findall(line)]


@pytest.mark.parametrize("path", PAGES, ids=page_id)
def test_links_point_somewhere(path):
    for target in LINK.findall(text_of(path)):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        there = (path.parent / file).resolve() if file else path
        assert there.exists(), f"{page_id(path)}: {target}"
        if anchor and there.suffix == ".md":
            assert anchor in anchors(there), f"{page_id(path)}: {target} has no such heading"


@pytest.mark.parametrize("path", PAGES, ids=page_id)
def test_commands_exist(path):
    parser, known = cli.build_parser(), verbs()
    for verb, rest in commands(path):
        assert verb in known, f"{page_id(path)}: freehold {verb}{rest}"
        words = [PLACEHOLDERS.get(word, word) for word in shlex.split(rest.partition(" | ")[0])]
        if words:
            parser.parse_args([verb, *words])  # exits, having said why, when it cannot


@pytest.mark.parametrize("path", PAGES, ids=page_id)
def test_overrides_are_accepted(path):
    """Each `key=value` shown for the laptop recipe (or RECIPE) fills a real key with a valid value."""
    for verb, rest in commands(path):
        if verb not in WALK and verb != "run":
            continue
        words = shlex.split(rest)
        if not words or words[0] not in {"RECIPE", "recipes/laptop.yaml"}:
            continue
        overrides = [word for word in words[1:] if "=" in word and not word.startswith("--")]
        resolve(ROOT / "recipes/laptop.yaml", overrides, stage="" if verb == "run" else verb)


@pytest.mark.parametrize("path", RECIPES, ids=page_id)
def test_recipes_resolve(path):
    recipe = resolve(path)
    assert set(recipe.stages) == set(WALK)


def test_recipes_in_documents_resolve(tmp_path):
    """A fenced YAML block that starts with `# recipe` is a whole recipe, next to ours."""
    for recipe in RECIPES:
        shutil.copy(recipe, tmp_path)
    shown = [(page, block) for page in PAGES for kind, block in FENCE.findall(text_of(page)) if kind == "yaml"]
    whole = [(page, block) for page, block in shown if block.startswith("# recipe")]
    assert whole, "docs/own-data.md shows at least one"
    for page, block in whole:
        (tmp_path / "shown.yaml").write_text(block, encoding="utf-8")
        assert resolve(tmp_path / "shown.yaml").head.name, page_id(page)


def test_formats_name_every_column_and_metric():
    text = text_of(ROOT / "docs/formats.md")
    columns = {*Document.SCHEMA.names, *Conversation.SCHEMA.names}
    source = "".join(text_of(path) for path in (ROOT / "freehold/trainer").glob("*.py"))
    metrics = set(re.findall(r"\"((?:loss|optim|perf|moe|val)/[a-z_]+)", source))
    assert len(metrics) > 10
    assert not {name for name in columns | metrics if not re.search(rf"`{name}[`/]", text)}


def test_every_stage_has_its_page():
    pages = {path.stem for path in (ROOT / "docs/stages").glob("*.md")}
    assert pages == set(WALK), "docs/stages/"
    for path in (ROOT / "docs/stages").glob("*.md"):
        assert len(text_of(path).splitlines()) <= 60, f"{page_id(path)} is longer than a page"


def exercise_pins() -> list[str]:
    """Return the lines of recipes/corpus.txt whose package is no source of the laptop recipe."""
    sources = resolve(ROOT / "recipes/laptop.yaml").stages["gather"].config.sources.values()
    text = {getattr(source, "distribution", "") for source in sources}
    pins = re.findall(r"^([\w-]+==\S+)", text_of(ROOT / "recipes/corpus.txt"), re.M)
    return [pin for pin in pins if pin.partition("==")[0] not in text]


def test_dependencies_are_explained():
    project = tomllib.loads(text_of(ROOT / "pyproject.toml"))
    extras = project["project"]["optional-dependencies"]
    declared = {
        "Runtime": project["project"]["dependencies"],
        **{name.capitalize(): lines for name, lines in extras.items()},
        "Exercises": exercise_pins(),
        "Build": project["build-system"]["requires"],
    }
    wanted = {part: {re.split(r"[\[<>=~! ]", line)[0] for line in lines} for part, lines in declared.items()}
    text = text_of(ROOT / "docs/dependencies.md")
    parts = re.split(r"^## (.+)$", text, flags=re.M)[1:]
    explained = {
        part: set(re.findall(r"^- `([^`]+)` \([^)]+\):? .+", body, re.M))
        for part, body in zip(parts[::2], parts[1::2], strict=True)
    }
    assert explained == wanted


def test_decisions_are_listed():
    listed = set(LINK.findall(text_of(ROOT / "docs/decisions/README.md")))
    assert listed == {path.name for path in (ROOT / "docs/decisions").glob("0*.md")}


def test_hashed_requirements_are_whole_and_the_pinned_versions():
    """`pip install --require-hashes` refuses a file with one gap: each package of the default install has its line."""
    lines = [line for line in (ROOT / "requirements-hashed.txt").read_text().splitlines() if not line.startswith("#")]
    found = dict(re.fullmatch(r"(\S+?)==(\S+) --hash=sha256:[0-9a-f]{64}", line).groups() for line in lines)
    hashed = {canonicalize_name(name): version.partition("+")[0] for name, version in found.items()}
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if line[0] != "#")
    pinned = {canonicalize_name(name): version for name, version in pins.items()}
    assert {name: pinned.get(name) for name in hashed} == hashed
    needed, left = set(), [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["export"]]
    while left:
        wanted = Requirement(left.pop())
        name = canonicalize_name(wanted.name)
        if name in needed or (wanted.marker and not wanted.marker.evaluate({"extra": ""})):
            continue
        needed.add(name)
        left += importlib.metadata.requires(name) or []
    assert needed <= hashed.keys(), needed - hashed.keys()
