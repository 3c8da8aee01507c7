"""Where a block looks, and how much of its answer is the same for every image."""

import torch
from torch import Tensor

from rvlm.data import Data
from rvlm.models import Clip
from rvlm.models.towers import attention_output, tower_of

__all__ = ["attention_map", "insensitivity"]


def attention_map(clip: Clip, x: Tensor, block: int = 0, reduce: str = "cls") -> Tensor:
    """Attention over the patches [B, h, w] of a block, the mean of its heads.

    Args:
        x: pixels [B, 3, S, S].
        reduce: "cls", what the class token looks at, or "received", how much all tokens look at each patch.

    Raises:
        ValueError: a tower without such blocks.
    """
    if reduce not in ("cls", "received"):
        raise ValueError(f"reduce must be cls or received, got {reduce!r}")
    if clip.adapter is not None and clip.adapter.prompts is not None:
        raise ValueError(f"{clip.name} has prompts, whose share of the attention has no place on the image")
    lead = tower_of(clip).lead
    if reduce == "cls" and not lead:
        raise ValueError(f"{clip.name} has no class token: choose reduce='received'")
    weights = attention_output(clip, x, block, "map").mean(1)  # [B, N, N]
    patches = (weights[:, 0] if reduce == "cls" else weights.mean(1))[:, lead:]
    side = round(patches.shape[1] ** 0.5)
    return patches.unflatten(1, (side, side))


def insensitivity(clip: Clip, data: Data, block: int = 0, batch_size: int = 100) -> float:
    """|E_x O(x)|^2 / E_x |O(x)|^2 in [0, 1] of a block's attention output O: 1 if it is the same for every image."""
    total, power, n = 0.0, 0.0, 0
    for rows in torch.arange(len(data)).split(batch_size):
        out = attention_output(clip, data.batch(rows)[0].to(clip.device), block).double()
        total, power, n = total + out.sum(0), power + out.square().sum(), n + len(out)
    return float((total / n).square().sum() / (power / n))
