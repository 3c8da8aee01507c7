"""Toy models with gradients that are nowhere zero, and batches on the uint8 grid."""

import pytest
import torch
from torch import nn


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x):
        y = self.norm1(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


class TinyViT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 4, stride=4)
        self.blocks = nn.Sequential(Block(16), Block(16))
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        return self.head(self.blocks(self.patches(x).flatten(2).transpose(1, 2)).mean(1))


def _build(kind: str) -> nn.Module:
    torch.manual_seed(3)
    if kind == "linear":
        return nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 5))
    if kind == "mlp":
        return nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 16), nn.Tanh(), nn.Linear(16, 5))
    if kind == "conv":
        return nn.Sequential(nn.Conv2d(3, 6, 3, 2), nn.BatchNorm2d(6), nn.Tanh(), nn.Flatten(), nn.Linear(54, 5))
    return TinyViT()


KINDS = ["linear", "mlp", "conv", "vit"]


@pytest.fixture
def build():
    """build(kind, dtype) -> model in eval mode."""
    return lambda kind="conv", dtype=torch.float64: _build(kind).to(dtype).eval()


@pytest.fixture(params=KINDS)
def model(request, build):
    return build(request.param)


@pytest.fixture
def batch():
    """batch(dtype, n) -> x [n, 3, 8, 8] on the grid k/255, away from the box's faces, and labels."""

    def make(dtype=torch.float64, n=6):
        generator = torch.Generator().manual_seed(1)
        x = torch.randint(40, 216, (n, 3, 8, 8), generator=generator).to(dtype) / 255
        return x, torch.randint(0, 5, (n,), generator=generator)

    return make


@pytest.fixture
def compiled_sizes(monkeypatch):
    """Sizes of the batches that a stand-in for torch.compile, which compiles nothing, is called with (images last)."""
    sizes = []

    def compiled(work, **_):
        def run(*given):
            sizes.append(len(given[-1]))
            return work(*given)

        return run

    monkeypatch.setattr(torch, "compile", compiled)
    return sizes
