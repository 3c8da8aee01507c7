"""Losses that an attack raises (or, targeted, lowers): callables (logits [B, C], labels [B]) -> [B]."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["LOSSES", "ce", "margin"]


def ce(logits: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy per sample, -log softmax(z)_y."""
    return F.cross_entropy(logits, y, reduction="none")


def margin(logits: Tensor, y: Tensor) -> Tensor:
    """max_{c != y} z_c - z_y per sample: positive exactly where the sample is misclassified (Carlini & Wagner 2017)."""
    if logits.shape[1] < 2:
        raise ValueError(f"the margin loss needs at least 2 classes, got logits of shape {list(logits.shape)}")
    own = logits.gather(1, y[:, None])
    rest = logits.scatter(1, y[:, None], -torch.inf)
    return rest.amax(1) - own.squeeze(1)


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"ce": ce, "margin": margin}
