"""The doctor: what it measures here, and the sentence for each thing that is slow or missing."""

import dataclasses
import json
import math
import re
import time

import pytest

from freehold.cli.main import main
from freehold.run.doctor import Facts, as_text, findings
from freehold.trainer.callbacks import mfu_words

TORCH = {
    "cuda_build": None, "device": "cpu", "threads": 2, "memory_bytes_s": 3e10,
    "operators": {"bfloat16": "CPU kernels (x)", "float32": "CPU kernels (x)"},
    "gemm_flops_s": {"bfloat16": 4e11, "float32": 2e11},
}  # fmt: skip
WELL = Facts(
    versions={"freehold": "1", "python": "3.11", "torch": "2.13"}, cpu="a CPU", cores=2, usable_cores=2,
    memory_bytes=16 << 30, free_memory_bytes=12 << 30, disk="/", free_disk_bytes=100 << 30, disk_bytes_s=5e8,
    busy_cores=0.0, nvidia_devices=0, compiler="c++", torch=TORCH,
)  # fmt: skip


def test_doctor_measures_this_machine_in_time(tmp_path, capsys):
    begun = time.monotonic()
    assert main(["doctor", "--json", "--runs", str(tmp_path / "runs")]) == 0
    assert time.monotonic() - begun < 20
    found = json.loads(capsys.readouterr().out)
    assert found["torch"]["gemm_flops_s"]["float32"] > 1e9
    assert found["torch"]["memory_bytes_s"] > 1e8
    assert found["disk"] == str(tmp_path)
    assert found["findings"]
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({}, "nothing stands out"),
        ({"nvidia_devices": 1}, "CPU build"),
        ({"nvidia_devices": 1, "torch": {**TORCH, "cuda_build": "13.0"}}, "nvidia-smi"),
        ({"torch": {**TORCH, "operators": {"bfloat16": "PyTorch (no C++ compiler was found)"}}}, "no C.. compiler"),
        ({"torch": {**TORCH, "gemm_flops_s": {"bfloat16": 1e11, "float32": 2e11}}}, "dtype=float32"),
        ({"torch": {"error": "No module named 'torch'"}}, "nothing can be trained: No module"),
        ({"busy_cores": 1.5}, "others keep 1.5 of 2 cores busy"),
        ({"usable_cores": 0.5}, "0.5 of 2 cores"),
        ({"free_memory_bytes": 1 << 30}, "GB of memory are free"),
        ({"disk_bytes_s": 1e7}, "checkpoint_every_steps"),
        ({"disk_bytes_s": None}, "runs_dir"),
        ({"free_disk_bytes": 1 << 30}, "GB of disk are free"),
    ],
)
def test_each_fault_has_its_sentence(changes, says):
    facts = dataclasses.replace(WELL, **changes)
    assert any(re.search(says, sentence) for sentence in findings(facts))
    assert "What will be slow" in as_text(facts)


def test_a_share_above_all_is_unknown():
    assert mfu_words(0.42) == "MFU 42%"
    assert mfu_words(math.nan) == "MFU unknown on a busy machine"
