"""What one device of each kind can do, as its maker or a price list states it.

Rates are dense (no sparsity) bf16; links are one direction, per device: `node` inside a machine, `network` between
machines. Specifications: A100, H100, H200 data sheets as listed in acecloud.ai/blog/nvidia-b200-vs-h200-h100-a100;
B200, B300: datacrunch.io/blog/nvidia-b300-vs-b200-complete-gpu-comparison-to-date (BF16 2.25 PFLOP/s dense both).
Prices are on-demand, May 2026: mercatus-ai.com/blog/cloud-gpu-pricing (A100, H200), aimultiple.com/gpu-index (H100),
lyceum.technology/magazine/nvidia-b200-gpu-cloud-pricing-2026 (B200). Change them: every one is an input.
"""

from __future__ import annotations

from typing import NamedTuple

GB = 1e9
"""Bytes; memory is printed in GiB where a tool of the vendor would (2**30) and in GB for files."""

MFU_ERROR = 0.2
"""How wrong the share of the peak is that arithmetic reaches, relative; ours against published runs (docs/plan.md)."""
FACILITY = 1.5
"""Watts at the meter for a watt of device: host, network, cooling."""
RESTART_S = 600.0
"""From a stop to the first new step."""


class Device(NamedTuple):
    """One accelerator (or this machine's CPU) and its share of the machine around it."""

    flops: float
    """Dense bf16 FLOP/s."""
    memory_bytes: float
    memory_bytes_s: float
    node_bytes_s: float
    network_bytes_s: float
    per_node: int
    watts: float
    usd_hour: float
    note: str = ""


DEVICES: dict[str, Device] = {
    "a100": Device(312e12, 80 * GB, 2039 * GB, 300 * GB, 25 * GB, 8, 400, 1.30),
    "h100": Device(989e12, 80 * GB, 3350 * GB, 450 * GB, 50 * GB, 8, 700, 2.95),
    # H100 with NVLink cut to 400 GB/s; DeepSeek-V3's own price assumption (arXiv 2412.19437, table 1).
    "h800": Device(989e12, 80 * GB, 3350 * GB, 200 * GB, 50 * GB, 8, 700, 2.00, "price: DeepSeek's own assumption"),
    "h200": Device(989e12, 141 * GB, 4800 * GB, 450 * GB, 50 * GB, 8, 700, 4.00),
    "b200": Device(2250e12, 180 * GB, 7700 * GB, 900 * GB, 50 * GB, 8, 1000, 5.25),
    "b300": Device(2250e12, 288 * GB, 8000 * GB, 900 * GB, 100 * GB, 8, 1100, 6.00, "price: upper end of the B200's"),
    # Two cores of an AMD EPYC (Zen 4), measured: 400 GFLOP/s bf16 GEMM, 34 GB/s read. Links, watts and price are
    # guesses for a rented pair of cores; nothing but this machine's own plans depends on them.
    "cpu": Device(400e9, 24 * GB, 34 * GB, 5 * GB, 1 * GB, 1, 20, 0.08, "power, price and links are guesses"),
}

INTERRUPTIONS_PER_DEVICE_HOUR = 419 / (54 * 24 * 16384)
"""Unexpected interruptions of Llama 3 405B: 419 in 54 days on 16,384 H100 (arXiv 2407.21783, section 3.3.4)."""
