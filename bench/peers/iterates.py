"""The lines that APGD's step, its book-keeping and the L1 projection replace, as one writes them in eager PyTorch."""

import torch
from torch import Tensor


def apgd_step(x_prev: Tensor, x_adv: Tensor, grad: Tensor, x: Tensor, step: Tensor, eps: float, a: float) -> Tensor:
    """The next iterate; both projections as AutoAttack writes them."""
    moved = x_adv - x_prev
    z = x_adv + step * torch.sign(grad)
    z = torch.clamp(torch.min(torch.max(z, x - eps), x + eps), 0.0, 1.0)
    y = x_adv + (z - x_adv) * a + moved * (1 - a)
    return torch.clamp(torch.min(torch.max(y, x - eps), x + eps), 0.0, 1.0)


def keep_best(best: Tensor, src: Tensor, flag: Tensor) -> Tensor:
    """By index, which asks the device how many rows there are."""
    rows = flag.nonzero().squeeze(1)
    best[rows] = src[rows]
    return best


def l1_step(x_adv: Tensor, grad: Tensor, x: Tensor, alpha: float, eps: float, top: float) -> Tensor:
    """SLIDE's step; the threshold of the gradient by another sort."""
    size = grad.abs().flatten(1)
    still = min(int((1 - top) * size.shape[1]), size.shape[1] - 1)
    least = size.sort(1).values[:, still : still + 1]
    sign = (grad.flatten(1) * (size >= least)).sign()
    moved = sign / (sign.abs().sum(1, keepdim=True) + 1e-10)
    return l1_project(x_adv + alpha * moved.view_as(x), x, eps)


def l1_project(x_adv: Tensor, x: Tensor, eps: float) -> Tensor:
    """By sorting all places where the length of the perturbation bends, two per pixel."""
    u = (x_adv - x).flatten(1)
    size, room = u.abs(), torch.where(u > 0, 1 - x.flatten(1), x.flatten(1))
    # Between two bends the length falls by (how many pixels shorten there) per unit of the threshold.
    bends = torch.cat([size, (size - room).clamp(min=0)], 1)
    change = torch.cat([torch.ones_like(size), -torch.ones_like(size)], 1)  # walking down from the largest bend
    bends, order = bends.sort(1, descending=True)
    moving = change.gather(1, order).cumsum(1)
    gaps = bends - torch.nn.functional.pad(bends[:, 1:], (0, 1))
    length = (moving * gaps).cumsum(1)  # at the lower end of each gap
    past = (length <= eps).sum(1, keepdim=True).clamp(max=bends.shape[1] - 1)
    before = torch.where(past > 0, length.gather(1, (past - 1).clamp(min=0)), 0.0)
    mu = bends.gather(1, past) - (eps - before) / moving.gather(1, past).clamp(min=1)
    mu = torch.where(length[:, -1:] <= eps, 0.0, mu)
    return (x + (torch.sign(u) * (size - mu).clamp(min=0)).view_as(x)).clamp(0, 1)


def momentum_step(
    x_adv: Tensor, velocity: Tensor, grad: Tensor, x: Tensor, alpha: float, eps: float, mu: float, kind: str
) -> Tensor:
    """MI-FGSM's step, or the one that takes signs twice; the velocity is updated in place."""
    if kind == "mi":
        length = grad.abs().flatten(1).sum(1).view(-1, *[1] * (grad.dim() - 1))
        velocity.mul_(mu).add_(grad / length)
    else:
        velocity.copy_(torch.sign(mu * velocity + torch.sign(grad)))
    delta = torch.clamp(x_adv + alpha * velocity.sign() - x, -eps, eps)
    return torch.clamp(x + delta, 0.0, 1.0)
