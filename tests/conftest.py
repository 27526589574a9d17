"""Fixtures several rooms share: one tiny random model, made once."""

from __future__ import annotations

import os
import signal

import pytest

FIRST = ("walk", "distributed", "stages", "infer", "kernels", "parallel", "trainer")


def pytest_configure(config: pytest.Config) -> None:
    """Hide CUDA devices from all tests but those marked cuda: `device: auto` would take them."""
    if config.option.markexpr != "cuda":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the folders whose files take longest, so that two workers end at about the same time."""
    items.sort(key=lambda item: FIRST.index(name) if (name := item.path.parent.name) in FIRST else len(FIRST))


@pytest.fixture(scope="session", autouse=True)
def interrupts_arrive():
    """Handle Ctrl-C here and in what tests start, also in a suite that a shell has put into the background."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def tiny_model():
    """A random fp32 model: `tiny.config` with a vocabulary of 512 and a context of 1,024; in eval mode."""
    import tiny
    import torch

    from freehold.model.afmoe import Afmoe

    config = tiny.config(vocab_size=512, max_position_embeddings=1024)
    model = Afmoe(config)
    model.init_weights(torch.Generator().manual_seed(1))
    with torch.no_grad():
        # Random heads are nearly flat: sharper ones make greedy choices and log-probabilities differ more.
        model.lm_head.weight *= 8
    return model.eval()


@pytest.fixture(scope="session")
def tiny_tokenizer():
    """A tokenizer of 512 tokens, the tiny model's vocabulary."""
    import textwrap
    from pathlib import Path

    from freehold.core.log import Log
    from freehold.tokenizer.bpe import train

    text = Path(textwrap.__file__).read_text(encoding="utf-8")
    return train([text, "The capital of France is Paris. The capital of Peru is Lima."], 512, Log(quiet=True))


@pytest.fixture(scope="session")
def tiny_checkpoint(tiny_model, tiny_tokenizer, tmp_path_factory):
    """A finished native checkpoint of the tiny model: `run/align/preview`. Copy it before changing it."""
    from freehold.checkpoint import dcp

    run = tmp_path_factory.mktemp("tiny") / "run"
    tiny_tokenizer.save(run / "tokenizer")
    files = [run / "tokenizer" / name for name in ("tokenizer.json", "tokenizer_config.json")]
    facts = {"step": 1, "stage_type": "Preview", "tokenizer_sha256": tiny_tokenizer.sha256, "begins_with": [0]}
    folder = run / "align" / "preview"
    folder.parent.mkdir(parents=True)
    dcp.save(folder, {"model": tiny_model.state_dict()}, tiny_model.config, facts, files)
    return folder


@pytest.fixture(scope="session")
def short_folder(tiny_model, tiny_tokenizer, tmp_path_factory):
    """The tiny model in HF form, with a context of 40 tokens."""
    import torch

    from freehold.checkpoint import hf

    folder = tmp_path_factory.mktemp("short")
    config = tiny_model.config.model_copy(update={"max_position_embeddings": 40})
    hf.save_hf(folder, config, tiny_model.state_dict(), torch.float32)
    tiny_tokenizer.save(folder)
    return folder
