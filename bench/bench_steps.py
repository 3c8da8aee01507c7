"""The step ops against the lines they replace: eager, and the same lines under torch.compile.

Every cell first has to agree with the reference on its own inputs. "cold" cells rotate their inputs through more memory
than the caches hold, as if a large model had run between two steps; "warm" ones (CPU only) use the same inputs again
and again, as after a model that fits in the caches. A real attack lies between the two. `bytes` is the least that the
op must move, so GB/s and the fraction of the copy ceiling are of useful bytes for every implementation. The eager lines
timed against themselves are the control: how far their ratio is from 1 is what a ratio is worth.
"""

import itertools
import re
import time
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from measure import QUICK
from peers import steps as eager
from torch import Tensor

from rvlm import ops

ON_GPU = torch.cuda.is_available()
if QUICK:
    SHAPES = [(2, 3, 32, 32), (1, 3, 17, 19)]
elif ON_GPU:
    SHAPES = [(batch, 3, 224, 224) for batch in (128, 1, 8, 64, 512)]
else:
    SHAPES = [(16, 3, 224, 224), (128, 3, 32, 32), (1, 3, 224, 224), (1, 3, 32, 32)]
BACKENDS = ["triton", "cpp", "reference"] if ON_GPU else ["cpp", "reference"]
EPS, ALPHA = {"linf": 8 / 255, "l2": 1.0}, {"linf": 2 / 255, "l2": 0.25}
ROTATE = 2**20 if QUICK else 128 * 2**20  # bytes; cold inputs go round in at least this much

by_shape = pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
by_cache = pytest.mark.parametrize("cache", ["cold"] if ON_GPU or QUICK else ["cold", "warm"])
by_impl = pytest.mark.parametrize("impl", [*BACKENDS, "compile", "eager"])


class Inputs(NamedTuple):
    x_adv: Tensor
    grad: Tensor
    x: Tensor


def make_inputs(shape: tuple[int, ...], device: torch.device, eps: float, seed: int) -> Inputs:
    generator = torch.Generator(device).manual_seed(seed)
    x = torch.rand(shape, device=device, generator=generator)
    noise = (torch.rand(shape, device=device, generator=generator) * 2 - 1) * eps
    grad = torch.randn(shape, device=device, generator=generator) * 1e-3
    return Inputs((x + noise).clamp(0, 1), grad, x)


def rotation(shape: tuple[int, ...], device: torch.device, eps: float, cache: str) -> Callable[[], Inputs]:
    one = 3 * 4 * torch.Size(shape).numel()
    count = 1 if cache == "warm" else max(1, -(-ROTATE // one))
    sets = [make_inputs(shape, device, eps, seed) for seed in range(count)]
    return itertools.cycle(sets).__next__


def skip_if_missing(call: Callable[[], object]) -> None:
    """Skips where the forced backend was not built; the op's error says why."""
    try:
        call()
    except RuntimeError as error:
        if not re.search("has no '.*' backend", str(error)):
            raise
        pytest.skip(str(error))


def compiled(fn: Callable) -> Callable:
    torch.compiler.reset()
    return torch.compile(fn, dynamic=False)


def traffic(device: torch.device, ceiling: float, least_bytes: int, info: dict) -> None:
    """Adds bandwidth to a cell's extra_info."""
    info["bytes"] = least_bytes
    if "us_per_call" in info:
        rate = least_bytes / (info["us_per_call"] * 1e-6)
        info.update(gb_per_s=rate / 1e9, copy_ceiling_gb_per_s=ceiling / 1e9, fraction_of_copy=rate / ceiling)


def device_time(call: Callable[[], object]) -> dict:
    """Time of the kernels alone, by device events with a cold cache; the host's share is what the cell has on top."""
    if not ON_GPU or QUICK:
        return {}
    from triton.testing import do_bench

    low, median, high = do_bench(call, quantiles=[0.25, 0.5, 0.75])
    return {"device_us": median * 1e3, "device_us_iqr": (high - low) * 1e3}


def bench_step(norm, impl, shape, cache, device, ceiling, compare, benchmark, passes) -> None:
    fused = {"linf": ops.linf_step_, "l2": ops.l2_step_}[norm]
    lines = {"linf": eager.linf_step, "l2": eager.l2_step}[norm]
    eps, alpha = EPS[norm], ALPHA[norm]
    radius, length = torch.tensor([eps], device=device), torch.tensor([alpha], device=device)  # as an attack holds them
    inputs = rotation(shape, device, eps, cache)

    def call_eager(x_adv, grad, x):
        return lines(x_adv, grad, x, alpha, eps)

    def call_fused(x_adv, grad, x):
        return fused(x_adv, grad, x, length, radius)

    step = {"eager": call_eager, "compile": compiled(call_eager)}.get(impl, call_fused)
    with ops.use_backend(impl if impl in BACKENDS else "auto"):
        gate = make_inputs(shape, device, eps, seed=1234)
        if impl in BACKENDS:
            skip_if_missing(lambda: step(gate.x_adv.clone(), gate.grad, gate.x))
        with ops.use_backend("reference"):
            expected = call_fused(gate.x_adv.clone(), gate.grad, gate.x)
        began = time.perf_counter()
        got = step(gate.x_adv.clone(), gate.grad, gate.x)
        first = time.perf_counter() - began
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)
        info = {"case": f"{list(shape)} {cache}", "impl": impl, "peer": "eager"}
        if impl == "compile":
            info["compile_seconds"] = first
        compare(lambda: step(*inputs()), lambda: call_eager(*inputs()), **info, **device_time(lambda: step(*inputs())))
    traffic(device, ceiling, passes * 4 * torch.Size(shape).numel(), benchmark.extra_info)


@by_shape
@by_cache
@by_impl
@pytest.mark.benchmark(group="linf_step_")
def test_linf_step(shape, impl, cache, device, copy_ceiling, compare, benchmark):
    bench_step("linf", impl, shape, cache, device, copy_ceiling, compare, benchmark, passes=4)


@by_shape
@by_cache
@by_impl
@pytest.mark.benchmark(group="l2_step_")
def test_l2_step(shape, impl, cache, device, copy_ceiling, compare, benchmark):
    # Seven passes: the norm is known only after a first reading of all three.
    bench_step("l2", impl, shape, cache, device, copy_ceiling, compare, benchmark, passes=7)


@by_shape
@by_impl
@pytest.mark.benchmark(group="uniform_start")
def test_uniform_start(shape, impl, device, copy_ceiling, compare, benchmark):
    eps = EPS["linf"]
    radius = torch.tensor([eps], device=device)
    ids = torch.arange(shape[0], device=device)
    inputs = rotation(shape, device, eps, "cold")

    def call_eager(x):
        return eager.uniform_start(x, eps)

    def call_fused(x):
        return ops.uniform_start(x, radius, ids, seed=7)

    start = {"eager": call_eager, "compile": compiled(call_eager)}.get(impl, call_fused)
    with ops.use_backend(impl if impl in BACKENDS else "auto"):
        x = make_inputs(shape, device, eps, seed=1234).x
        if impl in BACKENDS:
            skip_if_missing(lambda: start(x))
        began = time.perf_counter()
        got = start(x)
        first = time.perf_counter() - began
        if impl in BACKENDS:  # the same numbers; the first samples are enough, noise does not depend on the batch
            with ops.use_backend("reference"):
                expected = ops.uniform_start(x[:4], radius, ids[:4], seed=7)
            torch.testing.assert_close(got[:4], expected, rtol=0, atol=1e-6)
        inside = got[(x > eps) & (x < 1 - eps)] - x[(x > eps) & (x < 1 - eps)]
        assert inside.abs().max() <= eps + 1e-6
        torch.testing.assert_close(inside.std().item(), eps / 3**0.5, rtol=0.1, atol=0)
        info = {"case": f"{list(shape)} cold", "impl": impl, "peer": "eager"}
        if impl == "compile":
            info["compile_seconds"] = first
        compare(
            lambda: start(inputs().x),
            lambda: call_eager(inputs().x),
            **info,
            **device_time(lambda: start(inputs().x)),
        )
    traffic(device, copy_ceiling, 2 * 4 * torch.Size(shape).numel(), benchmark.extra_info)
