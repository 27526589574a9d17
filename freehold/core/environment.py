"""What a process sets before it computes: how threads wait, and how memory is kept. Never imports torch."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import sys

# Read when a process starts (so by the stages of a walk) or loads PyTorch. Threads that wait by spinning for long make
# a step five times slower as soon as anything else runs; fresh pages for every large tensor cost a tenth of a step.
SETTINGS = {
    "GOMP_SPINCOUNT": "3000",
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(16 << 30),
}
# mallopt(3): the same two thresholds for a process that runs already. M_TRIM_THRESHOLD is -1, M_MMAP_THRESHOLD -3.
_MALLOC = {-1: 2**31 - 1, -3: 32 << 20}


def prepare() -> None:
    """Set what this process and those it starts compute best with; print, once, what came too late to be set."""
    if "torch" in sys.modules and "GOMP_SPINCOUNT" not in os.environ:
        _report_late()
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    _keep_memory()


@functools.cache
def _keep_memory() -> None:
    """Let malloc keep large blocks instead of asking the system for fresh pages each time (glibc only)."""
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        for option, value in _MALLOC.items():
            mallopt(option, value)


@functools.cache
def _report_late() -> None:
    """Print that PyTorch was loaded before the way its threads wait could be set."""
    print(
        "freehold: torch was imported before a model was loaded, so its threads wait by spinning, which slows them "
        "and others on a busy machine; call freehold.load before `import torch`, or set GOMP_SPINCOUNT=3000 for Python",
        file=sys.stderr,
    )
