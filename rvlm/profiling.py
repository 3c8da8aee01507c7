"""Where the time goes: named phases, timed without synchronising the device, read once at the end.

    with profiling.record() as phases:
        pgd(model, x, y)
    print(phases.totals())     # {"forward": (seconds, calls), "backward": ..., "step": ...}

On the CPU a steady clock is enough; work on a CUDA device is timed by events on its stream, whose times are read after
one synchronisation when the totals are asked for. Outside `record()` a phase costs one attribute check.

`peak_bytes` says what one call of something allocates at most, by torch's own allocators.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar

import torch

try:
    from rvlm._host import PhaseTimer
except ImportError:  # not compiled: same interface, same result
    PhaseTimer = None

__all__ = ["PyPhaseTimer", "peak_bytes", "phase", "record"]


class PyPhaseTimer:
    """Seconds and calls per phase. Phases nest; a phase's time includes what runs inside it. Twin of csrc/host.cpp."""

    def __init__(self) -> None:
        self._open: list[tuple[str, float]] = []
        self._totals: dict[str, tuple[float, int]] = {}

    def start(self, name: str) -> None:
        self._open.append((name, time.perf_counter()))

    def stop(self) -> None:
        if not self._open:
            raise RuntimeError("PhaseTimer.stop() without a matching start()")
        name, began = self._open.pop()
        seconds, calls = self._totals.get(name, (0.0, 0))
        self._totals[name] = (seconds + time.perf_counter() - began, calls + 1)

    def totals(self) -> dict[str, tuple[float, int]]:
        return dict(self._totals)


class _CudaPhaseTimer:
    """The same interface on CUDA events."""

    def __init__(self) -> None:
        self._open: list[tuple[str, torch.cuda.Event]] = []
        self._spans: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    def start(self, name: str) -> None:
        self._open.append((name, self._event()))

    def stop(self) -> None:
        name, began = self._open.pop()
        self._spans.append((name, began, self._event()))

    def totals(self) -> dict[str, tuple[float, int]]:
        torch.cuda.synchronize()
        totals: dict[str, tuple[float, int]] = {}
        for name, began, ended in self._spans:
            seconds, calls = totals.get(name, (0.0, 0))
            totals[name] = (seconds + began.elapsed_time(ended) / 1e3, calls + 1)
        return totals

    @staticmethod
    def _event() -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


_timer: ContextVar = ContextVar("rvlm_phase_timer", default=None)
_nothing = nullcontext()


@contextmanager
def record(device: str | torch.device = "cpu") -> Iterator["PyPhaseTimer"]:
    """Times every `phase` in the block; yields the timer, whose `totals()` maps a phase to (seconds, calls)."""
    on_gpu = torch.device(device).type == "cuda"
    timer = _CudaPhaseTimer() if on_gpu else (PhaseTimer or PyPhaseTimer)()
    token = _timer.set(timer)
    try:
        yield timer
    finally:
        _timer.reset(token)


def phase(name: str):
    """Context manager around one phase of work; does nothing unless `record` is active."""
    timer = _timer.get()
    return _nothing if timer is None else _timed(timer, name)


@contextmanager
def _timed(timer, name: str) -> Iterator[None]:
    timer.start(name)
    try:
        yield
    finally:
        timer.stop()


def peak_bytes(work: Callable[[], object], device: str | torch.device = "cpu") -> int:
    """The most that is allocated at one time while `work` runs, beyond what was before. What it holds itself, its
    weights, does not count, and on the CPU neither does what libraries take without asking torch's allocator."""
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as seen:
        work()
    changes = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(changes, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most
