"""The CIA World Factbook as data: a page of prose a country, and the short clean facts that become questions."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from freehold.corpora.wordings import TAUGHT, filled
from freehold.text.html import strip_html
from freehold.text.reading import Member, Part, Reading

many_per_file = False
# Fields shorter than this are numbers and names that read badly without their table.
MIN_FIELD_CHARS = 60
# Short fields worth a line of their own on the page.
SHORT_FIELDS = {
    "Location", "Area - comparative", "Climate", "Terrain", "Natural resources", "Government type", "Capital",
    "Languages", "Coastline", "National symbol(s)", "Agricultural products", "Industries",
}  # fmt: skip
# Names that are said with an article.
ARTICLE = re.compile(
    r"(Islands|Republic|States|Kingdom|Emirates|Territories)$|^(Bahamas|Gambia|Netherlands|Philippines|Maldives|"
    r"Seychelles|Comoros|Holy See|Gaza Strip|West Bank|Isle of Man|European Union|Marshall Islands)"
)
REGION = r"[A-Z][a-z]+(?: (?:and the )?[A-Z][a-z]+)*"
# Answers that are said with an article.
WITH_ARTICLE = re.compile(r"^((?:Middle|Antarctic|Arctic|West) .*)$")
NO_ANSWER = re.compile(r"(none|na|n/a|no|not|unnamed)\b", re.I)
SKIPPED = {"Geographic coordinates", "Map references", "Diplomatic representation from the US", "Age structure"}


@dataclass(frozen=True)
class Field:
    """One kind of fact: where it is stored, how it is asked and said; `{c}` is the country, `{a}` the answer."""

    key: str
    path: str
    questions: tuple[str, ...]
    statements: tuple[str, ...]
    choice: bool = False
    """Whether other countries' answers are wrong answers, so that it can be asked as multiple choice."""
    max_chars: int = 60


def _taught(key: str, path: str, max_chars: int = 60) -> Field:
    wordings = TAUGHT[key]
    return Field(key, path, wordings.questions, wordings.statements, choice=True, max_chars=max_chars)


FIELDS = (
    _taught("capital", "Government/Capital/name"),
    _taught("region", "Geography/Map references"),
    _taught("language", "People and Society/Languages"),
    Field(
        "location",
        "Geography/Location",
        ("Where is {c}?", "Where is {c} located?", "Which neighbours and seas does {c} have?"),
        ("{c} is located here: {a}.",),
        max_chars=110,
    ),
    Field(
        "size",
        "Geography/Area - comparative",
        ("How big is {c}?", "What is the size of {c} compared to other places?", "How large is the area of {c}?"),
        ("The area of {c} is {a}.",),
        max_chars=80,
    ),
    Field(
        "climate",
        "Geography/Climate",
        ("What is the climate of {c}?", "What is the climate like in {c}?", "Describe the climate of {c}."),
        ("The climate of {c}: {a}.",),
        max_chars=90,
    ),
    Field(
        "terrain",
        "Geography/Terrain",
        ("What is the terrain of {c}?", "What does the land look like in {c}?", "Describe the terrain of {c}."),
        ("The terrain of {c}: {a}.",),
        max_chars=90,
    ),
    Field(
        "government",
        "Government/Government type",
        (
            "What type of government does {c} have?",
            "How is {c} governed?",
            "What is the form of government of {c}?",
        ),
        ("The government type of {c} is {a}.",),
    ),
    _taught("internet", "Communications/Internet country code", max_chars=4),
    Field(
        "symbol",
        "Government/National symbol(s)",
        ("What is the national symbol of {c}?", "Which symbol stands for {c}?", "Name the national symbol of {c}."),
        ("The national symbol of {c} is {a}.",),
        choice=True,
    ),
    Field(
        "colors",
        "Government/National color(s)",
        ("What are the national colors of {c}?", "Which colors stand for {c}?", "Name the national colors of {c}."),
        ("The national colors of {c} are {a}.",),
    ),
    Field(
        "highest",
        "Geography/Elevation/highest point",
        (
            "What is the highest point of {c}?",
            "What is the highest place in {c}?",
            "Which point of {c} is the highest?",
        ),
        ("The highest point of {c} is {a}.",),
        choice=True,
    ),
    _taught("currency", "Economy/Exchange rates/Currency"),
    Field(
        "independence",
        "Government/Independence",
        ("When did {c} become independent?", "What is the independence date of {c}?"),
        ("{c} became independent on {a}.",),
        choice=True,
    ),
    _taught("adjective", "People and Society/Nationality/adjective"),
    Field(
        "exports",
        "Economy/Exports - commodities",
        ("What does {c} export?", "What are the main exports of {c}?", "Which goods does {c} sell to the world?"),
        ("The main exports of {c} are {a}.",),
        max_chars=100,
    ),
    Field(
        "crops",
        "Economy/Agricultural products",
        ("What do farmers in {c} produce?", "Which agricultural products come from {c}?", "What is grown in {c}?"),
        ("The agricultural products of {c} are {a}.",),
        max_chars=110,
    ),
    Field(
        "population",
        "People and Society/Population/total",
        ("How many people live in {c}?", "What is the population of {c}?", "How large is the population of {c}?"),
        ("The population of {c} is {a}.",),
    ),
)


@dataclass(frozen=True)
class Fact:
    """One short fact of one country."""

    country: str
    field: Field
    answer: str
    path: str
    """Member of the factbook it was read from."""

    @property
    def key(self) -> str:
        """What the hold-out is decided on."""
        return f"{self.country}\0{self.field.key}"

    @property
    def questions(self) -> list[str]:
        """The question in each of its phrasings."""
        return [filled(q, self.country) for q in self.field.questions]

    @property
    def statement(self) -> str:
        """The fact said as a sentence."""
        return self.statements[0]

    @property
    def statements(self) -> list[str]:
        """The fact said as a sentence in each of its wordings."""
        return [filled(s, self.country, self.answer) for s in self.field.statements]

    @property
    def tests(self) -> list[str]:
        """The question in wordings that training does not use; none for a relation that is not taught."""
        return [filled(q, self.country) for q in TAUGHT[self.field.key].tests] if self.field.key in TAUGHT else []


def read(members: list[Member], reading: Reading) -> Iterator[Part]:
    """Yield one document a country."""
    return reading.each(members, lambda member, text: country_page(member, text, reading))


def country_page(member: Member, text: str, reading: Reading) -> Iterator[Part]:
    """Yield a country's longer fields as paragraphs under the section they belong to."""
    found = page(json.loads(text), strip_html)
    if found:
        yield Part(member, "", found)
    else:
        reading.skipped.append((member.path, "no text in it"))


def sentence(text: str) -> str:
    """Return the text with its first letter in upper case."""
    return text[:1].upper() + text[1:]


def at(country: dict[str, Any], path: str) -> str:
    """Return the raw text of a field, or an empty string."""
    node: Any = country
    for key in path.split("/"):
        node = node.get(key) if isinstance(node, dict) else None
    text = node.get("text") if isinstance(node, dict) else None
    return text if isinstance(text, str) else ""


def name_of(country: dict[str, Any], plain: Callable[[str], str]) -> str:
    """Return a country's everyday name (`the Bahamas` included), or an empty string."""
    for form in ("conventional short form", "conventional long form"):
        text = plain(at(country, f"Government/Country name/{form}")).split("\n")[0]
        text = re.sub(r"(?<!\s)\s*\((?:sometimes|formerly|also).*", "", text).split(";")[0].strip()
        if text and text.lower() != "none" and len(text) < 50:
            text = text.removeprefix("The ")
            return f"the {text}" if ARTICLE.search(text) else text
    return ""


def facts(country: dict[str, Any], path: str, plain: Callable[[str], str]) -> Iterator[Fact]:
    """Yield the short clean facts of one country; whatever has notes, parts or doubts in it is skipped."""
    name = name_of(country, plain)
    if not name:
        return
    for field in FIELDS:
        raw = at(country, field.path) or at(country, f"{field.path}/{field.path.rpartition('/')[2]}")
        answer = clean(field, plain(raw))
        if answer:
            yield Fact(name, field, answer, path)


def clean(field: Field, text: str) -> str:
    """Return the answer in a field's text, or an empty string when it is not short and clean."""
    if field.key == "language":
        return main_language(text)
    if field.key == "region":
        return WITH_ARTICLE.sub(r"the \1", text) if re.fullmatch(REGION, text) else ""
    if not text or "\n" in text or NO_ANSWER.match(text):
        return ""
    if field.key == "currency":
        text = text.partition(" per US dollar")[0]
    if field.key == "highest":
        text = re.sub(r"(?<!\s)\s+-?[\d,.]+\s*m?$", "", text)
    if field.key == "population" and not text[:1].isdigit():
        return ""
    if field.key == "independence":
        found = re.match(r"\d{1,2} [A-Z][a-z]+ \d{4}(?= \(|$)", text)
        return found.group() if found else ""
    text = re.sub(r"(?<!\s)\s*\([^()]*\)", "", text)
    if field.key == "capital" and ("," in text or ";" in text):
        return ""
    text = text.split(";")[0].strip().rstrip(",")
    if field.key == "internet" and not re.fullmatch(r"\.[a-z]{2}", text):
        return ""
    if len(text) > field.max_chars or re.search(r"[:(){}\[\]\"]|\bnote\b|\bNA\b", text):
        return ""
    return text


def main_language(text: str) -> str:
    """Return the first official language of a list, else its first one; empty when that has two names."""
    official = re.search(r"(?:^|, )([A-Z][A-Za-z' -]*?)(?: [\d.]+%)? \((?:official|de facto official)", text)
    found = official or re.match(r"([A-Z][A-Za-z' -]*?)(?= \(| [<\d]|[,;]|$)", text)
    name = found[1] if found else ""
    return "" if " or " in name or " only" in name or len(name) > 30 else name


def page(country: dict[str, Any], plain: Callable[[str], str]) -> str:
    """Return a country as prose: sections, and in them the fields that read as text, each text once."""
    name = name_of(country, plain)
    seen: set[str] = set()
    blocks = [sentence(name)] if name else []
    for section, fields in country.items():
        if not isinstance(fields, dict):
            continue
        paragraphs = []
        for title, inner in fields.items():
            if title in SKIPPED:
                continue
            for sub, raw in _texts(inner):
                text = re.sub(r"^note:\s*", "", plain(raw))
                if text in seen or (len(text) < MIN_FIELD_CHARS and not (title in SHORT_FIELDS and len(text) > 3)):
                    continue
                seen.add(text)
                label = f"{title}, {sub}" if sub else title
                paragraphs.append(f"{label}: {text}")
        if paragraphs:
            blocks.append(f"{section}\n\n" + "\n\n".join(paragraphs))
    return "\n\n".join(blocks) + "\n" if len(blocks) > 1 else ""


def _texts(node: Any, label: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(node, str):
        yield label, node
    elif isinstance(node, dict):
        for key, inner in node.items():
            # `{"text": ...}` is the field itself; anything else is a part with a name.
            name = label if key == "text" else key.strip() if not label else f"{label}, {key.strip()}"
            yield from _texts(inner, name)
