"""What attacks that look for short perturbations share: the nearest image so far that fools the model."""

import torch
from torch import Tensor

from rvlm import ops
from rvlm.attacks.ball import ORDER, Ball
from rvlm.attacks.kept import Kept
from rvlm.attacks.objective import Objective, Scores

__all__ = ["Nearest"]


class Nearest:
    """Per sample, the nearest image that fools the model, and its distance; at first the clean image, at infinity.

    Args:
        ball: around the clean images; its radius decides in the end.
        wrong: bool [B], where the model is wrong on the clean image already, at distance 0.
    """

    def __init__(self, ball: Ball, wrong: Tensor) -> None:
        self.ball, self.x_adv = ball, ball.x.clone()
        self.distance = torch.where(wrong, 0.0, torch.inf).to(ball.x.dtype)

    def length(self, x_adv: Tensor) -> Tensor:
        return (x_adv - self.ball.x).flatten(1).norm(ORDER[self.ball.norm], dim=1)

    def take(self, x_adv: Tensor, wrong: Tensor) -> None:
        """Looks at new images, of which some fool the model."""
        length = self.length(x_adv)
        closer = wrong & (length < self.distance)
        ops.keep_best_(self.x_adv, x_adv, closer)
        self.distance = torch.where(closer, length, self.distance)

    def kept(self, objective: Objective) -> Kept:
        """The images, projected into the ball where they are outside, and scored; their loss is minus the distance."""
        x_adv = self.ball.as_seen(self.ball.project(self.x_adv))
        pred = objective.logits(x_adv).argmax(1)
        fooled = pred == objective.labels if objective.targeted else pred != objective.labels
        return Kept(x_adv, Scores(-self.distance, fooled, pred))
