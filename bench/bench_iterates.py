"""APGD's step, the keeping of best rows and the L1 projection against the lines they replace, eager and compiled.

As in bench_steps.py: a correctness gate first, inputs that rotate through more memory than the caches hold ("cold"),
and the eager lines against themselves as the control.
"""

import time

import pytest
import torch
from bench_steps import BACKENDS, SHAPES, by_impl, by_shape, compiled, device_time, rotation, skip_if_missing, traffic
from peers import iterates as eager

from rvlm import ops

EPS = 8 / 255


def bench(impl, fused, lines, inputs, case, least_bytes, atol, device, ceiling, compare, benchmark) -> None:
    """fused(batch) and lines(batch) return what is compared; batch is x_adv, grad, x and may be overwritten."""
    job = {"eager": lines, "compile": compiled(lines)}.get(impl, fused)
    with ops.use_backend(impl if impl in BACKENDS else "auto"):
        gate = inputs()
        if impl in BACKENDS:
            skip_if_missing(lambda: job(type(gate)(*(t.clone() for t in gate))))
        with ops.use_backend("reference"):
            expected = fused(type(gate)(*(t.clone() for t in gate)))
        began = time.perf_counter()
        got = job(type(gate)(*(t.clone() for t in gate)))
        first = time.perf_counter() - began
        torch.testing.assert_close(got, expected, rtol=0, atol=atol)
        info = {"case": case, "impl": impl, "peer": "eager"}
        if impl == "compile":
            info["compile_seconds"] = first
        compare(lambda: job(inputs()), lambda: lines(inputs()), **info, **device_time(lambda: job(inputs())))
    traffic(device, ceiling, least_bytes, benchmark.extra_info)


@by_shape
@by_impl
@pytest.mark.benchmark(group="apgd_step_")
def test_apgd_step(shape, impl, device, copy_ceiling, compare, benchmark):
    step = torch.full((shape[0],), 2 * EPS, device=device)
    rowwise, radius = step.view(-1, 1, 1, 1), torch.tensor([EPS], device=device)

    def fused(batch):  # the batch's gradient stands for the iterate before, too: both are written over
        return ops.apgd_step_(batch.grad, batch.x_adv, batch.x, batch.x, step, radius)

    def lines(batch):
        return eager.apgd_step(batch.grad, batch.x_adv, batch.x, batch.x, rowwise, EPS, 0.75)

    inputs = rotation(shape, device, EPS, "cold")
    least = 4 * 4 * torch.Size(shape).numel()  # the gradient and the clean image are the same tensor here
    bench(impl, fused, lines, inputs, f"{list(shape)} cold", least, 1e-6, device, copy_ceiling, compare, benchmark)


@by_shape
@by_impl
@pytest.mark.parametrize("kept", [0.1, 0.5])
@pytest.mark.benchmark(group="keep_best_")
def test_keep_best(shape, impl, kept, device, copy_ceiling, compare, benchmark):
    flag = torch.arange(shape[0], device=device) < max(1, round(kept * shape[0]))

    def fused(batch):
        return ops.keep_best_(batch.x_adv, batch.x, flag)

    def lines(batch):
        return eager.keep_best(batch.x_adv, batch.x, flag)

    inputs = rotation(shape, device, EPS, "cold")
    least = 2 * 4 * int(flag.sum()) * torch.Size(shape[1:]).numel()
    case = f"{list(shape)} {int(flag.sum())} rows"
    bench(impl, fused, lines, inputs, case, least, 0, device, copy_ceiling, compare, benchmark)


@pytest.mark.parametrize("shape", SHAPES[:2], ids=lambda shape: "x".join(map(str, shape)))
@by_impl
@pytest.mark.benchmark(group="l1_project")
def test_l1_project(shape, impl, device, copy_ceiling, compare, benchmark):
    eps = 0.002 * torch.Size(shape[1:]).numel()
    radius = torch.full((shape[0],), eps, device=device)

    def fused(batch):
        return ops.l1_project(batch.x_adv, batch.x, radius)

    def lines(batch):
        return eager.l1_project(batch.x_adv, batch.x, eps)

    inputs = rotation(shape, device, EPS, "cold")
    least = 3 * 4 * torch.Size(shape).numel()
    bench(impl, fused, lines, inputs, f"{list(shape)} cold", least, 2e-5, device, copy_ceiling, compare, benchmark)


@pytest.mark.parametrize("shape", SHAPES[:2], ids=lambda shape: "x".join(map(str, shape)))
@by_impl
@pytest.mark.benchmark(group="l1_step_")
def test_l1_step(shape, impl, device, copy_ceiling, compare, benchmark):
    eps = 0.002 * torch.Size(shape[1:]).numel()
    radius, step = torch.full((shape[0],), eps, device=device), torch.full((1,), eps, device=device)

    def fused(batch):
        return ops.l1_step_(batch.x_adv, batch.grad, batch.x, step, radius, top=0.05)

    def lines(batch):
        return batch.x_adv.copy_(eager.l1_step(batch.x_adv, batch.grad, batch.x, eps, eps, 0.05))

    inputs = rotation(shape, device, EPS, "cold")
    least = 4 * 4 * torch.Size(shape).numel()
    bench(impl, fused, lines, inputs, f"{list(shape)} cold", least, 2e-5, device, copy_ceiling, compare, benchmark)


@by_shape
@by_impl
@pytest.mark.parametrize("kind", ["mi", "sign"])
@pytest.mark.benchmark(group="momentum_step_")
def test_momentum_step(shape, impl, kind, device, copy_ceiling, compare, benchmark):
    velocity = torch.zeros(shape, device=device)
    step, radius = torch.tensor([EPS / 4], device=device), torch.tensor([EPS], device=device)

    def fused(batch):
        return ops.momentum_step_(batch.x_adv, velocity.zero_(), batch.grad, batch.x, step, radius, 0.9, kind)

    def lines(batch):
        return eager.momentum_step(batch.x_adv, velocity.zero_(), batch.grad, batch.x, EPS / 4, EPS, 0.9, kind)

    inputs = rotation(shape, device, EPS, "cold")
    least = 6 * 4 * torch.Size(shape).numel()  # reads iterate, velocity, gradient and image, writes the first two
    case = f"{list(shape)} {kind} cold"
    bench(impl, fused, lines, inputs, case, least, 1e-6, device, copy_ceiling, compare, benchmark)
