"""Anchors and prefixes, forward and backward, against the lines of a hook and other compositions.

Gradients for streams and anchor or prompts, which is what learning them asks for.
"""

import time

import pytest
import torch
from bench_steps import BACKENDS, ON_GPU, compiled, device_time, skip_if_missing
from measure import QUICK
from peers import attention as peers
from torch.nn import functional as F

from rvlm import ops

if QUICK:
    SHAPES = [(2, 5, 32)]
elif ON_GPU:
    SHAPES = [(128, 50, 768), (128, 197, 768), (128, 257, 1024), (8, 50, 768)]
else:
    SHAPES = [(8, 50, 768), (8, 197, 768), (64, 17, 64)]
ALPHA = 1.2


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
@pytest.mark.parametrize("impl", [*BACKENDS, "compile", "eager"])
@pytest.mark.benchmark(group="anchored_residual")
def test_anchored_residual(shape, impl, device, compare):
    generator = torch.Generator(device).manual_seed(0)
    x0, o, of_x1, of_y = torch.randn(4, *shape, device=device, generator=generator)
    anchor = torch.randn(shape[1:], device=device, generator=generator)
    weight, bias = torch.rand(2, shape[2], device=device, generator=generator)
    leaves = [t.clone().requires_grad_() for t in (x0, o, anchor)]

    def lines(x0, o, anchor):
        x1 = x0 + o + ALPHA * anchor
        return x1, F.layer_norm(x1, x1.shape[-1:], weight, bias)

    def fused(x0, o, anchor):
        return ops.anchored_residual(x0, o, anchor, ALPHA, "add", weight, bias)

    def job(forward):
        out = forward(*leaves)
        return *(t.detach() for t in out), *torch.autograd.grad(out, leaves, (of_x1, of_y))

    forward = {"eager": lines, "compile": compiled(lines)}.get(impl, fused)
    with ops.use_backend(impl if impl in BACKENDS else "auto"):
        if impl in BACKENDS:
            skip_if_missing(lambda: job(forward))
        expected = job(lines)
        began = time.perf_counter()
        got = job(forward)
        info = {"case": f"{list(shape)}", "impl": impl, "peer": "eager"}
        if impl == "compile":
            info["compile_seconds"] = time.perf_counter() - began
        for ours, theirs in zip(got, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
        compare(lambda: job(forward), lambda: job(lines), **info, **device_time(lambda: job(forward)))


HEADS = [(2, 3, 17, 16)] if QUICK else [(128 if ON_GPU else 8, 12, n, 64) for n in (50, 197, 257, 577)]
MAPS = {
    "rvlm": ops.anchored_attention,
    "einsum": peers.anchored_by_einsum,
    "matmul": peers.anchored_by_matmul,
    "naive": peers.anchored_naive,
    "flex": compiled(peers.anchored_by_flex),  # without a compiler it would make the map in memory
}
PREFIXES = {"rvlm": ops.prefix_attention, "keys": peers.keys_concatenated, "tokens": peers.tokens_concatenated}


def bench(impl, peer, implementations, leaves, *rest, case, device, compare) -> None:
    slope = torch.randn(leaves[0].shape, device=device, generator=torch.Generator(device).manual_seed(1))

    def job(name):
        out = implementations[name](*leaves, *rest)
        return out.detach(), *torch.autograd.grad(out, leaves, slope)

    began = time.perf_counter()
    got = job(impl)
    info = {"case": case, "impl": impl, "peer": peer}
    if impl == "flex":
        info["compile_seconds"] = time.perf_counter() - began
    for ours, theirs in zip(got, job(peer), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)  # sums over the batch of numbers near 1
    compare(lambda: job(impl), lambda: job(peer), **info, **device_time(lambda: job(impl)))


@pytest.mark.parametrize("shape", HEADS, ids=lambda shape: "x".join(map(str, shape)))
@pytest.mark.parametrize("impl", MAPS)
@pytest.mark.benchmark(group="anchored_attention")
def test_anchored_attention(shape, impl, device, compare):
    if impl == "flex" and not ON_GPU:
        pytest.skip("FlexAttention has no backward pass on a CPU")
    generator = torch.Generator(device).manual_seed(0)
    q, k, v = torch.randn(3, *shape, device=device, generator=generator)
    anchor = torch.rand(shape[1], shape[2], shape[2], device=device, generator=generator)
    leaves = [t.clone().requires_grad_() for t in (q, k, v, anchor)]
    bench(impl, "einsum", MAPS, leaves, 0.3, case=f"{list(shape)} map, add", device=device, compare=compare)


@pytest.mark.parametrize("shape", HEADS, ids=lambda shape: "x".join(map(str, shape)))
@pytest.mark.parametrize("impl", PREFIXES)
@pytest.mark.benchmark(group="prefix_attention")
def test_prefix_attention(shape, impl, device, compare):
    generator = torch.Generator(device).manual_seed(0)
    q, k, v = torch.randn(3, *shape, device=device, generator=generator)
    prompts = torch.randn(2, shape[1], 4, shape[3], device=device, generator=generator)
    # The queries of the prompts are their keys in the peer, but their rows are thrown away: the same gradients.
    leaves = [t.clone().requires_grad_() for t in (q, k, v, *prompts)]
    bench(impl, "tokens", PREFIXES, leaves, case=f"{list(shape)}, 4 prompts", device=device, compare=compare)
