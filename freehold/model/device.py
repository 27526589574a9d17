"""Which device computes: the one place that reads `auto`."""

from __future__ import annotations

import os
import sys
from typing import Literal

import torch

from freehold.core.errors import ConfigError

Device = Literal["auto", "cpu", "cuda"]


def choose_device(name: Device, where: str = "device", *, quiet: bool = False) -> torch.device:
    """Return the device to compute on; `auto` takes CUDA where there is some, and prints what it chose.

    `where` is the setting an error names. A process of several takes the CUDA device of its LOCAL_RANK.
    Raises ConfigError when CUDA is asked for and this process has none.
    """
    number, found = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    # All ranks of a machine must choose the same kind, also those whose number would have a device.
    last = max(number, int(os.environ.get("LOCAL_WORLD_SIZE", "1")) - 1)
    if name == "cuda" and number >= found:
        raise ConfigError(
            "there is no CUDA device for this process",
            where=where,
            found=f"{found} CUDA devices, PyTorch {torch.__version__}",
            expected=f"one for LOCAL_RANK {number}",
            todo=f"{where}=auto or cpu; a CUDA build of PyTorch if this machine has a GPU",
        )
    cuda = name == "cuda" or (name == "auto" and last < found)
    device = torch.device("cuda", number) if cuda else torch.device("cpu")
    if name == "auto" and not quiet:
        what = torch.cuda.get_device_name(device) if cuda else "no CUDA device was found"
        print(f"device: {device} (auto; {what})", file=sys.stderr)
    return device
