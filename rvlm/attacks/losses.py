"""Losses that an attack raises (or, targeted, lowers): callables (logits [B, C], labels [B]) -> [B].

Those by name also stand here as an attack asks for them: at the logits, by autograd, and at an embedding, with the
slope from which a backward pass begins.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from rvlm import ops

__all__ = [
    "AIMED", "LOSSES", "ce", "cosine", "dlr", "given", "loss_at_head", "loss_at_logits", "margin", "of_ops",
    "squared_l2", "wide",
]  # fmt: skip


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


def wide(output: Tensor) -> Tensor:
    """A model's logits in the precision of losses: float32, or float64 if they come so."""
    return output if output.dtype == torch.float64 else output.float()


def of_ops(name: str, labels: Tensor, target: Tensor | None) -> tuple[str, Tensor, Tensor | None, int]:
    """A loss by name as `ops.attack_loss` has it: kind, label, target, and the sign that comes before it.

    target: class that a loss of AIMED moves to, int64 [B]; the others do not look at it.
    """
    if name == "ce-targeted":
        return "ce", target, None, -1
    return name, labels, target if name in AIMED else None, 1


def loss_at_logits(
    name: str, logits: Tensor, labels: Tensor, target: Tensor | None = None, *, fused: bool = False
) -> Tensor:
    """A loss by name, [B], differentiable; fused: cross-entropy, too, by the formula of `loss_at_head`."""
    if name in LOSSES and not fused:
        return LOSSES[name](logits, labels)
    kind, label, other, sign = of_ops(name, labels, target)
    loss = ops.attack_loss(logits, label, kind, other)[0]
    return loss if sign > 0 else -loss


def loss_at_head(
    name: str, embedding: Tensor, head: Tensor, labels: Tensor, target: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """A loss by name, [B], of the logits embedding @ head, these logits, and the slope of its sum at the embedding."""
    kind, label, other, sign = of_ops(name, labels, target)
    loss, _, logits, slope = ops.clip_head_loss(embedding, head, label, kind, other)
    return (loss, logits, slope) if sign > 0 else (-loss, logits, -slope)
