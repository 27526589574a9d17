"""What a source claims for its texts and what shows it; and what one document then is under."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import re

from freehold.core.errors import LicenceError
from freehold.ledger.conflicts import covered, is_free
from freehold.ledger.evidence import (
    Confidence,
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
from freehold.ledger.licence import normalise, strictest
from freehold.stages.gather.config import Debian, FileSource
from freehold.stages.gather.origins import Origin
from freehold.stages.gather.statements import against, against_wrapper
from freehold.text.making import Material
from freehold.text.reading import Part

DETECT, WRAPPER = "detect", "wrapper"
MOST_LINK_CHARS = 4_000
# A licence file of this name is about the texts, not about the program around them.
OF_CONTENT = re.compile(r"[-_.](content|data|texts?|docs?|documentation|corpus|media)\b", re.I)


def wrapper_findings(origin: Origin) -> list[Finding]:
    """Return what the wrapper says: its metadata, and each licence file as far as it is recognised."""
    found = []
    if origin.declared or origin.wrapper_licence:
        kind = "debian" if origin.copyright else "metadata"
        found.append(Finding(kind, "", origin.wrapper_licence, origin.declared))
    for path, text in origin.licence_files if origin.copyright is None else ():
        for key in licence_text(text).ids:
            found.append(Finding("licence file", path, key))
        found += unfilled(text, path)
    return found


def claim(source: FileSource, origin: Origin) -> Weighed:
    """Return the licence a source claims for all its texts, how sure that is, and what speaks against it.

    Whatever a file of the source states under other terms speaks against the claim, and is named with its line; of a
    package around the text see `freehold.ledger.conflicts.conflicts`.
    """
    evidence = str(source.licence_evidence or "")
    conflicts: list[str] = []
    if source.licence == WRAPPER:
        licence = origin.wrapper_licence
        confidence, conflicts = _borne_out(licence, origin)
        conflicts += against_wrapper(licence, source, origin)
    elif source.licence == DETECT:
        licence, confidence, conflicts, evidence = _detected(origin)
    else:
        conflicts = against(source.licence, source, origin)
        licence = source.licence
        confidence = "high" if source.licence_evidence and source.licence_evidence.file else "medium"
    if licence:
        conflicts += [
            f"{path} is the text of {', '.join(found.ids)}"
            for path, text in origin.licence_files
            if OF_CONTENT.search(path.rpartition("/")[2])
            for found in [licence_text(text)]
            if agreement(licence, found) == "contradicts"
        ]
    with contextlib.suppress(LicenceError):  # the gate refuses it, with every other row it refuses
        licence = normalise(licence) if licence else ""
    if conflicts:
        confidence = "low"
        evidence = "; ".join(filter(None, [evidence, *(f"against it: {conflict}" for conflict in conflicts)]))
    return settled(source.settled, Weighed(licence, confidence, evidence, tuple(conflicts)))


def of_document(source: FileSource, origin: Origin, base: Weighed, part: Part) -> Weighed:
    """Return the licence of one document: its source's claim and its own statements, the strictest term winning."""
    own = [*of_header(part), *part.findings, *of_head(part.text), *restrictions(f"{part.text}\n{part.path}")]
    stated = _debian_statement(source, origin, part.member.path)
    if stated is not None:
        own.insert(0, stated)
    if source.licence != DETECT:
        own = [finding for finding in own if finding.sure or not finding.says]
    weighed = weigh(base, own, detected=source.licence == DETECT)
    if source.licence != DETECT:
        weighed = doubted(weighed, against_claim(base.licence, own, part.text, part.path))
    return settled(source.settled, weighed)


def of_header(part: Part) -> list[Finding]:
    """Return what the HTTP header `Link` of a page says of its licence."""
    link = part.member.web.headers.get("link", "") if part.member.web else ""
    found = []
    for one in link[:MOST_LINK_CHARS].split(","):
        address, _, relation = one.partition(";")
        says = of_cc_url(address.strip().strip("<>")) if "license" in relation.lower() else None
        if says:
            found.append(Finding("link", f"{part.path}, HTTP header", says, one.strip()[:120], sure=True))
    return found


def against_claim(licence: str, own: list[Finding], text: str, path: str) -> list[str]:
    """Return what a document states that asks for more than its source's claim, with its line.

    Terms that ask for no more than a notice are added to the document's licence, and contradict nothing.
    """
    found = []
    for finding in own:
        if finding.says and licence and not covered(finding.says, licence) and not is_free(finding.says):
            line = 1 + text.count("\n", 0, max(text.find(finding.quote), 0)) if finding.quote else 1
            found.append(f"{path}:{line} ({finding.kind}) says {finding.says}")
    return found


def doubted(weighed: Weighed, found: list[str]) -> Weighed:
    """Return the verdict with further statements against it."""
    if not found:
        return weighed
    evidence = "; ".join(filter(None, [weighed.evidence, *(f"against it: {one}" for one in found)]))
    return Weighed(weighed.licence, "low", evidence, (*weighed.conflicts, *found))


def material(source: FileSource, origin: Origin) -> Material:
    """Return what a generator gets of a source: its files, and the strictest terms that any of them is under."""
    claimed = claim(source, origin)
    weighed = [of_document(source, origin, claimed, Part(member, "", "")) for member in origin.members]
    licence = functools.reduce(strictest, (one.licence for one in weighed)) if weighed else ""
    doubt = next((one.evidence for one in weighed if one.confidence == "low"), "")
    return Material(origin.version, origin.acquired, origin.members, source.max_document_bytes, licence, doubt)


def settled(reason: str, weighed: Weighed) -> Weighed:
    """Return the verdict with a person's answer to what speaks against it; that makes low medium."""
    if not reason or weighed.confidence != "low" or reason in weighed.evidence:
        return weighed
    evidence = f"{weighed.evidence}; settled: {reason}"
    return dataclasses.replace(weighed, confidence="medium", evidence=evidence, conflicts=())


def _borne_out(licence: str, origin: Origin) -> tuple[Confidence, list[str]]:
    """Return how sure a wrapper's licence is, and what speaks against it, from its licence files and descriptions."""
    conflicts = []
    confidence: Confidence = "medium"
    if origin.licence_files and licence and origin.copyright is None:
        whole = _whole(origin)
        result = agreement(licence, whole)
        confidence = "high" if result == "agrees" else "medium"
        if result == "contradicts":
            files = ", ".join(path for path, _ in origin.licence_files[:3])
            conflicts.append(f"it declares {licence}, but {files} is the text of {', '.join(whole.ids[:5])}")
    for path, text in origin.licence_files if origin.copyright is None else ():
        conflicts += [str(finding) for finding in unfilled(text, path)]
    for path, text in origin.about:
        conflicts += [str(finding) for finding in restrictions(text, path, foreign=True)]
    return confidence, conflicts


def _detected(origin: Origin) -> tuple[str, Confidence, list[str], str]:
    """Return (licence, confidence, conflicts, evidence) as far as the wrapper shows them, no person having looked."""
    findings = [finding for finding in wrapper_findings(origin) if finding.says]
    evidence = "; ".join(dict.fromkeys(map(str, findings)))
    if origin.copyright is not None:
        return "", "low", [], ""  # it speaks file by file
    declared = origin.wrapper_licence
    whole = _whole(origin)
    confidence, conflicts = _borne_out(declared, origin)
    if declared and agreement(declared, whole) == "agrees":
        return declared, confidence, conflicts, evidence
    licence = declared
    for key in whole.ids:
        licence = strictest(licence, key) if licence else key
    return licence, "medium" if whole.ids and whole.explained > 0.5 else "low", conflicts, evidence


def _whole(origin: Origin) -> Text:
    """Return all licence files of a source as one."""
    found = [licence_text(text) for _, text in origin.licence_files]
    ids = tuple(dict.fromkeys(key for text in found for key in text.ids))
    explained = max((text.explained for text in found), default=0.0)
    return Text(ids, explained, any(text.opens_unread for text in found))


def _debian_statement(source: FileSource, origin: Origin, path: str) -> Finding | None:
    """Return what a Debian package's copyright file says of one file."""
    if origin.copyright is None:
        return None
    mapped = path
    for pattern, replacement in source.upstream.items() if isinstance(source, Debian) else ():
        mapped, count = re.subn(pattern, replacement, path, count=1)
        if count:
            break
    found = origin.copyright.of(mapped)
    if found is None:
        return None
    paragraph, glob = found
    place = f"usr/share/doc/*/copyright, Files: {glob}"
    if paragraph.contradiction:
        return Finding("restriction", place, "", paragraph.contradiction)
    # `*` holds for whatever no other paragraph names; in a package whose paths are not the source's that may be wrong.
    globs = {g for p in origin.copyright.paragraphs for g in p.globs if not g.startswith("debian/")}
    sure = glob != "*" or mapped != path or globs == {"*"}
    return Finding("debian", place, paragraph.expression, paragraph.name, sure)
