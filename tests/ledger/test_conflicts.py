"""Statements of other licences than the one claimed: found in whatever carries them, with their line."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from freehold.ledger.conflicts import Statement, by_name, conflicts, covered, in_metadata, is_free, mentions, quoted

IDS = ["MIT", "Apache-2.0", "BSD-3-Clause", "GPL-2.0-only", "GPL-3.0-or-later", "CC-BY-4.0", "CC-BY-NC-4.0", "CC0-1.0",
       "LicenseRef-PD-USGov", "LicenseRef-Own"]  # fmt: skip
one = st.sampled_from(IDS)
expressions = st.one_of(
    one,
    st.tuples(one, one).map(lambda pair: f"{pair[0]} AND {pair[1]}"),
    st.tuples(one, one).map(lambda pair: f"{pair[0]} OR {pair[1]}"),
)


@settings(max_examples=40, deadline=None)
@given(expressions)
def test_a_claim_agrees_with_itself(claim: str) -> None:
    assert covered(claim, claim)
    assert mentions(claim, claim)
    assert conflicts(claim, [Statement("a:1", claim, "metadata")], around=False) == []


@settings(max_examples=40, deadline=None)
@given(expressions, expressions)
def test_more_obligations_never_conflict_more(claim: str, said: str) -> None:
    stricter = f"({claim}) AND ({said})"
    assert covered(said, stricter)
    assert conflicts(stricter, [Statement("a:1", said, "metadata")], around=False) == []


@settings(max_examples=40, deadline=None)
@given(expressions, expressions, st.booleans())
def test_what_a_claim_does_not_keep_to_is_a_conflict(claim: str, said: str, around: bool) -> None:
    found = conflicts(claim, [Statement("LICENSE:3", said, "text")], around=around)
    if covered(said, claim):
        assert found == []
    elif not around or not is_free(said):
        assert [str(each) for each in found] == [f"LICENSE:3 is the text of {said}"] or mentions(said, claim)


@settings(max_examples=40, deadline=None)
@given(one, one, one)
def test_a_choice_must_be_shown(first: str, second: str, shown: str) -> None:
    claim = f"{first} OR {second}"
    found = conflicts(claim, [Statement("COPYING:1", shown, "text")], around=False)
    assert bool(found) != covered(shown, claim)
    both = [Statement("COPYING:1", first, "text"), Statement("LICENSE:1", second, "text")]
    assert conflicts(claim, both, around=False) == []


@pytest.mark.parametrize(
    ("text", "path", "says"),
    [
        ('{\n "name": "x",\n "license": "GPL-3.0"}', "package.json", [("package.json:3", "GPL-3.0-only")]),
        ('{"resources": [{"licenses": [{"name": "CC-BY-4.0"}]}]}', "datapackage.json", [("datapackage.json:1",
                                                                                         "CC-BY-4.0")]),
        ('[project]\nlicense = {text = "GPLv3"}\n', "pyproject.toml", [("pyproject.toml:2", "GPL")]),
        ('classifiers = [\n  "License :: OSI Approved :: MIT License",\n]', "pyproject.toml", [("pyproject.toml:2",
                                                                                               "MIT")]),
        ("---\nlicense: cc-by-nc-4.0\n---\n", "README.md", [("README.md:2", "CC-BY-NC-4.0")]),
        ("License: https://creativecommons.org/licenses/by-sa/4.0/", "metadata.yaml", [("metadata.yaml:1",
                                                                                       "CC-BY-SA-4.0")]),
        ("license: Public Domain", "metadata.yaml", [("metadata.yaml:1", "CC-PDDC")]),
        ("SPDX-License-Identifier: MPL-2.0", "a.txt.license", [("a.txt.license:1", "MPL-2.0")]),
        ('{"license": null, "deep": {"a": {"b": {"c": {"license": "MIT"}}}}}', "package.json", []),
        ("title: a book about a licence", "CITATION.cff", []),
    ],
)  # fmt: skip
def test_metadata_state_a_licence_at_a_line(text: str, path: str, says: list[tuple[str, str]]) -> None:
    assert [(each.place, each.says) for each in in_metadata(text, path)] == says


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("the GNU Lesser General Public License, version 2.1", ["LGPL"]),
        ("GNU AFFERO GENERAL PUBLIC LICENSE", ["AGPL"]),
        ("licensed under CC BY-NC-SA 4.0", ["CC-BY-NC"]),
        ("Creative Commons Attribution-NonCommercial-NoDerivs", ["CC-BY-NC"]),
        ("the MIT License or the Apache License", ["MIT", "Apache"]),
        ("committed permits, a bicycle by the sea", []),
    ],
)
def test_licences_are_known_by_their_names(text: str, names: list[str]) -> None:
    assert [each.says for each in by_name(text, "README")] == names


@pytest.mark.parametrize(
    ("quote", "claim", "verdict"),
    [
        ("GNU GENERAL PUBLIC LICENSE Version 3, 29 June 2007", "MIT", "contradicts"),
        ("GNU GENERAL PUBLIC LICENSE Version 3, 29 June 2007", "GPL-3.0-only", "agrees"),
        ("Permission is hereby granted, free of charge", "MIT", "silent"),
        ("Licensed under the Apache License, Version 2.0", "Apache-2.0", "agrees"),
        ("Licensed under the Apache License, Version 2.0", "BSD-3-Clause", "contradicts"),
        ("Creative Commons Attribution-NonCommercial 4.0 International", "CC-BY-4.0", "contradicts"),
        ("may be used for anything", "LicenseRef-Own", "silent"),
    ],
)
def test_a_quote_is_evidence_for_its_own_licence_only(quote: str, claim: str, verdict: str) -> None:
    assert quoted(quote, claim)[0] == verdict
