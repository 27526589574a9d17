"""The server, asked by the official OpenAI client over a real socket."""

from __future__ import annotations

import asyncio
import json
import threading
from pathlib import Path

import httpx
import openai
import pytest
from serving import HELLO, JSON, MODEL, Running, Script, wait_for

from freehold import api
from freehold.core.errors import ArtifactError
from freehold.infer.sampler import Sampling
from freehold.stages.serve.app import create_app
from freehold.stages.serve.backends import Served
from freehold.stages.serve.config import ServeConfig
from freehold.stages.serve.worker import Worker
from freehold.tokenizer.chat import render_ids


@pytest.fixture(scope="module")
def loaded(tiny_checkpoint):
    return api.load(tiny_checkpoint)


@pytest.fixture(scope="module")
def server(loaded):
    with Running(create_app(Served(MODEL, loaded.engine, loaded.tokenizer, loaded.sampling), ServeConfig())) as running:
        yield running


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=server.address + "/v1", api_key="none", max_retries=0)


def greedy(loaded, messages, max_tokens):
    ids, _ = render_ids(loaded.tokenizer, messages, generation=True)
    return ids, loaded.engine.generate([ids], Sampling(temperature=0, max_tokens=max_tokens, stop_ids=loaded.stop_ids))[
        0
    ]


def test_chat_equals_the_engine(client, loaded):
    answer = client.chat.completions.create(model=MODEL, messages=HELLO, temperature=0, max_tokens=12)
    ids, expected = greedy(loaded, HELLO, 12)
    assert answer.object == "chat.completion"
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content == loaded.generate(HELLO, max_tokens=12)
    assert answer.choices[0].finish_reason == expected.finish_reason
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(ids), len(expected.ids))
    assert answer.usage.total_tokens == len(ids) + len(expected.ids)


def test_a_stream_says_the_same(client):
    options = {"model": MODEL, "messages": HELLO, "temperature": 0, "max_tokens": 12}
    whole = client.chat.completions.create(**options)
    chunks = list(client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks[:-1]) == whole.choices[0].message.content
    reasons = [c.choices[0].finish_reason for c in chunks[:-1]]
    assert reasons == [None] * (len(reasons) - 1) + [whole.choices[0].finish_reason]
    assert all(c.choices[0].delta.role is None for c in chunks[1:-1])
    assert (chunks[-1].choices, chunks[-1].usage) == ([], whole.usage)
    assert len({c.id for c in chunks}) == 1


def test_the_stream_ends_with_done(server):
    body = {"model": MODEL, "messages": HELLO, "max_tokens": 3, "stream": True}
    answer = httpx.post(server.address + "/v1/chat/completions", json=body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = answer.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert all("usage" not in json.loads(e.removeprefix("data: ")) for e in events[:-2])


def test_seeds_repeat_choices_differ(client):
    options = {"model": MODEL, "messages": HELLO, "max_tokens": 16, "n": 3, "temperature": 1.5}
    first = [c.message.content for c in client.chat.completions.create(**options, seed=7).choices]
    again = [c.message.content for c in client.chat.completions.create(**options, seed=7).choices]
    other = [c.message.content for c in client.chat.completions.create(**options, seed=70).choices]
    assert first == again
    assert len(set(first)) == 3
    assert first != other
    streamed = ["", "", ""]
    for chunk in client.chat.completions.create(**options, seed=7, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert streamed == first


def test_conversation_with_history(client):
    first = client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=8, temperature=0)
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "The capital "}, {"type": "text", "text": "of France?"}]},
        first.choices[0].message,
        {"role": "user", "content": "And of Peru?"},
    ]
    second = client.chat.completions.create(model=MODEL, messages=messages, max_tokens=8, temperature=0)
    assert second.usage.prompt_tokens > first.usage.prompt_tokens


def test_top_k_and_min_p_reach_the_sampler(client):
    options = {"model": MODEL, "messages": HELLO, "max_tokens": 10, "temperature": 2}
    best = client.chat.completions.create(**options | {"temperature": 0}).choices[0].message.content
    for extra in ({"top_k": 1}, {"min_p": 1.0}):
        assert client.chat.completions.create(**options, extra_body=extra).choices[0].message.content == best
    assert client.chat.completions.create(**options, top_p=1e-9).choices[0].message.content == best
    biased = client.chat.completions.create(**options, logit_bias={"97": 100}).choices[0].message
    assert len(set(biased.content)) == 1


def test_chat_logprobs(client, loaded):
    options = {"model": MODEL, "messages": HELLO, "max_tokens": 6, "temperature": 0, "logprobs": True}
    answer = client.chat.completions.create(**options, top_logprobs=3)
    _, expected = greedy(loaded, HELLO, 6)
    content = answer.choices[0].logprobs.content
    assert [c.logprob for c in content] == pytest.approx(expected.logprobs[: len(content)], abs=1e-4)
    assert all(len(c.top_logprobs) == 3 and c.top_logprobs[0].logprob == c.logprob for c in content)
    assert b"".join(bytes(c.bytes) for c in content) == loaded.tokenizer.decode_bytes(
        expected.ids[: len(content)], skip_specials=False
    )
    streamed = [
        entry
        for chunk in client.chat.completions.create(**options, top_logprobs=3, stream=True)
        if chunk.choices[0].logprobs
        for entry in chunk.choices[0].logprobs.content
    ]
    assert streamed == content


def test_stop_strings_end_the_answer_and_are_not_in_it(client):
    options = {"model": MODEL, "prompt": "The capital", "max_tokens": 30, "temperature": 0}
    whole = client.completions.create(**options).choices[0].text
    assert len(whole) > 8
    for at, width in ((3, 1), (4, 3), (0, 2)):
        stop = whole[at : at + width]
        cut = client.completions.create(**options, stop=[stop, "\u0000never"])
        assert (cut.choices[0].text, cut.choices[0].finish_reason) == (whole[: whole.index(stop)], "stop")
        streamed = list(client.completions.create(**options, stop=stop, stream=True))
        assert "".join(c.choices[0].text for c in streamed) == whole[: whole.index(stop)]
        assert [c.choices[0].finish_reason for c in streamed if c.choices[0].finish_reason] == ["stop"]
    assert cut.usage.completion_tokens < 30


def test_completions_take_texts_and_ids(client, loaded):
    texts = ["The capital", "def add"]
    ids = [loaded.text_ids(t) for t in texts]
    options = {"model": MODEL, "max_tokens": 7, "temperature": 0}
    expected = [c.text for c in client.completions.create(prompt=texts, **options).choices]
    assert [c.text for c in client.completions.create(prompt=ids, **options).choices] == expected
    assert client.completions.create(prompt=ids[1], **options).choices[0].text == expected[1]
    two = client.completions.create(prompt=texts, n=2, echo=True, **options)
    assert [c.index for c in two.choices] == [0, 1, 2, 3]
    assert [c.text for c in two.choices] == [t + e for t, e in zip(texts, expected, strict=True) for _ in "ab"]
    assert two.usage.prompt_tokens == sum(map(len, ids))
    assert client.completions.create(model=MODEL, prompt="a", temperature=0).usage.completion_tokens <= 16


@pytest.mark.parametrize("max_tokens", [0, 1])
def test_echoed_logprobs_equal_the_engines_score(client, loaded, max_tokens):
    """What lm-evaluation-harness sends for loglikelihood requests (`local-completions`)."""
    prompts = [loaded.tokenizer.encode("The capital of France is Paris."), loaded.tokenizer.encode("def é")]
    answer = client.completions.create(
        model=MODEL, prompt=prompts, echo=True, max_tokens=max_tokens, logprobs=1, temperature=0, seed=1234
    )
    for ids, choice in zip(prompts, answer.choices, strict=True):
        block = choice.logprobs
        assert block.token_logprobs[0] is None
        assert block.top_logprobs[0] is None
        assert len(block.token_logprobs) == len(block.tokens) == len(block.text_offset) == len(ids) + max_tokens
        assert block.token_logprobs[1 : len(ids)] == pytest.approx(loaded.engine.score([ids])[0][1:], abs=1e-4)
        for own, name, top in zip(block.token_logprobs[1:], block.tokens[1:], block.top_logprobs[1:], strict=True):
            assert top[name] == own
            assert len(top) in (1, 2)  # the best, and the token itself if it is another
    assert answer.choices[0].text.startswith("The capital of France is Paris.")


def test_echo_of_a_text_gives_its_first_token_a_logprob(client, loaded):
    """What begins a text is read before it, but is not part of the answer."""
    text = "The capital of France"
    ids = loaded.text_ids(text)
    options = {"model": MODEL, "echo": True, "max_tokens": 0, "logprobs": 1}
    one, empty = client.completions.create(prompt=[text, ""], **options).choices
    assert one.text == text
    assert one.logprobs.token_logprobs == pytest.approx(loaded.engine.score([ids])[0][1:], abs=1e-4)
    assert (empty.text, empty.logprobs.tokens) == ("", [])


def test_greedy_tokens_are_seen_to_be_greedy(client, loaded):
    ids = loaded.tokenizer.encode("The capital")
    full = ids + loaded.engine.generate([ids], Sampling(temperature=0, max_tokens=5))[0].ids
    options = {"model": MODEL, "echo": True, "max_tokens": 1, "logprobs": 1, "temperature": 0}
    block = client.completions.create(prompt=[full], **options).choices[0].logprobs
    pairs = zip(block.token_logprobs[len(ids) : -1], block.top_logprobs[len(ids) : -1], strict=True)
    assert all(own == max(top.values()) for own, top in pairs)


def test_lm_evaluation_harness_gets_the_engines_numbers(server, loaded, tiny_checkpoint):
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    harness = LocalCompletionsAPI(
        base_url=server.address + "/v1/completions", model=MODEL, tokenizer=str(tiny_checkpoint), batch_size=2,
        max_length=1024, tokenizer_backend="huggingface", add_bos_token=True,
    )  # fmt: skip
    asked = [("The capital of France is", " Paris."), ("The capital of Peru is", " Lima."), ("def", " add(a, b):")]
    found = harness.loglikelihood(
        [Instance("loglikelihood", {}, arguments, number) for number, arguments in enumerate(asked)], disable_tqdm=True
    )
    for (context, answer), (logprob, _) in zip(asked, found, strict=True):
        before, whole = loaded.text_ids(context), loaded.text_ids(context + answer)
        assert logprob == pytest.approx(sum(loaded.engine.score([whole])[0][len(before) :]), abs=1e-3)
    until = [Instance("generate_until", {}, ("The capital", {"until": ["\n"], "max_gen_toks": 9}), 0)]
    assert harness.generate_until(until, disable_tqdm=True) == [
        loaded.complete("The capital", max_tokens=9).partition("\n")[0]
    ]


def test_models_health_and_metrics(server, client):
    assert [m.id for m in client.models.list().data] == [MODEL]
    assert client.models.retrieve(MODEL).object == "model"
    assert httpx.get(server.address + "/health").json() == {"status": "ok"}
    before = metric(server, "freehold_generated_tokens_total")
    client.completions.create(model=MODEL, prompt="x", max_tokens=5, temperature=0, logit_bias={"97": 100})
    assert metric(server, "freehold_generated_tokens_total") == before + 5
    assert metric(server, 'freehold_requests_total{route="/v1/completions",status="200"}') >= 1
    assert metric(server, "freehold_waiting_requests") == 0


def metric(server, name: str) -> float:
    lines = httpx.get(server.address + "/metrics").text.splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name + " "))


CHAT = {"model": MODEL, "messages": HELLO, "max_tokens": 2}
TEXT = {"model": MODEL, "prompt": "a", "max_tokens": 2}
CALL = {"role": "assistant", "content": None}


def calls(arguments: str) -> dict:
    """Return a tool call."""
    return {"id": "1", "type": "function", "function": {"name": "add", "arguments": arguments}}


@pytest.mark.parametrize(
    ("body", "status", "param", "code"),
    [
        (CHAT | {"model": "other"}, 404, "model", "model_not_found"),
        (CHAT | {"temperature": 3}, 400, "temperature", "invalid_value"),
        (CHAT | {"temperature": "hot"}, 400, "temperature", "invalid_type"),
        (CHAT | {"top_p": 0}, 400, "top_p", "invalid_value"),
        (CHAT | {"n": 0}, 400, "n", "invalid_type"),
        (CHAT | {"max_tokens": 5000}, 400, "max_tokens", "context_length_exceeded"),
        (CHAT | {"messages": [{"role": "user", "content": "a" * 9000}]}, 400, "prompt", "context_length_exceeded"),
        (CHAT | {"messages": []}, 400, "messages", "invalid_type"),
        (CHAT | {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "messages.0.content", None),
        ({"model": MODEL}, 400, "messages", "missing_required_parameter"),
        (CHAT | {"wisdom": 1}, 400, "wisdom", "unknown_parameter"),
        (CHAT | {"tool_choice": "required"}, 400, "tool_choice", "invalid_value"),
        (CHAT | {"response_format": {"type": "poem"}}, 400, "response_format", "invalid_value"),
        (CHAT | {"response_format": {"type": "json_schema"}}, 400, "response_format", "invalid_value"),
        (CHAT | {"tool_choice": {"type": "function", "function": {"name": "add"}}}, 400, "tool_choice", None),
        (CHAT | {"functions": []}, 400, "functions", "invalid_value"),
        (CHAT | {"top_logprobs": 2}, 400, "top_logprobs", "invalid_value"),
        (CHAT | {"logit_bias": {"a": 1}}, 400, "logit_bias", "invalid_value"),
        (CHAT | {"logit_bias": {"4711": 1}}, 400, "logit_bias", "invalid_value"),
        (CHAT | {"logit_bias": {"--5": 1}}, 400, "logit_bias", "invalid_value"),
        (CHAT | {"logit_bias": {"5" * 5000: 1}}, 400, "logit_bias", "invalid_value"),
        (CHAT | {"logit_bias": {"\u0663": 1}}, 400, "logit_bias", "invalid_value"),  # an Arabic three
        (CHAT | {"logit_bias": {"\ud800": 1}}, 400, "logit_bias", "invalid_value"),
        (CHAT | {"logit_bias": {str(i): 1 for i in range(1025)}}, 400, "logit_bias", "invalid_type"),
        (CHAT | {"top_k": 2**63}, 400, "top_k", "invalid_value"),
        (CHAT | {"model": "\ud800"}, 404, "model", "model_not_found"),
        (CHAT | {"\ud800": 1}, 400, None, None),
        (CHAT | {"tool_choice": "\ud800"}, 400, "tool_choice", "invalid_value"),
        (CHAT | {"messages": [{"role": "user", "content": [{"type": "\ud800"}]}]}, 400, "messages.0.content", None),
        (CHAT | {"messages": [{"role": "\ud800", "content": ""}]}, 400, "messages[0]", "invalid_value"),
        (CHAT | {"messages": [CALL | {"tool_calls": [calls("[" * 5000)]}]}, 400, "messages[0].tool_calls[0]", None),
        (CHAT | {"messages": [CALL | {"tool_calls": [calls("9" * 5000)]}]}, 400, "messages[0].tool_calls[0]", None),
        (CHAT | {"stop": ""}, 400, "stop", "invalid_value"),
        (CHAT | {"stop": ["a"] * 65}, 400, "stop", "invalid_value"),
        (CHAT | {"stream": True, "max_tokens": 5000}, 400, "max_tokens", "context_length_exceeded"),
        (TEXT | {"prompt": []}, 400, "prompt", "invalid_value"),
        (TEXT | {"prompt": ["a"] * 1025}, 400, "prompt", "invalid_value"),
        (TEXT | {"prompt": [[1]] * 9, "n": 128}, 400, "prompt", "invalid_value"),
        (TEXT | {"prompt": [[1, 99999]]}, 400, "prompt", "invalid_value"),
        (TEXT | {"prompt": [1.5]}, 400, "prompt", "invalid_type"),
        (TEXT | {"best_of": 3}, 400, "best_of", "invalid_value"),
        (TEXT | {"suffix": "b"}, 400, "suffix", "invalid_value"),
    ],
    ids=lambda value: ascii(value)[:60] if isinstance(value, dict) else "",
)
def test_a_request_that_cannot_be_answered_is_refused_by_name(server, body, status, param, code):
    route = "/v1/completions" if "prompt" in body else "/v1/chat/completions"
    answer = httpx.post(server.address + route, content=json.dumps(body), headers=JSON)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (status, param)
    assert code in (None, error["code"])
    assert error["type"] == "invalid_request_error"
    assert error["message"]


@pytest.mark.parametrize(
    ("route", "body"),
    [
        ("/v1/completions", lambda text: TEXT | {"prompt": text}),
        ("/v1/completions", lambda text: TEXT | {"prompt": ["a", text]}),
        ("/v1/chat/completions", lambda text: CHAT | {"messages": [{"role": "user", "content": text}]}),
    ],
    ids=["text", "texts", "chat"],
)
class TestLongPrompts:
    def test_the_server_listens_while_a_prompt_is_encoded(self, server, loaded, monkeypatch, route, body):
        begun, resume, encode = threading.Event(), threading.Event(), loaded.tokenizer.encode

        def slow(text, **options):
            begun.set()
            assert resume.wait(30)
            return encode(text, **options)

        monkeypatch.setattr(loaded.tokenizer, "encode", slow)
        found = []
        asking = threading.Thread(
            target=lambda: found.append(httpx.post(server.address + route, json=body("hello"), timeout=60))
        )
        asking.start()
        assert begun.wait(30)
        assert httpx.get(server.address + "/health", timeout=30).status_code == 200
        assert not found
        resume.set()
        asking.join(60)
        assert found[0].status_code == 200

    def test_what_cannot_fit_is_refused_before_it_is_encoded(self, server, loaded, monkeypatch, route, body):
        encoded, encode = [], loaded.tokenizer.encode
        monkeypatch.setattr(loaded.tokenizer, "encode", lambda text, **_: encoded.append(text) or encode(text))
        longest = max(len(loaded.tokenizer.token_bytes(i)) for i in range(loaded.tokenizer.vocab_size))
        answer = httpx.post(server.address + route, json=body("b" * (1024 * longest + 1)))
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "context_length_exceeded")
        assert not any("b" in text for text in encoded)

    @pytest.mark.parametrize("chunked", [False, True])
    def test_a_body_beyond_the_limit_is_not_even_read(self, server, route, body, chunked):
        data = json.dumps(body("b" * (2**20 + 64 * 1024))).encode()
        answer = httpx.post(server.address + route, content=iter([data]) if chunked else data, headers=JSON)
        error = answer.json()["error"]
        assert (answer.status_code, error["code"], error["type"]) == (413, "request_too_large", "invalid_request_error")
        within = json.dumps(body("b" * 2**20)).encode()
        assert httpx.post(server.address + route, content=within, headers=JSON).status_code == 400


def test_half_a_surrogate_pair_is_read_as_any_text(server):
    messages = [CALL | {"content": "\ud800\ud800\ud800 abc"}, CALL | {"reasoning_content": "\udc00"}, *HELLO]
    answer = httpx.post(
        server.address + "/v1/chat/completions", content=json.dumps(CHAT | {"messages": messages}), headers=JSON
    )
    assert answer.status_code == 200


def test_broken_json_and_unknown_paths(server, client):
    answer = httpx.post(server.address + "/v1/completions", content=b"{'a", headers=JSON)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_json")
    answer = httpx.get(server.address + "/v1/nothing")
    assert (answer.status_code, answer.json()["error"]["type"]) == (404, "invalid_request_error")
    assert httpx.get(server.address + "/v1/completions").status_code == 405
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_tools_are_offered_and_idle_fields_accepted(client):
    tool = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
    options = {"model": MODEL, "messages": HELLO, "max_tokens": 4, "user": "me", "parallel_tool_calls": False}
    with_tools = client.chat.completions.create(**options, tools=[tool], tool_choice="auto")
    without = client.chat.completions.create(**options, tools=[tool], tool_choice="none")
    assert with_tools.usage.prompt_tokens > without.usage.prompt_tokens


@pytest.fixture
def script(tiny_tokenizer):
    backend = Script(tiny_tokenizer)
    config, sampling = ServeConfig(max_queue=1), api.default_sampling(Path("nowhere"), tiny_tokenizer)
    with Running(create_app(Served(MODEL, backend, tiny_tokenizer, sampling), config, api_key="secret")) as running:
        backend.client = openai.OpenAI(base_url=running.address + "/v1", api_key="secret", max_retries=0)
        yield backend


TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}


def test_thoughts_and_tool_calls_are_taken_apart(script):
    script.text = (
        '<think>\nAdd them.\n</think>\n\nSure.\n<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
        '<tool_call>\n{"name": "add", "arguments": {"a": 2}}\n</tool_call>'
    )
    options = {"model": MODEL, "messages": HELLO, "tools": [TOOL]}
    message = script.client.chat.completions.create(**options).choices[0].message
    assert (message.reasoning_content, message.content) == ("Add them.", "Sure.")
    assert [(c.function.name, c.function.arguments) for c in message.tool_calls] == [
        ("add", '{"a": 1}'),
        ("add", '{"a": 2}'),
    ]
    reasoning, content, calls, reasons = "", "", [], []
    for chunk in script.client.chat.completions.create(**options, stream=True):
        delta = chunk.choices[0].delta
        reasoning += getattr(delta, "reasoning_content", None) or ""
        assert getattr(delta, "reasoning", None) == getattr(delta, "reasoning_content", None)
        content += delta.content or ""
        calls += delta.tool_calls or []
        reasons.append(chunk.choices[0].finish_reason)
    assert (reasoning, content) == ("Add them.", "Sure.")
    assert [(c.index, c.function.name) for c in calls if c.id] == [(0, "add"), (1, "add")]
    written = ["".join(c.function.arguments for c in calls if c.index == i) for i in (0, 1)]
    assert written == ['{"a": 1}', '{"a": 2}']
    assert len(calls) > 4  # arguments come as they are written
    assert len({c.id for c in calls if c.id}) == 2
    assert reasons[-1] == "tool_calls"
    assert set(reasons[:-1]) == {None}


def test_only_a_tool_call_has_no_content(script):
    script.text = '<tool_call>\n{"name": "add", "arguments": {}}\n</tool_call>'
    choice = script.client.chat.completions.create(model=MODEL, messages=HELLO, tools=[TOOL]).choices[0]
    assert choice.message.content is None
    assert choice.finish_reason == "tool_calls"
    choice = script.client.chat.completions.create(model=MODEL, messages=HELLO).choices[0]  # no tools were offered
    assert choice.message.tool_calls is None
    assert "<" not in choice.message.content
    assert choice.finish_reason == "stop"


def test_a_tool_name_that_no_text_can_hold_is_no_error(script):
    script.text = '<tool_call>\n{"name": "\\ud800", "arguments": {}}\n</tool_call>'
    options = {"model": MODEL, "messages": HELLO, "tools": [TOOL]}
    message = script.client.chat.completions.create(**options).choices[0].message
    assert message.tool_calls[0].function.name == "?"
    deltas = [c.choices[0].delta.tool_calls for c in script.client.chat.completions.create(**options, stream=True)]
    assert [calls[0].function.name for calls in deltas if calls and calls[0].id] == ["?"]


def test_thinking_that_is_cut_off_is_not_the_answer(script):
    script.text, script.reason = "<think>\nlet me see, hm", "length"
    choice = script.client.chat.completions.create(model=MODEL, messages=HELLO).choices[0]
    assert choice.message.reasoning_content.startswith("let me see, hm")
    assert choice.message.content == ""
    assert choice.finish_reason == "length"


def test_the_token_that_ends_an_answer_is_no_part_of_it(script):
    script.text = "Paris."
    answer = script.client.chat.completions.create(model=MODEL, messages=HELLO, logprobs=True)
    assert answer.choices[0].message.content == "Paris."
    assert "".join(c.token for c in answer.choices[0].logprobs.content) == "Paris."
    assert answer.usage.completion_tokens == len(answer.choices[0].logprobs.content) + 1


def test_a_key_is_asked_for(script):
    with pytest.raises(openai.AuthenticationError) as caught:
        script.client.with_options(api_key="wrong").models.list()
    assert caught.value.code == "invalid_api_key"
    assert script.client.models.list().data


def test_whoever_leaves_stops_the_work(script):
    script.text, script.pause_s = "word " * 500, 0.01
    stream = script.client.chat.completions.create(model=MODEL, messages=HELLO, stream=True)
    next(stream)
    stream.close()
    wait_for(lambda: script.closed == 1)
    with pytest.raises(openai.APITimeoutError):  # not streamed
        script.client.with_options(timeout=0.3).chat.completions.create(model=MODEL, messages=HELLO)
    wait_for(lambda: script.closed == 2)


def test_a_full_queue_says_so(script):
    script.text, script.pause_s = "word " * 500, 0.01
    working = script.client.chat.completions.create(model=MODEL, messages=HELLO, stream=True)
    next(working)

    async def crowd():
        client = openai.AsyncOpenAI(base_url=str(script.client.base_url), api_key="secret", max_retries=0)
        calls = [client.completions.create(model=MODEL, prompt="a", timeout=1) for _ in range(3)]
        return await asyncio.gather(*calls, return_exceptions=True)

    errors = asyncio.run(crowd())
    refused = [e for e in errors if isinstance(e, openai.RateLimitError)]
    assert len(refused) == 2
    assert refused[0].code == "queue_full"
    assert refused[0].response.headers["retry-after"] == "2"  # as long as two take
    working.close()


def test_a_backend_that_died_is_not_the_clients_mistake(script):
    script.error = ArtifactError("llama.cpp died at /completion", where="model.gguf")
    with pytest.raises(openai.InternalServerError) as caught:
        script.client.completions.create(model=MODEL, prompt="a")
    assert "model.gguf" not in caught.value.message


def test_work_takes_turns():
    def endless():
        while True:
            yield 0

    async def both():
        worker = Worker(limit=4, running=2)
        long, short = worker.run(endless()), worker.run(iter_of(1, 2, 3))
        await anext(long)
        try:
            return [item async for item in short]
        finally:
            await long.aclose()
            await asyncio.to_thread(worker.stop)

    def iter_of(*items):
        yield from items

    assert asyncio.run(asyncio.wait_for(both(), 60)) == [1, 2, 3]


def test_requests_that_take_turns_get_what_they_get_alone(loaded):
    served = Served(MODEL, loaded.engine, loaded.tokenizer, loaded.sampling, running=3)
    asked = [
        {"prompt": "The capital of France", "max_tokens": 40, "seed": 1, "n": 2},
        {"prompt": ["def add", "x" * 50], "max_tokens": 30, "seed": 2, "top_p": 0.9},
        {"prompt": "A", "max_tokens": 60, "seed": 3, "frequency_penalty": 1.0},
    ]

    async def answers(client, options):
        answer = await client.completions.create(model=MODEL, logprobs=2, **options)
        return [(c.text, c.logprobs.token_logprobs) for c in answer.choices]

    async def ask(address):
        client = openai.AsyncOpenAI(base_url=address + "/v1", api_key="none", max_retries=0)
        alone = [await answers(client, options) for options in asked]
        return alone, await asyncio.gather(*(answers(client, options) for options in asked))

    with Running(create_app(served, ServeConfig())) as running:
        alone, together = asyncio.run(ask(running.address))
    assert together == alone


def test_our_own_bug_is_a_500_in_openais_form(script, caplog):
    with pytest.raises(openai.InternalServerError) as caught:
        script.client.completions.create(model=MODEL, prompt="a", echo=True, logprobs=1)
    assert caught.value.type == "server_error"
