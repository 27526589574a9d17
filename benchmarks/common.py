"""What every benchmark writes next to its figures: the machine, the versions, and the load of others."""

from __future__ import annotations

import gc
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import psutil

from freehold.core.artifact import package_versions


def environment(*peers: str) -> dict[str, Any]:
    """Return the machine, the commit, and the versions of our packages and of the peers compared with."""
    cpu = Path("/proc/cpuinfo")
    names = [line.partition(":")[2].strip() for line in cpu.read_text().splitlines() if line.startswith("model name")]
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "system": platform.platform(),
        "commit": git.stdout.strip(),
        "versions": package_versions() | {peer: importlib.metadata.version(peer) for peer in peers},
    }


def machine_busy_s() -> float:
    """Return the core-seconds the whole machine has been busy since it started."""
    times = psutil.cpu_times()
    return sum(times) - times.idle - getattr(times, "iowait", 0.0)


def timed(step: Callable[[], object]) -> dict[str, float]:
    """Return the seconds of a step, and the cores that others kept busy meanwhile."""
    gc.collect()
    own, busy, start = sum(psutil.Process().cpu_times()[:2]), machine_busy_s(), time.perf_counter()
    step()
    seconds = time.perf_counter() - start
    foreign = (machine_busy_s() - busy) - (sum(psutil.Process().cpu_times()[:2]) - own)
    return {"seconds": seconds, "foreign_cores": max(foreign, 0.0) / seconds}


def interleaved(
    steps: Mapping[str, Callable[[], object]], rounds: int, pause_s: float = 0.0
) -> dict[str, list[dict[str, float]]]:
    """Time every step once a round, in turn, after a round that is not kept; `pause_s` between rounds is for others."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in steps}
    for number in range(rounds + 1):
        for name, step in steps.items():
            taken = timed(step)
            if number:
                found[name].append(taken)
        if number < rounds:
            time.sleep(pause_s)
    return found


def middle(values: Iterable[float]) -> dict[str, float]:
    """Return the median and the ends of some values."""
    values = sorted(values)
    return {"median": statistics.median(values), "least": values[0], "most": values[-1]}


def write(path: Path | None, result: dict[str, Any]) -> None:
    """Write a result as JSON, if a path was given."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
