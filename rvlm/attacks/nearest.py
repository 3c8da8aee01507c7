"""What attacks that look for short perturbations share: the nearest image so far that fools the model."""

import dataclasses

import torch
from torch import Tensor

from rvlm import ops
from rvlm.attacks.ball import Ball
from rvlm.attacks.kept import Kept
from rvlm.attacks.objective import Objective, Scores
from rvlm.attacks.rows import Rows

__all__ = ["Nearest"]


@dataclasses.dataclass
class Nearest(Rows):
    """Per sample, the nearest image that fools the model, and its distance; at first the clean image, at infinity."""

    x_adv: Tensor
    distance: Tensor

    @classmethod
    def of(cls, ball: Ball) -> "Nearest":
        return cls(ball.x.clone(), torch.full_like(ball.x.flatten(1)[:, 0], torch.inf))

    def take(self, x_adv: Tensor, wrong: Tensor, ball: Ball) -> Tensor:
        """Looks at new images, of which some fool the model; returns which are nearer than those before, bool [B]."""
        distance = ball.distance(x_adv)
        closer = wrong & (distance < self.distance)
        ops.keep_best_(self.x_adv, x_adv, closer)
        self.distance = torch.where(closer, distance, self.distance)
        return closer

    def kept(self, objective: Objective, ball: Ball) -> Kept:
        """The images, projected into the ball where they are outside, and scored; their loss is minus the distance."""
        x_adv = ball.as_seen(ball.project(self.x_adv))
        pred = objective.logits(x_adv).argmax(1)
        fooled = pred == objective.labels if objective.targeted else pred != objective.labels
        return Kept(x_adv, Scores(-self.distance, fooled, pred))
