"""A run that moves its start step by step, and many of them that stand at one step.

    look at the iterates -> who is done leaves -> move -> ... -> look

Runs that need not stand at one step share a batch in `rvlm.attacks.slots`.
"""

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from rvlm.attacks.ball import Ball
from rvlm.attacks.kept import Kept, Roll
from rvlm.attacks.objective import Objective, Scores
from rvlm.attacks.rows import Rows

__all__ = ["Climb", "in_step", "unscored"]


@dataclasses.dataclass
class Climb(Rows):
    """Where runs stand, each after k steps of its own; those that have made none come last.

    Attributes:
        steps: of a run.
        x_adv: iterates.
        scores: of them; None if nobody asked.
        k: steps made.
        moved: int64 [B], how many of those changed the iterate.
    """

    steps: int
    x_adv: Tensor
    scores: Scores | None
    k: list[int]
    moved: Tensor

    @property
    def ended(self) -> list[bool]:
        """Whether all steps are made."""
        return [k == self.steps for k in self.k]

    @property
    def done(self) -> Tensor | None:
        """bool [B], who need not go on for another reason, such as being fooled; None: nobody leaves early."""
        raise NotImplementedError

    def look(self, objective: Objective, ball: Ball) -> None:
        """Evaluates the iterates."""
        raise NotImplementedError

    def move(self, ball: Ball) -> None:
        """One step."""
        raise NotImplementedError

    def kept(self) -> Kept:
        """What the runs return if they end here."""
        raise NotImplementedError

    @property
    def begun(self) -> int:
        """How many have made a step."""
        return len(self.k) - self.k.count(0)


def unscored(start: Tensor, objective: Objective) -> Scores:
    """Scores of iterates that nobody has asked about."""
    rows, device = len(start), start.device
    loss, pred = torch.full((rows,), torch.nan, device=device), torch.zeros(rows, dtype=torch.int64, device=device)
    return Scores(loss, None if objective.labels is None else pred.bool(), pred)


def in_step(
    climb: Climb,
    objective: Objective,
    ball: Ball,
    *,
    leave: bool,
    callback: Callable[[int, Tensor, Tensor], None] | None = None,
    before: int = 0,
    counts: bool = True,
) -> tuple[Kept, Tensor]:
    """What runs keep that all begin now, one of each sample, and their steps [B].

    Args:
        leave: who is done leaves the batch; else the runs end once all are done.
        callback: called as callback(k, iterates, loss) at every step, the last one's end excepted.
        before, counts: steps are noted behind so many, and whether fooling the model counts (`Objective.note`).
    """
    roll, used = Roll(), torch.zeros_like(climb.moved)
    for k in range(climb.steps + 1):
        climb.look(objective, ball)
        if climb.scores is not None:
            objective.note(before + k, climb.scores, counts)
        if k == climb.steps:
            break
        if callback is not None:
            callback(k, ball.as_seen(climb.x_adv), climb.scores.loss)
        if climb.done is not None and leave:
            if (left := roll.call(climb.done, k)) is not None:
                used[roll.rows] = climb.moved
                if not roll.dismiss(climb.kept(), left):
                    return roll.kept, used
                objective, ball, climb = objective.at(left), ball.at(left), climb.at(left)
        elif climb.done is not None and _all(climb.done, k):
            break
        climb.move(ball)
    used[roll.rows] = climb.moved
    return roll.close(climb.kept()), used


def _all(done: Tensor, k: int) -> bool:
    # Asking waits for the device: on a GPU only now and then, steps of rows that are done change nothing.
    return (not done.is_cuda or k % 8 == 7) and bool(done.all().item())
