"""Clocks, quartiles and verdicts, shared by the benchmark files."""

import os
import time
from collections.abc import Callable

import torch
from torch import Tensor

QUICK = os.environ.get("RVLM_BENCH_QUICK") == "1"


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_per_call(fn: Callable[[], object], device: torch.device, calls: int = 3) -> float:
    """The shortest of a few calls, device work included; the first call, which may compile, is not counted."""
    fn()
    best = float("inf")
    for _ in range(calls):
        synchronize(device)
        began = time.perf_counter()
        fn()
        synchronize(device)
        best = min(best, time.perf_counter() - began)
    return best


def quartiles(values: list[float]) -> list[float]:
    """[lower quartile, median, upper quartile]."""
    return torch.tensor(values, dtype=torch.float64).quantile(torch.tensor([0.25, 0.5, 0.75]).double()).tolist()


def robust(model: Callable[[Tensor], Tensor], x_adv: Tensor, y: Tensor) -> Tensor:
    """bool [B], what the model still gets right."""
    with torch.no_grad():
        return model(x_adv).argmax(1) == y
