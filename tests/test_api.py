"""Opening models from each place they may be in, and asking them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch

from freehold import api
from freehold.checkpoint import hf
from freehold.core.environment import SETTINGS
from freehold.core.errors import ArtifactError, CheckpointError
from freehold.infer.limits import ContextOverflow
from freehold.infer.sampler import Sampling


def test_three_lines_to_an_answer(tiny_checkpoint):
    model = api.load(tiny_checkpoint)
    answer = model.generate("What is the capital of France?", max_tokens=8)
    assert isinstance(answer, str)
    assert answer == model.generate([{"role": "user", "content": "What is the capital of France?"}], max_tokens=8)


def test_without_max_tokens_the_context_is_the_end(short_folder):
    model = api.load(short_folder)
    ids = model.prompt_ids("hi")
    answer = model.engine.generate([ids], Sampling(temperature=0, stop_ids=model.stop_ids))[0]
    assert len(ids) + len(answer.ids) == 40  # or else this shows nothing
    assert model.generate("hi") == model.generate("hi", max_tokens=40 - len(ids))
    assert model.complete("hi") == model.complete("hi", max_tokens=40 - len(model.text_ids("hi")))
    with pytest.raises(ContextOverflow, match="at most 40"):
        model.generate("hi", max_tokens=40)


def test_temperature_and_seed(tiny_checkpoint):
    model = api.load(tiny_checkpoint)
    answers = [model.generate("Hello", max_tokens=12, temperature=1.5, seed=s) for s in (1, 1, 2)]
    assert answers[0] == answers[1] != answers[2]


def test_a_text_is_continued(tiny_checkpoint):
    model = api.load(tiny_checkpoint)
    ids = model.text_ids("The capital")
    assert ids == [model.tokenizer.bos, *model.tokenizer.encode("The capital")]
    expected = model.engine.generate([ids], Sampling(temperature=0, max_tokens=6, stop_ids=model.stop_ids))[0].ids
    assert model.complete("The capital", max_tokens=6) == model.tokenizer.decode(expected)
    assert isinstance(model.complete("", max_tokens=3), str)


def test_native_and_hf_folders_hold_the_same_model(tiny_checkpoint, tiny_model, tmp_path):
    native = api.load(tiny_checkpoint)
    hf.save_hf(tmp_path / "hf", tiny_model.config, tiny_model.state_dict(), torch.float32)
    native.tokenizer.save(tmp_path / "hf")
    other = api.load(tmp_path)
    assert other.folder == tmp_path / "hf"
    assert other.tokenizer.sha256 == native.tokenizer.sha256
    ids = [[5, 6, 7, 8, 9]]
    assert other.engine.score(ids) == native.engine.score(ids)


def test_bfloat16_keeps_gains_and_biases_exact(tiny_checkpoint):
    model = api.load(tiny_checkpoint, "bfloat16").model
    assert model.lm_head.weight.dtype == torch.bfloat16
    assert model.model.norm.weight.dtype == torch.float32
    assert all(moe.expert_bias.dtype == torch.float32 for moe in model.moe_layers().values())
    assert not any(p.requires_grad for p in model.parameters())


def test_a_run_means_its_most_finished_model(tiny_checkpoint, tmp_path):
    run = tmp_path / "run"
    for name in ("pretrain/checkpoints/step_00000010", "pretrain/checkpoints/step_00000020"):
        shutil.copytree(tiny_checkpoint, run / name)
    assert api.find_model(run) == run / "pretrain/checkpoints/step_00000020"
    assert api.find_model(run / "pretrain") == run / "pretrain/checkpoints/step_00000020"
    for name in ("pretrain/truebase", "pretrain/base", "align/preview"):
        shutil.copytree(tiny_checkpoint, run / name)
        assert api.find_model(run) == run / name
    assert api.find_model(run / "pretrain") == run / "pretrain/base"
    assert api.find_model(run / "align") == run / "align/preview"
    assert api.find_model(run / "pretrain/truebase") == run / "pretrain/truebase"
    (run / "align/preview/manifest.json").unlink()  # not finished
    assert api.find_model(run) == run / "pretrain/base"


def test_what_is_no_model_is_refused(tmp_path):
    with pytest.raises(ArtifactError, match="no such path"):
        api.load(tmp_path / "nowhere")
    with pytest.raises(ArtifactError, match="an empty folder"):
        api.load(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ArtifactError, match="no model here"):
        api.load(tmp_path)
    for damaged in ("[", "[1]", "[" * 200_000, "\ud800"):
        (tmp_path / "config.json").write_text(damaged, errors="surrogatepass")
        with pytest.raises(ArtifactError, match="no model here"):
            api.load(tmp_path)
    (tmp_path / "model.gguf").write_bytes(b"")
    with pytest.raises(ArtifactError, match="freehold serve"):
        api.load(tmp_path / "model.gguf")


def test_a_damaged_checkpoint_is_refused(tiny_checkpoint, tmp_path):
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "damaged")
    shard = max((folder / "state").iterdir(), key=lambda p: p.stat().st_size)
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    with pytest.raises(CheckpointError, match=shard.name):
        api.load(folder)


def hf_folder(tiny_model, tokenizer, folder):
    hf.save_hf(folder, tiny_model.config, tiny_model.state_dict(), torch.float32)
    tokenizer.save(folder)
    return folder


def test_another_models_tokenizer_is_refused(tiny_model, tiny_tokenizer, tmp_path):
    from freehold.core.log import Log
    from freehold.tokenizer.bpe import train

    folder = hf_folder(tiny_model, tiny_tokenizer, tmp_path)
    (folder / "trainer.json").write_text(json.dumps({"tokenizer_sha256": "0" * 64}))
    with pytest.raises(CheckpointError, match="not the tokenizer this model was trained with"):
        api.load(folder)
    for damaged in ("[1]", "{", "[" * 100_000):
        (folder / "trainer.json").write_text(damaged)
        with pytest.raises(CheckpointError, match="trainer.json"):
            api.load(folder)
    (folder / "trainer.json").unlink()
    larger = train([chr(a) + chr(b) for a in range(65, 91) for b in range(65, 91)] * 2, 600, Log(quiet=True))
    larger.save(folder)
    with pytest.raises(CheckpointError, match="600 tokens"):
        api.load(folder)


def test_the_context_can_be_limited(tiny_checkpoint):
    model = api.load(tiny_checkpoint, limit_tokens=20)
    with pytest.raises(ContextOverflow, match="at most 20"):
        model.generate("a question longer than that", max_tokens=20)


def test_trainable_model_learns(tiny_checkpoint):
    model = api.load(tiny_checkpoint, trainable=True, threads=1)
    ids = torch.tensor([model.tokenizer.encode("The capital of France is Paris.")])
    before = model.engine.score(ids.tolist())[0]
    optimizer = torch.optim.SGD(model.model.parameters(), lr=0.1)
    for _ in range(3):
        model.model.train()
        logits = model.model(ids)
        loss = torch.nn.functional.cross_entropy(logits[0, :-1].float(), ids[0, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert sum(model.engine.score(ids.tolist())[0]) > sum(before)  # the engine reads the new weights
    assert not any(p.requires_grad for p in api.load(tiny_checkpoint).model.parameters())


def test_threads_are_measured_and_change_no_answer(tiny_checkpoint, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    cores, before = len(os.sched_getaffinity(0)), torch.get_num_threads()
    try:
        answers = []
        for threads in (1, cores, None):
            model = api.load(tiny_checkpoint, threads=threads)
            assert torch.get_num_threads() in ([threads] if threads else range(1, cores + 1))
            answers.append(model.engine.generate([[5, 6, 7]], Sampling(temperature=0, max_tokens=12))[0])
        assert answers[0] == answers[1] == answers[2]
        torch.set_num_threads(cores)
        monkeypatch.setenv("OMP_NUM_THREADS", str(cores))
        api.load(tiny_checkpoint)
        assert torch.get_num_threads() == cores  # the user's word
    finally:
        torch.set_num_threads(before)


def test_what_came_too_late_is_said_once():
    code = "import sys; {}; import freehold.core.environment as e; e.prepare(); e.prepare()"
    environment = {name: value for name, value in os.environ.items() if name not in SETTINGS}
    said = [
        subprocess.run(
            [sys.executable, "-c", code.format(first)], env=environment, capture_output=True, text=True, check=True
        ).stderr.count("torch was imported")
        for first in ("sys.modules['torch'] = sys", "pass")
    ]
    assert said == [1, 0]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_answers_only_keeps_packed_weights_and_bits(tiny_checkpoint, tmp_path, dtype):
    """Half the memory, the same answers: what is packed is let go of."""
    both = api.load(tiny_checkpoint, dtype)
    lean = api.load(tiny_checkpoint, dtype, answers_only=True)
    asked = Sampling(temperature=0, max_tokens=6, logprobs=3)
    ids = [[3, 4, 5], [6, 7, 8, 9]]
    assert lean.engine.generate(ids, asked) == both.engine.generate(ids, asked)
    assert lean.engine.score(ids) == both.engine.score(ids)
    if lean.engine.exact:
        layers = dict(lean.model.model.layers.named_parameters())
        assert all(weight.is_meta for weight in layers.values() if weight.ndim > 1)
        with pytest.raises(NotImplementedError, match="meta tensor"):  # PyTorch says so
            hf.save_hf(tmp_path, lean.config, lean.model.state_dict())
