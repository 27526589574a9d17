"""The formats of conversations, preferences and tasks: which keys name which, and what a row becomes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from freehold.conversations.messages import Message, Refused, conversation

Format = Literal["messages", "sharegpt", "alpaca", "prompt_completion", "preference", "unpaired", "task", "choice_task"]
FORMATS: tuple[Format, ...] = get_args(Format)


@dataclass(frozen=True)
class Made:
    """What a row becomes: messages to learn from, or a held-out item of a task."""

    messages: list[Message]
    """Of a pair, the better answer; its first message holds `rejected`, the worse one. Of an unpaired row, `label`."""
    item: dict[str, Any] | None = None
    """A task: the item without its `task` name. `messages` is its prompt then."""


def detect(row: Any) -> Format:
    """Return the format that the keys of a row name; Refused when they name none, or more than one."""
    if not isinstance(row, Mapping):
        raise Refused(f"a row is not a JSON object but {type(row).__name__}")
    has = {key for key, value in row.items() if value is not None}
    if {"input_ids", "token_ids"} & has:
        raise Refused("it holds token ids; give the text, so that the template and the tokenizer are the run's own")
    found: list[Format] = []
    if "messages" in has:
        found.append("messages")
    if "conversations" in has:
        found.append("sharegpt")
    if "instruction" in has and "output" in has:
        found.append("alpaca")
    if {"chosen", "rejected"} & has:
        found.append("preference")
    if "completion" in has and "prompt" in has:
        found.append("unpaired" if "label" in has else "prompt_completion")
    if "answer" in has and "prompt" in has and "completion" not in has:
        found.append("choice_task" if "choices" in has else "task")
    if len(found) != 1:
        what = f"could be {' or '.join(found)}" if found else "has the keys of no format"
        raise Refused(f"{what}: {', '.join(sorted(map(str, row))[:8])}")
    return found[0]


def convert(row: Mapping[str, Any], kind: Format) -> Made:
    """Return what a row of a format becomes; Refused says what is wrong with it."""
    missing = [key for key in NEEDS[kind] if row.get(key) is None]
    if missing:
        raise Refused(f"not a row of {kind}: `{missing[0]}` is missing")
    return _MAKERS[kind](row)


def _messages(row: Mapping[str, Any]) -> Made:
    return Made(conversation(row["messages"], row.get("tools"), system=row.get("system")))


def _sharegpt(row: Mapping[str, Any]) -> Made:
    return Made(conversation(row["conversations"], row.get("tools"), system=row.get("system")))


def _alpaca(row: Mapping[str, Any]) -> Made:
    history = row.get("history") or []
    if not all(isinstance(turn, Sequence) and len(turn) == 2 for turn in history):
        raise Refused("`history` is not a list of (question, answer)")
    turns: list[Message] = []
    for asked, answered in history:
        turns += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    parts = [row["instruction"], row.get("input") or ""]
    if not all(isinstance(part, str) for part in parts):
        raise Refused("`instruction` or `input` is not text")
    turns.append({"role": "user", "content": "\n\n".join(part for part in parts if part.strip())})
    return Made(conversation([*turns, {"role": "assistant", "content": row["output"]}], system=row.get("system")))


def _asked(value: Any, role: str) -> list[Any]:
    """Return one side of a pair: text is one message of `role`, a list is messages."""
    return [{"role": role, "content": value}] if isinstance(value, str) else value


def _joined(prompt: Any, completion: Any, row: Mapping[str, Any]) -> tuple[list[Message], int]:
    """Return prompt and completion as one conversation, and where the completion begins.

    They are joined as messages, so that the template's own tokens stand between them and no token spans the two.
    """
    asked, answer = _asked(prompt, "user"), _asked(completion, "assistant")
    if not isinstance(asked, list) or not isinstance(answer, list) or not answer:
        raise Refused("prompt and completion are not text or lists of messages")
    found = conversation([*asked, *answer], row.get("tools"), system=row.get("system"))
    at = len(found) - len(answer)
    if any(message["role"] != "assistant" for message in found[at : at + 1]):
        raise Refused("the completion does not begin with the assistant")
    # Turns of the assistant inside the prompt are given, not learned.
    return [m | ({"train": False} if m["role"] == "assistant" else {}) for m in found[:at]] + found[at:], at


def _prompt_completion(row: Mapping[str, Any]) -> Made:
    return Made(_joined(row["prompt"], row["completion"], row)[0])


def _unpaired(row: Mapping[str, Any]) -> Made:
    if not isinstance(row["label"], bool):
        raise Refused("`label` is not true or false")
    found, at = _joined(row["prompt"], row["completion"], row)
    found[at] = {**found[at], "label": row["label"]}
    return Made(found)


def _preference(row: Mapping[str, Any]) -> Made:
    """Return the better answer with the worse one next to it; without a prompt, what both begin with is the prompt."""
    chosen, rejected = _asked(row["chosen"], "assistant"), _asked(row["rejected"], "assistant")
    if not isinstance(chosen, list) or not isinstance(rejected, list):
        raise Refused("chosen and rejected are not text or lists of messages")
    prompt = row.get("prompt")
    if prompt is None:
        shared = 0
        while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
            shared += 1
        prompt, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
        if not prompt:
            raise Refused("there is no prompt, and chosen and rejected begin differently")
    asked = _asked(prompt, "user")
    if isinstance(asked, list) and asked:  # some data sets repeat the prompt on both sides
        chosen, rejected = (side[len(asked) :] if side[: len(asked)] == asked else side for side in (chosen, rejected))
    if not chosen or not rejected or chosen == rejected:
        raise Refused("chosen and rejected are the same, or one is empty")
    better, at = _joined(asked, chosen, row)
    worse, _ = _joined(asked, rejected, row)
    pair: Message = {"rejected": worse[at:]}
    if (margin := _margin(row)) is not None:
        pair["margin"] = margin
    return Made([*better[:at], better[at] | pair, *better[at + 1 :]])


def _margin(row: Mapping[str, Any]) -> float | None:
    """Return how much better the chosen answer is, when the row says so; Refused when it says it is worse."""
    better, worse = row.get("score_chosen"), row.get("score_rejected")
    scored = better - worse if isinstance(better, int | float) and isinstance(worse, int | float) else None
    if (margin := row.get("margin", scored)) is None:
        return None
    if not isinstance(margin, int | float) or not math.isfinite(margin) or margin < 0:
        raise Refused(f"its margin is {margin!r}: the rejected answer is the better one, or it is no number")
    return float(margin)


def _task(row: Mapping[str, Any]) -> Made:
    if not isinstance(row["answer"], str | int | float) or isinstance(row["answer"], bool):
        raise Refused("the answer of a task is not text or a number")
    prompt = conversation(_asked(row["prompt"], "user"), row.get("tools"), learns=False, text_tags=False)
    return Made(prompt, {"kind": "generate", "prompt": prompt, "answer": str(row["answer"])})


def _choice_task(row: Mapping[str, Any]) -> Made:
    choices, answer = row["choices"], row["answer"]
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(c, str) and c for c in choices):
        raise Refused("`choices` is not a list of two or more texts")
    if isinstance(answer, str) and answer in choices:
        answer = choices.index(answer)
    if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(choices):
        raise Refused("`answer` is neither one of the choices nor the number of one")
    prompt = conversation(_asked(row["prompt"], "user"), learns=False, text_tags=False)
    return Made(prompt, {"kind": "choice", "prompt": prompt, "choices": choices, "answer": answer})


NEEDS: dict[Format, tuple[str, ...]] = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "prompt_completion": ("prompt", "completion"),
    "preference": ("chosen", "rejected"),
    "unpaired": ("prompt", "completion", "label"),
    "task": ("prompt", "answer"),
    "choice_task": ("prompt", "choices", "answer"),
}
"""The keys that a row of each format must have."""
_MAKERS: dict[Format, Callable[[Mapping[str, Any]], Made]] = {
    "messages": _messages,
    "sharegpt": _sharegpt,
    "alpaca": _alpaca,
    "prompt_completion": _prompt_completion,
    "preference": _preference,
    "unpaired": _unpaired,
    "task": _task,
    "choice_task": _choice_task,
}
