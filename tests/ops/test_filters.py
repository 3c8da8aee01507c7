"""The Gaussian filter against its DFT in float64, its adjoint, constants, shapes, bad input."""

import math

import numpy as np
import pytest
import torch

from rvlm import ops


def by_dft(x: torch.Tensor, cutoff: float) -> np.ndarray:
    """The definition, with the spectrum's centre at n // 2, in numpy."""
    x = x.double().cpu().numpy()
    u, v = (np.arange(n) - n // 2 for n in x.shape[-2:])
    response = np.exp(-(u[:, None] ** 2 + v[None, :] ** 2) / (2 * cutoff**2))
    spectrum = np.fft.fftshift(np.fft.fft2(x), axes=(-2, -1)) * response
    return np.fft.ifft2(np.fft.ifftshift(spectrum, axes=(-2, -1))).real


@pytest.mark.parametrize(
    "shape",
    [
        (2, 3, 32, 32),
        (1, 3, 224, 224),
        (3, 17, 24),
        (5, 8),
        (2, 3, 1, 1),
        (0, 3, 8, 8),
        (0, 3, 224, 224),
        (1, 200, 301),
    ],
)
@pytest.mark.parametrize("cutoff", [2, 6.5, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_is_its_definition(device, shape, cutoff, dtype):
    x = torch.rand(shape, dtype=dtype, device=device)
    got = ops.gaussian_filter(x, cutoff, clamp=False)
    assert got.shape == x.shape and got.dtype == dtype
    np.testing.assert_allclose(
        got.double().cpu().numpy(), by_dft(x, cutoff), rtol=0, atol=3e-6 if dtype == torch.float32 else 1e-13
    )


@pytest.mark.parametrize("size", [(20, 31), (112, 113)])
def test_is_its_own_adjoint(device, size):
    x, y = torch.randn(2, 2, 3, *size, dtype=torch.float64, device=device)
    left = (ops.gaussian_filter(x, 5, clamp=False) * y).sum()
    right = (x * ops.gaussian_filter(y, 5, clamp=False)).sum()
    torch.testing.assert_close(left, right)
    leaf = x.requires_grad_()
    (grad,) = torch.autograd.grad((ops.gaussian_filter(leaf, 5, clamp=False) * y).sum(), leaf)
    torch.testing.assert_close(grad, ops.gaussian_filter(y, 5, clamp=False))


def test_gradients_with_the_clamp(device):
    x = (2 * torch.rand(1, 1, 5, 6, dtype=torch.float64, device=device) - 0.5).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: ops.gaussian_filter(x, 1.5), (x,))
    assert torch.autograd.gradgradcheck(lambda x: ops.gaussian_filter(x, 1.5) ** 2, (x,))
    clipped = ops.gaussian_filter(x, 1.5)
    assert clipped.min() >= 0 and clipped.max() <= 1


def test_constants_and_the_blur_in_pixels(device):
    white = torch.ones(1, 3, 64, 64, device=device)
    torch.testing.assert_close(ops.gaussian_filter(white, 7), white)
    dot = torch.zeros(1, 1, 64, 64, dtype=torch.float64, device=device)
    dot[..., 32, 32] = 1
    blurred = ops.gaussian_filter(dot, 4, clamp=False)[0, 0]
    distance = torch.arange(64, device=device).double() - 32
    variance = (blurred.sum(0) * distance**2).sum()
    assert math.sqrt(variance) == pytest.approx(64 / (2 * math.pi * 4), rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bits_and_autocast(device, dtype):
    x = torch.rand(2, 3, 32, 32, device=device)
    got = ops.gaussian_filter(x.to(dtype), 6)
    assert got.dtype == dtype
    expected = ops.gaussian_filter(x.to(dtype).float(), 6)
    torch.testing.assert_close(got, expected.to(dtype))
    with torch.autocast(torch.device(device).type, dtype=torch.bfloat16):
        assert torch.equal(ops.gaussian_filter(x, 6), ops.gaussian_filter(x.clone(), 6.0))
        torch.testing.assert_close(
            ops.gaussian_filter(x, 6).double().cpu(), torch.tensor(by_dft(x, 6)), atol=3e-6, rtol=0
        )


def test_made_in_inference_mode_used_in_a_graph(device):
    x = torch.rand(1, 1, 23, 23, device=device)
    with torch.inference_mode():
        ops.gaussian_filter(x, 3.25)
    leaf = x.clone().requires_grad_()
    assert torch.autograd.grad(ops.gaussian_filter(leaf, 3.25).sum(), leaf)[0].isfinite().all()


def test_compiles_without_graph_breaks(device):
    x = torch.rand(2, 3, 16, 16, device=device)
    job = torch.compile(lambda x: ops.gaussian_filter(x, 4), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(job(x), ops.gaussian_filter(x, 4))


@pytest.mark.parametrize("x, cutoff, error, message", [
    (torch.zeros(3), 4, ValueError, r"\[\.\.\., H, W\], got \[3\]"),
    (torch.zeros(3, 3).long(), 4, TypeError, "floating-point"),
    (torch.zeros(3, 3), 0, ValueError, "above 0, got 0"),
    (torch.zeros(3, 3), math.nan, ValueError, "above 0, got nan"),
    ([[0.0]], 4, TypeError, "got list"),
])  # fmt: skip
def test_bad_input(x, cutoff, error, message):
    with pytest.raises(error, match=message):
        ops.gaussian_filter(x, cutoff)
