"""What runs keep: of every sample the iterate that counts so far, also of those that have left the batch."""

import dataclasses

import torch
from torch import Tensor

from rvlm import ops
from rvlm.attacks.objective import Objective, Scores
from rvlm.attacks.rows import Rows

__all__ = ["Kept", "Roll"]


@dataclasses.dataclass
class Kept(Rows):
    """The iterate that a run returns so far, with its scores (None while nobody has asked for them)."""

    x_adv: Tensor
    scores: Scores | None

    @property
    def fooled(self) -> Tensor | None:
        return None if self.scores is None else self.scores.fooled

    def take(self, rows: Tensor, x_adv: Tensor, scores: Scores) -> None:
        """Replaces the rows that are True."""
        ops.keep_best_(self.x_adv, x_adv, rows)
        old = self.scores
        self.scores = Scores(
            torch.where(rows, scores.loss, old.loss),
            None if scores.fooled is None else torch.where(rows, scores.fooled, old.fooled),
            None if scores.pred is None else torch.where(rows, scores.pred, old.pred),
        )

    def put(self, rows: Tensor, part: "Kept") -> None:
        """Replaces the rows of that index by a part's."""
        self.x_adv[rows] = part.x_adv
        if self.scores is not None:
            self.scores.put(rows, part.scores)

    def merge(self, other: "Kept", objective: Objective) -> "Kept":
        """The better of two runs, per sample: success first, then loss."""
        rows = objective.better(other.scores.loss, self.scores.loss)
        if self.fooled is not None:
            rows = torch.where(self.fooled == other.fooled, rows, other.fooled)
        self.take(rows, other.x_adv, other.scores)
        return self


class Roll:
    """The samples that a run still works on, and what it has kept of those that it is done with.

    Attributes:
        rows: index of the former in the batch; a slice as long as nobody has left.
    """

    def __init__(self) -> None:
        self.rows: Tensor | slice = slice(None)
        self.kept: Kept | None = None

    def call(self, done: Tensor, k: int) -> Tensor | None:
        """The rows to go on with, once an eighth of those that are left is done; None: all of them.

        Asking waits for the device, so on a GPU it is done at every eighth step k.
        """
        if done.is_cuda and k % 8 != 7:
            return None
        left = (~done).nonzero().flatten()
        return left if len(left) <= len(done) * 7 // 8 else None

    def dismiss(self, kept: Kept, left: Tensor) -> bool:
        """Notes what is kept of all that were left; `left` of them stay. Returns whether there are any."""
        self.close(kept)
        self.rows = left if isinstance(self.rows, slice) else self.rows[left]
        return len(left) > 0

    def close(self, kept: Kept) -> Kept:
        """What the run keeps of everybody, given what it keeps of those that are left."""
        if self.kept is None:
            self.kept = kept
        else:
            self.kept.put(self.rows, kept)
        return self.kept
