"""torchattacks' PGD loop in its own words, for machines where the package cannot be installed."""

from collections.abc import Callable

import torch
from peers.steps import linf_step, uniform_start
from torch import Tensor, nn

__all__ = ["PGD", "torchattacks_pgd"]


class PGD:
    """Same arguments, same arithmetic, same order as torchattacks.PGD (3.5.1), untargeted."""

    def __init__(
        self,
        model: Callable[[Tensor], Tensor],
        eps: float = 8 / 255,
        alpha: float = 2 / 255,
        steps: int = 10,
        random_start: bool = True,
    ) -> None:
        self.model, self.eps, self.alpha, self.steps, self.random_start = model, eps, alpha, steps, random_start

    def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
        images, labels = images.clone().detach(), labels.clone().detach()
        loss = nn.CrossEntropyLoss()
        x_adv = uniform_start(images, self.eps) if self.random_start else images.clone().detach()
        for _ in range(self.steps):
            x_adv.requires_grad = True
            cost = loss(self.model(x_adv), labels)
            grad = torch.autograd.grad(cost, x_adv, retain_graph=False, create_graph=False)[0]
            x_adv = linf_step(x_adv, grad, images, self.alpha, self.eps)
        return x_adv


def torchattacks_pgd(model: Callable[[Tensor], Tensor], **settings) -> Callable[[Tensor, Tensor], Tensor]:
    """torchattacks' PGD, or its twin where the package is not installed."""
    try:
        from torchattacks import PGD as theirs
    except ImportError:
        theirs = PGD
    return theirs(model, **settings)
