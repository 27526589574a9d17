"""Messages of every dialect, brought into the one form that the chat template renders.

Reasoning arrives in four places: `<think>` tags inside the content, `reasoning_content`, `reasoning` and `thinking`. It
leaves as `reasoning_content`. Calls arrive as objects or as JSON text, and inside `<tool_call>` tags; they leave as
`tool_calls` whose arguments are JSON text, so that numbers and the order of keys stay as they were written.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from freehold.core.errors import DataError, RequestError
from freehold.tokenizer.chat import render

Message = dict[str, Any]

ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "model", "bot", "function_call"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function", "function_response"), "tool"),
}
"""What roles are called elsewhere -> what they are called here."""
REASONING = ("reasoning_content", "reasoning", "thinking")
"""Keys that hold the reasoning of an assistant's message."""

_RESPONSE = re.compile(r"\A\s*<tool_response>\n?(.*?)\n?</tool_response>\s*\Z", re.S)


class Refused(Exception):  # noqa: N818 - it is caught for each row and becomes a line of a list
    """Why one row cannot be learned from."""


def conversation(
    messages: Any, tools: Any = None, *, system: Any = None, learns: bool = True, text_tags: bool = True
) -> list[Message]:
    """Return a row's messages in our form, its tools in the first of them; Refused says what is wrong.

    With `learns` at least one turn of the assistant must have something to say. `text_tags` lifts reasoning and calls
    out of the text; data that is about such tags keeps them.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise Refused("its messages are not a list with at least one message")
    found = [_message(one, number, text_tags) for number, one in enumerate(messages)]
    if system:
        found.insert(0, {"role": "system", "content": _text(system, "system")})
    if text_tags and tools is None and found[0]["role"] == "system":
        found[0], tools = _tools_in_text(found[0])
        found = found if found[0]["content"] or len(found) == 1 else found[1:]
    if tools := _tools(tools):
        found[0] = {**found[0], "tools": tools}
    _check_renders(found, tools)
    if learns:
        _check_learns(found)
    return found


def _message(one: Any, number: int, text_tags: bool) -> Message:
    if not isinstance(one, Mapping):
        raise Refused(f"message {number} is not an object")
    given = one.get("role", one.get("from"))
    role = ROLES.get(str(given).lower())
    if role is None:
        raise Refused(f"message {number} has the unknown role {given!r}")
    message: Message = {"role": role, "content": _text(one.get("content", one.get("value")), f"message {number}")}
    if role == "tool":
        message["content"] = _RESPONSE.sub(r"\1", message["content"])
        message |= {key: one[key] for key in ("tool_call_id", "name") if isinstance(one.get(key), str)}
    elif role == "assistant":
        if str(given).lower() == "function_call":
            message |= {"content": "", "tool_calls": [_call(message["content"], number)]}
        elif text_tags:
            message |= _calls_in_text(message["content"], number)
        message |= _reasoning(one, message["content"], number, text_tags)
        if calls := one.get("tool_calls") or ([one["function_call"]] if one.get("function_call") else []):
            if not isinstance(calls, Sequence) or message.get("tool_calls"):
                raise Refused(f"message {number} has calls in two places, or `tool_calls` that is not a list")
            message["tool_calls"] = [_call(call, number) for call in calls]
        if one.get("train") is False or one.get("weight", 1) == 0:
            message["train"] = False
    return message


def _text(content: Any, where: str) -> str:
    """Return content as text: null is empty, a list of text parts is joined."""
    if content is None:
        return ""
    if isinstance(content, Sequence) and not isinstance(content, str):
        parts = [part if isinstance(part, Mapping) else {"type": type(part).__name__} for part in content]
        other = [str(p.get("type")) for p in parts if p.get("type") != "text" or not isinstance(p.get("text"), str)]
        if other:
            raise Refused(f"{where} has a part of type {other[0]}; only text can be learned")
        return "".join(part["text"] for part in parts)
    if not isinstance(content, str):
        raise Refused(f"{where} has content of type {type(content).__name__}, not text")
    return content


def _reasoning(one: Mapping[str, Any], content: str, number: int, text_tags: bool) -> Message:
    """Return `content` and `reasoning_content` of an assistant's message; Refused when two places disagree."""
    said = {key: _text(one[key], f"message {number}: {key}").strip("\n") for key in REASONING if one.get(key)}
    if text_tags and ("<think>" in content or "</think>" in content):
        before, opened, rest = content.partition("<think>")
        inside, closed, after = rest.partition("</think>")
        if not opened or not closed or "think>" in before + inside + after:
            raise Refused(f"message {number} has a <think> that is not closed, or more than one")
        content = before + after.lstrip("\n")
        if inside.strip():
            said["<think>"] = inside.strip("\n")
    if len(set(said.values())) > 1:
        raise Refused(f"message {number} has different reasoning in {' and '.join(said)}")
    thought = next(iter(said.values()), "")
    return {"content": content} | ({"reasoning_content": thought} if thought.strip() else {})


def _calls_in_text(content: str, number: int) -> Message:
    """Return content and calls of a message that has its calls in `<tool_call>` tags."""
    found = list(between(content, "<tool_call>", "</tool_call>"))
    if not found:
        return {}
    ends = [0, *(end for _, end, _ in found)]
    starts = [*(start for start, _, _ in found), len(content)]
    left = "".join(content[end:start] for end, start in zip(ends, starts, strict=True))
    return {"content": left.strip("\n"), "tool_calls": [_call(inside.strip(), number) for _, _, inside in found]}


def between(text: str, opening: str, closing: str) -> Iterator[tuple[int, int, str]]:
    """Yield (start, end, inside) of each pair of tags, from left to right, in linear time."""
    place = 0
    while (start := text.find(opening, place)) >= 0 and (close := text.find(closing, start + len(opening))) >= 0:
        place = close + len(closing)
        yield start, place, text[start + len(opening) : close]


def _call(call: Any, number: int) -> Message:
    """Return one call; its arguments are JSON text, kept as written when they came as text."""
    if isinstance(call, str):
        call = _parsed(call, f"message {number}: a call")
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise Refused(f"message {number} has a call without a name")
    arguments = function.get("arguments", function.get("parameters", {}))
    if arguments is None or arguments == "":
        arguments = {}
    read = _parsed(arguments, f"message {number}: the arguments of {function['name']}")
    if not isinstance(read, Mapping):
        raise Refused(f"message {number}: the arguments of {function['name']} are not a JSON object")
    written = arguments.strip() if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    made: Message = {"type": "function", "function": {"name": function["name"], "arguments": written}}
    return made | ({"id": call["id"]} if isinstance(call.get("id"), str) else {})


def _parsed(value: Any, what: str) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise Refused(f"{what} are not JSON: {str(error)[:80]}") from error


def _tools(tools: Any) -> list[Any]:
    """Return tool schemas; a bare function gets the frame that the template renders."""
    tools = _parsed(tools, "its tools") if tools else []
    if not isinstance(tools, list):
        raise Refused("its tools are not a list")
    return [
        {"type": "function", "function": tool} if isinstance(tool, Mapping) and "function" not in tool else tool
        for tool in tools
    ]


def _tools_in_text(system: Message) -> tuple[Message, list[Any] | None]:
    """Return a system message without the schemas in its `<tools>` tags, and those schemas."""
    tags = between(system["content"], "<tools>", "</tools>")
    start, end, inside = next((tag for tag in tags if tag[2].lstrip().startswith(("[", "{"))), (0, 0, ""))
    if not inside:
        return system, None
    try:
        found = json.loads(inside.strip())
    except ValueError:
        found = [_parsed(line, "its tools") for line in inside.strip().splitlines() if line.strip()]
    left = (system["content"][:start] + system["content"][end:]).strip()
    return {**system, "content": left}, found if isinstance(found, list) else [found]


def _check_renders(messages: list[Message], tools: list[Any]) -> None:
    try:
        render(messages, tools=tools)
    except RequestError as error:
        raise Refused(f"{error.where}: {error.what}" + (f": {error.found}" if error.found else "")) from error


def _check_learns(messages: list[Message]) -> None:
    turns = [m for m in messages if m["role"] == "assistant"]
    for message in turns:
        if not says(message):
            raise Refused("a turn of the assistant says nothing: no content, reasoning or calls")
    if not any(message.get("train", True) for message in turns):
        raise Refused("nothing to learn: no turn of the assistant, or every one has weight 0")


def says(message: Mapping[str, Any]) -> bool:
    """Return whether an assistant's message has content, reasoning or calls."""
    return bool(
        str(message.get("content") or "").strip() or message.get("reasoning_content") or message.get("tool_calls")
    )


def refuse_file(what: str, where: object, found: object) -> DataError:
    """Return the error for a file that holds no conversations at all."""
    return DataError(
        what,
        where=where,
        found=found,
        expected="one JSON object a line with messages, conversations, instruction + output, prompt + completion, "
        "chosen + rejected, prompt + completion + label, or prompt + answer",
        todo="look at it with `freehold align --check FILE`; the formats are in docs/conversations.md",
    )
