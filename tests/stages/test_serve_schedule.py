"""Who is answered when: fairness by key, deadlines, leaving in mid-prompt, and prompts that are kept."""

from __future__ import annotations

import asyncio
import threading

import httpx
import pytest
from serving import MODEL, Running, wait_for

from freehold import api
from freehold.core.errors import ConfigError
from freehold.stages.serve.app import create_app
from freehold.stages.serve.backends import Served, open_model
from freehold.stages.serve.config import ServeConfig
from freehold.stages.serve.worker import Overloaded, Worker


async def drain(worker: Worker, items, tenant=None) -> list:
    return [item async for item in worker.run(items, tenant)]


def test_next_to_begin_is_of_who_has_the_fewest_running():
    gate, began = threading.Event(), []

    def work(name):
        began.append(name)
        gate.wait(10)
        yield name

    async def all_of_them():
        worker = Worker(limit=20, running=1)
        first = asyncio.create_task(drain(worker, work("a0"), "a"))
        await asyncio.to_thread(wait_for, lambda: began)
        rest = []
        for name in ("a1", "a2", "a3", "b0", "c0", "b1"):
            rest.append(asyncio.create_task(drain(worker, work(name), name[0])))
            await asyncio.to_thread(wait_for, lambda: worker.waiting == len(rest))  # noqa: B023
        gate.set()
        await asyncio.gather(first, *rest)
        await asyncio.to_thread(worker.stop)

    asyncio.run(all_of_them())
    assert began == ["a0", "a1", "a2", "a3", "b0", "c0", "b1"]  # one place: whoever came first

    began.clear()
    held = threading.Event()

    def holds(name):
        began.append(name)
        while not held.is_set():
            yield None
        yield name

    async def two_places():
        worker = Worker(limit=20, running=2)
        first = asyncio.create_task(drain(worker, holds("a0"), "a"))
        await asyncio.to_thread(wait_for, lambda: began)
        busy = asyncio.create_task(drain(worker, work("a1"), "a"))
        await asyncio.to_thread(wait_for, lambda: len(began) == 2)
        rest = []
        for name in ("a2", "a3", "b0"):
            rest.append(asyncio.create_task(drain(worker, work(name), name[0])))
            await asyncio.to_thread(wait_for, lambda: worker.waiting == len(rest))  # noqa: B023
        await asyncio.gather(busy, *rest)
        held.set()
        await first
        await asyncio.to_thread(worker.stop)

    gate.clear()
    threading.Timer(0.3, gate.set).start()
    asyncio.run(two_places())
    assert began == ["a0", "a1", "b0", "a2", "a3"]


def test_request_that_waited_too_long_is_refused():
    gate = threading.Event()

    def work():
        gate.wait(10)
        yield 1

    async def both():
        worker = Worker(limit=5, deadline_s=0.2)
        first = asyncio.create_task(drain(worker, work()))
        await asyncio.to_thread(wait_for, lambda: worker.waiting == 0)
        with pytest.raises(Overloaded, match="waited 0.2 s") as caught:
            await drain(worker, iter([]))
        gate.set()
        assert await first == [1]  # the deadline is for beginning, not for ending
        await asyncio.to_thread(worker.stop)
        return caught.value.retry_s, worker.waiting

    assert asyncio.run(both()) == (1, 0)


@pytest.fixture(scope="module")
def served(tiny_checkpoint) -> Served:
    return open_model(ServeConfig(model_name=MODEL, cache_mib=8), tiny_checkpoint)


def test_default_running_requests_follow_the_memory(served, tiny_checkpoint):
    assert served.running == min(64, served.backend.usual_requests()) >= 8
    with pytest.raises(ConfigError, match="does not hold one request"):
        api.load(tiny_checkpoint, limit_tokens=1000, cache_bytes=200_000)


def test_kept_prompts_show_in_usage_and_metrics(served):
    prompt = list(range(40, 340))
    body = {"model": MODEL, "prompt": prompt, "max_tokens": 3, "temperature": 0, "n": 2}
    with Running(create_app(served, ServeConfig(), "one, two")) as server:

        def ask(key: str, **more) -> tuple[list[str], int]:
            url, headers = server.address + "/v1/completions", {"Authorization": f"Bearer {key}"}
            answer = httpx.post(url, json=body | more, headers=headers, timeout=60).json()
            usage = answer["usage"]
            assert usage["prompt_tokens"] == 300
            return [c["text"] for c in answer["choices"]], usage["prompt_tokens_details"]["cached_tokens"]

        cold = ask("one")
        assert cold[1] == 0
        assert ask("one") == (cold[0], 256)
        assert ask("one", cache_salt="mine") == cold
        assert ask("two") == cold  # another tenant: nothing is shared, and nothing else differs
        assert ask("two") == (cold[0], 256)
        assert httpx.get(server.address + "/v1/models", headers={"Authorization": "Bearer three"}).status_code == 401
        numbers = httpx.get(server.address + "/metrics", headers={"Authorization": "Bearer two"}).text
    found = dict(line.rsplit(" ", 1) for line in numbers.splitlines() if not line.startswith("#"))
    assert float(found["freehold_prefix_found_tokens_total"]) == 4 * 256
    assert float(found["freehold_cache_free_pages"]) < float(found["freehold_cache_pages"])


def test_leaving_in_mid_prompt_stops_the_work(tiny_checkpoint, monkeypatch):
    monkeypatch.setattr("freehold.infer.engine.STEP_TOKENS", 2)
    loaded = api.load(tiny_checkpoint)
    served = Served(MODEL, loaded.engine, loaded.tokenizer, loaded.sampling, running=4)
    body = {"model": MODEL, "prompt": [7] * 900, "max_tokens": 1}
    with Running(create_app(served, ServeConfig())) as server:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(server.address + "/v1/completions", json=body, timeout=0.2)
        wait_for(lambda: not loaded.engine.queue.running, 10)
        assert loaded.engine.pool.free == loaded.engine.pool.pages
        short = httpx.post(server.address + "/v1/completions", json=body | {"prompt": [7]}, timeout=60)
        assert short.status_code == 200
