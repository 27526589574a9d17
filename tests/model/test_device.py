"""Which device computes, and what is said about it."""

from __future__ import annotations

import pytest
import torch

from freehold.core.errors import ConfigError
from freehold.model.device import choose_device


@pytest.mark.parametrize(
    ("name", "devices", "chosen", "line"),
    [
        ("auto", 0, "cpu", "device: cpu (auto; no CUDA device was found)\n"),
        ("auto", 2, "cuda:1", "device: cuda:1 (auto; H200)\n"),
        ("cpu", 2, "cpu", ""),
        ("cuda", 2, "cuda:1", ""),
    ],
)
def test_auto_takes_cuda_and_says_so(monkeypatch, capsys, name, devices, chosen, line):
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: devices)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "H200")
    assert choose_device(name) == torch.device(chosen)
    assert capsys.readouterr().err == line


def test_missing_cuda_is_one_clear_error(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ConfigError, match="no CUDA device") as caught:
        choose_device("cuda", "serve.device")
    assert caught.value.where == "serve.device"
    assert "serve.device=auto or cpu" in str(caught.value)
