"""Where the time goes: named phases, timed without synchronising the device, read once at the end.

    with profiling.record() as phases:
        pgd(model, x, y)
    print(phases.totals())     # {"forward": (seconds, calls), "backward": ..., "step": ...}
    for span in phases.spans():
        print(span.path, span.seconds, span.own, span.images_per_s)

Phases nest. On the CPU a steady clock is enough; work on a CUDA device is timed by events on its stream, whose times
are read after one synchronisation when they are asked for. What the CPU does while the device is busy costs no time by
these events, what the device waits for does. Outside `record()` a phase costs one look-up of a context variable.

`record(ranges=True)` also shows the phases to torch.profiler, as ranges around the ops; `record(flops=True)` counts the
floating-point operations of matrix products and convolutions in every phase (two for a product and its sum), attention
as its two products: those of the mathematics, whatever a kernel computes again.

`peak_bytes` says what one call of something allocates at most, `memory_peak` the most that was held so far.
"""

import dataclasses
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from contextvars import ContextVar

import torch
from torch.utils._python_dispatch import TorchDispatchMode

try:
    from rvlm._host import PhaseTimer
except ImportError:  # not compiled: same interface, same result
    PhaseTimer = None

try:
    import resource
except ImportError:  # Windows
    resource = None

__all__ = ["PyPhaseTimer", "Recording", "Span", "memory_peak", "peak_bytes", "phase", "record"]

BETWEEN = "\x1f"  # joins a path to a timer's key; names may hold anything else


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
    """The same interface on CUDA events, on the current stream of a device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._open: list[tuple[str, torch.cuda.Event]] = []
        self._spans: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    def start(self, name: str) -> None:
        self._open.append((name, self._event()))

    def stop(self) -> None:
        name, began = self._open.pop()
        self._spans.append((name, began, self._event()))

    def totals(self) -> dict[str, tuple[float, int]]:
        torch.cuda.synchronize(self.device)
        totals: dict[str, tuple[float, int]] = {}
        for name, began, ended in self._spans:
            seconds, calls = totals.get(name, (0.0, 0))
            totals[name] = (seconds + began.elapsed_time(ended) / 1e3, calls + 1)
        return totals

    def _event(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event


@dataclasses.dataclass(frozen=True)
class Span:
    """All calls of a phase at one place.

    Attributes:
        path: names of the phases around it and its own; () is the whole recording.
        seconds: of all calls, with what runs inside.
        own: those in no phase inside it. The own seconds of all spans add up to the whole.
        calls: how often it ran.
        images: that went through, as often as they did; 0 if nobody said.
        flops: floating-point operations, if they were counted.
    """

    path: tuple[str, ...]
    seconds: float
    own: float
    calls: int
    images: int
    flops: int

    @property
    def name(self) -> str:
        return self.path[-1] if self.path else "whole"

    @property
    def images_per_s(self) -> float:
        return self.images / max(self.seconds, 1e-9)


class Recording:
    """What `record` yields."""

    def __init__(self, timer, ranges: bool = False, counter=None) -> None:
        self._timer, self._counter = timer, counter
        self._path: tuple[str, ...] = ()
        self._images: dict[tuple[str, ...], int] = {}
        self._flops: dict[tuple[str, ...], int] = {}
        self._before: list[int] = []
        self._ranges: list[torch.profiler.record_function] | None = [] if ranges else None

    def start(self, name: str, images: int = 0) -> None:
        self._path = (*self._path, name)
        self._images[self._path] = self._images.get(self._path, 0) + images
        if self._ranges is not None:
            self._ranges.append(torch.profiler.record_function(name))
            self._ranges[-1].__enter__()
        if self._counter is not None:
            self._before.append(self._counter.flops)
        self._timer.start(BETWEEN.join(self._path))

    def stop(self) -> None:
        self._timer.stop()
        if self._counter is not None:
            counted = self._counter.flops - self._before.pop()
            self._flops[self._path] = self._flops.get(self._path, 0) + counted
        if self._ranges is not None:
            self._ranges.pop().__exit__(None, None, None)
        self._path = self._path[:-1]

    def totals(self) -> dict[str, tuple[float, int]]:
        """Phase -> (seconds, calls), wherever it ran."""
        totals: dict[str, tuple[float, int]] = {}
        for key, (seconds, calls) in self._timer.totals().items():
            if key:  # "" is the whole
                name = key.rpartition(BETWEEN)[2]
                before = totals.get(name, (0.0, 0))
                totals[name] = (before[0] + seconds, before[1] + calls)
        return totals

    def spans(self) -> list[Span]:
        """The whole first, then every phase in the order of its first start, each followed by those inside it.

        Raises:
            RuntimeError: the recording has not ended.
        """
        totals = self._timer.totals()
        if "" not in totals:
            raise RuntimeError("spans() of a recording that has not ended: ask behind the with block")
        found: list[Span] = []
        flops = self._flops | {(): 0 if self._counter is None else self._counter.flops}

        def visit(path: tuple[str, ...]) -> None:
            seconds, calls = totals[BETWEEN.join(path)]
            inside = [below for below in self._images if below[:-1] == path]
            own = seconds - sum(totals[BETWEEN.join(below)][0] for below in inside)
            found.append(Span(path, seconds, own, calls, self._images.get(path, 0), flops.get(path, 0)))
            for below in inside:
                visit(below)

        visit(())
        return found


_recording: ContextVar[Recording | None] = ContextVar("rvlm_recording", default=None)
_nothing = nullcontext()


@contextmanager
def record(device: str | torch.device = "cpu", *, ranges: bool = False, flops: bool = False) -> Iterator[Recording]:
    """Times every `phase` in the block.

    Args:
        device: whose work is timed.
        ranges: show the phases to torch.profiler too.
        flops: count floating-point operations too, which slows everything else down. Ops that are no products of
            matrices and no convolutions count none; so do fused ones: run those on `rvlm.ops.use_backend("reference")`.
    """
    device = torch.device(device)
    timer = _CudaPhaseTimer(device) if device.type == "cuda" else (PhaseTimer or PyPhaseTimer)()
    with ExitStack() as stack:
        recording = Recording(timer, ranges, stack.enter_context(_counting()) if flops else None)
        token = _recording.set(recording)
        stack.callback(_recording.reset, token)
        timer.start("")
        stack.callback(timer.stop)
        yield recording


class _Counter(TorchDispatchMode):
    """Adds up torch's formulas for the ops that run. FlopCounterMode does, too, and hooks into modules to say which of
    them ran what; its hooks forbid to ask autograd.grad for the gradient of a module's input, which attacks live on."""

    def __init__(self, formulas: dict) -> None:
        super().__init__()
        self.formulas, self.flops = formulas, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        formula = self.formulas.get(func._overloadpacket)
        if formula is None:
            with self:
                parts = func.decompose(*args, **kwargs)  # in inference mode ops arrive whole
            if parts is not NotImplemented:
                return parts
        out = func(*args, **kwargs)
        self.flops += 0 if formula is None else formula(*args, **kwargs, out_val=out)
        return out


@contextmanager
def _counting() -> Iterator[_Counter]:
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import flop_registry  # imports triton

    with _Counter(flop_registry) as counter, sdpa_kernel(SDPBackend.MATH):  # by its products
        yield counter


def phase(name: str, images: int = 0):
    """Context manager around one phase of work on so many images; does nothing unless `record` is active."""
    recording = _recording.get()
    return _nothing if recording is None else _timed(recording, name, images)


@contextmanager
def _timed(recording: Recording, name: str, images: int) -> Iterator[None]:
    recording.start(name, images)
    try:
        yield
    finally:
        recording.stop()


def memory_peak(device: str | torch.device = "cpu") -> int | None:
    """Bytes: of a CUDA device the most that tensors have held since `torch.cuda.reset_peak_memory_stats`, else the
    largest resident set of this process since it began, with Python and libraries; None where that is not known."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if resource is None:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 2**10


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
