"""Training steps as the papers' released scripts take them, in our words: what the methods are timed against.

Text is encoded anew at every forward pass, with a graph; the attack calls backward() on the whole model, weight
gradients and all; teachers are neither under no_grad nor cached; MMT-ARD's third teacher is asked and not used. The
arithmetic is that of the methods, so that losses agree.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from rvlm.models import Clip

__all__ = ["STEPS"]


def logits(clip: Clip, x: Tensor, texts: list[str]) -> Tensor:
    text = clip.encode_text(texts)
    return clip.logit_scale * clip.encode_pixels(x) @ text.T


def attacked(x: Tensor, loss_of, eps: float, alpha: float, steps: int) -> Tensor:
    delta = torch.zeros_like(x)
    for _ in range(steps):
        delta.requires_grad_()
        delta.grad = None
        loss_of(x + delta).backward()
        step = delta.detach() + alpha * delta.grad.sign()
        step = torch.clamp(step, -eps, eps)
        delta = torch.clamp(x + step, 0, 1) - x
    return (x + delta).detach()


def kl(first: Tensor, second: Tensor) -> Tensor:
    return F.kl_div(second.log_softmax(1), first.softmax(1), reduction="batchmean")


def tecoa(student: Clip, teachers: dict[str, Clip], x: Tensor, y: Tensor, texts: list[str], attack: dict) -> Tensor:
    x_adv = attacked(x, lambda v: F.cross_entropy(logits(student, v, texts), y), **attack)
    return F.cross_entropy(logits(student, x_adv, texts), y)


def pmg_aft(student: Clip, teachers: dict[str, Clip], x: Tensor, y: Tensor, texts: list[str], attack: dict) -> Tensor:
    x_adv = attacked(x, lambda v: F.cross_entropy(logits(student, v, texts), y), **attack)
    adv, clean = logits(student, x_adv, texts), logits(student, x, texts)
    frozen = logits(teachers["frozen"], x_adv, texts)
    return F.cross_entropy(adv, y) + kl(frozen, adv) + kl(clean, adv)


def hpt_gpd(student: Clip, teachers: dict[str, Clip], x: Tensor, y: Tensor, texts: list[str], attack: dict) -> Tensor:
    x_adv = attacked(x, lambda v: F.cross_entropy(logits(student, v, texts), y), **attack)
    return kl(logits(student, x_adv, texts), logits(teachers["proxy"], x_adv, texts))


def mmt_ard(student: Clip, teachers: dict[str, Clip], x: Tensor, y: Tensor, texts: list[str], attack: dict) -> Tensor:
    clean_said = logits(teachers["clean"], x, texts)
    x_adv = attacked(x, lambda v: kl(clean_said.detach(), logits(student, v, texts)), **attack)
    adv, clean = logits(student, x_adv, texts), logits(student, x, texts)
    robust_said, origin_said = logits(teachers["robust"], x_adv, texts), logits(teachers["origin"], x, texts)
    kl(origin_said, clean)
    return kl(robust_said, adv) + kl(clean_said, clean)


STEPS = {"tecoa": tecoa, "pmg_aft": pmg_aft, "hpt_gpd": hpt_gpd, "mmt_ard": mmt_ard}
