"""The server as a process of its own, on GGUF files, and under lm-evaluation-harness."""

from __future__ import annotations

import concurrent.futures
import json
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request

import pytest
import torch

from freehold import api
from freehold.checkpoint import hf
from freehold.core.artifact import Workspace
from freehold.core.errors import ArtifactError, ConfigError, RequestError
from freehold.core.log import Log
from freehold.infer.limits import ContextOverflow
from freehold.infer.sampler import Sampling
from freehold.stages.serve import run as serve_run
from freehold.stages.serve.backends import open_model
from freehold.stages.serve.config import ServeConfig, plan


def workspace(folder, checkpoint) -> Workspace:
    folder.mkdir()
    return Workspace(folder, "serve", "tiny", 0, Log(quiet=True), {"align": checkpoint.parent})


def test_the_walk_asks_a_real_server_and_keeps_the_answer(tiny_checkpoint, tmp_path):
    config = ServeConfig(question="What is the capital of Peru?", model_name="tiny")
    counts = serve_run.run(config, workspace(tmp_path / "serve", tiny_checkpoint))
    kept = json.loads((tmp_path / "serve" / "answer.json").read_text())
    assert kept["question"] == config.question
    assert (
        kept["answer"]
        == api.load(tiny_checkpoint).generate(config.question, max_tokens=serve_run.ANSWER_TOKENS)
        == counts["answer"]
    )
    assert kept["model"] == "tiny"
    assert kept["usage"]["completion_tokens"] <= serve_run.ANSWER_TOKENS
    log = (tmp_path / "serve" / "log" / "server.txt").read_text()
    assert log.endswith("stopped\n")  # SIGTERM ended it cleanly
    assert sorted(kept) == ["answer", "finish_reason", "model", "question", "usage"]


def test_refused_question_fails_the_stage_with_its_reason(tiny_checkpoint, tmp_path):
    config = ServeConfig(max_model_len=16)
    with pytest.raises(serve_run.ServeError, match="found 33 tokens; expected at most 16"):
        serve_run.run(config, workspace(tmp_path / "serve", tiny_checkpoint))


def test_server_that_cannot_start_shows_its_log(tmp_path):
    log = tmp_path / "server.txt"
    log.write_text("opening\nno model here\n")
    process = subprocess.Popen([sys.executable, "-c", "raise SystemExit(3)"])
    with pytest.raises(serve_run.ServeError, match="ended with code 3") as caught:
        serve_run._wait(process, "http://127.0.0.1:9", 20, log)
    assert "no model here" in str(caught.value)


def test_a_server_that_is_too_slow_is_given_up(tmp_path):
    log = tmp_path / "server.txt"
    log.write_text("")
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        with pytest.raises(serve_run.ServeError, match="within 0.2 s"):
            serve_run._wait(process, "http://127.0.0.1:9", 0.2, log)
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_cleanly(tiny_checkpoint, number, capsys):
    def stop(address: str) -> None:
        def work() -> None:
            for _ in range(200):
                try:
                    urllib.request.urlopen(address + "/health", timeout=1).close()
                    break
                except OSError:
                    time.sleep(0.02)
            os.kill(os.getpid(), number)

        threading.Thread(target=work).start()

    before = signal.getsignal(number)
    serve_run.serve(ServeConfig(path=tiny_checkpoint, port=0), ready=stop)
    assert signal.getsignal(number) is before
    assert capsys.readouterr().err.endswith("stopped\n")


def test_taken_port_is_reported_before_model_is_opened(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(serve_run.ServeError, match=f"--port {port + 1}") as caught:
            serve_run.serve(ServeConfig(path=tmp_path / "nowhere", port=port))
    assert "in use" in caught.value.what


def test_an_address_that_is_not_ours_is_refused(tmp_path):
    for host in ("192.0.2.1", "no such host"):
        with pytest.raises(serve_run.ServeError, match="cannot listen there"):
            serve_run.serve(ServeConfig(path=tmp_path, host=host, port=0))


def test_what_to_serve_must_be_said():
    with pytest.raises(ConfigError, match="serve.path"):
        serve_run.serve(ServeConfig())
    assert "capital" in plan(ServeConfig())[0]


@pytest.fixture(scope="module")
def exported(tiny_model, tiny_tokenizer, tmp_path_factory):
    """An export folder: hf/ and gguf/."""
    from freehold.stages.export.files import write_files

    folder = tmp_path_factory.mktemp("export")
    hf.save_hf(folder / "hf", tiny_model.config, tiny_model.state_dict(), torch.float32)
    tiny_tokenizer.save(folder / "hf")
    (folder / "gguf").mkdir()
    write_files(folder / "hf", tiny_model.config, {"F32": folder / "gguf" / "Tiny-F32.gguf"}, name="Tiny")
    return folder


@pytest.fixture(scope="module")
def gguf(exported):
    served = open_model(ServeConfig(max_model_len=256), exported / "gguf" / "Tiny-F32.gguf")
    yield served
    served.close()
    assert served.backend._llama.process.returncode == 0


def test_a_gguf_file_answers_as_the_checkpoint_does(gguf, tiny_checkpoint):
    engine, prompt = api.load(tiny_checkpoint).engine, [0, 40, 50, 60, 41, 51]
    settings = [Sampling(temperature=0, max_tokens=12, logprobs=2), Sampling(temperature=0, max_tokens=3)]
    found = list(gguf.backend.decode([prompt, prompt[:3]], settings))
    expected = engine.generate([prompt, prompt[:3]], settings)
    assert gguf.name == "Tiny-F32"
    for number in (0, 1):
        tokens = [t for n, t in found if n == number]
        assert [t.id for t in tokens] == expected[number].ids
        pairs = zip((t.logprob for t in tokens), expected[number].logprobs, strict=True)
        known = [pair for pair in pairs if not math.isnan(pair[0])]  # half a character comes without
        assert known
        assert all(own == pytest.approx(wanted, abs=0.02) for own, wanted in known)  # its cache is fp16
        assert [t.finish_reason for t in tokens] == [None] * (len(tokens) - 1) + ["length"]
    assert [i for i, _ in found[0][1].top_logprobs] == [i for i, _ in expected[0].top_logprobs[0]]


def test_a_gguf_file_stops_draws_and_repeats(gguf):
    prompt = [0, 40, 50, 60, 41, 51]
    free = [t.id for _, t in gguf.backend.decode([prompt], [Sampling(temperature=0, max_tokens=12)])]
    stop = free[4]
    stopped = [t for _, t in gguf.backend.decode([prompt], [Sampling(temperature=0, stop_ids=(stop,))])]
    assert [t.id for t in stopped] == free[: free.index(stop) + 1]
    assert stopped[-1].finish_reason == "stop"
    drawn = [
        [t.id for _, t in gguf.backend.decode([prompt], [Sampling(seed=seed, max_tokens=12, temperature=1.5)])]
        for seed in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    ended = [t for _, t in gguf.backend.decode([prompt], [Sampling(logit_bias={3: 100.0}, temperature=0)])]
    assert [(t.id, t.finish_reason) for t in ended] == [(3, "stop")]
    assert list(gguf.backend.decode([prompt], [Sampling(max_tokens=0)])) == []


class Only:
    """A constraint that lets a few tokens come, then the end."""

    def __init__(self, allowed, last) -> None:
        self.allowed, self.last, self.seen = allowed, last, 0

    def mask(self, logits) -> None:
        keep = self.allowed if self.seen < 3 else [self.last]
        kept = logits[keep].clone()
        logits.fill_(-torch.inf)
        logits[keep] = kept

    def took(self, token) -> None:
        self.seen += 1


@pytest.mark.parametrize("allowed", [[40, 99, 300], [i for i in range(5, 512) if i % 7]], ids=["few", "most"])
def test_masks_hold_on_a_gguf_file(gguf, tiny_checkpoint, allowed):
    sampling = Sampling(temperature=0, max_tokens=9, stop_ids=(3,), constrain=lambda: Only(allowed, 3))
    found = [t for _, t in gguf.backend.decode([[0, 40, 50]], [sampling])]
    expected = api.load(tiny_checkpoint).engine.generate([[0, 40, 50]], sampling)[0]
    assert [t.id for t in found] == expected.ids
    assert found[-1].finish_reason == "stop"


def test_slots_of_a_gguf_file_answer_at_the_same_time(gguf):
    assert gguf.threads == 4
    prompts = [[0, 40 + i, 50, 60] for i in range(6)]
    sampling = Sampling(temperature=0, max_tokens=8)
    alone = [[t.id for _, t in gguf.backend.decode([p], [sampling])] for p in prompts]
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        together = list(pool.map(lambda p: [t.id for _, t in gguf.backend.decode([p], [sampling])], prompts))
    assert together == alone


@pytest.mark.parametrize("temperature", [1e-45, 1e-300, 1e-7])
def test_a_temperature_next_to_0_is_greedy_on_a_gguf_file(gguf, temperature):
    prompt = [0, 40, 50, 60, 41, 51]
    greedy, sharp = (
        [t.id for _, t in gguf.backend.decode([prompt], [Sampling(temperature=t, max_tokens=12, seed=0)])]
        for t in (0, temperature)
    )
    assert sharp == greedy


def test_connection_closed_by_llama_cpp_is_reopened(gguf):
    """It closes one that was idle for five seconds."""
    prompt, sampling = [0, 40, 50, 60, 41, 51], Sampling(temperature=0, max_tokens=4)
    before = [t.id for _, t in gguf.backend.decode([prompt], [sampling])]
    gguf.backend._llama._connection.sock.shutdown(socket.SHUT_RDWR)
    assert [t.id for _, t in gguf.backend.decode([prompt], [sampling])] == before


def test_penalties_mean_the_same_on_a_gguf_file(gguf, tiny_checkpoint):
    engine, prompt = api.load(tiny_checkpoint).engine, [0, 40, 50, 60, 41, 51]
    sampling = Sampling(temperature=0, max_tokens=16, presence_penalty=1.5, frequency_penalty=0.5, logit_bias={99: 2.0})
    found = [t.id for _, t in gguf.backend.decode([prompt], [sampling])]
    assert found == engine.generate([prompt], sampling)[0].ids


def test_what_a_gguf_file_cannot_do_is_refused(gguf):
    assert gguf.backend.limit_tokens == 256
    for prompt, sampling, kind in (
        ([], Sampling(), RequestError),
        ([0, 512], Sampling(), RequestError),
        ([0] * 256, Sampling(), ContextOverflow),
        ([0] * 10, Sampling(max_tokens=250), ContextOverflow),
        ([0], Sampling(logit_bias={512: 1.0}), RequestError),
    ):
        with pytest.raises(kind):
            list(gguf.backend.decode([prompt], [sampling]))
    with pytest.raises(RequestError, match="serve the checkpoint"):
        gguf.backend.score_top([[1]], 1)


def test_a_gguf_files_context_is_the_models(exported):
    served = open_model(ServeConfig(tokenizer=exported / "hf"), exported / "gguf" / "Tiny-F32.gguf")
    served.close()
    assert served.backend.limit_tokens == 1024


def test_what_is_no_gguf_file_is_refused(exported, tmp_path):
    with pytest.raises(ArtifactError, match="no tokenizer next to"):
        open_model(ServeConfig(), tmp_path / "model.gguf")
    with pytest.raises(ArtifactError, match="no such file"):
        open_model(ServeConfig(tokenizer=exported / "hf"), tmp_path / "model.gguf")
    (tmp_path / "model.gguf").write_bytes(b"not one")
    with pytest.raises(ArtifactError, match="does not begin with GGUF"):
        open_model(ServeConfig(tokenizer=exported / "hf"), tmp_path / "model.gguf")
    sound = (exported / "gguf" / "Tiny-F32.gguf").read_bytes()
    # Of the same length, so the header is sound; what llama.cpp needs is missing all the same.
    (tmp_path / "model.gguf").write_bytes(sound.replace(b"general.architecture", b"general.architecturf"))
    with pytest.raises(ArtifactError, match="cannot open") as caught:
        open_model(ServeConfig(tokenizer=exported / "hf"), tmp_path / "model.gguf")
    assert "model loading error" in str(caught.value)  # llama.cpp's own words


def test_dead_llama_cpp_is_reported(exported):
    served = open_model(ServeConfig(), exported / "gguf" / "Tiny-F32.gguf")
    served.backend._llama.process.kill()
    for _ in range(2):
        with pytest.raises(ArtifactError, match="died at /completion"):
            list(served.backend.decode([[0]], [Sampling(max_tokens=1)]))
    served.close()


def test_without_xllamacpp_gguf_files_are_refused(exported, monkeypatch):
    monkeypatch.setitem(sys.modules, "xllamacpp", None)
    with pytest.raises(ArtifactError, match="freehold\\[export\\]"):
        open_model(ServeConfig(), exported / "gguf" / "Tiny-F32.gguf")
