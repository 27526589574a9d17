"""What every benchmark writes beside its figures: the machine, the versions, and the load of others."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
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


def write(path: Path | None, result: dict[str, Any]) -> None:
    """Write a result as JSON, if a path was given."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
