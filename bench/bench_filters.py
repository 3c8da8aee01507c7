"""R-Adapt's Gaussian filter, forward and backward: matrix products against the DFT and against a blur with few taps.

The gate is float64's DFT; a blur misses it by what it leaves out, which stands in the column `largest_error`.
"""

import pytest
import torch
from bench_steps import ON_GPU
from measure import QUICK
from peers import filters as peers

from rvlm import ops

SHAPES = (
    [(2, 3, 32, 32)]
    if QUICK
    else [
        (64 if ON_GPU else 8, 3, 224, 224),
        (128, 3, 32, 32),
        (32, 3, 96, 96),
        (16, 3, 128, 128),
        (8, 3, 160, 160),
        (4, 3, 336, 336),
    ]
)
IMPLS = {
    "rvlm": ops.gaussian_filter,
    "products": peers.by_products,
    "fft": peers.by_fft,
    "9 taps": lambda x, cutoff: peers.by_taps(x, cutoff, 4),
    "25 taps": lambda x, cutoff: peers.by_taps(x, cutoff, 12),
}


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.benchmark(group="gaussian_filter")
def test_gaussian_filter(shape, impl, device, compare):
    x = torch.rand(shape, device=device, generator=torch.Generator(device).manual_seed(0)).requires_grad_()
    cutoff = 40 * shape[-1] / 224
    truth = peers.by_fft(x.detach().double(), cutoff)
    error = (IMPLS[impl](x.detach(), cutoff).double() - truth).abs().max().item()
    assert error < (0.02 if "taps" in impl else 3e-6)

    def job(name):
        return torch.autograd.grad(IMPLS[name](x, cutoff).sum(), x)

    compare(lambda: job(impl), lambda: job("fft"), case=f"{list(shape)}", impl=impl, peer="fft", largest_error=error)
