"""The update lines of other attack libraries, as they stand in their loops: plain PyTorch, one tensor per line.

Written again from torchattacks 3.5.1 (PGD, PGDL2); tests/bench holds them against the package.
"""

import torch
from torch import Tensor

__all__ = ["l2_step", "linf_step", "uniform_start"]


def linf_step(x_adv: Tensor, grad: Tensor, x: Tensor, alpha: float, eps: float) -> Tensor:
    x_adv = x_adv.detach() + alpha * grad.sign()
    delta = torch.clamp(x_adv - x, min=-eps, max=eps)
    return torch.clamp(x + delta, min=0, max=1).detach()


def l2_step(x_adv: Tensor, grad: Tensor, x: Tensor, alpha: float, eps: float) -> Tensor:
    norm = torch.norm(grad.view(len(x), -1), p=2, dim=1) + 1e-10
    grad = grad / norm.view(len(x), 1, 1, 1)
    x_adv = x_adv.detach() + alpha * grad
    delta = x_adv - x
    norm = torch.norm(delta.view(len(x), -1), p=2, dim=1)
    factor = torch.min(eps / norm, torch.ones_like(norm))
    delta = delta * factor.view(-1, 1, 1, 1)
    return torch.clamp(x + delta, min=0, max=1).detach()


def uniform_start(x: Tensor, eps: float) -> Tensor:
    x_adv = x + torch.empty_like(x).uniform_(-eps, eps)
    return torch.clamp(x_adv, min=0, max=1).detach()
