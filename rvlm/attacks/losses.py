"""Losses that an attack raises (or, targeted, lowers): callables (logits [B, C], labels [B]) -> [B]."""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from rvlm import ops

__all__ = ["AIMED", "LOSSES", "ce", "cosine", "dlr", "given", "margin", "squared_l2"]


def ce(logits: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy per sample, -log softmax(z)_y, by torch: the gradients of other attack libraries to the bit."""
    return F.cross_entropy(logits, y, reduction="none")


def margin(logits: Tensor, y: Tensor) -> Tensor:
    """max_{c != y} z_c - z_y per sample: positive exactly where the sample is misclassified (Carlini & Wagner 2017)."""
    return ops.attack_loss(logits, y, "cw")[0]


def dlr(logits: Tensor, y: Tensor) -> Tensor:
    """Difference of logits ratio, margin / (z_(1) - z_(3)): blind to the scale of the logits (Croce & Hein 2020)."""
    return ops.attack_loss(logits, y, "dlr")[0]


def squared_l2(embedding: Tensor, reference: Tensor) -> Tensor:
    """||f(x) - f_0||^2 per sample: what FARE's attack raises (Schlarmann et al. 2024, arXiv 2402.12336).

    For attacks on embeddings: pgd(clip.encode_pixels, x, clip.encode_pixels(x).detach(), loss=squared_l2).
    """
    return (embedding - reference).square().flatten(1).sum(1)


def cosine(embedding: Tensor, reference: Tensor) -> Tensor:
    """1 - cos(f(x), f_0) per sample; used like `squared_l2`."""
    return 1 - F.cosine_similarity(embedding.flatten(1), reference.flatten(1), dim=1)


def given(losses: Tensor, y: Any) -> Tensor:
    """The model's outputs [B] themselves, for a model that maps pixels to losses: a caption's, an answer's.

    pgd(lambda x: captioner(x, captions), x, loss=given, best="loss"); targeted=True lowers them.
    """
    return losses


AIMED = ("dlr-targeted", "ce-targeted")  # raised by untargeted attacks that aim at one wrong class after another
LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"ce": ce, "margin": margin, "dlr": dlr}
