"""Trajectories that have returned to an earlier state, and so will repeat what lies between.

Exact wherever the state decides the next one. A step along signs of the gradient in the Linf ball, of a fixed size,
moves on a finite grid, so returns come soon, and the image is the whole state: FGSM's iterations, PGD. With momentum
the velocity belongs to it: "sign" keeps it in {-1, 0, 1}, so that the pair returns, too. MI-FGSM's own velocity adds up
real numbers and does not; APGD changes its steps, VMI and DI draw or remember, L2 and L1 have no grid.
"""

import dataclasses
from typing import Self

import torch
from torch import Tensor

from rvlm.attacks.rows import Rows, on_device

__all__ = ["Cycle"]

RENEWED = 1.25  # sooner finds a cycle sooner after its start, and only shorter ones


@dataclasses.dataclass
class Cycle(Rows):
    """Finds, per trajectory, when it has returned (Brent's algorithm).

    The state is compared with a stored one that is renewed at steps 1, 2, 3, 4, 6, 8, 11, 14, 18, ... Once they are
    equal, all later states repeat with the period found, so only (steps left) mod period more steps are needed to
    land on that of the last step. All iterates of the cycle have been scored by then.

    Attributes:
        steps: of a run.
        anchor, anchor_step: the stored state, tensors [B, ...], and when it was stored.
        found: bool [B], who has returned.
        last_step: int64 [B], where to stop.
    """

    steps: int
    anchor: tuple[Tensor, ...]
    anchor_step: list[int]
    found: Tensor
    last_step: Tensor

    @classmethod
    def of(cls, steps: int, *state: Tensor) -> Self:
        """Trajectories that begin in a state."""
        rows, device = len(state[0]), state[0].device
        found = torch.zeros(rows, dtype=torch.bool, device=device)
        return cls(
            steps,
            tuple(part.clone() for part in state),
            [0] * rows,
            found,
            torch.full_like(found, steps, dtype=torch.int64),
        )

    def look(self, k: list[int], *state: Tensor) -> None:
        """The state after so many steps, of each trajectory one at least."""
        same = ~self.found
        for part, stored in zip(state, self.anchor, strict=True):
            same = same & (part == stored).flatten(1).all(1)
        periods = [step - at for step, at in zip(k, self.anchor_step, strict=True)]
        last = [step + (self.steps - step) % period for step, period in zip(k, periods, strict=True)]
        self.last_step = torch.where(same, on_device(same, last), self.last_step)
        self.found = self.found | same
        renew = [step > at * RENEWED for step, at in zip(k, self.anchor_step, strict=True)]
        if any(renew):
            rows = slice(None) if all(renew) else on_device(same, [row for row, new in enumerate(renew) if new])
            for part, stored in zip(state, self.anchor, strict=True):
                stored[rows] = part[rows]
            self.anchor_step = [step if new else at for step, at, new in zip(k, self.anchor_step, renew, strict=True)]
