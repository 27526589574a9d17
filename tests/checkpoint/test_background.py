import threading

import pytest
import torch

from freehold.checkpoint import dcp
from freehold.checkpoint.background import Saver
from freehold.core.errors import ArtifactError
from freehold.model.config import ModelConfig

MODEL = ModelConfig.model_validate({"preset": "laptop"})


def state(value):
    return {"model": {"w": torch.full((1000,), float(value))}, "rng": {"torch": torch.get_rng_state()}}


def test_file_holds_the_state_at_the_call(tmp_path, monkeypatch):
    go = threading.Event()
    real = dcp.save

    def slow(*args):
        assert go.wait(60)
        return real(*args)

    monkeypatch.setattr(dcp, "save", slow)
    saver, held, done = Saver(background=True), state(1), []
    saver.save(tmp_path / "a", held, MODEL, {"step": 1}, then=lambda: done.append((tmp_path / "a").exists()))
    held["model"]["w"].fill_(2)
    assert not (tmp_path / "a").exists()
    go.set()
    saver.wait()
    assert done == [True]
    assert dcp.load(tmp_path / "a")["model"]["w"].unique().tolist() == [1.0]


def test_in_the_foreground_it_is_there_at_once(tmp_path):
    saver = Saver(background=False)
    saver.save(tmp_path / "a", state(1), MODEL, {"step": 1})
    assert dcp.check(tmp_path / "a") == {"step": 1}


def test_failure_is_raised_once_by_the_next_call(tmp_path, monkeypatch):
    def full(*_):
        raise ArtifactError("No space left on device")

    saver = Saver(background=True)
    with monkeypatch.context() as context:
        context.setattr(dcp, "save", full)
        saver.save(tmp_path / "a", state(1), MODEL, {"step": 1})
        saver._thread.join()
    with pytest.raises(ArtifactError, match="No space left"):
        saver.save(tmp_path / "b", state(1), MODEL, {"step": 2})
    saver.save(tmp_path / "b", state(1), MODEL, {"step": 2})
    saver.wait()
    assert dcp.check(tmp_path / "b") == {"step": 2}
