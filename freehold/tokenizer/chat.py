"""The one chat template: the same text and ids in training, evaluation, serving and every export.

ChatML: the begin token once, then for each turn `<|im_start|>role`, a line break, the content, `<|im_end|>` and a line
break. Reasoning stands in `<think>`, tools (JSON Schema, one a line) in `<tools>` in the system turn, calls as JSON in
`<tool_call>`, results in `<tool_response>` in a user turn. Reasoning of earlier turns stays where it was.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from freehold.core.errors import RequestError

if TYPE_CHECKING:
    from freehold.tokenizer.bpe import Tokenizer

ROLES = ("system", "user", "assistant", "tool")


class Piece(NamedTuple):
    """A stretch of a rendered conversation: ordinary text or one special token, and whether it is learned."""

    text: str
    special: bool
    learned: bool


def render(
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    generation: bool = False,
) -> str:
    """Return a conversation as text; `generation` opens the assistant's turn. Errors as in `render_ids`."""
    return "".join(piece.text for piece in _pieces(messages, tools or (), generation))


def render_ids(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    generation: bool = False,
) -> tuple[list[int], list[bool]]:
    """Return a conversation as ids and, for each id, whether a model learns to say it.

    Learned is what the assistant says: reasoning, content, calls and `<|im_end|>`; not in a message whose `train` is
    false. Special ids come from the
    template alone; a special token's name inside a message is ordinary text. Raises RequestError, naming the message,
    for an unknown role, content that is not text, or a malformed call or tool.
    """
    ids: list[int] = []
    mask: list[bool] = []
    run: list[Piece] = []
    for piece in _pieces(messages, tools or (), generation):
        if piece.special:
            _encode_run(tokenizer, run, ids, mask)
            run = []
            ids.append(tokenizer.specials[piece.text])
            mask.append(piece.learned)
        else:
            run.append(piece)
    _encode_run(tokenizer, run, ids, mask)
    return ids, mask


def _encode_run(tokenizer: Tokenizer, run: list[Piece], ids: list[int], mask: list[bool]) -> None:
    """Encode text pieces as one text, as every other runtime will; a token is learned when its first byte is."""
    new = tokenizer.encode("".join(piece.text for piece in run))
    ids += new
    flags = {piece.learned for piece in run if piece.text}
    if len(flags) < 2:
        mask += [True in flags] * len(new)
        return
    ends, end = [], 0
    for piece in run:
        end += len(piece.text.encode(errors="surrogatepass"))  # three bytes, as many as what replaces it
        ends.append((end, piece.learned))
    at, start = 0, 0
    for number in new:
        while ends[at][0] <= start:
            at += 1
        mask.append(ends[at][1])
        start += len(tokenizer.token_bytes(number))


def _pieces(
    messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]], generation: bool
) -> Iterator[Piece]:
    """Yield a conversation piece by piece: the template itself."""

    def special(name: str, learned: bool = False) -> Piece:
        return Piece(name, True, learned)

    def text(words: str, learned: bool = False) -> Piece:
        return Piece(words, False, learned)

    def turn(role: str, content: str) -> Iterator[Piece]:
        yield from (special("<|im_start|>"), text(f"{role}\n{content}"), special("<|im_end|>"), text("\n"))

    if not messages:
        raise RequestError("there are no messages", where="messages", expected="at least one")
    messages = [_joined(message) for message in messages]
    roles = [_check(message, f"messages[{index}]") for index, message in enumerate(messages)]
    yield special("<|begin_of_text|>")
    if tools:
        system = messages[0]["content"] if roles[0] == "system" else ""
        yield special("<|im_start|>")
        yield text("system\n" + (system and system + "\n\n") + "You can call these tools:\n")
        yield special("<tools>")
        yield text("\n" + "".join(_tool(tool, f"tools[{index}]") + "\n" for index, tool in enumerate(tools)))
        yield from (special("</tools>"), special("<|im_end|>"), text("\n"))
    for index, (role, message) in enumerate(zip(roles, messages, strict=True)):
        if role == "assistant":
            learned = message.get("train") is not False
            yield from (special("<|im_start|>"), text("assistant\n"))
            if message.get("reasoning_content"):
                yield special("<think>", learned)
                yield text(f"\n{message['reasoning_content']}\n", learned)
                yield from (special("</think>", learned), text("\n\n", learned))
            if message.get("content"):
                yield text(message["content"], learned)
            for number, call in enumerate(message.get("tool_calls") or ()):
                if message.get("content") or number:
                    yield text("\n", learned)
                yield special("<tool_call>", learned)
                yield text("\n" + _call(call, f"messages[{index}].tool_calls[{number}]") + "\n", learned)
                yield special("</tool_call>", learned)
            yield from (special("<|im_end|>", learned), text("\n"))
        elif role == "tool":
            if index == 0 or roles[index - 1] != "tool":
                yield from (special("<|im_start|>"), text("user\n"))
            yield from (special("<tool_response>"), text(f"\n{message['content']}\n"), special("</tool_response>"))
            if index + 1 == len(roles) or roles[index + 1] != "tool":
                yield special("<|im_end|>")
            yield text("\n")
        elif not (tools and index == 0 and role == "system"):
            yield from turn(role, message["content"])
    if generation:
        yield from (special("<|im_start|>"), text("assistant\n"))


def _joined(message: Any) -> Any:
    """Return a message whose content is one text, where it came as a list of text parts; others as they are."""
    parts = message.get("content") if isinstance(message, Mapping) else None
    if not isinstance(parts, list) or not all(
        isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str) for part in parts
    ):
        return message
    return {**message, "content": "".join(part["text"] for part in parts)}


def _check(message: Any, where: str) -> str:
    """Return the role of a message that can be rendered; RequestError otherwise."""
    if not isinstance(message, Mapping):
        raise RequestError("a message is not an object", where=where, found=type(message).__name__)
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise RequestError("unknown role", where=where, found=repr(role), expected=", ".join(ROLES))
    if role == "assistant":
        reasoning = message.get("reasoning_content")
        if reasoning is not None and not isinstance(reasoning, str):
            found = type(reasoning).__name__
            raise RequestError("reasoning_content is not text", where=where, found=found, expected="str")
        calls = message.get("tool_calls")
        if calls is not None and not isinstance(calls, (list, tuple)):
            raise RequestError("tool_calls is not a list", where=where, found=type(calls).__name__, expected="list")
        if content is None and calls:
            return str(role)
    if "content" not in message:
        raise RequestError("a message has no content", where=where, expected="content: str")
    if not isinstance(content, str):
        raise RequestError("content is not text", where=where, found=type(content).__name__, expected="str")
    return str(role)


def _tool(tool: Any, where: str) -> str:
    function = tool.get("function") if isinstance(tool, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        expected = '{"type": "function", "function": {"name": ..., "parameters": {...}}}'
        raise RequestError("not a tool", where=where, found=repr(tool)[:100], expected=expected)
    return _json(tool)


def _call(call: Any, where: str) -> str:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        expected = '{"function": {"name": ..., "arguments": "{...}"}}'
        raise RequestError("not a tool call", where=where, found=repr(call)[:100], expected=expected)
    arguments = function.get("arguments")
    if arguments is None or isinstance(arguments, str) and not arguments.strip():
        arguments = "{}"  # what clients send for a tool without parameters
    try:
        read = json.loads(arguments) if isinstance(arguments, str) else arguments
    except (ValueError, RecursionError):  # not JSON, a number of thousands of digits, or a thousand brackets
        read = None
    if not isinstance(read, Mapping):
        found = repr(arguments)[:100]
        raise RequestError("the arguments of a call are not a JSON object", where=where, found=found)
    # Arguments that come as a string go in as they are: templates cannot read JSON, and must give the same text.
    written = arguments if isinstance(arguments, str) else _json(arguments)
    return f'{{"name": {_json(function["name"])}, "arguments": {written}}}'


def _json(value: Any) -> str:
    """Return JSON as the `tojson` of Hugging Face's templates writes it."""
    return json.dumps(value, ensure_ascii=False)
