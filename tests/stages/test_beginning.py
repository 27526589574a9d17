"""One text, one beginning: plain text and rendered chat begin with the same ids in every front."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from freehold import api
from freehold.checkpoint import dcp, hf
from freehold.data.packing import text_batch
from freehold.stages.export.files import write_files
from freehold.stages.export.llama import ExactLlama
from freehold.stages.pretrain.run import Parent, beginning
from freehold.stages.serve.backends import open_model
from freehold.stages.serve.config import ServeConfig
from freehold.tokenizer.bpe import BOS, END_OF_TEXT
from freehold.tokenizer.chat import render_ids

TEXT = "The people of France"
TALK = [{"role": "user", "content": "Who are you?"}]


@pytest.fixture(scope="module")
def hf_folder(tiny_model: Any, tiny_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fronts") / "hf"
    hf.save_hf(folder, tiny_model.config, tiny_model.state_dict(), torch.float32)
    tiny_tokenizer.save(folder)
    return folder


@pytest.mark.parametrize("text", [TEXT, "", "<|begin_of_text|>"])
def test_every_front_begins_a_text_with_the_same_ids(
    tiny_checkpoint: Path, hf_folder: Path, tmp_path: Path, text: str
) -> None:
    native = api.load(tiny_checkpoint)
    expected = native.text_ids(text)
    assert expected == [BOS, *native.tokenizer.encode(text)]
    assert api.load(hf_folder).text_ids(text) == expected
    for folder in (tiny_checkpoint, hf_folder):
        assert open_model(ServeConfig(), folder).text_ids(text) == expected
    if "<|" not in text:  # transformers takes the name of a special token in a text for the token
        assert AutoTokenizer.from_pretrained(hf_folder)(text)["input_ids"] == expected
    # Training: the place where one document ends is where the next begins.
    ids = torch.tensor([[5, END_OF_TEXT, *native.tokenizer.encode(text), END_OF_TEXT]]).numpy()
    batch = text_batch(ids, END_OF_TEXT, beginning(None, tmp_path))
    assert batch.input_ids[0, 1:].tolist() == expected
    assert batch.targets[0, 1:].tolist() == [*expected[1:], END_OF_TEXT]


def test_a_gguf_file_begins_as_its_checkpoint_does(tiny_checkpoint: Path, hf_folder: Path, tmp_path: Path) -> None:
    native = api.load(tiny_checkpoint)
    path = tmp_path / "tiny.gguf"
    write_files(hf_folder, native.config, {"F32": path}, name="tiny")
    with ExactLlama(path, 256, tmp_path / "log.txt") as llama:
        assert llama.tokenize(TEXT, specials=True) == native.text_ids(TEXT)
        assert llama.tokenize("", specials=True) == native.text_ids("")
        assert llama.tokenize(llama.render(TALK), specials=True) == native.prompt_ids(TALK)
    served = open_model(ServeConfig(tokenizer=hf_folder), path)
    try:
        assert served.text_ids(TEXT) == native.text_ids(TEXT)
    finally:
        served.close()


def test_rendered_chat_begins_with_one_bos_everywhere(tiny_checkpoint: Path, hf_folder: Path) -> None:
    native = api.load(tiny_checkpoint)
    expected = native.prompt_ids(TALK)
    assert expected[:2] == [BOS, native.tokenizer.im_start]
    assert expected.count(BOS) == 1
    theirs = AutoTokenizer.from_pretrained(hf_folder)
    assert theirs.apply_chat_template(TALK, add_generation_prompt=True, return_dict=False) == expected
    assert render_ids(native.tokenizer, TALK, generation=True)[0] == expected


def test_old_checkpoints_begin_as_they_were_trained(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Before checkpoints said how texts begin, a text began with the end of the one before."""
    old = tmp_path / "old"
    shutil.copytree(tiny_checkpoint, old)
    facts = json.loads((old / "trainer.json").read_text())
    del facts["begins_with"]
    (old / "trainer.json").write_text(json.dumps(facts))
    tokenizer = api.Tokenizer.load(old)
    assert api.text_beginning(old, tokenizer) == (END_OF_TEXT,)
    # A branch, and a run that was stopped, continue as they began.
    stage, shape = tmp_path / "pretrain", dcp.read_config(old)
    assert beginning(Parent(old, facts, shape), stage) == END_OF_TEXT
    assert beginning(Parent(old, {"begins_with": [BOS]}, shape), stage) == BOS
    assert beginning(None, stage) == BOS
    for made in ("checkpoints/step_00000010", "base"):
        (stage / made).mkdir(parents=True)
        (stage / made / "trainer.json").write_text(json.dumps(facts))
        assert beginning(None, stage) == END_OF_TEXT
        shutil.rmtree(stage)
