"""Fine-tuning on two processes is that of one: the stage itself, from the same Base and the same conversations."""

import shutil
from pathlib import Path

import pytest
import torch

from freehold.checkpoint import dcp
from freehold.core.artifact import Workspace
from freehold.core.config import fill
from freehold.core.document import Conversation, write_rows
from freehold.core.log import Log, read_metrics
from freehold.stages.align.config import AlignConfig
from freehold.stages.align.run import run as align

STEPS = 3
RIGHTS = dict.fromkeys(
    ("source_version", "path", "sha256", "wrapper_licence", "licence", "licence_evidence", "acquired", "teacher"), "x"
) | {"kind": "talk", "synthetic_from": ""}


@pytest.fixture(scope="module")
def inputs(tiny_model, tiny_tokenizer, tmp_path_factory):
    """What pretrain, tokenize and curate leave behind."""
    run = tmp_path_factory.mktemp("inputs")
    tiny_tokenizer.save(run / "tokenize" / "tokenizer")
    facts = {"step": 1, "tokens": 100, "stage_type": "Base", "tokenizer_sha256": tiny_tokenizer.sha256}
    (run / "pretrain").mkdir()
    dcp.save(run / "pretrain" / "base", {"model": tiny_model.state_dict()}, tiny_model.config, facts)
    talks = [
        Conversation(
            id=f"t{i}", source="talk", split="train",
            messages=[{"role": "user", "content": f"Say {i}"}, {"role": "assistant", "content": "fox " * (1 + i % 5)}],
            **RIGHTS,
        )
        for i in range(17)
    ]  # fmt: skip
    write_rows(run / "curate" / "conversations" / "talk.parquet", talks, Conversation)
    return {stage: run / stage for stage in ("pretrain", "tokenize", "curate")}


def fine_tune(inputs: dict[str, Path], folder: Path, parallel: dict[str, int], leads: bool | None = None):
    leads = torch.distributed.get_rank() == 0 if leads is None else leads
    config = {
        "batch": {"context_tokens": 64, "sequences": 4, "micro_sequences": 1},
        "optim": {"matrices": "adamw", "lr": 5e-3},
        "trainer": {"threads": 1, "dtype": "float32", "log_every_steps": 1, "checkpoint_every_steps": 2},
        "phases": {"sft": {"steps": STEPS, "checkpoint": "preview", "stage_type": "Preview"}},
        "parallel": parallel,
    }
    log = Log(folder if leads else None, quiet=True)
    align(fill(AlignConfig, config, "align"), Workspace(folder, "align", "t", 0, log, inputs, leads))


def apart(a, b):
    """Return the largest difference of tensors by name, relative to their norm."""
    assert a.keys() == b.keys()
    return max(float((a[n] - b[n]).norm() / b[n].norm().clamp_min(1e-6)) for n in b)


def assert_equal(run, alone):
    facts = [dcp.check(folder / "preview") for folder in (run, alone)]
    assert all(facts[0][key] == facts[1][key] for key in ("step", "tokens", "data_sum", "parent", "skipped_steps"))
    losses = [[row["loss/mean"] for row in read_metrics(folder / "metrics.jsonl")] for folder in (run, alone)]
    assert len(losses[0]) == STEPS
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert apart(*(dcp.load(folder / "preview")["model"] for folder in (run, alone))) < 1e-5
    assert (run / "trace.parquet").read_bytes() == (alone / "trace.parquet").read_bytes()


def test_two_processes_end_with_the_weights_of_one(ranks, inputs, tmp_path, tiny_model):
    fine_tune(inputs, tmp_path / "one", {}, leads=True)
    assert apart(dcp.load(tmp_path / "one" / "preview")["model"], tiny_model.state_dict()) > 0.01
    ranks(2).run(fine_tune, inputs, tmp_path / "two", {"shard": 2, "expert": 2})
    assert_equal(tmp_path / "two", tmp_path / "one")
    shutil.rmtree(tmp_path / "two" / "preview")
    shutil.rmtree(dcp.step_folder(tmp_path / "two" / "checkpoints", STEPS))
    fine_tune(inputs, tmp_path / "two", {}, leads=True)
    assert dcp.check(tmp_path / "two" / "preview")["processes"] == [[0, 2], [2, 1]]
    assert_equal(tmp_path / "two", tmp_path / "one")
