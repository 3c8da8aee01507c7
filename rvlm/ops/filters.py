"""R-Adapt's Gaussian input filter: an image's DFT times exp(-(u^2 + v^2) / (2 D0^2)), u and v in bins from the centre.

The response is a product, so the filter is Y = G_H X G_W per channel with G_n the circulant n x n matrix whose first
column is the inverse DFT of exp(-f^2 / (2 D0^2)), f the circular distance to bin 0. G is symmetric: the backward pass
is the filter itself. G maps constants to themselves. In pixels it is a periodic blur with sigma = n / (2 pi D0).

Two matrix products per plane by the library are the implementation, and on a CPU from 112 x 112 pixels on the library's
real DFT; docs/performance.md has the figures, and why there is no kernel.
"""

import functools
import math

import torch
from torch import Tensor

__all__ = ["gaussian_filter"]

FFT_PIXELS = 112 * 112  # from here on the DFT is faster on a CPU


def gaussian_filter(x: Tensor, cutoff: float, clamp: bool = True) -> Tensor:
    """Low-pass filter with a circular boundary; differentiable as often as one likes.

    Args:
        x: images [..., H, W], any floating dtype; 16-bit images are filtered in float32, also under autocast.
        cutoff: D0 in DFT bins, above 0: the standard deviation of the response. It belongs to a resolution: 40 at 224
            pixels is the same blur as 60 at 336.
        clamp: clip the result to [0, 1]; the gradient is then 0 where it was clipped.

    Returns:
        Like x.

    Raises:
        TypeError: x is not a floating-point tensor. ValueError: fewer than two dimensions, or a cutoff that is not
        finite and positive.

    Source: R-Adapt's equation of the Gaussian input filter, with the clamp of the code it builds on.
    """
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError(f"x must be a floating-point tensor, got {getattr(x, 'dtype', type(x).__name__)}")
    if x.dim() < 2:
        raise ValueError(f"x must be images [..., H, W], got {list(x.shape)}")
    if not 0 < cutoff < math.inf:
        raise ValueError(f"cutoff must be a finite number of DFT bins above 0, got {cutoff}")
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    height, width = x.shape[-2:]
    if x.device.type == "cpu" and height * width >= FFT_PIXELS and x.numel():
        responses = _response(height, cutoff)[:, None] * _response(width, cutoff)[: width // 2 + 1]
        y = torch.fft.irfft2(torch.fft.rfft2(x.to(dtype)) * responses.to(dtype), s=(height, width))
    else:
        rows, columns = (_circulant(n, float(cutoff), dtype, x.device) for n in (height, width))
        with torch.autocast(x.device.type, enabled=False):
            y = rows @ x.to(dtype) @ columns
    return (y.clamp(0, 1) if clamp else y).to(x.dtype)


def _response(n: int, cutoff: float) -> Tensor:
    """Response along one axis [n], bin 0 first."""
    bins = torch.arange(n, dtype=torch.float64)
    return torch.exp(-(torch.minimum(bins, n - bins) ** 2) / (2 * cutoff**2))


@functools.lru_cache(maxsize=64)
def _circulant(n: int, cutoff: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """G_n [n, n]: entry (i, j) is tap i - j of the blur."""
    with torch.inference_mode(False), torch.no_grad():
        taps = torch.fft.ifft(_response(n, cutoff)).real
        index = (torch.arange(n)[:, None] - torch.arange(n)) % n
        return taps[index].to(device, dtype)
