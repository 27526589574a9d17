"""Verifiers of single answers: a final answer, a number, a pattern, a JSON schema."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

_FINAL = re.compile(r"\A(?:the )?(?:final )?answer(?: is)?\s*:?\s+(.*)\Z", re.I | re.S)
_BOXED = re.compile(r"\\boxed\{([^{}]*)\}")
_NUMBER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:/\d+)?\Z")
MOST_DIGITS = 400
"""Python refuses to read integers of thousands of digits, and no task has such an answer."""


def final_answer(text: str) -> str:
    """Return what the last line of an answer says, without `Answer:`, a box, or the full stop at its end."""
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
    if not lines:
        return ""
    # Only the last line counts: an answer that lists every candidate has said nothing.
    last = lines[-1]
    if found := _BOXED.findall(last):
        return str(found[-1]).strip()
    if match := _FINAL.match(last):
        last = match.group(1)
    return last.strip().removesuffix(".").strip()


def same_text(text: str, answer: str) -> float:
    """Return 1 when the final answer is `answer`, whatever the case and spaces."""
    return float(bool(answer.strip()) and _plain(final_answer(text)) == _plain(answer))


def same_number(text: str, answer: str) -> float:
    """Return 1 when the final answer is a number equal to `answer`: 0.5, 1/2 and 2/4 are one."""
    found, wanted = number(final_answer(text)), number(answer)
    return float(found is not None and found == wanted)


def number(text: str) -> Fraction | None:
    """Return a written number exactly; None when the text is anything else."""
    # What stands before `=` is the sum, not the answer.
    said = text.rpartition("=")[2].strip().strip("$").strip()
    if len(said) > MOST_DIGITS or not _NUMBER.match(said):
        return None
    try:
        return Fraction(said.replace(",", ""))
    except ZeroDivisionError:
        return None


def matches(text: str, pattern: str) -> float:
    """Return 1 when all of an answer has a form (a regular expression of the environment's, never of the policy's)."""
    return float(re.fullmatch(pattern, text.strip(), re.S) is not None)


def valid_json(text: str, schema: Mapping[str, Any]) -> float:
    """Return 1 when an answer is JSON, and nothing else, that satisfies a schema."""
    try:
        value = json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return 0.0
    return float(satisfies(value, schema))


def satisfies(value: Any, schema: Mapping[str, Any]) -> bool:
    """Return whether a value has the form of a JSON Schema (type, enum, bounds, properties, required, items)."""
    kinds = schema.get("type")
    wanted = [kinds] if isinstance(kinds, str) else kinds or []
    if wanted and not any(_TYPES[kind](value) for kind in wanted):
        return False
    if "enum" in schema and not any(type(one) is type(value) and one == value for one in schema["enum"]):
        return False
    if isinstance(value, Mapping):
        return _object(value, schema)
    if isinstance(value, list):
        least, most = schema.get("minItems", 0), schema.get("maxItems", len(value))
        return least <= len(value) <= most and all(satisfies(one, schema.get("items", {})) for one in value)
    if isinstance(value, str):
        return schema.get("minLength", 0) <= len(value) <= schema.get("maxLength", len(value))
    if isinstance(value, int | float) and not isinstance(value, bool):
        return bool(schema.get("minimum", value) <= value <= schema.get("maximum", value))
    return True


def _object(value: Mapping[str, Any], schema: Mapping[str, Any]) -> bool:
    known = schema.get("properties", {})
    if not set(schema.get("required", ())) <= set(value):
        return False
    if schema.get("additionalProperties") is False and not set(value) <= set(known):
        return False
    return all(satisfies(value[name], known[name]) for name in value if name in known)


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


_TYPES: dict[str, Any] = {
    "object": lambda v: isinstance(v, Mapping),
    "array": lambda v: isinstance(v, list),
    "string": lambda v: isinstance(v, str),
    # JSON has one kind of number; true is none of them.
    "integer": lambda v: isinstance(v, int) and not isinstance(v, bool),
    "number": lambda v: isinstance(v, int | float) and not isinstance(v, bool),
    "boolean": lambda v: isinstance(v, bool),
    "null": lambda v: v is None,
}
