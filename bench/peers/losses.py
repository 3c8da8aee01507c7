"""The lines that the fused losses replace, as one writes them in eager PyTorch."""

import torch
from torch import Tensor
from torch.nn import functional as F


def multi_teacher_kl(student: Tensor, teachers: Tensor, weights: Tensor, kind: str) -> Tensor:
    """Weighted divergences [B] to T teachers."""
    log_q, loss = F.log_softmax(student, 1), 0.0
    for weight, teacher in zip(weights, teachers, strict=True):
        log_p = F.log_softmax(teacher, 1)
        if kind == "js":
            middle = torch.log((log_p.exp() + log_q.exp()) / 2)
            each = (log_p.exp() * (log_p - middle) + log_q.exp() * (log_q - middle)).sum(1) / 2
        else:
            first, second = (log_p, log_q) if kind == "forward" else (log_q, log_p)
            each = F.kl_div(second, first, log_target=True, reduction="none").sum(1)
        loss = loss + weight * each
    return loss


def multi_teacher_kl_of_liger(student: Tensor, teachers: Tensor, weights: Tensor, kind: str) -> Tensor:
    """The same summed over the batch, by Liger-Kernel: log-probabilities of one teacher at a time, a mean over rows."""
    from liger_kernel.transformers.jsd import LigerJSD
    from liger_kernel.transformers.kl_div import LigerKLDIVLoss

    log_q, loss = F.log_softmax(student, 1), 0.0
    divergence = LigerJSD() if kind == "js" else LigerKLDIVLoss(reduction="sum", log_target=True)
    scale = len(student) if kind == "js" else 1
    for weight, teacher in zip(weights, teachers, strict=True):
        loss = loss + weight * scale * divergence(log_q, F.log_softmax(teacher, 1))
    return loss


def attack_loss(logits: Tensor, y: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Loss [B] and the verdict that every attack asks for."""
    rows = torch.arange(len(y), device=y.device)
    if kind == "ce":
        loss = F.cross_entropy(logits, y, reduction="none")
    elif kind == "cw":
        loss = logits.scatter(1, y[:, None], -torch.inf).amax(1) - logits[rows, y]
    else:  # as in AutoAttack: a sorted row
        ordered, order = logits.sort(dim=1)
        right = (order[:, -1] == y).to(logits.dtype)
        gap = logits[rows, y] - ordered[:, -2] * right - ordered[:, -1] * (1 - right)
        loss = -gap / (ordered[:, -1] - ordered[:, -3] + 1e-12)
    return loss, logits.detach().argmax(1) == y
