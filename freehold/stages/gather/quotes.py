"""The words that a recipe quotes as evidence: they must be in the file it names."""

from __future__ import annotations

import contextlib
import fnmatch
import importlib.metadata
import sysconfig
import zlib
from pathlib import Path

from freehold.core.config import user_path
from freehold.core.errors import LicenceError
from freehold.ledger.conflicts import quoted
from freehold.stages.gather.config import Archive, FileSource, Folder, Package
from freehold.stages.gather.origins import LICENCE_FILE_BYTES, Origin, find, read_file, walk
from freehold.stages.gather.paths import wanted
from freehold.text.source import Evidence


def check_evidence(
    name: str, source: FileSource, origin: Origin, licence: str, corpus_dir: Path, pinned: bool = True
) -> str:
    """Look the quote up in the file it is quoted from; return what the recogniser finds.

    `agrees`, `silent` where it does not know, or empty without a quote. Raises LicenceError when the words are not
    there, and when they are those of another licence than the one they are quoted for.
    """
    evidence = source.licence_evidence
    if evidence is None or not evidence.file:
        return ""
    verdict, found = quoted(evidence.quote, licence) if licence else ("silent", [])
    if verdict == "contradicts" and not source.settled:
        raise LicenceError(
            "the evidence for a licence is that of another one",
            where=f"{name}: {evidence.file}",
            found=f'"{" ".join(evidence.quote.split())[:120]}", words of {", ".join(found)}',
            expected=f"words of {licence}",
            todo="give the licence that the file states, or say in `settled` why it does not hold",
        )
    quote = " ".join(evidence.quote.split())
    known = [text for path, text in origin.licence_files if fnmatch.fnmatchcase(path, evidence.file)]
    if any(quote in " ".join(text.split()) for text in known):
        return verdict
    texts = _evidence_texts(source, evidence, corpus_dir, pinned)
    if not any(quote in " ".join(text.split()) for text in texts):
        raise LicenceError(
            "the evidence for a licence is not where the recipe says",
            where=f"{name}: {evidence.file}",
            found="no such file that can be read" if not texts else "the file, but not the words",
            expected=f'"{quote}"',
            todo="read the source's licence files and quote the line that holds",
        )
    return verdict


def _evidence_texts(source: FileSource, evidence: Evidence, corpus_dir: Path, pinned: bool) -> list[str]:
    # The licence file is found like any member, whatever the source itself reads or skips.
    probe = source.model_copy(update={"members": (evidence.file,), "max_document_bytes": LICENCE_FILE_BYTES})
    if isinstance(source, Package):
        files = importlib.metadata.distribution(source.distribution).files or []
        paths = [Path(str(f.locate())) for f in files if wanted(f.as_posix(), probe)]
        reads = [read_file(path) for path in paths if path.is_file()]
    elif isinstance(probe, Archive):
        reads = [m.read for m in find("", probe, corpus_dir, pinned).members]
    else:
        root = user_path(source.path) if isinstance(source, Folder) else Path(sysconfig.get_path("stdlib"))
        reads = [m.read for m in walk(root, probe, [])]
    texts = []
    for read in reads:
        with contextlib.suppress(OSError, EOFError, zlib.error):  # another file that matches may hold the quote
            texts.append((read(LICENCE_FILE_BYTES) or b"").decode("utf-8", "replace"))
    return texts
