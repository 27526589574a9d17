"""Documents about a run's data, made from its ledger alone: a data card, the EU summary, AB 2013, Croissant.

Field names and their order follow
- the Explanatory Notice and Template for the Public Summary of Training Content for general-purpose AI models,
  European Commission, 24 July 2025 (C(2025) 8311 of 5 December 2025), Article 53(1)(d) of Regulation (EU) 2024/1689;
- California Civil Code, section 3111(a)(1) to (12), added by Assembly Bill 2013 (2024);
- the Croissant Format Specification 1.0 of MLCommons, https://docs.mlcommons.org/croissant/docs/croissant-spec.html.

They are drafts for a person to sign, not legal advice. What no ledger holds is taken from the provider's statements
(`card.Statements`) or said to be unknown. The same run gives the same text.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from freehold.core.artifact import sha256_json, write_atomic
from freehold.core.document import WEB, Conversation, Document
from freehold.core.table import Table
from freehold.run.card import Statements
from freehold.run.layout import CURATE, PRETRAIN

UNKNOWN = "unknown: the ledger does not hold it, and it was not stated"
PICTURE = "data.png"
WEB_COLUMNS = [name for name, _ in WEB]
# Sizes as the template's boxes have them.
SIZES = ((10**9, "less than 1 billion tokens"), (10**13, "1 billion to 10 trillion tokens"))
PUBLIC = {"package": "Python distribution", "sdist": "source archive", "stdlib": "Python's standard library"}
OWN = ("folder", "jsonl", "parquet")


def make(facts: dict[str, Any], stated: Statements, kinds: Sequence[str]) -> dict[str, str]:
    """Return the text of each document by file name; `kinds` are keys of `MAKERS`."""
    return {MAKERS[kind][0]: MAKERS[kind][1](facts, stated) for kind in kinds}


def difference(old: dict[str, str], new: dict[str, str], names: tuple[str, str] = ("before", "now")) -> str:
    """Return a unified diff over all documents, empty when they are equal."""
    lines: list[str] = []
    for name in sorted({*old, *new}):
        before, after = (texts.get(name, "").splitlines(keepends=True) for texts in (old, new))
        lines += difflib.unified_diff(before, after, f"{names[0]}/{name}", f"{names[1]}/{name}")
    return "".join(lines)


def read(folder: Path, names: Sequence[str]) -> dict[str, str]:
    """Return the documents that are in a folder."""
    return {name: (folder / name).read_text(encoding="utf-8") for name in names if (folder / name).exists()}


def write(folder: Path, texts: dict[str, str]) -> None:
    """Write documents to a folder."""
    for name, text in texts.items():
        write_atomic(folder / name, text)


def data_card(facts: dict[str, Any], stated: Statements) -> str:
    """Return the data card: what is in the corpus, under which licences, what was taken out and why, what was read."""
    totals = {
        key: sum(row[key] for row in facts["splits"]) for key in ("documents", "conversations", "bytes", "tokens")
    }
    parts = [
        f"# Data of `{facts['run']}`\n",
        f"{_n(totals['documents'])} documents and {_n(totals['conversations'])} conversations, "
        f"{_n(totals['bytes'])} bytes of documents, {_n(totals['tokens'])} tokens. {_basis(facts)}\n",
        f"![Sources, licences, lengths, languages, drops and what training read]({PICTURE})\n",
    ]
    read = {row["source"]: row for row in facts["read"] if row["stage"] == PRETRAIN}
    unread = 0 if PRETRAIN in facts["training"] else None
    rows = [
        [
            row["source"], row["version"], row["kind"], ", ".join(row["licences"]) or "unknown",
            row["wrapper_licence"] or "unknown", "; ".join(row["evidence"]) or "unknown", row["acquired"] or "unknown",
            _n(row["documents"]), _n(row["conversations"]), _n(row["bytes"]), _n(row["tokens"]),
            _n(read[row["source"]]["tokens"] if row["source"] in read else unread),
        ]
        for row in facts["sources"]
    ]  # fmt: skip
    header = [
        "source", "version", "kind", "licence of the text", "of the package", "evidence", "acquired", "documents",
        "conversations", "bytes", "tokens", "tokens read in pretrain",
    ]  # fmt: skip
    note = "Bytes and tokens are those of documents; conversations are tokenized when they are learned from."
    parts.append(Table("Sources", header, rows, note, left=(0, 1, 2, 3, 4, 5, 6)).markdown())
    for title, key, name in (
        ("Licences", "licences", "licence"),
        ("Kinds", "kinds", "kind"),
        ("Splits", "splits", "split"),
    ):
        parts.append(_sums(title, name, facts[key]))
    edges = facts["lengths"]["edges_bytes"]
    rows = [
        [f"{_n(low)} to {_n(high - 1)}" if high else f"from {_n(low)}", _n(count)]
        for low, high, count in zip(edges, [*edges[1:], 0], facts["lengths"]["documents"], strict=True)
        if count
    ]
    parts.append(
        Table("Lengths", ["bytes", "documents"], rows, "" if rows else "Not tokenized yet: unknown.").markdown()
    )
    rows = [[row["language"], ", ".join(row["kinds"]), _n(row["documents"])] for row in facts["languages"]]
    note = "A language is a rule that a document passed; where none was asked for, it is unknown."
    parts.append(Table("Languages", ["language", "kinds", "rows"], rows, note, left=(0, 1)).markdown())
    rows = [[reason, _n(count)] for reason, count in facts["counts"].get("dropped", {}).items()]
    parts.append(Table("Dropped, by reason", ["reason", "rows"], rows, _chain(facts)).markdown())
    rows = [[what, _n(count)] for what, count in facts["redacted"].items()]
    note = "Found by patterns and replaced by stand-ins; what the patterns do not know is still there."
    parts.append(Table("Personal data replaced", ["what", "times"], rows, note).markdown())
    made = [row for row in facts["origins"] if row["synthetic_from"] or row["teacher"]]
    rows = [[r["synthetic_from"], r["teacher"] or "none", _n(r["documents"]), _n(r["conversations"])] for r in made]
    parts.append(Table("Made from", ["origin", "model", "documents", "conversations"], rows, left=(0, 1)).markdown())
    rows = [
        [stage, _n(t["steps"]), _n(sum(row["tokens"] for row in facts["read"] if row["stage"] == stage))]
        for stage, t in facts["training"].items()
    ]
    parts.append(Table("Training", ["stage", "steps", "tokens read"], rows).markdown())
    rows = [[c["path"], c["stage_type"], _n(c["step"]), c["content_sha256"]] for c in facts["checkpoints"]]
    parts.append(Table("Checkpoints", ["checkpoint", "what", "steps", "content"], rows, left=(0, 1, 3)).markdown())
    rows = []
    for a in facts["ancestors"]:
        open_points = [*a["unknown"], *([f"settled: {a['settled']}"] if a["settled"] else [])]
        licences = ", ".join(a["licences"]) or "unknown"
        made_by = a["origin"] or "unknown"
        rows.append([a["name"], a["content_sha256"], licences, _n(a["documents"]), made_by, "; ".join(open_points)])
    header = ["model", "content", "licences it learned from", "documents", "made by", "not known"]
    parts.append(Table("Models of other runs", header, rows, left=(0, 1, 2, 4, 5)).markdown() if rows else "")
    if facts["missing"]:
        parts.append("Not known: " + "; ".join(facts["missing"]) + ".\n")
    return "\n".join(part for part in parts if part)


def eu_summary(facts: dict[str, Any], stated: Statements) -> str:
    """Return the public summary of training content, section by section as the template of the AI Office."""
    tokens = sum(row["train_tokens"] for row in facts["sources"])
    size = next((text for most, text in SIZES if tokens < most), "more than 10 trillion tokens")
    sources = facts["sources"]
    public = [row for row in sources if row["kind"] in PUBLIC]
    own = [row for row in sources if row["kind"] in OWN]
    models = sorted({row["teacher"] for row in facts["origins"] if row["teacher"]})
    programs = [row for row in sources if row["kind"] == "generated"]
    outside = sorted({c["outside"] for c in facts["checkpoints"] if c["outside"]})
    model = stated.model_name or f"run {facts['run']}: " + (
        ", ".join(f"{c['stage_type'] or c['path']} {c['content_sha256'][:12]}" for c in facts["checkpoints"])
        or "no model"
    )
    languages = "; ".join(
        f"{r['language']}: {_n(r['documents'])} rows of {', '.join(r['kinds'])}" for r in facts["languages"]
    )
    lines = [
        "# Public summary of training content",
        "",
        "Regulation (EU) 2024/1689, Article 53(1)(d). A draft made from the ledger, to be checked and signed by the "
        f"provider. {_basis(facts)}",
        "",
        "## 1. General information",
        "### 1.1. Provider identification",
        _field("Provider name and contact details", stated.provider),
        _field("Authorised representative name and contact details", stated.representative),
        "### 1.2. Model identification",
        _field("Versioned model name(s)", model),
        _field(
            "Model dependencies",
            "; ".join(f"{a['name']}, content {a['content_sha256']}, under {', '.join(a['licences']) or 'unknown terms'}"
                      for a in facts["ancestors"]) if facts["ancestors"]
            else f"continues from a checkpoint of another run, content {', '.join(outside)}" if outside
            else "none: trained from random weights" if facts["checkpoints"] else "",
        ),
        _field("Date of placement of the model on the Union market", stated.placed_on_market),
        "### 1.3. Modalities, overall training data size and other characteristics",
        _field("Modality", "text"),
        _field("Training data size", f"{size} ({_n(tokens)} tokens for training)" if tokens else ""),
        _field("Types of content", _rows_by(facts["kinds"], "kind")),
        _field("Latest date of data acquisition/collection for model training", _last(facts)),
        _field("Description of the linguistic characteristics of the overall training data", languages),
        _field("Other relevant characteristics of the overall training data", _rows_by(facts["licences"], "licence")),
        "## 2. List of data sources",
        "### 2.1. Publicly available datasets",
        _field("Have you used publicly available datasets to train the model?", _yes(bool(public))),
        *(
            f"- {row['source']}: {PUBLIC[row['kind']]} {row['version']}, acquired {row['acquired'] or 'unknown'}, "
            f"{_n(row['documents'])} documents, {', '.join(row['licences'])}"
            for row in public
        ),
        "### 2.2. Private non-publicly available datasets obtained from third parties",
        "#### 2.2.1. Datasets commercially licensed by rightsholders or their representatives",
        _field("Have you concluded licensing agreements?", stated.purchased_or_licensed),
        "#### 2.2.2. Private datasets obtained from other third parties",
        *(
            f"- {row['source']}: the provider's own {row['kind']}, {_n(row['documents'])} documents, "
            f"{', '.join(row['licences'])}; who else holds it is {UNKNOWN}"
            for row in own
        ),
        *([] if own else ["- none: every source is a package, an archive or our own program"]),
        "### 2.3. Data crawled and scraped from online sources",
        _field(
            "Were crawlers used?",
            "not by this program, which reads packages, archives and folders; how others collected those is unknown",
        ),
        *(
            f"- {row['source']}: pages of web archives that others crawled, {row['version']}, "
            f"{_n(row['documents'])} documents, {', '.join(row['licences'])}"
            for row in sources
            if row["kind"] == "warc"
        ),
        "### 2.4. User data",
        _field("Was data from user interactions used?", stated.user_data or ("" if own else "no source holds any")),
        "### 2.5. Synthetic data",
        _field("Was synthetic AI-generated data used?", "yes" if models else _no_model(own)),
        *(f"- written by {name}" for name in models),
        "### 2.6. Other sources of data",
        *(
            f"- {row['source']}: written by a program without a model, "
            f"from {', '.join(row['made_from']) or 'nothing else'}: "
            f"{_n(row['documents'])} documents, {_n(row['conversations'])} conversations"
            for row in programs
        ),
        *([] if programs else ["- none"]),
        "## 3. Data processing aspects",
        "### 3.1. Respect of reservation of rights from text and data mining exception or limitation",
        _field("Signatory of the code of practice", stated.code_of_practice),
        _field("Measures", stated.reservation_of_rights),
        _field("Measure of the ledger", _gate(facts)),
        "### 3.2. Removal of illegal content",
        _field("Measures", stated.illegal_content),
        "### 3.3. Other information",
        _field("Processing", _chain(facts)),
        _field("Personal data", _privacy(facts)),
    ]  # fmt: skip
    return _markdown(lines)


def ab2013(facts: dict[str, Any], stated: Statements) -> str:
    """Return the documentation that section 3111(a) of the California Civil Code asks for, item by item."""
    totals = {key: sum(row[key] for row in facts["splits"]) for key in ("documents", "conversations", "tokens")}
    free = [row for row in facts["licences"] if _public_domain(row["licence"])]
    models = sorted({row["teacher"] for row in facts["origins"] if row["teacher"]})
    own = [row for row in facts["sources"] if row["kind"] in OWN]
    programs = [row["source"] for row in facts["sources"] if row["kind"] == "generated"]
    dates = sorted({row["acquired"] for row in facts["sources"] if row["acquired"]})
    first = sorted(t["began"] for t in facts["training"].values() if t["began"])
    synthetic = (
        f"yes: by {', '.join(models)}" if models
        else _no_model(own) + (f"; programs without a model wrote {', '.join(programs)}" if programs else "")
    )  # fmt: skip
    items = [
        ("Sources or owners of the datasets", "; ".join(f"{r['source']} ({r['version']})" for r in facts["sources"])),
        ("How the datasets further the intended purpose", stated.purpose),
        ("Number of data points", f"{_n(totals['documents'])} documents ({_n(totals['tokens'])} tokens) and "
         f"{_n(totals['conversations'])} conversations"),
        ("Types of data points", f"unlabelled text: {_rows_by(facts['kinds'], 'kind')}"),
        ("Whether data are protected by copyright, trademark or patent, or entirely in the public domain",
         ("entirely in the public domain" if len(free) == len(facts["licences"]) else "partly under licences")
         + f": {_rows_by(facts['licences'], 'licence')}; trademarks and patents: {UNKNOWN}"),
        ("Whether the datasets were purchased or licensed", stated.purchased_or_licensed
         or f"by agreement or purchase: {UNKNOWN}; public licences as above"),
        ("Whether the datasets include personal information (section 1798.140(v))", _privacy(facts)),
        ("Whether the datasets include aggregate consumer information (section 1798.140(b))", ""),
        ("Cleaning, processing or other modification, and its purpose", _chain(facts)),
        ("Time period of collection, and whether it continues",
         f"acquired {dates[0]} to {dates[-1]}; not continuing: the corpus is fixed by its hash "
         f"{facts['content_sha256'][:16]}; when the texts themselves were written is {UNKNOWN}" if dates else ""),
        ("Dates the datasets were first used during development",
         f"no later than {first[0]}, when the first training stage was finished" if first else ""),
        ("Whether synthetic data generation was or is used", synthetic),
    ]  # fmt: skip
    lines = [
        "# Training data documentation",
        "",
        "California Civil Code, section 3111(a) (Assembly Bill 2013). A draft made from the ledger, to be checked by "
        f"the developer. {_basis(facts)}",
        "",
        *(f"{number}. **{name}:** {text or UNKNOWN}." for number, (name, text) in enumerate(items, 1)),
    ]
    return _markdown(lines)


def croissant(facts: dict[str, Any], stated: Statements) -> str:
    """Return the corpus as Croissant 1.0 metadata: one FileObject and one RecordSet for each parquet file."""
    files, records = [], []
    for name, record in sorted(facts["files"].items()):
        files.append(
            {
                "@type": "cr:FileObject",
                "@id": name,
                "name": name,
                "contentUrl": f"{CURATE}/{name}",
                "contentSize": f"{record['bytes']} B",
                "encodingFormat": "application/x-parquet",
                "sha256": record["sha256"],
            }
        )
        key = name.removesuffix(".parquet")
        columns = (Conversation if name.startswith("conversations/") else Document).SCHEMA.names
        if name not in facts.get("with_addresses", ()):
            columns = [column for column in columns if column not in WEB_COLUMNS]
        records.append(
            {
                "@type": "cr:RecordSet",
                "@id": key,
                "name": key,
                "key": {"@id": f"{key}/id"},
                "field": [
                    {
                        "@type": "cr:Field",
                        "@id": f"{key}/{column}",
                        "name": column,
                        "dataType": "sc:Text",
                        "source": {"fileObject": {"@id": name}, "extract": {"column": column}},
                    }
                    for column in columns
                ],
            }
        )
    names = ", ".join(row["source"] for row in facts["sources"])
    metadata = {
        "@context": CONTEXT,
        "@type": "sc:Dataset",
        "conformsTo": "http://mlcommons.org/croissant/1.0",
        "name": f"{facts['run']}-corpus",
        "description": f"The curated corpus of the run {facts['run']}, with the rights of every row. Sources: {names}. "
        + _chain(facts),
        "license": sorted(row["licence"] for row in facts["licences"]),
        # A name made of the content's hash holds wherever the corpus is put.
        "url": stated.url or f"urn:sha256:{facts['content_sha256']}",
        "identifier": f"urn:sha256:{facts['content_sha256']}",
        "creator": {"@type": "sc:Organization", "name": stated.provider or UNKNOWN},
        "datePublished": stated.published or UNKNOWN,
        "dateCreated": facts["created"],
        "isLiveDataset": False,
        "distribution": files,
        "recordSet": records,
    }
    return json.dumps(metadata, indent=1, ensure_ascii=False) + "\n"


# The context that the specification prints, as far as its terms are used here.
CONTEXT = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    "column": "cr:column",
    "conformsTo": "dct:conformsTo",
    "cr": "http://mlcommons.org/croissant/",
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "dct": "http://purl.org/dc/terms/",
    "extract": "cr:extract",
    "field": "cr:field",
    "fileObject": "cr:fileObject",
    "isLiveDataset": "cr:isLiveDataset",
    "key": "cr:key",
    "recordSet": "cr:recordSet",
    "sc": "https://schema.org/",
    "source": "cr:source",
}
MAKERS: dict[str, tuple[str, Callable[[dict[str, Any], Statements], str]]] = {
    "data": ("data.md", data_card),
    "eu": ("eu-training-content.md", eu_summary),
    "ab2013": ("ab2013.md", ab2013),
    "croissant": ("croissant.json", croissant),
}


def _markdown(lines: list[str]) -> str:
    text = "\n".join(f"\n{line}\n" if line.startswith("#") else line for line in lines).strip() + "\n"
    while "\n\n\n" in text:
        text = text.replace("\n\n\n", "\n\n")
    return text


def _field(name: str, value: str) -> str:
    return f"- **{name}** {value or UNKNOWN}" if name.endswith("?") else f"- **{name}:** {value or UNKNOWN}"


def _sums(title: str, name: str, rows: list[dict[str, Any]]) -> str:
    cells = [[row[name], *(_n(row[key]) for key in ("documents", "conversations", "bytes", "tokens"))] for row in rows]
    return Table(title, [name, "documents", "conversations", "bytes", "tokens"], cells).markdown()


def _basis(facts: dict[str, Any]) -> str:
    ledger = {key: value for key, value in facts.items() if key != "run"}
    return f"Corpus content {facts['content_sha256'][:16]}, facts {sha256_json(ledger)[:16]}."


def _chain(facts: dict[str, Any]) -> str:
    """Return what was done to the text, in order, with its counts."""
    if not facts["steps"]:
        return ""
    counts = facts["counts"]
    gone = counts["documents"]["in"] - counts["documents"]["out"]
    found = f"steps in order: {', '.join(step.replace('_', ' ') for step in facts['steps'])}; "
    found += f"{_n(gone)} of {_n(counts['documents']['in'])} documents were dropped"
    if facts["decontaminated"]:
        found += "; text that holds a held-out question word for word is dropped"
    excluded = facts["excluded"] or {}
    if any(excluded.values()):
        found += "; rows excluded on request: " + _n(counts.get("dropped", {}).get("excluded", 0))
    return found


def _privacy(facts: dict[str, Any]) -> str:
    if not facts["privacy"]:
        return ""
    found = ", ".join(f"{_n(count)} {what}" for what, count in facts["redacted"].items()) or "none found"
    return (
        f"patterns for {', '.join(facts['privacy'])} were looked for and replaced ({found}); names and other personal "
        "data that no pattern finds are not measured"
    )


def _gate(facts: dict[str, Any]) -> str:
    if not facts["policy"]:
        return ""
    uses = ", ".join(facts["policy"].get("uses", ()))
    return f"no row without a content licence that is allowed for {uses}, with evidence; {_reserved(facts)}"


def _reserved(facts: dict[str, Any]) -> str:
    """Return what was done about what sites reserve."""
    found = facts.get("reserved") or {}
    lost = f"{_n(found['documents'])} documents of {_n(len(found['hosts']))} sites skipped" if found else ""
    if facts.get("reservations"):
        taken = (
            f"a snapshot of {facts['reservations']} of what sites reserve (robots.txt, ai.txt, tdmrep.json, headers)"
        )
        return f"documents with a web address are compared with {taken}: {lost or 'none is reserved'}"
    return lost or "reservations are not read"


def _rows_by(rows: list[dict[str, Any]], name: str) -> str:
    return "; ".join(f"{row[name]}: {_n(row['documents'] + row['conversations'])} rows" for row in rows)


def _public_domain(expression: str) -> bool:
    from freehold.ledger.policy import PUBLIC_DOMAIN

    words = expression.replace("(", " ").replace(")", " ").split()
    return all(word in PUBLIC_DOMAIN for word in words if word not in ("AND", "OR"))


def _last(facts: dict[str, Any]) -> str:
    return max((row["acquired"] for row in facts["sources"]), default="")


def _names(rows: list[dict[str, Any]]) -> str:
    return ", ".join(row["source"] for row in rows)


def _no_model(own: list[dict[str, Any]]) -> str:
    return "no row names a model that wrote it" + (f"; of {_names(own)} it is unknown" if own else "")


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _n(value: int | None) -> str:
    return "unknown" if value is None else f"{value:,}"
