"""What this machine has, how fast it is, and what will be slow here and why. Imports torch only where it measures."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil

from freehold.core.artifact import package_versions
from freehold.core.machine import cpu_name
from freehold.core.table import Table
from freehold.core.version import VERSION

# Below these a run works and waits; each has its sentence in `findings`.
SLOW_DISK_BYTES_S = 50e6
LITTLE_DISK_BYTES = 10e9
LITTLE_MEMORY_BYTES = 4e9
BUSY_CORES = 0.5
DISK_PROBE_BYTES = 64 << 20
COPY_BYTES = 256 << 20
"""Larger than any cache of a processor."""


@dataclass
class Facts:
    """What was found; rates in bytes/s and FLOP/s, None where something is not there."""

    versions: dict[str, str]
    cpu: str
    cores: int
    usable_cores: float
    """What the affinity of the process and the container's quota leave of them."""
    memory_bytes: int
    free_memory_bytes: int
    disk: str
    free_disk_bytes: int
    disk_bytes_s: float | None
    busy_cores: float
    """Cores that others keep busy now."""
    nvidia_devices: int
    """Devices the system shows, whether PyTorch can use them or not."""
    compiler: str | None
    torch: dict[str, Any] = field(default_factory=dict)
    """What PyTorch says and does; empty without it."""


def examine(folder: Path) -> Facts:
    """Look at this machine and measure it; `folder` is where runs will be. Takes some seconds."""
    memory, place = psutil.virtual_memory(), existing(folder)
    busy = busy_cores()
    return Facts(
        versions={"freehold": VERSION, **package_versions()},
        cpu=cpu_name(),
        cores=os.cpu_count() or 1,
        usable_cores=usable_cores(),
        memory_bytes=memory.total,
        free_memory_bytes=memory.available,
        disk=str(place),
        free_disk_bytes=shutil.disk_usage(place).free,
        disk_bytes_s=disk_rate(place),
        busy_cores=busy,
        nvidia_devices=len(list(Path("/dev").glob("nvidia[0-9]*"))),
        compiler=next((name for name in (os.environ.get("CXX"), "c++", "g++", "clang++") if usable(name)), None),
        torch=examine_torch(),
    )


def usable(name: str | None) -> bool:
    """Return whether a command is on PATH."""
    return bool(name) and shutil.which(str(name).split()[0]) is not None


def existing(folder: Path) -> Path:
    """Return the nearest folder that is there."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())


def usable_cores() -> float:
    """Return the cores this process may use: its affinity, cut by the quota of its container (cgroup v2)."""
    cores = float(len(os.sched_getaffinity(0))) if hasattr(os, "sched_getaffinity") else float(os.cpu_count() or 1)
    quota = Path("/sys/fs/cgroup/cpu.max")
    if quota.is_file():
        most, _, period = quota.read_text().partition(" ")
        if most.isdigit():
            cores = min(cores, int(most) / int(period))
    return cores


def busy_cores(seconds: float = 0.5) -> float:
    """Return how many cores other processes keep busy."""
    return sum(share / 100 for share in psutil.cpu_percent(seconds, percpu=True))


def disk_rate(folder: Path) -> float | None:
    """Return the bytes a second that the disk takes until they are safe; None where nothing can be written."""
    block = os.urandom(1 << 20)
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            begun = time.monotonic()
            for _ in range(DISK_PROBE_BYTES >> 20):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
            return DISK_PROBE_BYTES / (time.monotonic() - begun)
    except OSError:
        return None


def examine_torch() -> dict[str, Any]:
    """Return PyTorch's devices and rates, and the operators of the CPU; empty where PyTorch cannot be imported."""
    try:
        import torch

        from freehold.kernels import cpu as kernels
        from freehold.model.device import choose_device
        from freehold.trainer.monitor import gemm_flops_per_s
    except ImportError as error:
        return {"error": str(error)}
    device = choose_device("auto", quiet=True)
    found: dict[str, Any] = {
        "cuda_build": torch.version.cuda,
        "device": str(device),
        "threads": torch.get_num_threads(),
        "operators": {name: kernels.describe(getattr(torch, name)) for name in ("bfloat16", "float32")},
    }
    found["gemm_flops_s"] = {
        name: gemm_flops_per_s(getattr(torch, name), "cpu", size=1024, seconds=0.5) for name in found["operators"]
    }
    found["memory_bytes_s"] = memory_rate("cpu")
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["gpu"] = {
            "name": properties.name,
            "devices": torch.cuda.device_count(),
            "memory_bytes": properties.total_memory,
            "gemm_flops_s": gemm_flops_per_s(torch.bfloat16, device, size=8192),
            "memory_bytes_s": memory_rate("cuda"),
        }
    return found


def memory_rate(device: str, seconds: float = 0.5) -> float:
    """Return the bytes a second that a large copy reads and writes together."""
    import torch

    source = torch.zeros(COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    target.copy_(source)  # the pages are there afterwards
    best, begun = float("inf"), time.monotonic()
    while time.monotonic() - begun < seconds:
        before = time.monotonic()
        target.copy_(source)
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.monotonic() - before)
    return 2 * COPY_BYTES / best


def findings(facts: Facts) -> list[str]:
    """Return what will be slow or fail here, and what helps; a sentence each."""
    found = [*_computing(facts), *_resources(facts)]
    return found or ["nothing stands out"]


def _computing(facts: Facts) -> list[str]:
    found, torch = [], facts.torch
    if not torch or "error" in torch:
        return [f"PyTorch cannot be imported, so nothing can be trained: {torch.get('error', 'not installed')}"]
    on_cpu = "gpu" not in torch
    if on_cpu and facts.nvidia_devices and not torch["cuda_build"]:
        found.append("there is an NVIDIA device, but this PyTorch is a CPU build: docs/install.md has that for CUDA")
    elif on_cpu and facts.nvidia_devices:
        found.append("there is an NVIDIA device, but PyTorch cannot use it: look at the driver (nvidia-smi)")
    for name, words in torch["operators"].items() if on_cpu else ():
        if words.startswith("PyTorch"):
            found.append(f"{name} runs without our CPU kernels, a step takes two to three times as long: {words[9:-1]}")
    if on_cpu and torch["gemm_flops_s"]["bfloat16"] < torch["gemm_flops_s"]["float32"]:
        found.append("bfloat16 products are slower than float32 here: set pretrain.trainer.dtype=float32")
    if on_cpu and torch["threads"] > facts.usable_cores:
        found.append(f"PyTorch has {torch['threads']} threads for {facts.usable_cores:g} cores: set OMP_NUM_THREADS")
    return found


def _resources(facts: Facts) -> list[str]:
    found = []
    if facts.busy_cores > BUSY_CORES:
        found.append(
            f"others keep {facts.busy_cores:.1f} of {facts.cores} cores busy: what was measured, and MFU, is of a busy "
            "machine"
        )
    if facts.usable_cores < facts.cores:
        found.append(f"this process may use {facts.usable_cores:g} of {facts.cores} cores (affinity or quota)")
    if facts.free_memory_bytes < LITTLE_MEMORY_BYTES:
        found.append(f"{facts.free_memory_bytes / 1e9:.1f} GB of memory are free: the laptop recipe needs about 2")
    if facts.disk_bytes_s is None:
        found.append(f"nothing can be written to {facts.disk}: choose another `runs_dir`")
    elif facts.disk_bytes_s < SLOW_DISK_BYTES_S:
        found.append(f"the disk takes {facts.disk_bytes_s / 1e6:.0f} MB/s: raise trainer.checkpoint_every_steps")
    if facts.free_disk_bytes < LITTLE_DISK_BYTES:
        found.append(f"{facts.free_disk_bytes / 1e9:.1f} GB of disk are free in {facts.disk}")
    return found


def as_json(facts: Facts) -> dict[str, Any]:
    """Return everything as JSON."""
    return {**asdict(facts), "findings": findings(facts)}


def as_text(facts: Facts) -> str:
    """Return a table, and what will be slow."""
    torch = facts.torch
    rows = [
        ["freehold, python", f"{facts.versions['freehold']}, {facts.versions['python']} ({sys.platform})"],
        ["torch", f"{facts.versions.get('torch', 'none')} (CUDA {torch.get('cuda_build') or 'none'})"],
        ["device of `auto`", torch.get("device", "none")],
        ["processor", f"{facts.cpu}, {facts.usable_cores:g} of {facts.cores} cores, {facts.busy_cores:.1f} busy"],
        ["memory", f"{facts.free_memory_bytes / 1e9:.1f} of {facts.memory_bytes / 1e9:.1f} GB free"],
        ["disk", f"{facts.free_disk_bytes / 1e9:.0f} GB free, {_rate(facts.disk_bytes_s, 1e6, 'MB/s')} ({facts.disk})"],
        ["compiler", facts.compiler or "none"],
        *([name, words] for name, words in torch.get("operators", {}).items()),
        *([f"{n} products", _rate(rate, 1e9, "GFLOP/s")] for n, rate in torch.get("gemm_flops_s", {}).items()),
    ]
    if "memory_bytes_s" in torch:
        rows.append(["memory copies", _rate(torch["memory_bytes_s"], 1e9, "GB/s")])
    if "gpu" in torch:
        gpu = torch["gpu"]
        rows.append(["GPU", f"{gpu['devices']} x {gpu['name']}, {gpu['memory_bytes'] / 2**30:.0f} GiB"])
        rates = _rate(gpu["gemm_flops_s"], 1e12, "TFLOP/s bf16"), _rate(gpu["memory_bytes_s"], 1e9, "GB/s")
        rows.append(["GPU rates", ", ".join(rates)])
    table = Table("This machine", ("what", "found"), rows, left=(0, 1)).text()
    return "\n".join([table, "What will be slow, and why:", *(f"- {sentence}" for sentence in findings(facts))])


def _rate(rate: float | None, unit: float, name: str) -> str:
    return "not measured" if rate is None else f"{rate / unit:,.0f} {name}"
