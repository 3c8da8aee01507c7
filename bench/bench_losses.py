"""Divergences and attack losses against the lines they replace: eager, and the same lines under torch.compile.

Liger-Kernel's divergences stand beside ours on a GPU where the package is installed.

Both sides start at logits and end at loss and gradient. Every cell first has to agree with the reference on its own
inputs. The inputs are small next to the caches and are used again and again, as logits are that a model has just made.
"""

import time

import pytest
import torch
from bench_steps import BACKENDS, ON_GPU, compiled, device_time, skip_if_missing
from measure import QUICK
from peers import losses as eager
from torch.nn import functional as F

from rvlm import ops

if QUICK:
    SHAPES = [(4, 10), (2, 1000)]
elif ON_GPU:
    SHAPES = [(128, 10), (128, 1000), (1024, 1000), (1024, 21841)]
else:
    SHAPES = [(128, 10), (128, 1000), (64, 21841)]
TEACHERS = 3

by_shape = pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
IMPLS = [*BACKENDS, "compile", "eager"]
by_impl = pytest.mark.parametrize("impl", IMPLS)


def bench(impl, fused, lines, logits, case, compare, **peers) -> None:
    """fused() and lines(leaf), of which `peers` have more, return a loss and, with a graph, what else to compare."""
    forward = compiled(lines) if impl == "compile" else peers.get(impl, lines)

    def with_gradient(forward):
        leaf = logits.detach().requires_grad_()
        loss, *others = forward(leaf)
        return loss.detach(), torch.autograd.grad(loss.sum(), leaf)[0], *others

    def call_eager():
        return with_gradient(lines)

    job = fused if impl in BACKENDS else lambda: with_gradient(forward)
    with ops.use_backend(impl if impl in BACKENDS else "auto"):
        if impl in BACKENDS:
            skip_if_missing(job)
        with ops.use_backend("reference"):
            expected = fused()
        began = time.perf_counter()
        got = job()
        first = time.perf_counter() - began
        for ours, theirs in zip(got, expected, strict=True):  # some peers only give the sum over the batch
            torch.testing.assert_close(ours, theirs if ours.dim() else theirs.sum(), rtol=1e-4, atol=1e-5)
        info = {"case": case, "impl": impl, "peer": "eager"}
        if impl == "compile":
            info["compile_seconds"] = first
        compare(job, call_eager, **info, **device_time(job))


@by_shape
@pytest.mark.parametrize("kind", ["forward", "js"])
@pytest.mark.parametrize("impl", [*IMPLS, "liger"])
@pytest.mark.benchmark(group="multi_teacher_kl")
def test_multi_teacher_kl(shape, kind, impl, device, compare):
    if impl == "liger":
        pytest.importorskip("liger_kernel", reason="install rvlm[oracles]")
        if not ON_GPU:
            pytest.skip("Liger-Kernel needs a GPU")
    generator = torch.Generator(device).manual_seed(0)
    student = 3 * torch.randn(shape, device=device, generator=generator)
    teachers = 3 * torch.randn(TEACHERS, *shape, device=device, generator=generator)
    weights = torch.tensor([0.5, 0.3, 0.2], device=device)

    def fused():
        leaf = student.detach().requires_grad_()
        loss, _ = ops.multi_teacher_kl(leaf, teachers, weights, kind=kind)
        return loss.detach(), torch.autograd.grad(loss.sum(), leaf)[0]

    def lines(leaf):
        return (eager.multi_teacher_kl(leaf, teachers, weights, kind),)

    def of_liger(leaf):
        return (eager.multi_teacher_kl_of_liger(leaf, teachers, weights, kind),)

    bench(impl, fused, lines, student, f"{list(shape)} {kind}, {TEACHERS} teachers", compare, liger=of_liger)


@by_shape
@pytest.mark.parametrize("kind", ["ce", "cw", "dlr"])
@by_impl
@pytest.mark.benchmark(group="attack_loss")
def test_attack_loss(shape, kind, impl, device, compare):
    generator = torch.Generator(device).manual_seed(0)
    logits = 3 * torch.randn(shape, device=device, generator=generator)
    y = torch.randint(0, shape[1], shape[:1], device=device, generator=generator)

    def fused():
        loss, correct, grad = ops.attack_loss(logits, y, kind)
        return loss, grad, correct

    def lines(leaf):
        return eager.attack_loss(leaf, y, kind)

    bench(impl, fused, lines, logits, f"{list(shape)} {kind}", compare)


@pytest.mark.parametrize("shape", [(8, 64, 10)] if QUICK else [(8, 64, 10), (128, 512, 1000)], ids=str)
@by_impl
@pytest.mark.benchmark(group="clip_head_loss")
def test_clip_head_loss(shape, impl, device, compare):
    rows, width, classes = shape
    generator = torch.Generator(device).manual_seed(0)
    embedding = F.normalize(torch.randn(rows, width, device=device, generator=generator), dim=1)
    head = 20 * F.normalize(torch.randn(width, classes, device=device, generator=generator), dim=0)
    y = torch.randint(0, classes, (rows,), device=device, generator=generator)

    def fused():
        loss, correct, _, grad = ops.clip_head_loss(embedding, head, y)
        return loss, grad, correct

    def lines(leaf):
        return eager.attack_loss(leaf @ head, y, "ce")

    bench(impl, fused, lines, embedding, f"{list(shape)} ce", compare)


@by_shape
@by_impl
@pytest.mark.benchmark(group="fold_teachers")
def test_fold_teachers(shape, impl, device, compare):
    generator = torch.Generator(device).manual_seed(0)
    teachers = 3 * torch.randn(TEACHERS, *shape, device=device, generator=generator)
    weights = torch.rand(TEACHERS, shape[0], device=device, generator=generator)

    def lines(teachers):
        return (weights[:, :, None] * (teachers / 2.0).softmax(2)).sum(0)

    forward = compiled(lines) if impl == "compile" else lines
    job = (lambda: ops.fold_teachers(teachers, weights, 2.0)) if impl in BACKENDS else lambda: forward(teachers)
    with ops.use_backend(impl if impl in BACKENDS else "auto"):
        if impl in BACKENDS:
            skip_if_missing(job)
        began = time.perf_counter()
        torch.testing.assert_close(job(), lines(teachers), rtol=1e-4, atol=1e-6)
        info = {"case": f"{list(shape)}, {TEACHERS} teachers", "impl": impl, "peer": "eager"}
        if impl == "compile":
            info["compile_seconds"] = time.perf_counter() - began
        compare(job, lambda: lines(teachers), **info, **device_time(job))
