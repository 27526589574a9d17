"""Settings of PyTorch that a run makes, and states in its checkpoints."""

from __future__ import annotations

import os
from typing import Any

import torch

from freehold.kernels import cpu as kernels
from freehold.parallel.config import ParallelConfig
from freehold.trainer.job import Job


def describe(parallel: ParallelConfig, device: torch.device) -> str:
    """Return the device of this process, and who chose it."""
    name = f" ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else ""
    chosen = " (auto; no CUDA device for each process)" if device.type == "cpu" else ", chosen by auto"
    return f"{device}{name}{chosen if parallel.device == 'auto' else ''}"


def prepare(job: Job, device: torch.device, seed: int) -> dict[str, Any]:
    """Set threads, determinism, TF32 and the random seed; return what trainer.json records of them.

    `deterministic: auto` is on for CPUs, where it costs nothing measurable, and off for CUDA, where it replaces
    kernels by slower ones (scatter_add, index_add).
    """
    config = job.trainer
    deterministic = device.type == "cpu" if config.deterministic == "auto" else config.deterministic
    torch.manual_seed(seed)
    torch.set_num_threads(config.threads)
    if deterministic and device.type == "cuda":
        # cuBLAS repeats its bits only with a workspace of fixed size, and PyTorch refuses to multiply without.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(deterministic)
    # Filling fresh memory with NaN finds bugs of PyTorch's, not of a run; it is a pass over memory for each tensor.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = config.tf32
    return {
        "operators": kernels.operators(job.dtype) + ("+compile" if config.compile else ""),
        "device": device.type,
        "deterministic": deterministic,
        "tf32": config.tf32 and device.type == "cuda",
    }
