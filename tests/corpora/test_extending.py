"""A package of the user's adds a reader and a generator: the one that docs/extending.md shows, as it is shown."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from gather_fixtures import documents, gather, install, report

from freehold.core.code import PACKAGE, reachable
from freehold.core.config import fill
from freehold.core.document import Document
from freehold.core.errors import ConfigError
from freehold.core.extensions import declared, load
from freehold.stages.gather.config import GatherConfig

PAGE = (Path(__file__).resolve().parents[2] / "docs/extending.md").read_text()
SHOWN = dict(re.findall(r"^```(\w+)\n(.*?)^```", PAGE, re.M | re.S))
POEMS = {"a.txt": "Rain falls\nall day\n\nSun comes\n", "b.txt": "Ships sail\n"}


def publish(site: Path, name: str, points: dict[str, dict[str, str]], files: dict[str, str]) -> None:
    """Install a distribution that declares entry points."""
    lines = [f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in of.items()) for group, of in points.items()]
    info = f"{name.replace('-', '_')}-1.0.dist-info"
    install(site, name, {**files, f"{info}/entry_points.txt": "\n".join(lines)})


@pytest.fixture
def tales(site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Install the package of the page; returns the sources of its recipe, over two files of poems."""
    project = tomllib.loads(SHOWN["toml"])["project"]
    publish(site, project["name"], project["entry-points"], {"our_tales.py": SHOWN["python"]})
    monkeypatch.delitem(sys.modules, "our_tales", raising=False)
    (tmp_path / "poems").mkdir()
    for name, text in POEMS.items():
        (tmp_path / "poems" / name).write_text(text)
    sources = yaml.safe_load(SHOWN["yaml"])
    sources["poems"]["path"] = str(tmp_path / "poems")
    return sources


def test_reader_and_generator_of_a_package_are_used(tales: dict[str, Any], tmp_path: Path) -> None:
    gather(tmp_path / "out", tales)
    poems = documents(tmp_path / "out", "poems")
    assert {(row.path, row.text) for row in poems} == {
        ("a.txt#0000", "Rain falls\nall day\n"), ("a.txt#0001", "Sun comes\n"), ("b.txt#0000", "Ships sail\n"),
    }  # fmt: skip
    made: list[Document] = documents(tmp_path / "out", "riddles")
    assert {row.text.split("\n")[1] for row in made} == {"Rain", "Ships"}
    assert {row.licence for row in made} == {"CC0-1.0 AND LicenseRef-Freehold-Generated"}
    assert report(tmp_path / "out", "riddles")["made_from"] == ["poems"]


def test_version_of_the_package_is_kept_with_the_recipe(tales: dict[str, Any]) -> None:
    config = fill(GatherConfig, {"sources": tales}, "gather")
    assert {name: source.provider for name, source in config.sources.items()} == {
        "poems": "our-tales==1.0", "riddles": "our-tales==1.0",
    }  # fmt: skip
    kept = config.model_dump(mode="json")
    assert kept["sources"]["riddles"]["riddles"] == 2
    assert fill(GatherConfig, kept, "gather") == config
    kept["sources"]["poems"]["provider"] = "our-tales==0.9"
    with pytest.raises(ConfigError, match=r"(?s)another version.*our-tales==1\.0.*pip install our-tales==0\.9"):
        fill(GatherConfig, kept, "gather")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"poems": {"reader": "stanza"}}, r"(?s)no such reader.*poems\.reader.*bible.*text.*did you mean `stanzas`"),
        ({"poems": {"reader": "zzz"}}, r"(?s)no such reader.*install the package that declares it"),
        ({"riddles": {"generator": "jokes"}}, r"(?s)no such generator.*exercises, riddles"),
        ({"riddles": {"riddle": 3}}, r"(?s)unknown key.*sources\.riddles\.riddle.*did you mean `riddles`"),
        ({"riddles": {"riddles": 0}}, r"(?s)not a valid value.*gather\.sources\.riddles\.riddles"),
        ({"riddles": {"words": "riddles"}}, r"`riddles\.words` names `riddles`, which is no source read by stanzas"),
    ],
)
def test_mistakes_in_a_recipe_name_the_key(tales: dict[str, Any], change: dict[str, Any], message: str) -> None:
    sources = {name: source | change.get(name, {}) for name, source in tales.items()}
    with pytest.raises(ConfigError, match=message):
        fill(GatherConfig, {"sources": sources}, "gather")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("nowhere.at_all", r"(?s)cannot be imported.*nowhere\.at_all of half==1\.0"),
        ("half:absent", r"(?s)cannot be imported.*half:absent of half==1\.0"),
        ("half:READER", r"(?s)does not follow the protocol.*half==1\.0 has no read, many_per_file"),
    ],
)
def test_broken_entry_points_name_their_package(site: Path, value: str, message: str) -> None:
    publish(site, "half", {"freehold.readers": {"halves": value}}, {"half.py": "READER = 3\n"})
    with pytest.raises(ConfigError, match=message):
        load("freehold.readers", "halves", "reader", ("read", "many_per_file"))


def test_two_packages_with_one_name_are_refused(site: Path) -> None:
    publish(site, "other-books", {"freehold.readers": {"bible": "other_books"}}, {"other_books.py": ""})
    with pytest.raises(ConfigError, match=r"(?s)two packages declare the same name.*`bible`.*other-books==1\.0"):
        declared("freehold.readers")


def test_source_tree_without_metadata_is_one_error(tmp_path: Path) -> None:
    """Only what Freehold imports is copied to a path of its own: no installed distribution is seen."""
    (tmp_path / "freehold").symlink_to(PACKAGE)
    code = "from freehold.core.extensions import declared; declared('freehold.readers')"
    blind = "import importlib.metadata as m; m.entry_points = lambda group: m.EntryPoints(); " + code
    done = subprocess.run([sys.executable, "-c", blind], cwd=tmp_path, capture_output=True, text=True)
    assert "the entry points freehold.readers of Freehold itself are missing" in done.stderr
    assert "pip install --no-deps -e ." in done.stderr


def test_general_readers_need_no_metadata(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: importlib.metadata.EntryPoints())
    source = {"kind": "folder", "path": "x", "reader": "html"}
    assert fill(GatherConfig, {"sources": {"a": source}}, "gather").sources["a"].provider == ""
    with pytest.raises(ConfigError, match="of Freehold itself are missing"):
        fill(GatherConfig, {"sources": {"a": source | {"reader": "bible"}}}, "gather")


def test_schema_shows_the_settings_of_generators(tales: dict[str, Any]) -> None:
    shown = GatherConfig.model_json_schema()["$defs"]["Generated"]["properties"]
    assert {"licence", "conversations", "riddles"} <= set(shown)
    assert "how many riddles" in shown["riddles"]["description"]


def test_code_of_entry_points_counts_for_the_cache_key() -> None:
    files = {path.relative_to(PACKAGE).as_posix() for path in reachable("freehold.stages.gather.run")}
    assert {"corpora/generate.py", "corpora/bible.py", "text/html.py"} <= files
