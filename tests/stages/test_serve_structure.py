"""Answers of a given structure: JSON, schemas, tool calls that must come; every one is valid for `jsonschema` too."""

from __future__ import annotations

import concurrent.futures
import json
import time

import httpx
import jsonschema
import pytest
import torch
from serving import HELLO, MODEL, Running

from freehold import api
from freehold.core.errors import RequestError
from freehold.stages.serve import structure
from freehold.stages.serve.app import create_app
from freehold.stages.serve.backends import Served
from freehold.stages.serve.config import ServeConfig
from freehold.stages.serve.schema import ChatRequest
from freehold.tokenizer.output import AnswerFormat

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3},
        "pet": {"anyOf": [{"$ref": "#/$defs/pet"}, {"type": "null"}]},
    },
    "required": ["name", "age", "tags", "pet"],
    "additionalProperties": False,
    "$defs": {"pet": {"type": "object", "properties": {"x": {"type": "boolean"}}, "required": ["x"],
                      "additionalProperties": False}},
}  # fmt: skip
PLAN = {
    "properties": {
        "kind": {"type": "string", "enum": ["a<b", 'c"d']},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "deep": {"$ref": "#/$defs/deep"},
        "sure": {"type": "boolean"},
    },
    "required": ["kind", "age", "deep"],
    "additionalProperties": False,
    "$defs": {"deep": {"type": "array", "items": {"type": "boolean"}, "maxItems": 2}},
}
TOOLS = [
    {"type": "function", "function": {"name": "plan", "parameters": PLAN}},
    {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "additionalProperties": False}}},
]


class Asker:
    """A server over random weights, in one dialect."""

    def __init__(self, loaded, dialect):
        self.loaded, self.dialect = loaded, dialect
        parts = (loaded.engine, loaded.tokenizer, loaded.sampling, AnswerFormat(dialect))
        self.running = Running(create_app(Served(MODEL, *parts, running=4), ServeConfig()))

    def __call__(self, **body):
        base = {"model": MODEL, "messages": HELLO, "max_tokens": 400, "reasoning_effort": "none", "temperature": 1.0}
        return httpx.post(self.running.address + "/v1/chat/completions", json=base | body, timeout=60)


@pytest.fixture(scope="module")
def loaded(tiny_checkpoint):
    return api.load(tiny_checkpoint)


@pytest.fixture(scope="module")
def ask(loaded):
    asker = Asker(loaded, "hermes")
    with asker.running:
        yield asker


@pytest.fixture(scope="module")
def ask_xml(loaded):
    asker = Asker(loaded, "xml")
    with asker.running:
        yield asker


def schema_format(schema):
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}


@pytest.mark.parametrize("seed", range(2))
def test_content_follows_the_schema(ask, seed):
    """From a model of random weights, which writes anything else when it may."""
    choice = ask(response_format=schema_format(PERSON), seed=seed).json()["choices"][0]
    assert choice["finish_reason"] == "stop"
    jsonschema.validate(json.loads(choice["message"]["content"]), PERSON)


def test_streamed_content_is_the_same(ask):
    body = {"response_format": schema_format(PERSON), "seed": 1}
    content = ask(**body).json()["choices"][0]["message"]["content"]
    events = [json.loads(x[6:]) for x in ask(**body, stream=True).text.split("\n\n")[:-2]]
    assert "".join(e["choices"][0]["delta"].get("content") or "" for e in events) == content


def test_every_choice_is_an_object(ask):
    schema = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}
    choices = ask(response_format={"type": "json_object"}, n=2, seed=3, max_tokens=60).json()["choices"]
    for choice in choices:
        if choice["finish_reason"] == "stop":
            assert isinstance(json.loads(choice["message"]["content"]), dict)
    bounded = ask(response_format=schema_format(schema | {"additionalProperties": False}), n=2, temperature=2.0)
    for choice in bounded.json()["choices"]:
        jsonschema.validate(json.loads(choice["message"]["content"]), schema)


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "plan"}}])
@pytest.mark.parametrize("dialect", ["hermes", "xml"])
def test_tools_that_must_be_called_are(ask, ask_xml, choice, dialect):
    ask = {"hermes": ask, "xml": ask_xml}[dialect]
    body = {"tools": TOOLS, "tool_choice": choice, "seed": 1, "parallel_tool_calls": False, "max_tokens": 200}
    answer = ask(**body).json()["choices"][0]
    assert answer["finish_reason"] == "tool_calls"
    assert answer["message"]["content"] is None
    (call,) = answer["message"]["tool_calls"]
    arguments = json.loads(call["function"]["arguments"])
    schemas = {tool["function"]["name"]: tool["function"]["parameters"] for tool in TOOLS}
    jsonschema.validate(arguments, schemas[call["function"]["name"]])
    if choice != "required":
        assert call["function"]["name"] == "plan"


def test_reasoning_comes_before_the_structure(ask):
    """The model may think first: freely, and then it must answer as asked."""
    think, end = ask.loaded.tokenizer.specials["<think>"], ask.loaded.tokenizer.specials["</think>"]
    schema = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"],
              "additionalProperties": False}  # fmt: skip
    bias = {str(think): 100, str(end): 9}
    body = {"response_format": schema_format(schema), "logit_bias": bias, "reasoning_effort": None, "seed": 2}
    message = ask(**body).json()["choices"][0]["message"]
    jsonschema.validate(json.loads(message["content"]), schema)
    cut = ask(**body | {"logit_bias": {str(think): 100}, "max_tokens": 6}).json()["choices"][0]
    assert (cut["finish_reason"], cut["message"]["content"]) == ("length", "")


def test_white_space_is_bounded(ask):
    """A model that prefers blanks must end them."""
    blanks = {str(i): 100 for i in range(ask.loaded.tokenizer.vocab_size)
              if ask.loaded.tokenizer.token_bytes(i).isspace()}  # fmt: skip
    schema = {"type": "object", "properties": {"a": {"const": 1}}, "required": ["a"], "additionalProperties": False}
    choice = ask(response_format=schema_format(schema), logit_bias=blanks).json()["choices"][0]
    assert json.loads(choice["message"]["content"]) == {"a": 1}
    assert len(choice["message"]["content"]) < 60


UNSUPPORTED = {
    "not": {"type": "string"}, "uniqueItems": True, "propertyNames": {"maxLength": 2},
    "dependentRequired": {"a": ["b"]}, "dependentSchemas": {"a": {}}, "if": {"type": "string"},
    "contains": {"type": "string"}, "minContains": 1,
    "unevaluatedProperties": False, "unevaluatedItems": False, "$dynamicRef": "#a", "contentEncoding": "base64",
    "contentMediaType": "text/html", "format": "no-such-format", "dependencies": {"a": ["b"]}, "$ref": "http://a/b",
}  # fmt: skip


@pytest.mark.parametrize("keyword", UNSUPPORTED)
def test_keyword_that_cannot_be_enforced_is_named(ask, keyword):
    schema = {"type": "object", "properties": {"a": {"anyOf": [{keyword: UNSUPPORTED[keyword]}]}}}
    answer = ask(response_format=schema_format(schema))
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, "response_format")
    assert (str(UNSUPPORTED[keyword]) if keyword in ("format", "$ref") else keyword) in error["message"]


VIOLATED = {
    "minItems": ({"type": "array", "minItems": 2}, "[1]"),
    "maxItems": ({"type": "array", "maxItems": 1}, "[1,2]"),
    "prefixItems": ({"type": "array", "prefixItems": [{"type": "string"}]}, "[1]"),
    "items": ({"type": "array", "items": {"type": "string"}}, "[1]"),
    "pattern": ({"type": "string", "pattern": "^a+$"}, '"b"'),
    "minLength": ({"minLength": 2}, '"a"'),
    "maxLength": ({"type": "string", "maxLength": 1}, '"ab"'),
    "format": ({"type": "string", "format": "date"}, '"x"'),
    "multipleOf": ({"type": "integer", "multipleOf": 3}, "4"),
    "minimum": ({"type": "integer", "minimum": 5}, "4"),
    "maximum": ({"type": "number", "maximum": 5}, "5.5"),
    "exclusiveMinimum": ({"type": "integer", "exclusiveMinimum": 5}, "5"),
    "exclusiveMaximum": ({"type": "number", "exclusiveMaximum": 5}, "5"),
    "minProperties": ({"type": "object", "minProperties": 1}, "{}"),
    "maxProperties": ({"type": "object", "maxProperties": 1}, '{"a":1,"b":2}'),
    "patternProperties": ({"type": "object", "patternProperties": {"^a": {"type": "string"}}}, '{"ab":1}'),
    "required": ({"type": "object", "required": ["a"]}, "{}"),
    "additionalProperties": ({"type": "object", "additionalProperties": False}, '{"b":1}'),
    "allOf": ({"allOf": [{"type": "string"}, {"minLength": 3}]}, '"a"'),
    "anyOf": ({"anyOf": [{"type": "string"}]}, "1"),
    "oneOf": ({"oneOf": [{"type": "integer"}, {"type": "string"}]}, "true"),
    "const": ({"const": 3}, "4"),
    "enum": ({"enum": [1, 2]}, "3"),
    "$ref": ({"$ref": "#/$defs/a", "$defs": {"a": {"type": "string"}}}, "1"),
    "type": ({"type": ["string", "null"]}, "1"),
}


@pytest.fixture(scope="module")
def compiler(tiny_tokenizer):
    return structure.Structures(tiny_tokenizer, AnswerFormat())


def allows(compiler, tokenizer, schema, text) -> bool:
    """Whether a text may be written, token by token, and end."""
    request = ChatRequest(model=MODEL, messages=HELLO, response_format=schema_format(schema), reasoning_effort="none")
    return writes(compiler.of(request), tokenizer, text)


def writes(constraint, tokenizer, text) -> bool:
    """Whether a constraint lets a text be written, tags as tokens, and end."""
    state = constraint()
    for token in [*tokenizer.encode(text, specials=True), tokenizer.eos]:
        logits = torch.zeros(tokenizer.vocab_size)
        state.mask(logits)
        if logits[token] < 0:
            return False
        state.took(token)
    return True


@pytest.mark.parametrize("keyword", VIOLATED)
def test_keyword_is_enforced(compiler, tiny_tokenizer, keyword):
    schema, wrong = VIOLATED[keyword]
    assert not allows(compiler, tiny_tokenizer, schema, wrong)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.Draft202012Validator(schema, format_checker=jsonschema.FormatChecker()).validate(json.loads(wrong))


def test_all_usual_spacings_are_allowed(compiler, tiny_tokenizer):
    schema = {"type": "object", "properties": {"a": {"type": "array", "items": {"type": "integer"}}}}
    value = {"a": [1, 2]}
    for text in (
        json.dumps(value, separators=(",", ":")),
        json.dumps(value),
        json.dumps(value, indent=2),
        '\n\n{"a":[]}',
    ):
        assert allows(compiler, tiny_tokenizer, schema, text), text
    assert not allows(compiler, tiny_tokenizer, schema, '{"a":' + 9 * " " + "[]}")


def test_grammars_are_kept_within_bounds(compiler, tiny_tokenizer, monkeypatch):
    monkeypatch.setattr(structure, "GRAMMARS", 4)
    for number in range(9):
        assert allows(compiler, tiny_tokenizer, {"const": number}, str(number))
    assert len(compiler._compiled) <= 4


def nested(depth):
    schema = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    return schema


HOSTILE = [
    {"type": "string", "pattern": "^(a+)+$"},
    {"type": "string", "pattern": "(x{1,1000}){1,1000}"},
    {"type": "string", "minLength": 10_000_000},
    {"type": "array", "items": {"type": "string"}, "minItems": 1_000_000},
    {"type": "array", "minItems": 9, "maxItems": 3},
    {"$ref": "#"},
    {"anyOf": [{"$ref": "#"}, {"$ref": "#"}]},
    {"allOf": [{"type": "string"}, {"type": "integer"}]},
    nested(200),
    {"enum": [str(n) * 20 for n in range(4000)]},
    {"type": "object", "properties": {f"k{n}": {"type": "string", "pattern": f"(a|b){{{n}}}"} for n in range(200)}},
    {"type": "object", "patternProperties": {f"^.*a{n}.*$": {"type": "integer"} for n in range(60)}},
]


def test_hostile_schemas_disturb_no_other_answer(ask):
    def other():
        return ask(max_tokens=60, temperature=0).json()["choices"][0]["message"]["content"]

    expected = other()
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        other_answer = pool.submit(other)
        for schema in HOSTILE:
            began = time.monotonic()
            answer = ask(response_format=schema_format(schema), max_tokens=12)
            assert answer.status_code in (200, 400), schema
            assert time.monotonic() - began < 20, schema
        assert other_answer.result() == expected


def test_text_in_xml_calls_stands_as_it_is(tiny_tokenizer):
    def compiled(**kind):
        parameters = {"properties": {"a": {"type": "string"} | kind}, "required": ["a"]}
        tools = [{"type": "function", "function": {"name": "f", "parameters": parameters}}]
        request = ChatRequest(model=MODEL, messages=HELLO, tools=tools, tool_choice="required", reasoning_effort="none")
        return structure.Structures(tiny_tokenizer, AnswerFormat("xml")).of(request)

    with pytest.raises(RequestError, match="cannot be enforced for text in XML calls"):
        compiled(pattern="a")
    call = "<tool_call>\n<function=f>\n<parameter=a>\nx\n<b> 1\n</parameter>\n</function>\n</tool_call>"
    assert writes(compiled(), tiny_tokenizer, call)
    assert not writes(compiled(), tiny_tokenizer, call.replace("=a", "=c"))
