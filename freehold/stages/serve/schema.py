"""The requests we accept, in OpenAI's words; anything else is refused by name, never silently dropped."""

from __future__ import annotations

import json
import re
from typing import Annotated, Any, TypeVar

import pydantic
from pydantic import Field
from pydantic_core import PydanticCustomError

from freehold.core.errors import RequestError
from freehold.infer.sampler import MAX_TOP_LOGPROBS, Sampling

MAX_CHOICES = 128
MAX_BIASES, MAX_STOPS = 1024, 64
MAX_ANSWERS = 1024
"""Prompts of one request times choices of each."""
MAX_IDS, MAX_MESSAGES, MAX_TOOLS, MAX_PARTS = 1 << 20, 16_384, 1024, 1024
# A list of a million wrong items is a million errors of which one is reported: the first ends the check.
Ids = Annotated[list[int], Field(fail_fast=True, max_length=MAX_IDS)]
Objects = Annotated[list[dict[str, Any]], Field(fail_fast=True, max_length=MAX_TOOLS)]


def _bounded(value: Any) -> Any:
    """Refuse a table that is too long before each of its values is checked."""
    if isinstance(value, dict) and len(value) > MAX_BIASES:
        raise PydanticCustomError("too_long", "at most {most} token ids", {"most": MAX_BIASES})
    return value


Biases = Annotated[dict[str, float], pydantic.BeforeValidator(_bounded)]
P = TypeVar("P", bound="_Part")


class _Part(pydantic.BaseModel):
    """The base of every part of a request: strict types, unknown fields refused."""

    model_config = pydantic.ConfigDict(extra="forbid", strict=True)

    @pydantic.model_validator(mode="before")
    @classmethod
    def _refuse_unknown(cls, value: Any) -> Any:
        """Refuse the first unknown field; pydantic would make an error of each."""
        for key in value if isinstance(value, dict) else ():
            if key not in cls.model_fields:
                raise PydanticCustomError("unknown_field", "unknown field", {"name": key[:100]})
        return value


def read(kind: type[P], body: bytes) -> P:
    """Return a request from the bytes of its body; ValueError when they are not JSON, else pydantic's error.

    Slow for a long body, so not for the thread that listens.
    """
    try:
        value = json.loads(body)
    except RecursionError as error:
        raise ValueError("brackets are nested too deeply") from error
    return kind.model_validate(value)


class StreamOptions(_Part):
    """What else a stream carries."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None
    """Accepted and ignored: nothing is padded here."""


class Request(_Part):
    """What chat and text completions have in common."""

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = Field(None, ge=-1)
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: Biases | None = None
    max_tokens: int | None = None
    seed: int | None = None
    stop: str | Annotated[list[str], Field(fail_fast=True)] | None = None
    cache_salt: str | None = Field(None, max_length=256)
    """Only requests with the same one share kept prompts, as in vLLM."""

    # Accepted, and of no consequence for the answer.
    user: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None

    @property
    def stops(self) -> list[str]:
        """The stop strings; RequestError for an empty one, or too many."""
        stops = [self.stop] if isinstance(self.stop, str) else list(self.stop or [])
        if "" in stops:
            raise RequestError("a stop string is empty", where="stop", expected="at least one character")
        if len(stops) > MAX_STOPS:
            raise RequestError("too many stop strings", where="stop", found=len(stops), expected=f"at most {MAX_STOPS}")
        return stops

    @property
    def usage_wanted(self) -> bool:
        """Whether a stream ends with a chunk of token counts."""
        return bool(self.stream_options and self.stream_options.include_usage)

    def sampling(self, default: Sampling, *, choice: int = 0, logprobs: int = 0, max_tokens: int | None) -> Sampling:
        """Return how choice number `choice` is sampled: with its own draws, but the same ones every time.

        What the request does not say is as in `default`, the model's own way.
        """
        bias: dict[int, float] = {}
        for key, value in (self.logit_bias or {}).items():
            if not re.fullmatch("[0-9]{1,9}", key):
                raise RequestError("logit_bias maps token ids to numbers", where="logit_bias", found=key[:100])
            bias[int(key)] = value
        return Sampling(
            temperature=default.temperature if self.temperature is None else self.temperature,
            top_p=default.top_p if self.top_p is None else self.top_p,
            top_k=default.top_k if self.top_k is None else max(self.top_k, 0),
            min_p=default.min_p if self.min_p is None else self.min_p,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            logit_bias=bias,
            max_tokens=max_tokens,
            stop_ids=default.stop_ids,
            constrain=default.constrain,
            adapter=default.adapter,
            seed=None if self.seed is None else self.seed + choice,
            logprobs=logprobs,
        )

    def refuse(self, name: str, *accepted: Any, why: str = "") -> None:
        """Raise RequestError when a field asks for what this server cannot do."""
        value = getattr(self, name)
        if value is not None and value not in accepted:
            expected = " or ".join(repr(a) for a in accepted) if accepted else "nothing: it is not supported here"
            what = f"{name} is not supported with this value" + (f": {why}" if why else "")
            raise RequestError(what, where=name, found=repr(value)[:100], expected=expected)


class CompletionRequest(Request):
    """`POST /v1/completions`."""

    prompt: str | Annotated[list[str], Field(fail_fast=True)] | Ids | Annotated[list[Ids], Field(fail_fast=True)] = ""
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    best_of: int | None = None
    suffix: str | None = None

    @property
    def prompts(self) -> list[Any]:
        """The prompts, one or many: texts or lists of ids."""
        one = isinstance(self.prompt, str) or bool(self.prompt) and isinstance(self.prompt[0], int)
        return [self.prompt] if one else list(self.prompt)

    def check(self) -> None:
        """Refuse what cannot be done as asked."""
        self.refuse("best_of", 1, self.n or 1)
        self.refuse("suffix", "")
        count = len(self.prompts)
        if count == 0:
            raise RequestError("the prompt is empty", where="prompt", expected="at least one token")
        if count * (self.n or 1) > MAX_ANSWERS:
            raise RequestError(
                "too many prompts in one request",
                where="prompt",
                found=f"{count} prompts, n = {self.n or 1}",
                expected=f"at most {MAX_ANSWERS} answers",
            )


class ChatMessage(_Part):
    """One message; content may come as text or as a list of text parts."""

    role: str
    content: str | Annotated[list[dict[str, Any]], Field(fail_fast=True, max_length=MAX_PARTS)] | None = None
    name: str | None = None
    tool_calls: Objects | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    # What clients send back when they return our own message.
    refusal: Any = None
    annotations: Any = None
    audio: None = None
    function_call: None = None

    def plain(self, number: int) -> dict[str, Any]:
        """Return the message as the template takes it; RequestError when a part is not text."""
        message: dict[str, Any] = {"role": "system" if self.role == "developer" else self.role}
        content = self.content
        if isinstance(content, list):
            for part in content:
                if part.get("type") != "text" or not isinstance(part.get("text"), str):
                    raise RequestError(
                        "only text can be read", where=f"messages.{number}.content", found=part.get("type")
                    )
            content = "".join(part["text"] for part in content)
        message["content"] = content or ""
        if self.tool_calls:
            message["tool_calls"] = self.tool_calls
        reasoning = self.reasoning_content or self.reasoning
        if reasoning:
            message["reasoning_content"] = reasoning
        return message


class ChatRequest(Request):
    """`POST /v1/chat/completions`."""

    messages: list[ChatMessage] = Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    tools: Objects | None = None
    tool_choice: Any = None
    response_format: dict[str, Any] | None = None
    modalities: list[str] | None = None
    functions: Any = None
    function_call: Any = None
    audio: Any = None
    prediction: Any = None
    web_search_options: Any = None

    # Accepted, and of no consequence for the answer.
    parallel_tool_calls: Any = None
    reasoning_effort: Any = None
    verbosity: Any = None

    def check(self) -> None:
        """Refuse what cannot be done as asked."""
        _ = self.forced_tools, self.content_schema
        self.refuse("modalities", ["text"])
        for name in ("functions", "function_call", "audio", "prediction", "web_search_options"):
            self.refuse(name)
        if self.top_logprobs and not self.logprobs:
            raise RequestError("top_logprobs needs logprobs", where="top_logprobs", expected="logprobs: true")

    @property
    def forced_tools(self) -> list[dict[str, Any]] | None:
        """The tools of which one must be called; None when none must. RequestError names a choice that is none."""
        choice = self.tool_choice
        if choice in (None, "none", "auto"):
            return None
        tools = self.tools or []
        if isinstance(choice, dict) and choice.get("type") == "function" and isinstance(choice.get("function"), dict):
            name = choice["function"].get("name")
            tools = [tool for tool in tools if (tool.get("function") or {}).get("name") == name]
        elif choice != "required":
            raise RequestError(
                "not a choice of tools",
                where="tool_choice",
                found=repr(choice)[:100],
                expected='none, auto, required or {"type": "function", "function": {"name": ...}}',
            )
        if not tools:
            raise RequestError(
                "the tool that must be called is not offered", where="tool_choice", found=repr(choice)[:100]
            )
        return tools

    @property
    def content_schema(self) -> dict[str, Any] | None:
        """The schema the content must follow; None when it is free. RequestError names a format that is none."""
        wanted = self.response_format
        kind = (wanted or {}).get("type", "text")
        if kind == "text":
            return None
        if kind == "json_object":
            return {"type": "object"}
        described = (wanted or {}).get("json_schema")
        if kind != "json_schema" or not isinstance(described, dict) or not isinstance(described.get("schema"), dict):
            raise RequestError(
                "not a format",
                where="response_format",
                found=repr(wanted)[:100],
                expected='text, json_object, or {"type": "json_schema", "json_schema": {"name": ..., "schema": {...}}}',
            )
        schema: dict[str, Any] = described["schema"]
        return schema

    @property
    def offered_tools(self) -> list[dict[str, Any]] | None:
        """The tools the model may call."""
        return self.tools if self.tools and self.tool_choice != "none" else None
