"""The most floating-point operations per second that a device can do, which `rvlm profile` holds what it sees against.

From the table below where the device is in it: dense products of matrices at boost clock, by the maker's own papers,
10^12 a second. Elsewhere it is measured with one large product, and the answer says so.
"""

import re
from typing import NamedTuple

import torch

from rvlm import profiling

__all__ = ["Peak", "peak_of"]

# Name by CUDA; fp32 without tensor cores, tf32, and bf16 or fp16 with sums in fp32; where the figures are from. A slice
# of a device (MIG) has another name and is measured.
DEVICES = (
    (r"NVIDIA (H100 80GB HBM3|H200|GH200 \d+GB)", 66.9, 494.7, 989.4, "H100 white paper, SXM5"),
    (r"NVIDIA H100 PCIe", 51.2, 378.0, 756.0, "H100 white paper, PCIe"),
    (r"NVIDIA H(100|200) NVL", 60.0, 417.5, 835.5, "H100 NVL and H200 NVL data sheets, half of the sparse figures"),
    (r"(NVIDIA )?A100(-SXM4-\d+GB|-PCIE-\d+GB| \d+GB PCIe)", 19.5, 156.0, 312.0, "A100 data sheet"),
    (r"(NVIDIA )?A40", 37.4, 74.8, 149.7, "A40 data sheet"),
    (r"(NVIDIA )?A10", 31.2, 62.5, 125.0, "A10 data sheet"),
    (r"NVIDIA L40S", 91.6, 183.0, 362.05, "L40S data sheet"),
    (r"NVIDIA L40", 90.5, 90.5, 181.05, "L40 data sheet"),
    (r"NVIDIA L4", 30.3, 60.0, 121.0, "L4 data sheet, half of the sparse figures"),
    (r"NVIDIA GeForce RTX 4090", 82.6, 82.6, 165.2, "Ada white paper, appendix A"),
    (r"NVIDIA GeForce RTX 3090", 35.6, 35.6, 71.0, "GA102 white paper, appendix A"),
)
COLUMNS = {"fp32": 1, "tf32": 2, "bf16": 3, "fp16": 3}
DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SIDE = {"cpu": 1024, "cuda": 8192}  # of the matrices that are multiplied
TURNS = 5


class Peak(NamedTuple):
    """Operations per second, for which precision, and where that is from."""

    flops_per_s: float
    precision: str
    source: str


def peak_of(device: torch.device, precision: str) -> Peak:
    """The peak of a device for products in "fp32", "tf32", "bf16" or "fp16"; fp32 is tf32 where torch may use it."""
    if device.type == "cuda" and precision == "fp32" and torch.backends.cuda.matmul.fp32_precision == "tf32":
        precision = "tf32"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    for row in DEVICES:
        if re.fullmatch(row[0], name):
            return Peak(1e12 * row[COLUMNS[precision]], precision, row[4])
    side = SIDE.get(device.type, SIDE["cpu"])
    where = name or f"this CPU, threads: {torch.get_num_threads()}"
    source = f"measured now by the best of {TURNS} products of {side} x {side} matrices; {where}"
    return Peak(_measured(device, DTYPES[precision], side), precision, source)


def _measured(device: torch.device, dtype: torch.dtype, side: int) -> float:
    a, b = torch.randn(2, side, side, device=device).to(dtype)
    a @ b  # what is slow once
    seconds = []
    for _ in range(TURNS):
        with profiling.record(device) as turn:
            a @ b
        seconds.append(turn.spans()[0].seconds)
    return 2 * side**3 / min(seconds)
