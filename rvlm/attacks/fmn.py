"""Fast minimum-norm attack (Pintor et al. 2021, arXiv 2102.12827): steps in a ball whose radius learns to be small.

    x_{k+1} = P_e(x_k + a_k g / ||g||_2),   g the gradient of the margin max_{c != y} z_c - z_y
    radius e: if x_k fools the model    min(e (1 - c_k), shortest perturbation so far)
              else, if any did          e (1 + c_k)
              else                      ||x_k - x|| + |margin| / ||g||_dual, where the plane is that the margin's
                                        linearisation is 0 on, and a hair more, so that rounding does not stop at it

a_k and c_k fall along half a cosine, from alpha to alpha / 100 and from gamma to 0.001. Iterates aim at the boundary,
where rounding may say on which side they are: distances repeat in another batch to about a per cent, images not to the
bit.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rvlm import profiling
from rvlm.attacks.ball import DUAL, Ball, rowwise
from rvlm.attacks.kept import Kept
from rvlm.attacks.nearest import Nearest
from rvlm.attacks.objective import AttackResult, Objective, Passes
from rvlm.attacks.search import Attack, check_count, search

__all__ = ["FMN", "fmn"]


def fmn(
    model: Callable[[Tensor], Any],
    x: Tensor,
    y: Tensor | None = None,
    *,
    eps: float | Tensor | None = None,
    steps: int = 100,
    norm: str = "linf",
    targeted: bool = False,
    alpha: float = 1.0,
    gamma: float = 0.05,
    bounds: tuple[float, float] = (0.0, 1.0),
    sample_ids: Tensor | None = None,
    precision: str | None = None,
    strict_eps: bool = False,
    quantize: int | None = None,
    model_mode: str = "eval",
    engine: str = "auto",
    callback: Callable[[int, Tensor, Tensor], None] | None = None,
    return_info: bool = False,
) -> Tensor | AttackResult:
    """FMN: the nearest image that fools the model. Draws nothing. What is not listed means what it means in `pgd`.

    Args:
        eps: None: whatever distance it takes. A radius: images farther away are projected into the ball, and `success`
            is about what is left of them.
        steps: gradients per image.
        norm: whose length is made small, "linf", "l2" or "l1".
        alpha: first step size, an L2 length.
        gamma: first relative change of the radius.
        callback: called as callback(step, x_adv, distance of the nearest image so far) after every gradient.

    Returns:
        As `pgd`; images of samples that nothing fooled are clean. `loss` is minus the distance from x, minus infinity
        where nothing fooled the model.

    Raises:
        As `pgd`.
    """
    check_count("steps", steps, 1)
    for name, value in (("alpha", alpha), ("gamma", gamma)):
        if not value > 0:
            raise ValueError(f"{name} must be above 0, got {value}")
    run = _Shrinking(alpha, gamma, steps, callback)
    return search(
        "fmn", run, model, x, y, eps=eps, norm=norm, loss="margin", bounds=bounds, targeted=targeted,
        distances=True, random_start=False, sample_ids=sample_ids, precision=precision, strict_eps=strict_eps,
        quantize=quantize, model_mode=model_mode, engine=engine, return_info=return_info,
    )  # fmt: skip


class FMN(Attack):
    """`fmn` with its settings fixed: `FMN(model, norm="l2")(x, y)`. Its keywords are attributes."""

    function = fmn

    @staticmethod
    def _passes(classes: int, norm: str, given: dict[str, Any]) -> Passes:
        """A gradient for each step, and the verdict."""
        return Passes(given["steps"] + 1, given["steps"])


class _Shrinking:
    """One run."""

    def __init__(self, alpha: float, gamma: float, steps: int, callback) -> None:
        self.alpha, self.gamma, self.steps, self.callback = alpha, gamma, steps, callback

    def __call__(self, objective: Objective, ball: Ball, x_adv: Tensor, scored: bool, noise) -> tuple[Kept, Tensor]:
        clean, norm, sign = ball.x, ball.norm, -1.0 if objective.targeted else 1.0
        nearest = Nearest.of(ball)
        lo, hi = ball.bounds
        farthest = ball.distance(clean + torch.maximum(clean - lo, hi - clean))
        radius = torch.full_like(farthest, torch.inf)
        found = torch.zeros(len(clean), dtype=torch.bool, device=clean.device)
        hair = 1 + 64 * torch.finfo(clean.dtype).eps
        for k in range(self.steps):
            fall = (1 + math.cos(math.pi * k / self.steps)) / 2
            alpha = self.alpha / 100 + 0.99 * self.alpha * fall
            gamma = 0.001 + (self.gamma - 0.001) * fall
            scores, grad = objective.gradient(x_adv)
            with profiling.phase("step", len(x_adv)):
                nearest.take(x_adv, scores.fooled, ball)
                found |= scores.fooled
                if self.callback is not None:
                    self.callback(k, x_adv, nearest.distance)
                slope = grad.flatten(1).norm(DUAL[norm], dim=1).clamp(min=torch.finfo(clean.dtype).tiny)
                ahead = (ball.distance(x_adv) + scores.loss.abs().to(clean.dtype) / slope) * hair
                shrunk = torch.minimum(radius * (1 - gamma), nearest.distance)
                radius = torch.where(scores.fooled, shrunk, torch.where(found, radius * (1 + gamma), ahead))
                radius = torch.minimum(radius, farthest)
                length = grad.flatten(1).norm(dim=1)
                share = torch.where(length > 0, sign * alpha / length, 0.0).to(clean.dtype)
                x_adv = Ball(clean, radius, norm, ball.bounds).nearest_(x_adv + rowwise(share, x_adv) * grad)
        return nearest.kept(objective, ball), torch.full((len(clean),), self.steps, device=clean.device)
