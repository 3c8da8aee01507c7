"""Other ways to the Gaussian filter: by the DFT, as it is defined, and as a blur with a few taps."""

import functools

import torch
from torch import Tensor
from torch.nn import functional as F


def response(n: int, cutoff: float, like: Tensor) -> Tensor:
    bins = torch.arange(n, device=like.device)
    return torch.exp(-(torch.minimum(bins, n - bins).to(like.dtype) ** 2) / (2 * cutoff**2))


def by_fft(x: Tensor, cutoff: float) -> Tensor:
    height, width = x.shape[-2:]
    both = response(height, cutoff, x)[:, None] * response(width, cutoff, x)[: width // 2 + 1]
    return torch.fft.irfft2(torch.fft.rfft2(x) * both, s=(height, width)).clamp(0, 1)


def by_products(x: Tensor, cutoff: float) -> Tensor:
    """One circulant matrix from each side."""
    rows, columns = (circulant(n, cutoff, x.dtype, x.device) for n in x.shape[-2:])
    return (rows @ x @ columns).clamp(0, 1)


@functools.cache
def circulant(n: int, cutoff: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    taps = torch.fft.ifft(response(n, cutoff, torch.empty(0, dtype=torch.float64))).real
    index = (torch.arange(n)[:, None] - torch.arange(n)) % n
    return taps[index].to(device, dtype)


def by_taps(x: Tensor, cutoff: float, radius: int) -> Tensor:
    """Two depthwise convolutions; the taps beyond `radius` are lost. Square images."""
    taps = torch.fft.ifft(response(x.shape[-1], cutoff, x)).real.roll(radius)[: 2 * radius + 1]
    taps, channels = taps.expand(x.shape[1], 1, -1), x.shape[1]
    x = F.pad(x, (radius,) * 4, mode="circular")
    x = F.conv2d(F.conv2d(x, taps[..., None, :], groups=channels), taps[..., None], groups=channels)
    return x.clamp(0, 1)
