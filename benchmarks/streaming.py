"""Measure the streaming export on a synthetic checkpoint in the layout of Trinity Large, cut to fit the disk.

    python benchmarks/streaming.py --gigabytes 6 --types Q4_K_M,Q8_0 --folder /tmp/large

The folder gets config.json, a tokenizer and sharded safetensors with all tensor names of a few layers at Large's full
widths (hidden 3072, experts 3072 wide). `freehold export` then runs in a process of its own under RLIMIT_DATA; it is
killed once in the middle and repeated. Reported: seconds, MB/s, peak resident memory of the process tree, bytes read
again after the kill, hashes with and without the kill, and by arithmetic the hours for Large. The files are deleted.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from freehold.core.log import Log
from freehold.model.config import PRESETS, ModelConfig, to_hf_dict
from freehold.stages.export import gguf_writer, samples
from freehold.tokenizer import bpe

SHARD_BYTES = 2_000_000_000
LIMIT_BYTES = 1_000_000_000


def shape(gigabytes: float) -> ModelConfig:
    """Return Large with as many experts a layer as fit: one dense layer, three with experts, all widths full."""
    large = PRESETS["large"].model_dump()
    layers = {"num_hidden_layers": 4, "num_dense_layers": 1, "layer_types": None, "vocab_size": 32_000}
    expert = 3 * large["hidden_size"] * large["moe_intermediate_size"] * 2 * 3
    rest = sum(np.prod(s) for s in gguf_writer.tensor_shapes(config(large, layers, 4)).values()) * 2 - 4 * expert
    experts = max(4, int((gigabytes * 1e9 - rest) / expert))
    return config(large, layers, experts)


def config(large: dict[str, Any], layers: dict[str, Any], experts: int) -> ModelConfig:
    """Return a shape of Large with other layers and experts."""
    fields = {key: value for key, value in {**large, **layers, "num_experts": experts}.items() if value is not None}
    return ModelConfig.model_validate(fields)


def write_model(folder: Path, model: ModelConfig) -> int:
    """Write random bfloat16 weights slab by slab as sharded safetensors; return their bytes."""
    folder.mkdir(parents=True)
    names = sorted({s for t in gguf_writer.plan_tensors(model) for s in t.sources})
    groups: list[list[str]] = [[]]
    filled = total = 0
    for name in names:
        size = bytes_of(model, name)
        if filled + size > SHARD_BYTES and groups[-1]:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled, total = filled + size, total + size
    weight_map = {}
    for number, group in enumerate(groups, 1):
        file = f"model-{number:05}-of-{len(groups):05}.safetensors"
        write_shard(folder / file, model, group, number)
        weight_map |= dict.fromkeys(group, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(to_hf_dict(model)))
    tokenizer = bpe.train([*samples.KINDS.values(), *samples.SCRIPTS.values()] * 2, 600, Log(quiet=True))
    tokenizer.save(folder)
    return total


def bytes_of(model: ModelConfig, name: str) -> int:
    """Return the size of a tensor: matrices in bfloat16, vectors in float32."""
    size = gguf_writer.source_shape(model, name)
    return int(np.prod(size)) * (2 if len(size) > 1 else 4)


def write_shard(path: Path, model: ModelConfig, names: list[str], seed: int) -> None:
    """Write one safetensors file of bell-shaped weights, 16 MB at a time."""
    header, at = {}, 0
    for name in names:
        size = gguf_writer.source_shape(model, name)
        end = at + bytes_of(model, name)
        header[name] = {"dtype": "BF16" if len(size) > 1 else "F32", "shape": size, "data_offsets": [at, end]}
        at = end
    head = json.dumps(header).encode()
    random = np.random.default_rng(seed)
    pool = (random.standard_normal(1 << 22, dtype=np.float32) * 0.02).view(np.uint32) >> 16
    narrow = pool.astype(np.uint16)
    with path.open("wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        for name in names:
            left = bytes_of(model, name)
            if len(gguf_writer.source_shape(model, name)) == 1:
                file.write(np.ones(left // 4, np.float32).tobytes())
                continue
            while left:
                part = np.roll(narrow, int(random.integers(1 << 22)))[: left // 2]
                file.write(part.tobytes())
                left -= part.nbytes


def tree_bytes(pid: int) -> int:
    """Return the resident bytes of a process and its children."""
    total, waiting = 0, [pid]
    while waiting:
        one = waiting.pop()
        try:
            status = Path(f"/proc/{one}/status").read_text()
            children = Path(f"/proc/{one}/task/{one}/children").read_text()
        except OSError:
            continue
        total += sum(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmRSS"))
        waiting += [int(child) for child in children.split()]
    return total


def export(model: Path, output: Path, types: str, kill_after_s: float = 0) -> dict[str, Any]:
    """Run the command under the limit; return seconds, peak and its answer (none when it was killed)."""
    command = [sys.executable, "-m", "freehold.cli", "export", str(model), "--types", types, "--output", str(output)]
    command += ["--name", "Large", "--json"]

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_DATA, (LIMIT_BYTES, LIMIT_BYTES))

    start, peak = time.monotonic(), 0
    process = subprocess.Popen(command, stdout=subprocess.PIPE, preexec_fn=limit)
    while process.poll() is None:
        peak = max(peak, tree_bytes(process.pid))
        if kill_after_s and time.monotonic() - start > kill_after_s:
            process.send_signal(signal.SIGKILL)
        time.sleep(0.05)
    assert process.stdout is not None
    text = process.stdout.read()
    answer = json.loads(text) if text else {}
    return {"seconds": time.monotonic() - start, "peak_rss_bytes": peak, "rc": process.returncode, "answer": answer}


def hashes(folder: Path) -> dict[str, str]:
    """Return the hash of every GGUF file of a folder."""
    found = {}
    for path in sorted(folder.glob("*.gguf")):
        with path.open("rb") as file:
            found[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    free = shutil.disk_usage("/tmp").free / 1e9
    parser.add_argument("--gigabytes", type=float, default=min(20.0, free / 3), help="of the synthetic checkpoint")
    parser.add_argument("--types", default="Q4_K_M,Q8_0")
    parser.add_argument("--folder", type=Path, default=Path("/tmp/freehold-streaming"))
    parser.add_argument("--out", type=Path, help="write the result there as JSON")
    args = parser.parse_args()
    shutil.rmtree(args.folder, ignore_errors=True)
    try:
        model = shape(args.gigabytes)
        size = write_model(args.folder / "model", model)
        straight = export(args.folder / "model", args.folder / "a", args.types)
        wanted = hashes(args.folder / "a")
        shutil.rmtree(args.folder / "a")
        killed = export(args.folder / "model", args.folder / "b", args.types, kill_after_s=straight["seconds"] * 0.8)
        resumed = export(args.folder / "model", args.folder / "b", args.types)
        large = 2 * 398_635_272_192
        speed = straight["answer"]["bytes_read"] / straight["answer"]["seconds"]
        result = {
            "model_bytes": size,
            "experts": model.num_experts,
            "types": args.types,
            "cores": len(os.sched_getaffinity(0)),
            "seconds": round(straight["seconds"], 1),
            "read_mb_s": round(speed / 1e6, 1),
            "peak_rss_mb": round(max(r["peak_rss_bytes"] for r in (straight, killed, resumed)) / 1e6, 1),
            "killed_rc": killed["rc"],
            "bytes_read_after_the_kill": resumed["answer"].get("bytes_read"),
            "same_bytes_after_the_kill": hashes(args.folder / "b") == wanted,
            "large_bytes_read": large,
            "large_hours_at_this_speed": round(large / speed / 3600, 2),
        }
    finally:
        shutil.rmtree(args.folder, ignore_errors=True)
    print(json.dumps(result, indent=1))
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
