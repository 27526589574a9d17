"""Requests that other servers were reported to answer wrongly."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import httpx
import openai
import pytest
from serving import HELLO, MODEL, Running, Script

from freehold import api
from freehold.core.errors import CheckpointError
from freehold.stages.serve.answers import TextLogprobs
from freehold.stages.serve.app import create_app
from freehold.stages.serve.backends import Served, open_model
from freehold.stages.serve.config import ServeConfig
from freehold.tokenizer.output import AnswerFormat

GREEDY = {"model": MODEL, "messages": HELLO, "temperature": 0, "max_tokens": 12}


@pytest.fixture(scope="module")
def ask(tiny_checkpoint):
    loaded = api.load(tiny_checkpoint)
    app = create_app(Served(MODEL, loaded.engine, loaded.tokenizer, loaded.sampling), ServeConfig())
    with Running(app) as server:

        def post(path, **body):
            return httpx.post(server.address + path, json=body, timeout=60)

        post.loaded, post.address = loaded, server.address
        yield post


def content(answer):
    return answer.json()["choices"][0]["message"]["content"]


def streamed_tokens(answer, field):
    chunks = [json.loads(x.removeprefix("data: ")) for x in answer.text.split("\n\n")[:-2]]
    blocks = [chunk["choices"][0]["logprobs"] for chunk in chunks if chunk["choices"]]
    return [entry for block in blocks if block for entry in block[field]]


@pytest.mark.parametrize("at", [0, 3, 6])
@pytest.mark.parametrize("width", [1, 3])
def test_no_logprob_without_text(ask, at, width):
    """A token that straddles a stop string stays, one behind it does not; streamed or not."""
    said = content(ask("/v1/chat/completions", **GREEDY))
    stop = said[at : at + width]
    body = GREEDY | {"stop": stop, "logprobs": True}
    choice = ask("/v1/chat/completions", **body).json()["choices"][0]
    entries, text = choice["logprobs"]["content"], choice["message"]["content"]
    assert choice["finish_reason"] == "stop"
    assert text == said[: said.index(stop)]
    before = b"".join(bytes(entry["bytes"]) for entry in entries[:-1]).decode(errors="replace").rstrip("\ufffd")
    assert text.startswith(before)
    assert len(before) < len(text) or not entries
    assert streamed_tokens(ask("/v1/chat/completions", **body, stream=True), "content") == entries
    body = {"model": MODEL, "prompt": "The capital", "max_tokens": 12, "temperature": 0, "logprobs": 0}
    said = ask("/v1/completions", **body).json()["choices"][0]["text"]
    choice = ask("/v1/completions", **body, stop=said[at : at + width]).json()["choices"][0]
    block = choice["logprobs"]
    assert all(offset < len(choice["text"]) for offset in block["text_offset"])
    streamed = ask("/v1/completions", **body, stop=said[at : at + width], stream=True)
    assert streamed_tokens(streamed, "text_offset") == block["text_offset"]


def test_offsets_count_characters(tiny_tokenizer):
    table = TextLogprobs(tiny_tokenizer, 0)
    ids = tiny_tokenizer.encode("é€😀 The<|im_end|>x", specials=True)
    block = table.block(ids, [0.0] * len(ids), [[]] * len(ids))
    expected = []
    for number in range(len(ids)):
        expected.append(len(tiny_tokenizer.decode_bytes(ids[:number]).decode(errors="ignore")))
    assert block["text_offset"] == expected
    assert len(ids) > len("é€😀") + 3  # characters in several tokens


@pytest.mark.parametrize("temperature", [1e-3, 1e-39, 1e-46, 5e-324])
def test_any_small_temperature_is_greedy(ask, temperature):
    greedy = content(ask("/v1/chat/completions", **GREEDY))
    for more in ({}, {"top_p": 5e-324}, {"min_p": 5e-324}, {"seed": 2**200, "presence_penalty": 5e-324}):
        answer = ask("/v1/chat/completions", **GREEDY | {"temperature": temperature, "seed": 1} | more)
        assert (answer.status_code, content(answer)) == (200, greedy)


@pytest.mark.parametrize("prompt", ["", [""], ["a", ""], [[]], [[1], []], None])
def test_empty_prompt_begins_a_document(ask, prompt):
    body = {"model": MODEL, "max_tokens": 6, "temperature": 0}
    answers = ask("/v1/completions", **body, **({} if prompt is None else {"prompt": prompt}))
    assert answers.status_code == 200
    begun = ask("/v1/completions", **body, prompt=[[ask.loaded.tokenizer.bos]]).json()["choices"][0]["text"]
    assert answers.json()["choices"][-1]["text"] == begun == ask.loaded.complete("", max_tokens=6)


def test_call_without_arguments_in_the_history(ask):
    tool = {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}}
    found = []
    for arguments in ("{}", "", "  ", "\n"):
        call = {"id": "1", "type": "function", "function": {"name": "now", "arguments": arguments}}
        history = [*HELLO, {"role": "assistant", "content": None, "tool_calls": [call]}]
        history.append({"role": "tool", "tool_call_id": "1", "content": "10:00"})
        found.append(ask("/v1/chat/completions", **GREEDY | {"messages": history, "tools": [tool]}))
    assert [answer.status_code for answer in found] == [200] * 4
    assert len({content(answer) for answer in found[:2]}) == 1


def test_models_own_sampling_is_the_default(tiny_checkpoint, tmp_path, tiny_tokenizer):
    assert api.load(tiny_checkpoint).sampling.temperature == api.DEFAULT["temperature"]
    path = tmp_path / "generation_config.json"
    path.write_text(json.dumps({"temperature": 0.2, "top_k": 7, "top_p": None, "eos_token_id": [3, 1]}))
    found = api.default_sampling(tmp_path, tiny_tokenizer)
    assert (found.temperature, found.top_k, found.top_p, found.stop_ids) == (0.2, 7, 1.0, (3, 1))
    path.write_text(json.dumps({"do_sample": False, "temperature": 0.6}))
    assert api.default_sampling(tmp_path, tiny_tokenizer).greedy
    for text in ("[1]", "{", '{"temperature": 9}', '{"top_k": "many"}', "[" * 100_000):
        path.write_text(text)
        with pytest.raises(CheckpointError, match="not a generation config"):
            api.default_sampling(tmp_path, tiny_tokenizer)


def test_models_say_what_computes(ask):
    assert ask.loaded.engine.describe() in httpx.get(ask.address + "/v1/models").json()["data"][0]["engine"]


def test_request_without_sampling_uses_the_models(ask):
    model = ask.loaded
    ids = model.prompt_ids(HELLO)
    sampling = dataclasses.replace(model.sampling, seed=5, max_tokens=12)
    expected = model.engine.generate([ids], sampling)[0]
    body = {"model": MODEL, "messages": HELLO, "seed": 5, "max_tokens": 12, "logprobs": True}
    found = ask("/v1/chat/completions", **body).json()["choices"][0]["logprobs"]["content"]
    assert [entry["logprob"] for entry in found] == pytest.approx(expected.logprobs[: len(found)], abs=1e-4)


@pytest.mark.parametrize("stream", [False, True])
def test_tool_calls_in_xml_are_openais(tiny_tokenizer, stream):
    """What Trinity Large Thinking writes, as any client reads it: typed arguments, in deltas when streamed."""
    backend = Script(tiny_tokenizer)
    backend.text = (
        "<think>\nhm\n</think>\n\nSure.\n<tool_call>\n<function=plan>\n<parameter=city>\nZü\nrich\n</parameter>\n"
        "<parameter=days>\n3\n</parameter>\n</function>\n</tool_call>\n<tool_call>\n<function=now>\n</function>\n"
        "</tool_call>"
    )
    properties = {"city": {"type": "string"}, "days": {"type": "integer"}}
    tools = [
        {"type": "function", "function": {"name": "plan", "parameters": {"properties": properties}}},
        {"type": "function", "function": {"name": "now"}},
    ]
    sampling = api.default_sampling(Path("nowhere"), tiny_tokenizer)
    served = Served(MODEL, backend, tiny_tokenizer, sampling, AnswerFormat("xml"))
    with Running(create_app(served, ServeConfig())) as running:
        client = openai.OpenAI(base_url=running.address + "/v1", api_key="none", max_retries=0)
        options = {"model": MODEL, "messages": HELLO, "tools": tools}
        if not stream:
            choice = client.chat.completions.create(**options).choices[0]
            found = [(call.function.name, call.function.arguments) for call in choice.message.tool_calls]
            text, reason = (choice.message.reasoning, choice.message.content), choice.finish_reason
        else:
            with client.beta.chat.completions.stream(**options) as events:
                choice = events.get_final_completion().choices[0]
            found = [(call.function.name, call.function.arguments) for call in choice.message.tool_calls]
            text, reason = (choice.message.reasoning_content, choice.message.content), choice.finish_reason
    assert found == [("plan", '{"city": "Zü\\nrich", "days": 3}'), ("now", "{}")]
    assert (text, reason) == (("hm", "Sure."), "tool_calls")


def test_another_dialect_than_recorded_is_said(tiny_checkpoint, capsys):
    served = open_model(ServeConfig(dialect="xml", calls_in_reasoning=False), tiny_checkpoint)
    assert served.answers == AnswerFormat("xml", calls_in_reasoning=False)
    assert "records hermes" in capsys.readouterr().err
