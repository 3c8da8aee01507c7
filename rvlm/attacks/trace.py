"""What the iterates of an attack came to: the step that fooled each sample first, and the loss at every step.

Step 0 is the start; the steps of later runs count on from the last that an earlier one made. Rows come in any order.

FMN, CW and DeepFool have none. They look for the nearest image that fools and climb no loss: CW's weighs two terms anew
in each round, FMN's ball and DeepFool's boundary are other ones at every step, and an iterate that fools may be outside
eps. How far they came is the distance that they end with.
"""

import torch
from torch import Tensor

from rvlm.attacks.rows import on_device

__all__ = ["Trace"]

NEVER = 2**62


class Trace:
    """Of a batch of samples.

    Attributes:
        last: the largest step so far, -1 before the first.
    """

    def __init__(self, batch: int, device: torch.device) -> None:
        self.last = -1
        self._before = 0  # steps of earlier runs
        self._at = torch.full((batch,), NEVER, device=device)
        # By step; NaN where nobody has looked.
        self._losses = torch.full((batch, 16), torch.nan, dtype=torch.float32, device=device)

    @property
    def fooled_at(self) -> Tensor:
        """int64 [B], the first step whose iterate fooled the model, -1: none did."""
        return torch.where(self._at == NEVER, -1, self._at)

    def sums(self) -> Tensor:
        """The loss summed over the batch, by step, in float64. A fooled sample, and one that was not looked at, keeps
        its loss of before."""
        losses = self._losses[:, : self.last + 1]
        steps = torch.arange(losses.shape[1], device=losses.device)
        known = torch.where(losses.isnan(), 0, steps).cummax(1).values
        return losses.gather(1, known.gather(1, torch.minimum(steps, self._at[:, None]))).double().sum(0)

    def next_run(self) -> None:
        """What is noted from here on is of another run."""
        self._before = max(self.last, 0)

    def note(self, rows: Tensor, steps: int | list[int], loss: Tensor, fooled: Tensor | None) -> None:
        """An iterate's loss and verdict, for samples in `rows`; steps: one for all, or of each."""
        if isinstance(steps, int):
            steps = [steps] * len(rows)
        self.last = max(self.last, self._before + max(steps))
        while self.last >= self._losses.shape[1]:
            self._losses = torch.cat([self._losses, torch.full_like(self._losses, torch.nan)], 1)
        at = on_device(rows, steps) + self._before
        self._losses[rows, at] = loss.detach().to(self._losses.dtype)
        if fooled is not None:
            self._at.scatter_reduce_(0, rows, torch.where(fooled, at, NEVER), "amin")

    def recant(self, rows: Tensor) -> None:
        """Takes back that these samples were fooled."""
        self._at[rows] = NEVER
