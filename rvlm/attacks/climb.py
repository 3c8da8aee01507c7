"""A run that moves its start step by step, and many of them that stand at one step.

    look at the iterates -> who is done leaves -> move -> ... -> look

Runs that need not stand at one step share a batch in `rvlm.attacks.slots`.
"""

from collections.abc import Callable
from typing import Protocol, Self

from torch import Tensor

from rvlm.attacks.ball import Ball
from rvlm.attacks.kept import Kept, Roll
from rvlm.attacks.objective import Objective, Scores

__all__ = ["Climb", "in_step"]


class Climb(Protocol):
    """Where runs stand: Rows of B of them, those that have just begun last.

    steps: of a run. x_adv: iterates. scores: of them, None if nobody asked. k: steps made. ended: whether these are
    all. done: bool [B], who need not go on for another reason, such as being fooled; None: nobody leaves early.
    """

    steps: int
    scores: Scores | None
    x_adv: Tensor
    k: list[int]
    ended: list[bool]
    done: Tensor | None

    def at(self, rows: Tensor) -> Self: ...

    def join(self, other: Self) -> Self: ...

    def look(self, objective: Objective, ball: Ball) -> None:
        """Evaluates the iterates."""

    def move(self, ball: Ball) -> Tensor | int:
        """One step; 1, or whether each run has made it: bool [B]."""

    def kept(self) -> Kept: ...


def in_step(
    climb: Climb,
    objective: Objective,
    ball: Ball,
    used: Tensor,
    *,
    leave: bool,
    callback: Callable[[int, Tensor, Tensor], None] | None = None,
    before: int = 0,
    counts: bool = True,
) -> Kept:
    """What runs keep that all begin now, one of each sample.

    Args:
        used: int64 [B], to which the steps that they make are added.
        leave: who is done leaves the batch; else the runs end once all are done.
        callback: called as callback(k, iterates, loss) at every step, the last one's end excepted.
        before, counts: steps are noted behind so many, and whether fooling the model counts (`Objective.note`).
    """
    roll = Roll()
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
                if not roll.dismiss(climb.kept(), left):
                    return roll.kept
                objective, ball, climb = objective.at(left), ball.at(left), climb.at(left)
        elif climb.done is not None and _all(climb.done, k):
            break
        used[roll.rows] += climb.move(ball)
    return roll.close(climb.kept())


def _all(done: Tensor, k: int) -> bool:
    # Asking waits for the device: on a GPU only now and then, steps of rows that are done change nothing.
    return (not done.is_cuda or k % 8 == 7) and bool(done.all().item())
