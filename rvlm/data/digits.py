"""Handwritten digits that need no network: the 1,797 scans of 8 x 8 pixels that scikit-learn ships (see NOTICE)."""

import torch
from torch.nn import functional as F

from rvlm.data.base import Data

__all__ = ["load_digits"]

WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
TEST_SAMPLES = 500


def load_digits(split: str = "test", size: int = 32) -> Data:
    """Split "train" (1,297 scans) or "test" (500), by a fixed permutation; enlarged once, rounded to uint8."""
    from sklearn.datasets import load_digits as sklearn_digits

    if split not in ("train", "test"):
        raise ValueError(f"digits has the splits train and test, got {split!r}")
    raw = sklearn_digits()
    scans = torch.as_tensor(raw.images, dtype=torch.float32)[:, None] / 16
    large = F.interpolate(scans, size=(size, size), mode="bicubic", align_corners=False)
    pixels = (large.clamp(0, 1) * 255).round().to(torch.uint8).expand(-1, 3, -1, -1)
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))
    index = (order[:TEST_SAMPLES] if split == "test" else order[TEST_SAMPLES:]).sort().values
    return Data(
        "digits", split, WORDS, torch.as_tensor(raw.target)[index], index, lambda i: pixels[i], "digits", len(index)
    )
