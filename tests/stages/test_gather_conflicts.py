"""A claim that a source's own files contradict stops gather, whatever says so, until the recipe gives a reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from gather_fixtures import MIT, WORDS, documents, gather, install, report
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from freehold.core.errors import LicenceError

APACHE = "Licensed under the Apache License, Version 2.0 (the License);\nhttp://www.apache.org/licenses/LICENSE-2.0\n"
GPL = """This program is free software: you can redistribute it and/or modify it under the terms of the GNU General
Public License as published by the Free Software Foundation, either version 3 of the License, or (at your option) any
later version.
"""
CLAIM = {"licence": "MIT", "licence_evidence": {"rule": "trust me"}}
OPEN = {"allow": ["MIT", "Apache-2.0", "GPL-3.0-or-later", "CC-BY-NC-4.0"], "uses": ["train"], "review": []}
# {what carries the statement: (its file, its text, where it is named)}
CARRIERS: dict[str, tuple[str, str, str]] = {
    "licence file": ("LICENSE", f"\n\n{GPL}", "LICENSE:3 is the text of GPL-3.0-or-later"),
    "second licence file": ("COPYING", GPL, "COPYING:1 is the text of GPL-3.0-or-later"),
    "title alone": ("COPYING", "GNU GENERAL PUBLIC LICENSE\nVersion 3", "COPYING:1 names GPL"),
    "permissive but other": ("LICENSE", APACHE, "LICENSE:1 is the text of Apache-2.0"),
    "nested licence file": ("deep/LICENSE.txt", GPL, "deep/LICENSE.txt:1 is the text of GPL-3.0-or-later"),
    "REUSE folder": ("LICENSES/GPL-3.0.txt", GPL, "LICENSES/GPL-3.0.txt:1 is the text of GPL-3.0-or-later"),
    "package.json": ("package.json", '{"license": "GPL-3.0-or-later"}', "package.json:1 declares GPL-3.0-or-later"),
    "model card": ("README.md", "---\nlicense: cc-by-nc-4.0\n---\n", "README.md:2 declares CC-BY-NC-4.0"),
    "README": ("README", "Texts\n\n## License\nCC BY-NC 4.0\n", "README:4 names CC-BY-NC"),
    "sidecar": ("deep/a.txt.license", "SPDX-License-Identifier: GPL-3.0-or-later", "a.txt.license:1 declares GPL"),
    "tag in a text": ("deep/b.txt", f"# SPDX-License-Identifier: GPL-3.0-or-later\n{WORDS}", "deep/b.txt:1 (tag)"),
    "notice in a text": ("deep/b.txt", f"{GPL}\n{WORDS}", "deep/b.txt:1 (notice) says GPL-3.0-or-later"),
}


def folder(path: Path, **files: str) -> dict[str, Any]:
    (path / "deep").mkdir(parents=True)
    for name, text in {"deep/a.txt": WORDS, **files}.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(text)
    return {"kind": "folder", "path": str(path), "members": ["deep/*.txt"], "exclude": ["*LICENSE*"], **CLAIM}


@pytest.mark.parametrize("carrier", CARRIERS)
def test_whatever_disagrees_stops_and_is_named_with_its_line(carrier: str, tmp_path: Path) -> None:
    name, text, place = CARRIERS[carrier]
    source = folder(tmp_path / "texts", **{name: text})
    with pytest.raises(LicenceError) as caught:
        gather(tmp_path / "out", {"mine": source}, policy=OPEN)
    assert f"against it: {place}" in str(caught.value).replace("deep/a.txt.license", "a.txt.license")
    gather(tmp_path / "out", {"mine": {**source, "settled": "the author wrote to us"}}, policy=OPEN)
    rows = documents(tmp_path / "out", "mine")
    assert all(
        "settled: the author wrote to us" in row.licence_evidence for row in rows if "against" in row.licence_evidence
    )
    assert any(
        "settled: the author wrote to us" in line for line in report(tmp_path / "out", "mine")["licence_evidence"]
    )


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    carriers=st.sets(st.sampled_from(sorted(CARRIERS)), max_size=3),
    claim=st.sampled_from(["MIT", "GPL-3.0-or-later"]),
)
def test_no_mixture_of_statements_hides_another(carriers: set[str], claim: str, tmp_path_factory) -> None:
    tmp_path = tmp_path_factory.mktemp("mixed")
    files = {"LICENSE": MIT if claim == "MIT" else GPL}
    files |= {CARRIERS[carrier][0]: CARRIERS[carrier][1] for carrier in sorted(carriers)}
    source = {**folder(tmp_path / "texts", **files), "licence": claim}
    agrees = {"MIT": lambda text: text == MIT, "GPL-3.0-or-later": lambda text: "GPL" in text or "General" in text
              or "GENERAL" in text}[claim]  # fmt: skip
    others = [text for name, text in files.items() if not agrees(text)]
    if others:
        with pytest.raises(LicenceError, match="against it"):
            gather(tmp_path / "out", {"mine": source}, policy=OPEN)
    else:
        assert gather(tmp_path / "out", {"mine": source}, policy=OPEN)["documents"] > 0


def test_a_quote_of_another_licence_is_no_evidence(tmp_path: Path) -> None:
    source = folder(tmp_path / "texts", LICENSE="GNU GENERAL PUBLIC LICENSE\nVersion 3, 29 June 2007\n" + GPL)
    quote = {"file": "LICENSE", "quote": "GNU GENERAL PUBLIC LICENSE"}
    with pytest.raises(LicenceError, match="LICENSE:3 is the text of GPL-3.0-or-later"):
        gather(tmp_path / "out", {"mine": {**source, "licence_evidence": quote}}, policy=OPEN)
    (tmp_path / "texts/LICENSE").unlink()
    (tmp_path / "texts/terms.txt").write_text("They are under the GNU GENERAL PUBLIC LICENSE.")
    quote = {"file": "terms.txt", "quote": "under the GNU GENERAL PUBLIC LICENSE"}
    with pytest.raises(LicenceError, match=r"(?s)is that of another one.*words of GPL.*words of MIT"):
        gather(tmp_path / "out", {"mine": {**source, "licence_evidence": quote}}, policy=OPEN)
    gather(
        tmp_path / "out", {"mine": {**source, "licence_evidence": quote, "licence": "GPL-3.0-or-later"}}, policy=OPEN
    )
    assert report(tmp_path / "out", "mine")["quote"] == "agrees"


def test_a_package_around_a_free_text_may_be_permissive(tmp_path: Path, site: Path) -> None:
    install(site, "tool", {"tool/a.txt": WORDS, "tool-1.0.dist-info/LICENSE": MIT}, metadata="License: MIT\n")
    source = {"kind": "package", "distribution": "tool", "version": "1.0", "members": ["tool/*.txt"],
              "licence": "LicenseRef-PD-USGov", "licence_evidence": {"rule": "17 U.S.C. 105"}}  # fmt: skip
    assert gather(tmp_path / "out", {"tool": source})["documents"] == 1
    with pytest.raises(LicenceError, match="License: MIT declares MIT"):
        gather(tmp_path / "out", {"tool": {**source, "licence": "ISC"}})


@pytest.mark.parametrize("file", ["tool-1.0.dist-info/COPYING", "tool/LICENSE"])
def test_copyleft_of_a_package_speaks_against_any_claim(file: str, tmp_path: Path, site: Path) -> None:
    install(
        site, "tool", {"tool/a.txt": WORDS, file: GPL, "tool-1.0.dist-info/LICENSE": MIT}, metadata="License: MIT\n"
    )
    source = {"kind": "package", "distribution": "tool", "version": "1.0", "members": ["tool/*.txt"], **CLAIM}
    for licence in ("MIT", "LicenseRef-PD-USGov", "wrapper"):
        with pytest.raises(LicenceError, match=f"{file}:1 is the text of GPL-3.0-or-later"):
            gather(tmp_path / "out", {"tool": {**source, "licence": licence}})


def test_rows_state_a_licence_in_other_keys(tmp_path: Path) -> None:
    rows = [{"text": WORDS, "license": "mit"}, {"text": WORDS, "License": "cc-by-nc-4.0"},
            {"text": WORDS, "licenses": ["GPL-3.0-or-later"]}, {"text": WORDS, "license": "proprietary"},
            {"text": WORDS, "license": None}]  # fmt: skip
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"kind": "jsonl", "path": str(tmp_path / "rows.jsonl"), **CLAIM, "refused": "drop"}
    gather(tmp_path / "out", {"rows": source}, policy=OPEN)
    assert [row.path for row in documents(tmp_path / "out", "rows")] == ["rows.jsonl#1", "rows.jsonl#5"]
    refused = [row["reason"] for row in report(tmp_path / "out", "rows")["refused"]["named"]]
    assert [reason.rpartition("against it: ")[2] for reason in refused] == [
        "rows.jsonl#2 declares CC-BY-NC-4.0",
        "rows.jsonl#3 declares GPL-3.0-or-later",
        "rows.jsonl#4 declares proprietary",
    ]
    gather(tmp_path / "all", {"rows": {**source, "licence": "detect"}}, policy=OPEN)
    assert [row.licence for row in documents(tmp_path / "all", "rows")] == ["MIT", "CC-BY-NC-4.0", "GPL-3.0-or-later"]
