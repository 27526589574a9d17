"""`/v1/responses` as OpenAI's client reads it, embeddings, and the page at `/`."""

from __future__ import annotations

import base64
import hashlib
import json
import re

import httpx
import openai
import pytest
from serving import HELLO, MODEL, Running, Script

from freehold import api
from freehold.stages.serve.app import create_app
from freehold.stages.serve.backends import Served
from freehold.stages.serve.config import ServeConfig
from freehold.stages.serve.responses import ResponsesRequest

TOOL = {"type": "function", "name": "add", "parameters": {"type": "object", "properties": {}}, "strict": False}
SAID = (
    "<think>\nAdd them.\n</think>\n\nSure.\n"
    '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
    '<tool_call>\n{"name": "add", "arguments": {"a": 2}}\n</tool_call>'
)


@pytest.fixture(scope="module")
def server(tiny_tokenizer, tmp_path_factory):
    backend = Script(tiny_tokenizer)
    sampling = api.default_sampling(tmp_path_factory.mktemp("no"), tiny_tokenizer)
    with Running(create_app(Served(MODEL, backend, tiny_tokenizer, sampling), ServeConfig())) as running:
        running.client = openai.OpenAI(base_url=running.address + "/v1", api_key="none", max_retries=0)
        running.backend = backend
        yield running


def test_response_has_reasoning_text_and_calls(server):
    server.backend.text, server.backend.reason = SAID, "stop"
    answer = server.client.responses.create(model=MODEL, input="1 + 1?", tools=[TOOL], instructions="Be brief.")
    assert [item.type for item in answer.output] == ["reasoning", "message", "function_call", "function_call"]
    assert answer.output[0].content[0].text == "Add them."
    assert answer.output_text == "Sure."
    assert [(item.name, item.arguments) for item in answer.output[2:]] == [("add", '{"a": 1}'), ("add", '{"a": 2}')]
    assert answer.status == "completed"
    assert answer.usage.output_tokens == len(server.backend.tokenizer.encode(SAID, specials=True)) + 1
    assert 0 < answer.usage.output_tokens_details.reasoning_tokens < answer.usage.output_tokens


@pytest.mark.parametrize("reason", ["stop", "length"])
def test_streamed_response_is_the_same(server, reason):
    server.backend.text, server.backend.reason = SAID.replace("Sure", "Sure, as é€😀 says"), reason
    options = {"model": MODEL, "input": [{"role": "user", "content": "?"}], "tools": [TOOL]}
    expected = server.client.responses.create(**options)
    with server.client.responses.stream(**options) as stream:
        events = list(stream)
    final = events[-1].response
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert events[-1].type == ("response.completed" if reason == "stop" else "response.incomplete")
    assert final.status == expected.status

    def plain(item):
        found = {name: value for name, value in item.to_dict().items() if name not in ("id", "call_id")}
        found.pop("parsed_arguments", None)  # what OpenAI's client adds
        for part in found.get("content", ()):
            part.pop("parsed", None)
        return found

    assert [plain(item) for item in final.output] == [plain(item) for item in expected.output]
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(deltas) == expected.output_text
    assert len(deltas) > 3


def test_conversation_of_items_is_the_chat_it_means(server):
    items = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "input_text", "text": "1 + "}, {"type": "input_text", "text": "1?"}]},
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "Add."}]},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Sure."}]},
        {"type": "function_call", "call_id": "c", "name": "add", "arguments": '{"a": 1}'},
        {"type": "function_call", "call_id": "d", "name": "add", "arguments": ""},
        {"type": "function_call_output", "call_id": "c", "output": "2"},
        {"role": "user", "content": "Thanks."},
    ]
    chat = ResponsesRequest(model=MODEL, input=items, instructions="Help.").as_chat()
    messages = [message.plain(0) for message in chat.messages]
    call = {"type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    assert messages == [
        {"role": "system", "content": "Help."},
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "1 + 1?"},
        {
            "role": "assistant",
            "content": "Sure.",
            "tool_calls": [call, {"type": "function", "function": {"name": "add", "arguments": ""}}],
            "reasoning_content": "Add.",
        },
        {"role": "tool", "content": "2"},
        {"role": "user", "content": "Thanks."},
    ]
    server.backend.text, server.backend.reason = "Fine.", "stop"
    assert server.client.responses.create(model=MODEL, input=items).output_text == "Fine."


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"background": True}, "background"),
        ({"truncation": "auto"}, "truncation"),
        ({"tools": [{"type": "web_search"}]}, "tools.0"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input.0"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input.0"),
        ({"input": []}, "input"),
        ({"wisdom": 1}, "wisdom"),
    ],
)
def test_what_needs_more_than_this_is_refused(server, body, param):
    answer = httpx.post(server.address + "/v1/responses", json={"model": MODEL, "input": "a"} | body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


def test_embeddings_are_refused_with_the_reason(server):
    with pytest.raises(openai.NotFoundError, match="trained to write, not to embed"):
        server.client.embeddings.create(model=MODEL, input="a")


class TestPage:
    def test_only_its_own_script_and_style_may_run(self, server):
        answer = httpx.get(server.address + "/")
        policy = answer.headers["content-security-policy"]
        assert answer.headers["content-type"].startswith("text/html")
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        for tag in ("script", "style"):
            (source,) = re.findall(rf"<{tag}>(.*?)</{tag}>", answer.text, re.DOTALL)
            digest = base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()
            assert f"{tag}-src 'sha256-{digest}'" in policy

    def test_nothing_comes_from_elsewhere_or_becomes_markup(self, server):
        text = httpx.get(server.address + "/").text
        assert not re.findall(r"https?:|//[a-z]|@import|\bsrc=|url\(", text)
        assert not re.findall(
            r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|new Function|style=|onclick", text
        )

    def test_it_asks_what_the_server_answers(self, server):
        """The request the page makes, and the fields its script reads."""
        server.backend.text, server.backend.reason = "<think>\nhm\n</think>\n\nHello.", "stop"
        body = {"model": MODEL, "messages": HELLO, "stream": True, "stream_options": {"include_usage": True}}
        answer = httpx.post(server.address + "/v1/chat/completions", json=body)
        chunks = [json.loads(x.removeprefix("data: ")) for x in answer.text.split("\n\n")[:-2]]
        deltas = [chunk["choices"][0]["delta"] for chunk in chunks if chunk["choices"]]
        assert "".join(delta.get("reasoning_content", "") for delta in deltas) == "hm"
        assert "".join(delta.get("content", "") for delta in deltas) == "Hello."
        assert chunks[-1]["usage"]["completion_tokens"] > 1
        assert {"id", "max_model_len", "default_sampling"} <= set(
            httpx.get(server.address + "/v1/models").json()["data"][0]
        )
