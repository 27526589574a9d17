"""Answers of a given structure: JSON, JSON of a schema, tool calls that must come. Masks by llguidance.

A grammar is compiled once and kept in a bounded cache; each answer has a state of its own, whose mask is computed in
another thread while the model computes the next token. Structure begins after the reasoning.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from freehold.core.errors import RequestError
from freehold.stages.serve.schema import ChatRequest
from freehold.tokenizer.bpe import Tokenizer
from freehold.tokenizer.output import CALL, CALL_END, THINK, THINK_END, AnswerFormat

GRAMMARS = 64
"""Compiled grammars kept; what clients send must not fill the memory."""
SCHEMA_CHARS = 100_000
MAX_CALLS = 8
"""Tool calls of one answer that must call: without a bound a model can continue for ever."""
# Unbounded white space lets a model that prefers it never end; fixed separators make it write what it was not taught.
WHITE_SPACE = {"whitespace_flexible": True, "whitespace_pattern": r"[ \n\t]{0,8}"}
IGNORED = ("contentEncoding", "contentMediaType", "contentSchema")
"""Keywords the compiler takes for remarks and does not enforce; the others it does not know it refuses itself."""
PLAIN_TEXT = {"type", "title", "description", "default", "examples", "enum", "const", "deprecated"}
"""Keywords of a text argument that hold in the XML dialect, where text stands as it is."""

Grammar = str


class Structures:
    """Compiles what requests ask for, for one tokenizer and one way of calling tools."""

    def __init__(self, tokenizer: Tokenizer, answers: AnswerFormat) -> None:
        self._tokenizer, self._answers = tokenizer, answers
        self._lock = threading.Lock()
        self._compiled: OrderedDict[str, Any] = OrderedDict()
        self._vocabulary: Any = None
        self._masks = ThreadPoolExecutor(1, thread_name_prefix="freehold-masks")

    def of(self, request: ChatRequest) -> Callable[[], Constraint] | None:
        """Return what makes the state of one answer, or None when the answer is free.

        Raises RequestError, naming the keyword, for a schema that cannot be enforced. Takes milliseconds; the first
        time up to a second, so not for the thread that listens.
        """
        grammar = self._grammar(request)
        if grammar is None:
            return None
        matcher = self._compile(grammar, request)
        think = request.reasoning_effort not in ("none", "minimal")

        def constraint() -> Constraint:
            return Constraint(matcher.deep_copy(), self._tokenizer, self._masks, self._answers.thinking, think)

        return constraint

    def _grammar(self, request: ChatRequest) -> Grammar | None:
        tools = request.offered_tools or []
        forced = request.forced_tools
        schema = request.content_schema
        if forced is not None:
            return self._calls(forced, MAX_CALLS if request.parallel_tool_calls in (None, True) else 1)
        if schema is None:
            return None
        _check_schema(schema, "response_format")
        body = f"json: %json {json.dumps(_with_white_space(schema))}\nws: /[ \\n\\t]{{0,8}}/\n"
        if tools:  # the model may call instead of answering
            return f"start: ws json | calls\n{body}{self._calls(tools, MAX_CALLS).replace('start:', 'calls:', 1)}"
        return f"start: ws json\n{body}"

    def _calls(self, tools: Sequence[Mapping[str, Any]], most: int) -> Grammar:
        """Return the grammar of 1 to `most` calls."""
        ids = self._tokenizer.specials
        writer = {"hermes": _hermes, "xml": _xml}[self._answers.dialect]
        rules = ["gap: /[ \\n]{0,2}/", f"start: call (gap call){{0,{most - 1}}}" if most > 1 else "start: call"]
        names = " | ".join(f"call_{number}" for number in range(len(tools)))
        rules.append(f"call: <[{ids[CALL]}]> ({names}) <[{ids[CALL_END]}]>")
        for number, tool in enumerate(tools):
            rules += writer(f"call_{number}", tool["function"], f"tools.{number}")
        rules[0], rules[1] = rules[1], rules[0]
        return "\n".join(rules)

    def _compile(self, grammar: Grammar, request: ChatRequest) -> Any:
        """Return the matcher of a grammar, from the cache when it is there."""
        from llguidance import LLMatcher

        key = hashlib.sha256(grammar.encode()).hexdigest()
        with self._lock:
            if self._vocabulary is None:
                self._vocabulary = _vocabulary(self._tokenizer)
            if key in self._compiled:
                self._compiled.move_to_end(key)
                return self._compiled[key]
        matcher = LLMatcher(self._vocabulary, LLMatcher.grammar_from_lark(grammar), log_level=0)
        if matcher.is_error():
            reason = matcher.get_error().strip().splitlines()[0]
            where = "response_format" if request.forced_tools is None else "tool_choice"
            raise RequestError("this structure cannot be enforced", where=where, found=reason[:300])
        with self._lock:
            self._compiled[key] = matcher
            while len(self._compiled) > GRAMMARS:
                self._compiled.popitem(last=False)
        return matcher


class Constraint:
    """The state of one answer: which tokens may come next. Free while the model thinks."""

    def __init__(
        self, matcher: Any, tokenizer: Tokenizer, pool: ThreadPoolExecutor, thinking: bool, may_think: bool
    ) -> None:
        self._matcher, self._pool = matcher, pool
        self._think, self._think_end = tokenizer.specials[THINK], tokenizer.specials[THINK_END]
        self._stops = [tokenizer.eos, tokenizer.end_of_text]
        # A thought must end before the answer can: neither a stop nor a call may come inside.
        self._not_thoughts = [*self._stops, self._think, tokenizer.specials[CALL]]
        self._thinking, self._may_think = thinking, may_think and not thinking
        self._next: Future[bytes] = pool.submit(matcher.compute_bitmask)

    def mask(self, logits: Tensor) -> None:
        """Set the logits [V] of tokens that may not come next to minus infinity, in place."""
        if self._thinking:
            logits[self._not_thoughts] = -torch.inf
            return
        bits = np.frombuffer(self._next.result(), np.uint8)
        allowed = torch.zeros(len(logits), dtype=torch.bool)
        known = torch.from_numpy(np.unpackbits(bits, bitorder="little"))[: len(logits)].bool()
        allowed[: len(known)] = known
        if self._may_think:
            allowed[self._think] = True
        if not allowed.any():  # the structure is complete, or the grammar met a limit of its own
            allowed[self._stops] = True
        logits.masked_fill_(~allowed.to(logits.device), -torch.inf)

    def took(self, token: int) -> None:
        """Take note of the token that came."""
        if self._thinking:
            self._thinking = token != self._think_end
        elif self._may_think and token == self._think:
            self._thinking = True
        else:
            self._next.result()
            self._matcher.consume_token(token)
            self._next = self._pool.submit(self._matcher.compute_bitmask)
        self._may_think = False


def _vocabulary(tokenizer: Tokenizer) -> Any:
    """Return the tokenizer in llguidance's form; special tokens are no text there."""
    from llguidance import LLTokenizer, TokenizerWrapper

    class Form:
        """The fields that llguidance reads."""

        eos_token_id, bos_token_id = tokenizer.eos, None
        tokens = [tokenizer.token_bytes(number) for number in range(tokenizer.vocab_size)]
        special_token_ids = sorted(tokenizer.specials.values())

        def __call__(self, text: bytes | str) -> list[int]:
            """Return the ids of a text."""
            return tokenizer.encode(text.decode() if isinstance(text, bytes) else text)

    return LLTokenizer(
        TokenizerWrapper(Form()), n_vocab=tokenizer.vocab_size, eos_token=[tokenizer.eos, tokenizer.end_of_text]
    )


def _hermes(rule: str, function: Mapping[str, Any], where: str) -> Iterator[str]:
    schema = _parameters(function, where)
    begin = f'{{"name": {json.dumps(function["name"], ensure_ascii=False)}, "arguments": '
    yield f"{rule}: /\\n?/ {_quoted(begin)} {rule}_arguments {_quoted('}')} /\\n?/"
    yield f"{rule}_arguments: %json {json.dumps(_with_white_space(schema))}"


def _xml(rule: str, function: Mapping[str, Any], where: str) -> Iterator[str]:
    schema = _parameters(function, where)
    properties, required = schema.get("properties") or {}, schema.get("required") or ()
    shared = {name: schema[name] for name in ("$defs", "definitions") if name in schema}
    parts = [_quoted(f"\n<function={function['name']}>\n")]
    for number, (name, kind) in enumerate(properties.items()):
        value = f"{rule}_value_{number}"
        begin, end = _quoted(f"<parameter={name}>\n"), "\n</parameter>\n"
        text = isinstance(kind, dict) and kind.get("type") == "string"
        parts.append(f"({begin} {value}{'' if text else ' ' + _quoted(end)}){'' if name in required else '?'}")
        if not text:
            yield f"{value}: %json {json.dumps(_with_white_space(kind | shared))}"
            continue
        beyond = sorted(set(kind) - PLAIN_TEXT)
        if beyond:
            raise RequestError(
                "this keyword cannot be enforced for text in XML calls", where=f"{where}.{name}", found=beyond[0]
            )
        choices = kind.get("enum") or ([kind["const"]] if "const" in kind else [])
        if choices:
            yield f"{value}: ({' | '.join(_quoted(str(choice)) for choice in choices)}) {_quoted(end)}"
        else:
            yield f"{value}[suffix={_quoted(end)}]: /(?s:.*)/"
    yield f"{rule}: {' '.join(parts)} {_quoted('</function>' + chr(10))}"


def _parameters(function: Mapping[str, Any], where: str) -> dict[str, Any]:
    schema = function.get("parameters") or {}
    if not isinstance(schema, dict):
        raise RequestError("the parameters of a tool are no schema", where=where, found=type(schema).__name__)
    _check_schema(schema, where)
    return {"type": "object"} | schema


def _check_schema(schema: Any, where: str) -> None:
    """Refuse what is too long, no schema, or holds a keyword that would be ignored."""
    if not isinstance(schema, dict):
        raise RequestError("a schema is an object", where=where, found=type(schema).__name__)
    if len(json.dumps(schema)) > SCHEMA_CHARS:
        raise RequestError("the schema is too long", where=where, expected=f"at most {SCHEMA_CHARS} characters")
    for name in _keywords(schema):
        if name in IGNORED:
            raise RequestError(f"the keyword {name} is not supported", where=where, found=name)


def _keywords(schema: Any) -> Iterator[str]:
    """Yield the keywords of a schema and of those inside; names of properties and values are none."""
    if isinstance(schema, list):
        for item in schema:
            yield from _keywords(item)
    if not isinstance(schema, dict):
        return
    for name, value in schema.items():
        yield name
        if name in ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas"):
            yield from _keywords(list(value.values()) if isinstance(value, dict) else [])
        elif name not in ("const", "enum", "default", "examples", "required"):
            yield from _keywords(value)


def _with_white_space(schema: Any) -> Any:
    return {**schema, "x-guidance": WHITE_SPACE} if isinstance(schema, dict) else schema


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
