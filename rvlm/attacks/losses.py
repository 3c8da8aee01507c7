"""Losses that an attack raises (or, targeted, lowers): callables (logits [B, C], labels [B]) -> [B]."""

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional as F

from rvlm import ops

__all__ = ["AIMED", "LOSSES", "ce", "dlr", "margin"]


def ce(logits: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy per sample, -log softmax(z)_y, by torch: the gradients of other attack libraries to the bit."""
    return F.cross_entropy(logits, y, reduction="none")


def margin(logits: Tensor, y: Tensor) -> Tensor:
    """max_{c != y} z_c - z_y per sample: positive exactly where the sample is misclassified (Carlini & Wagner 2017)."""
    return ops.attack_loss(logits, y, "cw")[0]


def dlr(logits: Tensor, y: Tensor) -> Tensor:
    """Difference of logits ratio, margin / (z_(1) - z_(3)): blind to the scale of the logits (Croce & Hein 2020)."""
    return ops.attack_loss(logits, y, "dlr")[0]


AIMED = ("dlr-targeted", "ce-targeted")  # raised by untargeted attacks that aim at one wrong class after another
LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"ce": ce, "margin": margin, "dlr": dlr}
