from __future__ import annotations

import functools
import importlib.metadata
import re

import pytest

from freehold.ledger import debian
from freehold.ledger.evidence import (
    Finding,
    Text,
    Weighed,
    agreement,
    licence_text,
    of_cc_url,
    of_head,
    restrictions,
    unfilled,
    weigh,
)
from freehold.ledger.licence import of_distribution

# The words that make a text the MIT licence, as every program under it repeats them.
MIT = importlib.metadata.distribution("rich").read_text("licenses/LICENSE") or ""
CLAIM = Weighed("MIT", "high", 'LICENSE: "MIT"')


@functools.cache
def installed() -> list[tuple[str, str, str]]:
    """Return (name, declared, licence text) of the distributions of this environment that have both."""
    found = []
    for distribution in importlib.metadata.distributions():
        declared = of_distribution(distribution).expression
        files = [f for f in distribution.files or [] if f.parts[0].endswith(".dist-info")]
        text = "\n\n".join(
            str(f.locate().read_text(errors="replace"))  # type: ignore[call-arg]
            for f in files
            if re.match(r"(UN)?LICEN[CS]E|COPYING", f.name, re.I)
        )
        if declared and 0 < len(text) < 20_000:  # more is what others put into one wheel
            found.append((distribution.name, declared, text))
    return found


def test_licence_files_of_this_environment_agree() -> None:
    rows = [(name, agreement(declared, licence_text(text))) for name, declared, text in installed()]
    assert len(rows) > 40
    agree = sum(result in {"agrees", "partly"} for _, result in rows) / len(rows)
    contradicted = [name for name, result in rows if result == "contradicts"]
    assert agree >= 0.95, rows
    assert len(contradicted) <= 0.02 * len(rows), contradicted


def test_another_licence_text_is_found_wherever_possible() -> None:
    # Every declaration next to the licence text of another distribution, where the two are of different kinds.
    texts = {declared: text for _, declared, text in installed() if declared in {"MIT", "Apache-2.0", "BSD-3-Clause"}}
    assert set(texts) == {"MIT", "Apache-2.0", "BSD-3-Clause"}
    wrong = [(says, of) for says in ("MIT", "Apache-2.0", "BSD-3-Clause", "GPL-3.0-only") for of in texts if says != of]
    assert [pair for pair in wrong if agreement(pair[0], licence_text(texts[pair[1]])) != "contradicts"] == []


@pytest.mark.parametrize(
    ("expression", "ids", "result"),
    [
        ("MIT", ("MIT",), "agrees"),
        ("MIT", ("Apache-2.0", "MIT"), "agrees"),
        ("MIT AND Apache-2.0", ("MIT",), "partly"),
        ("MIT OR Apache-2.0", ("Apache-2.0",), "agrees"),
        ("Apache-2.0 WITH LLVM-exception", ("Apache-2.0",), "agrees"),
        ("GPL-2.0-or-later", ("GPL-3.0-only",), "agrees"),
        ("GPL-2.0-only", ("GPL-3.0-only",), "contradicts"),
        ("GPL-3.0-or-later", ("GPL-2.0-only",), "contradicts"),
        ("LGPL-2.1-or-later", ("GPL-2.0-only",), "contradicts"),
        ("PSF-2.0", ("Python-2.0.1",), "agrees"),
        ("MIT", ("GPL-3.0-only",), "contradicts"),
        ("MIT", (), "silent"),
        ("no expression", ("MIT",), "silent"),
    ],
)
def test_agreement(expression: str, ids: tuple[str, ...], result: str) -> None:
    assert agreement(expression, Text(ids, 1.0, False)) == result


def test_a_text_that_opens_unread_does_not_contradict() -> None:
    assert agreement("MIT-CMU", Text(("Zlib",), 0.7, True)) == "silent"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("# SPDX-License-Identifier: gpl-2.0\nimport x\n", [("tag", "GPL-2.0-only")]),
        ("/* SPDX-License-Identifier: MIT OR Apache-2.0 */\nint x;", [("tag", "MIT OR Apache-2.0")]),
        ("<!-- SPDX-License-Identifier: CC-BY-4.0 -->\n# Title", [("tag", "CC-BY-4.0")]),
        ("# SPDX-License-Identifier: my own terms\n", [("restriction", "")]),
        ("Write `SPDX-License-Identifier: MIT` into each file.", []),
        ("x = 1\n" * 2000 + "# SPDX-License-Identifier: GPL-3.0-only\n", []),
        ("A tale of licence and liberty.", []),
    ],
)
def test_reads_tags(text: str, says: list[tuple[str, str]]) -> None:
    assert [(f.kind, f.says) for f in of_head(text)] == says


def test_reads_a_notice() -> None:
    assert [(f.kind, f.says) for f in of_head(MIT + "\n\nprint(1)\n")] == [("notice", "MIT")]
    assert of_head("see https://www.gnu.org/licenses/gpl-3.0.html for the licence of another program") == []


@pytest.mark.parametrize(
    "text",
    [
        "These lists are free for non-commercial research use.",
        "For personal and educational use only.",
        "You may read it. It is not for commercial purposes.",
        "No part of this book may be reproduced in any form without leave.",
        "These files may not be redistributed without the author's consent.",
        "Please don't commercially republish them.",
        "This text may not be used to train language models.",
        "All rights in text and data mining are reserved.",
        "Given out with the permission of the copyright holder.",
        "The/at jury/nn said/vbd in/in the/at report/nn that",
        "word\n[1913 Webster]\n",
        "[Scene: a kitchen.]",
    ],
)
def test_finds_words_that_withhold(text: str) -> None:
    assert restrictions(text), text


@pytest.mark.parametrize(
    "text",
    [
        MIT,
        "Neither the name of the project nor the names of its contributors may be used to endorse products.",
        "Commercial use is welcome. The function returns only numbers. It may be copied.",
        "Only the first argument is used; see the section on text and data.",
        "--packfile=<hash>: For internal use only.",
        "and/or the left/right brackets, in/out parameters, and/or files",
        "He was asked for his permission and gave it.",
    ],
)
def test_finds_no_restriction_where_there_is_none(text: str) -> None:
    assert restrictions(text) == []


def test_a_description_names_the_work_of_others() -> None:
    for text in ("Contains rock lyrics.", "Friends tv-show transcripts", "Definitions were scraped from a web site."):
        assert restrictions(text) == []
        assert restrictions(text, foreign=True), text


def test_an_empty_form_grants_nothing() -> None:
    assert unfilled("MIT License\n\nCopyright (c) [year] [fullname]\n")
    assert unfilled(MIT) == []
    assert unfilled(MIT + "How to apply these terms: <year> <name of author>") == []


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("https://creativecommons.org/licenses/by-nc-sa/4.0/", "CC-BY-NC-SA-4.0"),
        ("http://creativecommons.org/licenses/by/3.0/us/", "CC-BY-3.0-US"),
        ("//creativecommons.org/licenses/by-sa/4.0/deed.de", "CC-BY-SA-4.0"),
        ("https://creativecommons.org/publicdomain/zero/1.0/", "CC0-1.0"),
        ("https://creativecommons.org/publicdomain/mark/1.0/", "LicenseRef-PD-mark"),
        ("https://creativecommons.org/about/", None),
        ("https://example.org/licenses/by/4.0/", None),
    ],
)
def test_creative_commons_addresses(url: str, says: str | None) -> None:
    assert of_cc_url(url) == says


def tag(says: str, sure: bool = True) -> Finding:
    return Finding("tag", "", says, sure=sure)


def test_the_strictest_term_wins() -> None:
    assert weigh(CLAIM, []).licence == "MIT"
    assert weigh(CLAIM, [tag("MIT")]) == Weighed("MIT", "high", 'LICENSE: "MIT"; tag MIT')
    mixed = weigh(CLAIM, [tag("GPL-2.0-only")])
    assert (mixed.licence, mixed.confidence) == ("GPL-2.0-only AND MIT", "medium")
    assert weigh(CLAIM, [tag("Apache-2.0"), tag("ISC")]).licence == "Apache-2.0 AND ISC AND MIT"


def test_without_a_claim_the_text_s_own_word_stands() -> None:
    around = Weighed("GPL-3.0-only", "medium", "licence file GPL-3.0-only in COPYING")
    assert weigh(around, [tag("MIT")], detected=True).licence == "MIT"
    assert weigh(around, [tag("MIT")], detected=True).confidence == "high"
    assert weigh(around, [tag("MIT", sure=False)], detected=True).confidence == "medium"
    assert weigh(around, [], detected=True).licence == "GPL-3.0-only"


def test_what_withholds_makes_it_low_and_is_named() -> None:
    weighed = weigh(CLAIM, restrictions("for non-commercial use"))
    assert (weighed.licence, weighed.confidence) == ("MIT", "low")
    assert 'against it: restriction: "non-commercial: for non-commercial use' in weighed.evidence


DEP5 = """Format: https://www.debian.org/doc/packaging-manuals/copyright-format/1.0/
Upstream-Name: letters

Files: *
Copyright: 2001 A
License: Expat

Files: lib/eldap/*
 doc/?.html
Copyright: B
License: GPL-2+ or Artistic

Files: lib/eldap/free/*
Copyright: C
License: public-domain
 Do as you like.

Files: debian/*
Copyright: D
License: GPL-3+

Files: *.odd
Copyright: E
License: Odd-1

License: Odd-1
 .
 No one knows these terms.
"""


@pytest.mark.parametrize(
    ("path", "expression", "glob"),
    [
        ("usr/share/doc/letters/a.html", "MIT", "*"),
        ("usr/share/doc/letters/lib/eldap/x.html", "GPL-2.0-or-later OR Artistic-1.0-Perl", "lib/eldap/*"),
        ("usr/share/doc/letters/lib/eldap/free/x.html", "LicenseRef-PD-dedicated", "lib/eldap/free/*"),
        ("usr/share/doc/debian/FAQ/x.html", "MIT", "*"),
        ("usr/share/doc/q.html", "MIT", "*"),
        ("usr/share/doc/letters/doc/q.html", "GPL-2.0-or-later OR Artistic-1.0-Perl", "doc/?.html"),
        ("x/doc/a.html", "GPL-2.0-or-later OR Artistic-1.0-Perl", "doc/?.html"),
        ("x/doc/ab.html", "MIT", "*"),
        ("a/b.odd", "LicenseRef-Odd-1", "*.odd"),
    ],
)
def test_debian_copyright_by_glob(path: str, expression: str, glob: str) -> None:
    parsed = debian.parse(DEP5)
    assert parsed is not None
    found = parsed.of(path)
    assert found is not None
    assert (found[0].expression, found[1]) == (expression, glob)


@pytest.mark.parametrize(
    ("name", "expression"),
    [
        ("GPL-2", "GPL-2.0-only"),
        ("GPL-1+ or Artistic", "GPL-1.0-or-later OR Artistic-1.0-Perl"),
        ("LGPL-2.1+", "LGPL-2.1-or-later"),
        ("GFDL-1.3+", "GFDL-1.3-or-later"),
        ("Apache-2.0 and BSD-3-clause", "Apache-2.0 AND BSD-3-Clause"),
        ("GPL-3+ with Font exception", "GPL-3.0-or-later"),
        ("REGCOMP, and GPL-1+ or Artistic", "LicenseRef-REGCOMP AND (GPL-1.0-or-later OR Artistic-1.0-Perl)"),
        ("CC-BY-SA-3.0", "CC-BY-SA-3.0"),
        ("", "LicenseRef-unnamed"),
    ],
)
def test_debian_names(name: str, expression: str) -> None:
    assert debian.spdx(name) == expression


def test_a_contradicting_copyright_file_is_named() -> None:
    body = "".join(f" {line or '.'}\n" for line in MIT.splitlines())
    wrong = DEP5.replace("License: Expat\n", f"License: GPL-3+\n{body}")
    honest = DEP5.replace("License: Expat\n", f"License: Expat\n{body}")
    assert debian.parse(wrong).of("a")[0].contradiction == "named GPL-3.0-or-later, but its text is that of MIT"  # type: ignore[union-attr,index]
    assert debian.parse(honest).of("a")[0].contradiction == ""  # type: ignore[union-attr,index]


def test_an_unknown_name_is_what_its_text_is() -> None:
    body = "".join(f" {line or '.'}\n" for line in MIT.splitlines())
    parsed = debian.parse(DEP5.replace("License: Expat\n", f"License: Odd-Expat\n{body}"))
    assert parsed is not None
    assert parsed.of("a")[0].expression == "MIT"  # type: ignore[index]


@pytest.mark.parametrize("text", ["", "This package was put together by hand.", "Format: text\n\nFiles: *\n"])
def test_other_copyright_files_are_not_dep5(text: str) -> None:
    assert debian.parse(text) is None
