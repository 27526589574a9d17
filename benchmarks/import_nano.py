"""Import a folder in Nano's exact layout with random weights: seconds, and memory of the first answer.

    python benchmarks/import_nano.py --folder /big/disk             all of Nano: 12.2 GB on disk, some 14 GB of memory
    python benchmarks/import_nano.py --folder /big/disk --layers 8  a slice, to try the script

Goals on two cores: import in at most 120 s, and an answer in at most 14 GB. The folder is written shard by shard, so
writing needs little memory. Without a tokenizer: 8 ids are continued by 8.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from freehold.checkpoint.hf import INDEX, key_table
from freehold.core.artifact import write_json
from freehold.model.config import ModelConfig, parameter_counts, to_hf_dict

SHARD_BYTES = 1_000_000_000


def write_folder(folder: Path, config: ModelConfig) -> None:
    """Write random bfloat16 weights under the published names, a shard in memory at a time."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    weight_map: dict[str, str] = {}
    tensors: dict[str, torch.Tensor] = {}
    size = number = 0

    def flush() -> None:
        nonlocal size, number
        number += 1
        name = f"model-{number:05}.safetensors"
        save_file(tensors, folder / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, name))
        tensors.clear()
        size = 0

    for entry in key_table(config):
        for name, shape in entry.shapes().items():
            kind = torch.bfloat16 if len(shape) > 1 else torch.float32
            tensors[name] = (torch.randn(shape, generator=generator) * 0.02).to(kind)
            size += tensors[name].nbytes
            if size > SHARD_BYTES:
                flush()
    flush()
    write_json(folder / INDEX, {"metadata": {}, "weight_map": weight_map})
    write_json(folder / "config.json", to_hf_dict(config))


ASK = """
import resource, sys, time
from freehold import api
from freehold.infer.sampler import Sampling
start = time.monotonic()
loaded = api.load(sys.argv[1], dtype="bfloat16", limit_tokens=256, answers_only=True)
opened = time.monotonic() - start
loaded.engine.generate([[3, 4, 5, 6, 7, 8, 9, 10]], Sampling(max_tokens=8))
total = time.monotonic() - start
print(opened, total, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6)
"""


def main() -> int:
    """Write, import, ask in a process of its own; print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="scratch folder; twice the model must fit")
    parser.add_argument("--layers", type=int, default=56)
    args = parser.parse_args()
    config = ModelConfig(preset="nano", num_hidden_layers=args.layers)
    source, runs = args.folder / "nano-random", args.folder / "runs"
    shutil.rmtree(source, ignore_errors=True)
    write_folder(source, config)
    command = [sys.executable, "-m", "freehold.cli", "import", str(source), "--name", "nano", "--licence", "Apache-2.0"]
    command += ["--evidence", "random weights", "--clean", "--quiet", f"runs_dir={runs}"]
    start = time.monotonic()
    subprocess.run(command, check=True)
    imported = time.monotonic() - start
    said = subprocess.run(
        [sys.executable, "-c", ASK, str(runs / "nano")], check=True, capture_output=True, text=True
    ).stdout
    opened, answered, peak = map(float, said.splitlines()[-1].split())
    child = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6
    counts = parameter_counts(config)
    print(
        json.dumps(
            {
                "parameters": counts["total"], "layers": args.layers, "import_s": round(imported, 1),
                "open_s": round(opened, 1), "answer_s": round(answered, 1), "answer_peak_gb": round(peak, 2),
                "largest_child_gb": round(child, 2),
            }
        )
    )  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
