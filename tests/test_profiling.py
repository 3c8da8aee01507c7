"""Phases: what they add up to, what they cost nobody who listens, what torch.profiler sees of them; FLOPs; memory."""

import itertools
import time

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from rvlm import profiling
from rvlm.attacks import pgd, square


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 32), nn.ReLU(), nn.Linear(32, 5))


def images():
    return torch.rand(6, 3, 8, 8), torch.arange(6) % 5


@pytest.mark.parametrize("timer", ["C++", "Python"])
def test_own_times_add_up_to_the_whole(timer, monkeypatch):
    if timer == "Python":
        monkeypatch.setattr(profiling, "PhaseTimer", None)
    elif profiling.PhaseTimer is None:
        pytest.skip("rvlm._host is not compiled")
    with profiling.record() as phases:
        for _ in range(2):
            with profiling.phase("outer, 8/255", 4):
                with profiling.phase("b", 3):
                    time.sleep(0.002)
                with profiling.phase("a"):
                    pass
        with profiling.phase("b", 5):
            pass
    spans = phases.spans()
    assert [(s.path, s.calls, s.images) for s in spans] == [
        ((), 1, 0), (("outer, 8/255",), 2, 8), (("outer, 8/255", "b"), 2, 6), (("outer, 8/255", "a"), 2, 0),
        (("b",), 1, 5),
    ]  # fmt: skip
    whole, outer, inner, *_ = spans
    assert sum(s.own for s in spans) == pytest.approx(whole.seconds) and all(s.own >= 0 for s in spans)
    assert whole.seconds >= outer.seconds >= inner.seconds >= 0.004 and whole.name == "whole"
    assert outer.own == pytest.approx(outer.seconds - inner.seconds - spans[3].seconds)
    assert outer.images_per_s == pytest.approx(8 / outer.seconds)
    assert {name: calls for name, (_, calls) in phases.totals().items()} == {"outer, 8/255": 2, "a": 2, "b": 3}


def test_spans_are_those_of_a_recording_that_has_ended():
    with profiling.record() as phases, profiling.phase("a"):
        with pytest.raises(RuntimeError, match="has not ended"):
            phases.spans()
    assert len(phases.spans()) == 2


def test_an_error_closes_its_phases():
    with pytest.raises(KeyError), profiling.record() as phases:
        with profiling.phase("a"), profiling.phase("b"):
            raise KeyError
    assert [s.path for s in phases.spans()] == [(), ("a",), ("a", "b")]
    assert profiling.phase("c") is profiling.phase("d"), "nobody listens any more"


def test_a_phase_costs_next_to_nothing_when_nobody_listens():
    def seconds(work, calls=20000):
        began = time.perf_counter()
        for _ in itertools.repeat(None, calls):
            work()
        return (time.perf_counter() - began) / calls

    def silent():
        with profiling.phase("step", 8):
            pass

    x = torch.zeros(4)
    assert min(seconds(silent) for _ in range(5)) < min(seconds(lambda: torch.add(x, x)) for _ in range(5))


def test_attacks_say_how_many_images_went_through(model):
    x, y = images()
    with profiling.record() as phases:
        pgd(model, x, y, steps=3)
        found = square(model, x, y, queries=4, return_info=True)
    spans = {s.path: s for s in phases.spans()}
    assert spans["backward",].images == 18 and spans["step",].calls == 3 + 4
    assert spans["forward",].images == 18 + found.forwards, "the last image of pgd is not scored"


class FakeEvent:
    """A CUDA event on a clock that says 1 ms more at every event."""

    made, streams, read = 0, [], 0

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self, stream):
        FakeEvent.made += 1
        FakeEvent.streams.append(stream)
        self.at = FakeEvent.made

    def elapsed_time(self, other):
        assert FakeEvent.read, "events are read after a synchronisation"
        return float(other.at - self.at)


def test_on_cuda_events_are_read_once_and_nothing_waits_before(monkeypatch):
    waited = []

    def synchronize(device):
        waited.append(device)
        FakeEvent.read = 1

    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    with profiling.record("cuda:1") as phases:
        with profiling.phase("a", 2), profiling.phase("b"):
            pass
        with profiling.phase("a", 2):
            pass
    assert not waited
    whole, a, b = phases.spans()
    assert [round(1e3 * s.seconds) for s in (whole, a, b)] == [7, 4, 1] and waited == [torch.device("cuda:1")]
    assert round(1e3 * whole.own) == 3 and a.calls == 2
    assert set(FakeEvent.streams) == {"stream of cuda:1"}, "not those of whatever device is current"


def test_operations_are_those_of_the_products(model):
    x, _ = images()
    layers = 2 * 6 * (192 * 32 + 32 * 5)
    leaf = x.requires_grad_()
    with profiling.record(flops=True) as phases:
        with profiling.phase("forward", 6):
            out = model(leaf)
        with profiling.phase("gradient of the pixels", 6):
            torch.autograd.grad(out.sum(), leaf, retain_graph=True)
        with profiling.phase("all"), profiling.phase("all gradients", 6):
            out.sum().backward()
        with torch.inference_mode(), profiling.phase("inference", 6):
            model(x)
    found = {s.path: s.flops for s in phases.spans()}
    assert found["forward",] == found["inference",] == layers
    assert found["gradient of the pixels",] == layers, "autograd.grad asks no weight"
    assert found["all",] == found["all", "all gradients"] == 2 * layers
    assert found[()] == 5 * layers


def test_operations_of_attention_do_not_depend_on_the_kernel():
    q = torch.rand(2, 3, 7, 4, requires_grad=True)
    product = 2 * 2 * 3 * 7 * 7 * 4
    with profiling.record(flops=True) as phases:
        with profiling.phase("forward"):
            out = F.scaled_dot_product_attention(q, q, q)
        with profiling.phase("backward"):
            out.sum().backward()
    assert [s.flops for s in phases.spans()] == [6 * product, 2 * product, 4 * product], "nothing is computed twice"


def test_the_profiler_sees_phases_around_ops(model):
    x, y = images()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        with profiling.record(ranges=True), profiling.phase("attack"):
            pgd(model, x, y, steps=2)
        with profiling.record(), profiling.phase("unseen"):
            pass
    events = {event.name: event for event in seen.events()}
    assert events["forward"].is_user_annotation and events["forward"].cpu_parent.name == "attack"
    above, names = events["aten::addmm"], set()
    while above is not None:
        names.add(above.name)
        above = above.cpu_parent
    assert {"forward", "attack"} <= names and "unseen" not in events


def test_memory_is_held_at_least_once(monkeypatch):
    before = profiling.memory_peak()
    held = torch.ones(8 * 2**20)  # 32 MB
    assert profiling.memory_peak() >= max(before, held.nbytes)
    monkeypatch.setattr(profiling, "resource", None)
    assert profiling.memory_peak() is None


def test_peak_is_the_most_at_one_time_beyond_what_was_there():
    held = torch.empty(1000, 1000)

    def work():
        first = torch.empty(1000, 500)
        second = held + 1  # 6 MB with the first
        del first, second
        return torch.empty(1000, 250)

    assert profiling.peak_bytes(work) == pytest.approx(6e6, rel=1e-3)
    assert profiling.peak_bytes(lambda: None) == 0
