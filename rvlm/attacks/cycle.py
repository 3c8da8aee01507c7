"""Trajectories that have returned to an earlier state, and so will repeat what lies between.

Exact wherever the state decides the next one. A step along signs of the gradient in the Linf ball, of a fixed size,
moves on a finite grid, so returns come soon, and the image is the whole state: FGSM's iterations, PGD. With momentum
the velocity belongs to it: "sign" keeps it in {-1, 0, 1}, so that the pair returns, too. MI-FGSM's own velocity adds up
real numbers and does not; APGD changes its steps, VMI and DI draw or remember, L2 and L1 have no grid.
"""

import copy
from typing import Self

import torch
from torch import Tensor

__all__ = ["Cycle"]

RENEWED = 1.25  # sooner finds a cycle sooner after its start, and only shorter ones


class Cycle:
    """Finds, per sample, when a trajectory has returned (Brent's algorithm).

    The state is compared with a stored one that is renewed at steps 1, 2, 3, 4, 6, 8, 11, 14, 18, ... Once they are
    equal, all later states repeat with the period found, so only (steps left) mod period more steps are needed to
    land on that of the last step. All iterates of the cycle have been scored by then.

    Args:
        steps: of the run.
        state: at its start, tensors [B, ...].

    Attributes:
        last_step: int64 [B], where to stop.
    """

    def __init__(self, steps: int, *state: Tensor) -> None:
        self.steps, self.anchor, self.anchor_step = steps, [part.clone() for part in state], 0
        rows, device = len(state[0]), state[0].device
        self.last_step = torch.full((rows,), steps, device=device)
        self.found = torch.zeros(rows, dtype=torch.bool, device=device)

    def at(self, rows: Tensor) -> Self:
        """Of some samples."""
        part = copy.copy(self)
        part.anchor = [stored[rows] for stored in self.anchor]
        part.last_step, part.found = self.last_step[rows], self.found[rows]
        return part

    def look(self, step: int, *state: Tensor) -> None:
        """The state after so many steps."""
        same = ~self.found
        for part, stored in zip(state, self.anchor, strict=True):
            same = same & (part == stored).flatten(1).all(1)
        remaining = (self.steps - step) % (step - self.anchor_step)
        self.last_step = torch.where(same, step + remaining, self.last_step)
        self.found |= same
        if step > self.anchor_step * RENEWED:
            for part, stored in zip(state, self.anchor, strict=True):
                stored.copy_(part)
            self.anchor_step = step
