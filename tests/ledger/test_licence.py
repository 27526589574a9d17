from __future__ import annotations

import email
import importlib.metadata

import pytest

from freehold.core.errors import LicenceError
from freehold.ledger import licence


@pytest.mark.parametrize(
    ("written", "normal"),
    [
        ("mit", "MIT"),
        ("apache-2.0", "Apache-2.0"),
        ("GPL-2.0", "GPL-2.0-only"),
        ("MIT or (Apache-2.0 and BSD-3-Clause)", "MIT OR (Apache-2.0 AND BSD-3-Clause)"),
        ("Apache-2.0 WITH LLVM-exception", "Apache-2.0 WITH LLVM-exception"),
        ("LicenseRef-PD-USGov", "LicenseRef-PD-USGov"),
        ("LicenseRef-PD-expired and mit", "LicenseRef-PD-expired AND MIT"),
    ],
)  # fmt: skip
def test_normalises(written: str, normal: str) -> None:
    assert licence.normalise(written) == normal
    assert licence.normalise(normal) == normal


@pytest.mark.parametrize(
    "wrong", ["Foo", "GPLv2", "BSD", "MIT AND", "MIT (", "()", "MIT WITH GPL-3.0-only", "LicenseRef-a b"]
)
def test_refuses_what_is_not_spdx(wrong: str) -> None:
    with pytest.raises(LicenceError, match="not an SPDX licence expression") as caught:
        licence.normalise(wrong)
    assert caught.value.where == wrong


@pytest.mark.parametrize("empty", ["", "  "])
def test_refuses_an_empty_expression(empty: str) -> None:
    with pytest.raises(LicenceError, match="a licence is missing"):
        licence.normalise(empty)


@pytest.mark.parametrize(
    ("text", "spdx"),
    [
        ("BSD", "BSD-3-Clause"),
        ("Apache 2.0", "Apache-2.0"),
        ("MIT License", "MIT"),
        ("PSF", "PSF-2.0"),
        ("Python Software Foundation License", "PSF-2.0"),
        ("GNU General Public License v3 (GPLv3)", "GPL-3.0-only"),
        ("MIT", "MIT"),
        ("The MIT License (MIT)\n\nCopyright (c) somebody\n", "MIT"),
        ("Do what you like", None),
        ("", None),
        ("Proprietary", None),
    ],
)
def test_reads_free_text(text: str, spdx: str | None) -> None:
    assert licence.from_free_text(text) == spdx


def test_every_free_text_means_a_valid_expression() -> None:
    for text, spdx in licence.FREE_TEXT.items():
        assert text == text.lower()
        assert licence.normalise(spdx) == spdx


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ("License-Expression: MIT\nLicense: GPLv3\n", "MIT"),
        ("License-Expression: Nonsense-1\nLicense: MIT\n", None),
        ("Classifier: License :: OSI Approved :: BSD License\nLicense: MIT\n", "BSD-3-Clause"),
        (
            "Classifier: License :: OSI Approved :: MIT License\nClassifier: License :: Strange\nLicense: PSF\n",
            "PSF-2.0",
        ),
        (
            "Classifier: License :: OSI Approved :: MIT License\n"
            "Classifier: License :: OSI Approved :: Apache Software License\n",
            "Apache-2.0 AND MIT",
        ),
        ("License: Apache 2.0\n", "Apache-2.0"),
        ("License: ask me\n", None),
        ("Name: x\n", None),
    ],
)
def test_reads_what_a_distribution_declares(metadata: str, expected: str | None) -> None:
    declared = licence.of_metadata(email.message_from_string(metadata))
    assert declared.expression == expected
    assert declared.how


def test_reads_an_installed_distribution() -> None:
    assert licence.of_distribution(importlib.metadata.distribution("reasoning-gym")).expression == "Apache-2.0"


@pytest.mark.parametrize(
    ("first", "second", "both"),
    [
        ("MIT", "MIT", "MIT"),
        ("MIT", "Apache-2.0", "Apache-2.0 AND MIT"),
        ("Apache-2.0", "MIT", "Apache-2.0 AND MIT"),
        ("MIT OR GPL-2.0-only", "ISC", "ISC AND (GPL-2.0-only OR MIT)"),
        ("Apache-2.0 WITH LLVM-exception", "MIT", "Apache-2.0 WITH LLVM-exception AND MIT"),
        ("MIT AND ISC", "ISC AND MIT", "ISC AND MIT"),
    ],
)
def test_strictest_terms_of_two(first: str, second: str, both: str) -> None:
    assert licence.strictest(first, second) == both


def test_strictest_needs_both() -> None:
    with pytest.raises(LicenceError):
        licence.strictest("MIT", "")
