"""Precision and recall of each step of curation on a corpus with planted defects.

Clean pages of real English (the reference pages inside Python, or the documents of `--documents`) with duplicates, near
and contained duplicates, shared passages and lines, personal data, toxic, foreign, gibberish and contaminated text,
wrong decodings, low quality, a bias and wrong licences among them, many next to a control that looks like it and must
be left alone. Everything follows from one seed. Toxic words are drawn from the vocabulary of the model that is to find
them: that row measures the step, not the model.

    python benchmarks/planted.py --output benchmarks/results/planted.json
"""

from __future__ import annotations

import argparse
import base64
import json
import pydoc_data.topics
import random
import re
import string
import tempfile
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from freehold.core.artifact import Workspace
from freehold.core.config import fill
from freehold.core.document import Document, document_id, read_rows, write_rows
from freehold.core.log import Log
from freehold.ledger.policy import Policy, judge_row
from freehold.stages.curate.bias import associations, count
from freehold.stages.curate.config import CurateConfig
from freehold.stages.curate.run import run
from freehold.text.words import read_words

QUESTION = "If a train leaves the {} station at noon and travels {} miles in three hours, how fast did it go?"
FOREIGN = (
    "Le petit village numéro {} se trouve au bord de la rivière, entouré de collines et de vieilles fermes. Chaque"
    " matin, les habitants se rendent au marché pour acheter du pain, des légumes et du fromage. ",
    "Das kleine Dorf Nummer {} liegt am Ufer des Flusses und ist von Hügeln und alten Höfen umgeben. Jeden Morgen"
    " gehen die Bewohner auf den Markt, um Brot, Gemüse und Käse zu kaufen, und reden über das Wetter. ",
)
SPAM = (
    "Click here now to win the best free {0} of the year! Our {0} offer is the lowest price online, and you will not"
    " believe how cheap this {1} offer is. Order the {0} today and get the {1} free, limited time only, call now! "
)
FOOTER = "All rights to the {0} of this page are kept by the {1} society of the town, page {2}"
RIGHT = ("MIT", "Apache-2.0 OR GPL-2.0-only", "BSD-3-Clause AND PSF-2.0", "CC0-1.0", "LicenseRef-PD-USGov")
WRONG = (
    "GPL-3.0-only", "MIT AND GPL-2.0-only", "CC-BY-NC-4.0", "CC-BY-ND-4.0", "LicenseRef-Unknown-Terms", "Foo Public",
    "",
)  # fmt: skip
WORDS = {
    "who": "farmer teacher sailor doctor painter baker judge pilot miner keeper weaver clerk",
    "did": "found carried painted followed counted watched repaired borrowed measured hid",
    "what": "lantern bridge letter horse garden clock window barrel map ship ladder basket",
    "where": "river market school harbour forest station mill tower quarry meadow",
}
MADE_OF_PAGES = ("exact", "near", "near control", "contained", "passage")
LISTS = {name: text.split() for name, text in WORDS.items()}


def document(source: str, path: str, text: str, kind: str = "prose", licence: str = "PSF-2.0") -> Document:
    """Return a row with plausible rights."""
    return Document(
        id=document_id(source, path), text=text, source=source, path=path, kind=kind, source_version=f"{source}==1.0",
        sha256="0" * 64, wrapper_licence="MIT", licence=licence, licence_evidence="LICENSE: quoted",
        acquired="2026-01-01", synthetic_from="", teacher="", split="",
    )  # fmt: skip


def pages(chars: int = 3000) -> list[str]:
    """Return real English text of a few thousand characters each, no paragraph twice: Python's reference pages."""
    whole = "\n\n".join(text for _, text in sorted(pydoc_data.topics.topics.items()))
    paragraphs = dict.fromkeys(p for p in whole.split("\n\n") if len(p) > 60)
    texts, text = [], ""
    for paragraph in paragraphs:
        text += paragraph + "\n\n"
        if len(text) > chars:
            texts.append(text)
            text = ""
    return texts


def sentence(dice: random.Random) -> str:
    """Return one sentence of our own making."""
    pick = {name: dice.choice(words) for name, words in LISTS.items()}
    also = {name: dice.choice(words) for name, words in LISTS.items()}
    first, second = dice.sample(range(2, 90_000), 2)  # a range so wide that 13 words are not the same by chance
    return (
        f"The {pick['who']} {pick['did']} a {pick['what']} that was at the {pick['where']} {first}, and then the"
        f" {also['who']} of the {also['where']} {also['did']} {second} of the {also['what']}s. "
    )


def story(dice: random.Random, sentences: int = 20) -> str:
    """Return English of our own making, never twice the same."""
    return "".join(sentence(dice) for _ in range(sentences))


class Plan:
    """The rows of the corpus, and what each planted one is there for."""

    def __init__(self, seed: int) -> None:
        self.dice = random.Random(seed)
        self.rows: list[Document] = []
        self.planted: dict[str, list[str]] = defaultdict(list)
        self.tasks: list[dict[str, Any]] = []
        self.origin: dict[str, str] = {}
        """{document with a passage: the page it is from}"""

    def add(self, defect: str, text: str, source: str = "dirty") -> str:
        """Add a document; returns its id. What is made of clean pages goes by the rules of reference pages."""
        kind = "reference" if source == "clean" or defect in MADE_OF_PAGES else "prose"
        row = document(source, f"{defect}/{len(self.planted[defect])}", text, kind)
        self.rows.append(row)
        self.planted[defect].append(row.id)
        return row.id


def build(clean: Sequence[str], count: int, seed: int = 7) -> Plan:
    """Plant `count` of each defect and of each control among clean pages, of which there must be five times as many."""
    plan = Plan(seed)
    dice = plan.dice
    pool = list(clean)
    dice.shuffle(pool)
    # A book, of which a second rendering follows in chapters; its pages are nowhere else.
    book, rest = pool[:count], pool[count:]
    for text in rest:
        plan.add("clean", text, "clean")
    picked = dice.sample(rest, 4 * count)
    for text in picked[:count]:
        plan.add("exact", re.sub(r"\s+", lambda _: dice.choice([" ", "\n", "\t "]), text))
    for text in picked[count : 2 * count]:
        words = text.split(" ")
        for place in dice.sample(range(len(words)), len(words) // 100):
            words[place] = f"word{dice.randrange(10**6)}"
        plan.add("near", " ".join(words))
    for text in picked[2 * count : 3 * count]:  # every tenth word is another one: a different text by our measure
        words = text.split(" ")
        for place in range(dice.randrange(10), len(words), 10):
            words[place] = f"word{dice.randrange(10**6)}"
        plan.add("near control", " ".join(words))
    plan.add("book", "\n\n".join(book), "clean")
    for number, text in enumerate(book):
        plan.add("contained", f"CHAPTER {number + 1}\n\n" + re.sub(r"\s+", " ", text))
    for text in picked[3 * count :]:
        words = text.split()
        start = dice.randrange(len(words) - 120)
        identity = plan.add(
            "passage", story(dice, 8) + "\n\n" + " ".join(words[start : start + 120]) + "\n\n" + story(dice, 8)
        )
        plan.origin[identity] = document_id("clean", f"clean/{rest.index(text)}")
    footers = [FOOTER.format(dice.choice(LISTS["what"]), dice.choice(LISTS["where"]), n) for n in range(2)]
    for number in range(max(count, 42)):
        plan.add("lines", f"{story(dice)}\n{footers[number % 2]}\n{story(dice)}")
    for number in range(count):
        plan.add("language", "".join(FOREIGN[number % 2].format(dice.randrange(10**6)) for _ in range(5)))
        plan.add("language control", f"{story(dice)}\nHe said: « {FOREIGN[0].format(number)} »\n{story(dice)}")
        letters = "bcdfghjklmnpqrstvwxz"
        plan.add("gibberish", " ".join("".join(dice.choices(letters, k=dice.randint(2, 9))) for _ in range(300)))
        plan.add("boilerplate", f"Click here to read our terms of service number {number}. " * 60)
        asked = f"{sentence(dice)}{sentence(dice)}How many of them are left?"
        exercise = QUESTION.format(dice.choice(LISTS["what"]), 300 + number)
        for kind, question in (("natural", asked), ("exercise", exercise)):
            plan.tasks.append({"id": f"{kind}-{number}", "prompt": [{"role": "user", "content": question}]})
        words = asked.split(" ")
        quoted = asked if number % 2 else " ".join(words[5:26])
        plan.add("contaminated", story(dice) + quoted + " " + story(dice))
        plan.add("contaminated", story(dice) + exercise.upper() + " " + story(dice))
        plan.add("contaminated control", story(dice) + QUESTION.format("yellow", 9000 + number) + story(dice))
        plan.add("contaminated control", story(dice) + " ".join(words[5:12]) + " " + story(dice))
        text = "The café ‘Zoë’ is naïve — " + story(dice)
        plan.add("mojibake", text.encode().decode("cp1252" if number % 2 else "latin-1"))
        plan.add("mojibake control", "Ångström, São Paulo und «Müller» — " + story(dice))
        plan.add("pii", personal(dice, number) + story(dice))
        plan.add("pii control", PUBLIC + story(dice))
        plan.add(
            "spam", "".join(SPAM.format(*dice.sample(LISTS["what"], 2)) + story(dice, 2) for _ in range(4)), "spam"
        )
        plan.add("story", story(dice, 30), "stories")
        plan.add("low quality", "".join(SPAM.format(*dice.sample(LISTS["what"], 2)) for _ in range(3)) + story(dice, 3))
        plan.add("toxic", hostile(dice) * 2 + story(dice, 4) + hostile(dice))
        plan.add("toxic control", story(dice) + "The doctor killed the pain with a strong drug and the judge died. ")
        said = "her home and her kitchen" if number % 2 else "the kitchen, and she went home to her family"
        sentences = (f"She was a woman who loved {said}. " + sentence(dice) for _ in range(6))
        plan.add("bias", "".join(sentences) + "He was a man of business. ")
    for number, licence in enumerate((*RIGHT, *WRONG) * -(-count // len(WRONG))):
        name = "licence control" if licence in RIGHT else "licence"
        plan.planted[f"{name}s"].append(json.dumps([f"row{number}", licence]))
    return plan


def personal(dice: random.Random, number: int) -> str:
    """Return a sentence with one of each kind of personal data; the numbers are made up."""
    return (
        f"Write to {dice.choice(LISTS['who'])}.smith{number}@corporate-mail.org or (415) 867-{5300 + number:04d}, card"
        f" 4111 1111 1111 1111, from 93.184.{number % 200}.77, number 219-09-{1000 + number}, account"
        f" {account(number)}, {secret(number)}. "
    )


def account(number: int) -> str:
    """Return a German bank account number with right check digits (ISO 7064)."""
    bank = f"37040044{number:010d}"
    check = 98 - int(bank + "131400") % 97  # D is 13, E is 14, and 00 stands where the check digits will be
    plain = f"DE{check:02d}{bank}"
    return " ".join(plain[i : i + 4] for i in range(0, len(plain), 4)) if number % 2 else plain


def secret(number: int) -> str:
    """Return a private key or a token, random in the form of one service or another; each has PLANTED in it."""
    dice = random.Random(number)
    letters = string.ascii_letters + string.digits
    upper = string.ascii_uppercase + "234567"

    def some(chars: int, of: str = letters) -> str:
        return PLANTED + "".join(dice.choices(of, k=chars - len(PLANTED)))

    head, body = (base64.urlsafe_b64encode(s).decode().rstrip("=") for s in (b'{"alg": "HS256"}', b'{"sub": "17"}'))
    lines = "\n".join(some(64) for _ in range(12))
    forms = (
        f"-----BEGIN RSA PRIVATE KEY-----\n{lines}\n-----END RSA PRIVATE KEY-----",
        f"AKIA{some(16, upper)}", f"aws_secret_access_key = '{some(40)}'", f"ghp_{some(36)}", f"glpat-{some(20)}",
        f"xoxb-{dice.randrange(10**11, 10**12)}-{some(24)}", f"sk_live_{some(24)}", f"AIza{some(35)}",
        f"{head}.{body}.{some(43)}",
    )  # fmt: skip
    return forms[number % len(forms)]


PLANTED = "Q7PLAN"
PUBLIC = (
    "Write to user@example.com or (212) 555-0100, from 192.168.0.1 or 198.51.100.7; version 12.34.56.78, the 13th of"
    " 1861-1865, id 5404319552844595 and 3.14159265358979; account DE88 3704 0044 0532 0130 00, part AB12 3456 7890"
    " 1234; key AKIA" + "IOSFODNN7EXAMPLE, token ghp_" + "x" * 36 + ", commit 0a4d55a8d778e5022fab701977c5d840bbc486d0,"
    " -----BEGIN PRIVATE KEY-----\n(your key)\n-----END PRIVATE KEY----- "
)


def hostile(dice: random.Random) -> str:
    """Return an insult of words that the package's model weighs most."""
    from freehold.stages.curate.toxicity import scorer

    vocabulary = _vocabulary()
    weights = scorer().weights.mean(axis=0)
    worst = [vocabulary[i] for i in weights.argsort()[-40:]]
    return "".join(
        f"You {dice.choice(worst)} are a {dice.choice(worst)} and none of us wants your {dice.choice(worst)} here. "
        for _ in range(4)
    )


def _vocabulary() -> list[str]:
    from profanity_check.profanity_check import vectorizer

    return list(vectorizer.get_feature_names_out())


CONFIG = {
    "overlap": {"passages": "drop"},
    "lines": {"act": "drop"},
    "toxicity": {"act": "drop"},
    "classifier": {"act": "drop", "good": ["clean", "stories"], "bad": ["spam"]},
    "bias": {"act": "drop", "max_dropped": 0.2, "min_pairs": 20},
}


def measure(clean: Sequence[str], count: int, folder: Path) -> list[dict[str, Any]]:
    """Curate a planted corpus in `folder`; returns `{step, planted, found, recall, precision}` of each step.

    Precision is the share of planted ones among all that the step took: clean pages and controls count against it.
    """
    plan = build(clean, count)
    by_source: dict[str, list[Document]] = defaultdict(list)
    for row in plan.rows:
        by_source[row.source].append(row)
    for source, rows in by_source.items():
        write_rows(folder / "gather" / "documents" / f"{source}.parquet", rows, Document)
    (folder / "gather" / "tasks").mkdir(parents=True)
    lines = "".join(json.dumps(row) + "\n" for row in plan.tasks)
    (folder / "gather" / "tasks" / "planted.jsonl").write_text(lines, encoding="utf-8")
    out = folder / "curate"
    out.mkdir()
    work = Workspace(out, "curate", "planted", 0, Log(None, quiet=True), {"gather": folder / "gather"})
    run(fill(CurateConfig, CONFIG, "curate"), work)
    drops = {row["id"]: row["reason"] for row in pq.read_table(out / "drops.parquet").to_pylist()}
    kept = {
        row.id: row.text
        for path in (out / "documents").glob("*.parquet")
        for row in read_rows(path, Document)
    }  # fmt: skip
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    return tabulate(plan, drops, kept, report)


def tabulate(plan: Plan, drops: dict[str, str], kept: dict[str, str], report: dict[str, Any]) -> list[dict[str, Any]]:
    """Compare what was planted with what was done."""
    original = {row.id: row.text for row in plan.rows}
    table: list[dict[str, Any]] = []

    def add(step: str, planted: int, found: int, taken: int) -> None:
        """Add a row; `taken` is all that the step took, planted or not."""
        precision = found / taken if taken else 1.0
        table.append(
            {"step": step, "planted": planted, "found": found, "taken": taken}
            | {"recall": round(found / planted, 4), "precision": round(precision, 4)}
        )

    def dropped(step: str, defects: Sequence[str], reasons: Sequence[str], also: Sequence[str] = ()) -> None:
        """Add a row for a step that drops; `also` are defects for which these reasons are no mistake."""
        ids = {i for defect in defects for i in plan.planted[defect]}
        others = {i for defect in also for i in plan.planted[defect]}
        taken = {i for i, reason in drops.items() if reason in reasons} - others
        add(step, len(ids), len(ids & taken), len(taken))

    dropped("exact duplicates", ["exact"], ["exact_duplicate"])
    dropped("near duplicates", ["near"], ["near_duplicate"], ["lines", "bias"])
    dropped("contained duplicates", ["contained"], ["contained_duplicate", "near_duplicate"], ["near", "bias"])
    dropped("language", ["language"], ["language"])
    prose = ["stop_words", "letters", "repeated_ngrams", "duplicate_lines", "word_length", "symbols"]
    dropped("prose quality", ["gibberish", "boilerplate"], [*prose, "language"], ["language"])
    dropped("trained classifier", ["low quality", "spam"], ["low_quality"])
    dropped("toxicity", ["toxic"], ["toxic"])
    dropped("decontamination", ["contaminated"], ["decontamination"])
    changed: dict[str, Callable[[str], bool]] = {
        "passage": lambda i: 0 < len(kept.get(i, "")) < len(original[i]) - 400,
        "lines": lambda i: i in kept and "All rights to the" not in kept[i],
    }
    for defect, is_cut in changed.items():
        # Where the rules of prose took either of the two, there is nothing to cut.
        ids = [i for i in plan.planted[defect] if i in kept and plan.origin.get(i, i) in kept]
        whole = 2 if defect == "lines" else 0  # of each footer one document keeps it
        found = sum(map(is_cut, ids))
        cut = sum(kept[i] != original[i] for i in plan.planted["clean"] if i in kept)
        add({"passage": "repeated passages", "lines": "repeated lines"}[defect], len(ids) - whole, found, found + cut)
    repaired = sum(kept.get(i, "").startswith("The café ‘Zoë’ is naïve — ") for i in plan.planted["mojibake"])
    spoilt = sum(kept.get(i, original[i]) != original[i] for i in plan.planted["mojibake control"])
    add("mojibake", len(plan.planted["mojibake"]), repaired, repaired + spoilt)
    ids = plan.planted["pii"]
    found = sum(is_gone(kept[i]) for i in ids if i in kept for is_gone in KINDS.values())
    replaced = sum(report["totals"]["redacted"].values())
    # What another step dropped was not found by this one; it is in no other text either, which is counted apart.
    add("personal data", len(ids) * len(KINDS), found, replaced)
    table[-1]["dropped"] = sum(i not in kept for i in ids) * len(KINDS)
    refused = right = 0
    for place, name in ((0, "licences"), (1, "licence controls")):
        for text in plan.planted[name]:
            path, licence = json.loads(text)
            verdict = judge_row(document("licensed", path, "", licence=licence), Policy())
            refused += verdict.decision != "allow"
            right += verdict.decision != "allow" and not place
    add("licence gate", len(plan.planted["licences"]), right, refused)
    add_bias(plan, drops, kept, table)
    return table


KINDS: dict[str, Callable[[str], bool]] = {
    "card": lambda text: "4111" not in text,
    "email": lambda text: "corporate-mail" not in text,
    "iban": lambda text: not re.search(r"3704 ?0044", text),
    "ip": lambda text: "93.184" not in text,
    "secret": lambda text: PLANTED not in text,
    "phone": lambda text: "867-" not in text,
    "ssn": lambda text: "219-09" not in text,
}


def add_bias(plan: Plan, drops: dict[str, str], kept: dict[str, str], table: list[dict[str, Any]]) -> None:
    """Add what the filter did to the planted association, counted here again from the texts."""
    ids = set(plan.planted["bias"])
    taken = {i for i, reason in drops.items() if reason == "bias"}
    odds = {}
    for when, texts in (("before", [row.text for row in plan.rows]), ("after", list(kept.values()))):
        sums = count([read_words(text) for text in texts], 10).sum(axis=0)
        found = [row for row in associations(sums, 1) if (row["group"], row["attribute"]) == ("women", "family")]
        odds[when] = found[0]["log_odds"] if found else None
    row = {"step": "bias", "planted": len(ids), "found": len(ids & taken), "taken": len(taken), "recall": None}
    table.append(row | {"precision": round(len(ids & taken) / max(1, len(taken)), 4), "log_odds": odds})


def main() -> None:
    """Plant, curate, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=30)
    parser.add_argument("--documents", type=Path, help="a folder of documents/*.parquet whose prose is the clean text")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    clean = pages(1500)
    if args.documents:
        texts = [
            r.text
            for p in sorted(args.documents.glob("*.parquet"))
            for r in read_rows(p, Document)
            if r.kind == "prose"
        ]
        clean = [text[start : start + 3000] for text in texts for start in range(0, len(text) - 3000, 60_000)]
    with tempfile.TemporaryDirectory() as folder:
        table = measure(clean, args.count, Path(folder))
    for row in table:
        print(json.dumps(row))
    if args.output:
        from common import environment, write

        write(
            args.output, {"count": args.count, "clean": len(clean), "steps": table, "environment": environment("rensa")}
        )


if __name__ == "__main__":
    main()
