"""SPDX expressions: what a licence text says, what a distribution declares, and the strictest of two terms."""

from __future__ import annotations

import importlib.metadata
import re
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from freehold.core.errors import LicenceError

if TYPE_CHECKING:
    from license_expression import Licensing

LICENCE_REF = re.compile(r"LicenseRef-[A-Za-z0-9.-]+")

# Free text and trove classifiers people write instead of SPDX ids, in lower case. `BSD` alone does not say which
# one, so it is read as the three-clause form: whoever keeps its terms keeps those of the two-clause form too.
FREE_TEXT = {
    "0bsd": "0BSD",
    "apache": "Apache-2.0",
    "apache 2": "Apache-2.0",
    "apache 2.0": "Apache-2.0",
    "apache 2.0 license": "Apache-2.0",
    "apache license": "Apache-2.0",
    "apache license 2.0": "Apache-2.0",
    "apache license, version 2.0": "Apache-2.0",
    "apache software license": "Apache-2.0",
    "apache software license 2.0": "Apache-2.0",
    "apache-2": "Apache-2.0",
    "bsd": "BSD-3-Clause",
    "bsd license": "BSD-3-Clause",
    "bsd 3-clause": "BSD-3-Clause",
    "bsd 3-clause license": "BSD-3-Clause",
    "3-clause bsd license": "BSD-3-Clause",
    "3-clause bsd": "BSD-3-Clause",
    "modified bsd": "BSD-3-Clause",
    "new bsd": "BSD-3-Clause",
    "new bsd license": "BSD-3-Clause",
    "bsd 2-clause": "BSD-2-Clause",
    "bsd 2-clause license": "BSD-2-Clause",
    "simplified bsd": "BSD-2-Clause",
    "cc0": "CC0-1.0",
    "cc0 1.0 universal (cc0 1.0) public domain dedication": "CC0-1.0",
    "expat": "MIT",
    "isc license": "ISC",
    "isc license (iscl)": "ISC",
    "mit license": "MIT",
    "the mit license": "MIT",
    "the mit license (mit)": "MIT",
    "mit no attribution license (mit-0)": "MIT-0",
    "mpl 2.0": "MPL-2.0",
    "mozilla public license 2.0 (mpl 2.0)": "MPL-2.0",
    "psf": "PSF-2.0",
    "psf license": "PSF-2.0",
    "psfl": "PSF-2.0",
    "python software foundation license": "PSF-2.0",
    "the unlicense": "Unlicense",
    "the unlicense (unlicense)": "Unlicense",
    "zlib/libpng license": "Zlib",
    "gplv2": "GPL-2.0-only",
    "gplv3": "GPL-3.0-only",
    "gplv3+": "GPL-3.0-or-later",
    "lgplv3": "LGPL-3.0-only",
    "agplv3": "AGPL-3.0-only",
    "gnu general public license v2 (gplv2)": "GPL-2.0-only",
    "gnu general public license v2 or later (gplv2+)": "GPL-2.0-or-later",
    "gnu general public license v3 (gplv3)": "GPL-3.0-only",
    "gnu general public license v3 or later (gplv3+)": "GPL-3.0-or-later",
    "gnu lesser general public license v2 or later (lgplv2+)": "LGPL-2.0-or-later",
    "gnu lesser general public license v3 (lgplv3)": "LGPL-3.0-only",
    "gnu lesser general public license v3 or later (lgplv3+)": "LGPL-3.0-or-later",
    "gnu affero general public license v3": "AGPL-3.0-only",
    "gnu affero general public license v3 or later (agplv3+)": "AGPL-3.0-or-later",
}


@dataclass(frozen=True)
class Declared:
    """What a distribution says about itself: the wrapper's licence, not yet the content's."""

    expression: str | None
    """Normalised SPDX expression, or None when nothing it says can be understood."""
    how: str
    """Which metadata field said so, with its text: `License-Expression: MIT`."""


@lru_cache(maxsize=1)
def _licensing() -> Licensing:
    # Imported late: a dry run reads no licence.
    from license_expression import get_spdx_licensing

    return get_spdx_licensing()


def parse(expression: str) -> Any:
    """Return the parsed expression (license-expression's tree); LicenceError when it is not SPDX.

    `LicenseRef-` ids of any name are accepted; unknown ids and bad grammar are not.
    """
    from license_expression import ExpressionError, ExpressionParseError

    if not expression.strip():
        raise LicenceError("a licence is missing", expected="an SPDX expression")
    try:
        tree = _licensing().parse(expression, validate=False, strict=True)
        unknown = [key for key in _licensing().unknown_license_keys(tree) if not LICENCE_REF.fullmatch(key)]
    except (ExpressionError, ExpressionParseError, ValueError, IndexError) as error:  # `()` is an IndexError there
        problem = (str(error).splitlines() or [""])[0]
        raise LicenceError("not an SPDX licence expression", where=expression, found=problem) from error
    if unknown:
        raise LicenceError(
            "not an SPDX licence expression",
            where=expression,
            found=f"unknown id {', '.join(sorted(unknown))}",
            expected="ids of the SPDX list, or LicenseRef-<name> for others",
        )
    return tree


@lru_cache(maxsize=4096)
def normalise(expression: str) -> str:
    """Return the expression in canonical spelling (`apache-2.0` -> `Apache-2.0`, `GPL-2.0` -> `GPL-2.0-only`)."""
    return str(parse(expression).render())


def from_free_text(text: str) -> str | None:
    """Return the SPDX expression meant by a `License:` field or classifier, or None when it is not clear."""
    first_line = next((line for line in text.splitlines() if line.strip()), "")
    name = " ".join(first_line.split()).rstrip(".").lower()
    if name in FREE_TEXT:
        return FREE_TEXT[name]
    try:
        return normalise(" ".join(first_line.split()))
    except LicenceError:
        return None


def of_distribution(distribution: importlib.metadata.Distribution) -> Declared:
    """Return the wrapper's licence as an installed distribution declares it."""
    return of_metadata(distribution.metadata)


def of_metadata(metadata: Any) -> Declared:
    """Return what METADATA or PKG-INFO (an email message) declares.

    License-Expression decides, else the classifiers, else the License field; None when it cannot be understood.
    """
    for text in metadata.get_all("License-Expression") or []:
        try:
            return Declared(normalise(text), f"License-Expression: {text}")
        except LicenceError:
            return Declared(None, f"License-Expression: {text}")
    marks = [c for c in metadata.get_all("Classifier") or [] if c.startswith("License :: ")]
    found = [from_free_text(mark.rsplit(" :: ", 1)[1]) for mark in marks]
    if found and all(found):
        expression = found[0] or ""
        for other in found[1:]:  # several classifiers do not say AND or OR: take the stricter reading
            expression = strictest(expression, other or "")
        return Declared(expression, "Classifier: " + "; ".join(marks))
    text = (metadata.get_all("License") or [""])[0]
    line = text.strip().splitlines()[0] if text.strip() else ""
    return Declared(from_free_text(text) if line else None, f"License: {line}" if line else "no licence field")


def strictest(first: str, second: str) -> str:
    """Return the terms that hold for something made of both: the AND of the two, said once each."""
    return str(parse(f"({normalise(first)}) AND ({normalise(second)})").simplify().render())
