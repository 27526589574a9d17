"""`POST /v1/responses`, the stateless core: OpenAI's newer form of a chat, whole or as events.

Nothing is kept between requests: the whole conversation comes in `input` each time.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from typing import Annotated, Any

from pydantic import Field

from freehold.core.errors import RequestError
from freehold.stages.serve.answers import Choice
from freehold.stages.serve.schema import MAX_MESSAGES, ChatMessage, ChatRequest, Objects, Request
from freehold.tokenizer.dialects import Piece

CUT = {"length": "max_output_tokens", "content_filter": "content_filter"}
"""Why an answer is incomplete, by its finish reason."""


class ResponsesRequest(Request):
    """The request; what would need a memory, another tool than functions, or files is refused by name."""

    input: str | Annotated[list[dict[str, Any]], Field(fail_fast=True, min_length=1, max_length=MAX_MESSAGES)]
    instructions: str | None = None
    max_output_tokens: int | None = None
    tools: Objects | None = None
    tool_choice: Any = None
    text: dict[str, Any] | None = None
    previous_response_id: Any = None
    conversation: Any = None
    background: bool | None = None
    prompt: Any = None
    truncation: str | None = None
    top_logprobs: int | None = None
    max_tool_calls: Any = None

    # Accepted, and of no consequence for the answer.
    include: Any = None
    parallel_tool_calls: Any = None
    reasoning: Any = None

    def as_chat(self) -> ChatRequest:
        """Return the same as a chat; RequestError names what cannot be done."""
        for name, accepted in (
            ("previous_response_id", ()), ("conversation", ()), ("background", (False,)), ("prompt", ()),
            ("truncation", ("disabled",)), ("top_logprobs", (0,)), ("max_tool_calls", ()),
            ("max_tokens", ()), ("n", (1,)),
        ):  # fmt: skip
            self.refuse(name, *accepted, why="nothing is kept between requests" if "_id" in name else "")
        items = [{"role": "user", "content": self.input}] if isinstance(self.input, str) else self.input
        messages = [ChatMessage(role="system", content=self.instructions)] if self.instructions else []
        return ChatRequest(
            **{name: getattr(self, name) for name in Request.model_fields},
            messages=messages + _messages(items),
            max_completion_tokens=self.max_output_tokens,
            tools=[_tool(tool, f"tools.{number}") for number, tool in enumerate(self.tools or ())] or None,
            tool_choice=_tool_choice(self.tool_choice),
            response_format=_format(self.text),
        )


def _messages(items: list[dict[str, Any]]) -> list[ChatMessage]:
    """Return items as messages: reasoning, text and calls that follow each other are one turn of the assistant."""
    messages: list[ChatMessage] = []
    for number, item in enumerate(items):
        where, kind = f"input.{number}", item.get("type", "message")
        if kind == "message":
            role, content = str(item.get("role")), _text(item.get("content"), where)
            if role == "assistant" and messages and messages[-1].role == role and not messages[-1].tool_calls:
                messages[-1].content = str(messages[-1].content or "") + content
            else:
                messages.append(ChatMessage(role=role, content=content))
        elif kind == "function_call_output":
            output = item.get("output")
            messages.append(ChatMessage(role="tool", content=_text(output, where), tool_call_id=item.get("call_id")))
        elif kind in ("function_call", "reasoning"):
            if not messages or messages[-1].role != "assistant":
                messages.append(ChatMessage(role="assistant", content=""))
            turn = messages[-1]
            if kind == "reasoning":
                turn.reasoning = (turn.reasoning or "") + _text(item.get("content") or item.get("summary") or "", where)
            else:
                call = {"name": item.get("name"), "arguments": item.get("arguments")}
                turn.tool_calls = [*(turn.tool_calls or ()), {"type": "function", "function": call}]
        else:
            raise RequestError("this kind of item cannot be read", where=where, found=str(kind)[:100])
    return messages


def _text(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not all(
        isinstance(p, dict) and isinstance(p.get("text"), str) for p in content
    ):
        raise RequestError("only text can be read", where=where, found=repr(content)[:100])
    return "".join(part["text"] for part in content)


def _tool(tool: dict[str, Any], where: str) -> dict[str, Any]:
    if tool.get("type") != "function":
        raise RequestError("only functions can be called", where=where, found=str(tool.get("type"))[:100])
    known = ("name", "description", "parameters", "strict")
    return {"type": "function", "function": {name: tool[name] for name in known if tool.get(name) is not None}}


def _tool_choice(choice: Any) -> Any:
    if isinstance(choice, dict) and choice.get("type") == "function":
        return {"type": "function", "function": {"name": choice.get("name")}}
    return choice


def _format(text: dict[str, Any] | None) -> dict[str, Any] | None:
    found = (text or {}).get("format")
    if not isinstance(found, dict) or found.get("type") != "json_schema":
        return found
    return {"type": "json_schema", "json_schema": {name: value for name, value in found.items() if name != "type"}}


class Output:
    """The items of one answer in the making, and the events a stream makes of them."""

    def __init__(self) -> None:
        self.items: list[dict[str, Any]] = []
        self._open: dict[str, Any] | None = None

    def feed(self, piece: Piece) -> Iterator[dict[str, Any]]:
        """Take one piece; yield the events it makes."""
        if piece.kind == "call_end":
            yield from self.close("completed")
            return
        wanted = {"content": "message", "reasoning": "reasoning"}.get(piece.kind, "function_call")
        if piece.kind == "call" or self._open is None or self._open["type"] != wanted:
            yield from self.close("completed")
            yield from self._begin(wanted, piece.name)
        if piece.text:
            yield from self._add(piece.text)

    def close(self, status: str) -> Iterator[dict[str, Any]]:
        """End the item that is open, if there is one."""
        item, self._open = self._open, None
        if item is None:
            return
        at = {"output_index": len(self.items) - 1, "item_id": item["id"]}
        if item["type"] == "function_call":
            yield {"type": "response.function_call_arguments.done", **at, "arguments": item["arguments"]}
        else:
            part = item["content"][0]
            kind = "output_text" if item["type"] == "message" else "reasoning_text"
            yield {"type": f"response.{kind}.done", **at, "content_index": 0, "text": part["text"]}
            yield {"type": "response.content_part.done", **at, "content_index": 0, "part": dict(part)}
        item["status"] = status
        yield {"type": "response.output_item.done", "output_index": at["output_index"], "item": dict(item)}

    def _begin(self, kind: str, name: str) -> Iterator[dict[str, Any]]:
        number = uuid.uuid4().hex
        item: dict[str, Any] = {"type": kind, "id": f"{kind[:2]}_{number}", "status": "in_progress"}
        part: dict[str, Any] | None = None
        if kind == "function_call":
            item |= {"call_id": f"call_{number[:24]}", "name": name, "arguments": ""}
        elif kind == "message":
            part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
            item |= {"role": "assistant", "content": [part]}
        else:
            part = {"type": "reasoning_text", "text": ""}
            item |= {"summary": [], "content": [part]}
        self.items.append(item)
        self._open = item
        index = len(self.items) - 1
        empty = item | ({"content": []} if part else {})
        yield {"type": "response.output_item.added", "output_index": index, "item": empty}
        if part:
            at = {"output_index": index, "item_id": item["id"], "content_index": 0}
            yield {"type": "response.content_part.added", **at, "part": dict(part)}

    def _add(self, text: str) -> Iterator[dict[str, Any]]:
        item = self._open
        assert item is not None
        at = {"output_index": len(self.items) - 1, "item_id": item["id"], "delta": text}
        if item["type"] == "function_call":
            item["arguments"] += text
            yield {"type": "response.function_call_arguments.delta", **at}
        else:
            item["content"][0]["text"] += text
            kind = "output_text" if item["type"] == "message" else "reasoning_text"
            yield {"type": f"response.{kind}.delta", **at, "content_index": 0}


class Body:
    """The response object around an output."""

    def __init__(self, request: ResponsesRequest) -> None:
        self.fields: dict[str, Any] = {
            "id": f"resp_{uuid.uuid4().hex}",
            "object": "response",
            "created_at": int(time.time()),
            "status": "in_progress",
            "error": None,
            "incomplete_details": None,
            "instructions": request.instructions,
            "max_output_tokens": request.max_output_tokens,
            "model": request.model,
            "output": [],
            "parallel_tool_calls": True,
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None},
            "store": False,
            "temperature": request.temperature,
            "text": request.text or {"format": {"type": "text"}},
            "tool_choice": request.tool_choice or "auto",
            "tools": request.tools or [],
            "top_p": request.top_p,
            "truncation": "disabled",
            "usage": None,
            "metadata": request.metadata or {},
        }

    def ended(self, output: Output, choice: Choice, prompt_tokens: int) -> dict[str, Any]:
        """Return the response of a finished answer."""
        cut = CUT.get(choice.finish_reason or "")
        return self.fields | {
            "status": "incomplete" if cut else "completed",
            "incomplete_details": {"reason": cut} if cut else None,
            "output": output.items,
            "usage": {
                "input_tokens": prompt_tokens,
                "input_tokens_details": {"cached_tokens": choice.cached_tokens},
                "output_tokens": choice.completion_tokens,
                "output_tokens_details": {"reasoning_tokens": choice.reasoning_tokens},
                "total_tokens": prompt_tokens + choice.completion_tokens,
            },
        }


async def events(
    body: Body, moves: AsyncIterator[tuple[int, list[Piece]]], choice: Choice, prompt_tokens: int
) -> AsyncGenerator[dict[str, Any]]:
    """Yield the events of a streamed response; the last one holds the response."""
    output, number = Output(), 0
    yield {"type": "response.created", "response": body.fields, "sequence_number": 0}
    yield {"type": "response.in_progress", "response": body.fields, "sequence_number": 1}
    number = 2
    async for _, pieces in moves:
        for piece in pieces:
            for event in output.feed(piece):
                yield event | {"sequence_number": number}
                number += 1
    for event in output.close("incomplete" if choice.finish_reason in CUT else "completed"):
        yield event | {"sequence_number": number}
        number += 1
    ended = body.ended(output, choice, prompt_tokens)
    yield {"type": f"response.{ended['status']}", "response": ended, "sequence_number": number}
