"""The runs of an attack, one for every restart and class that it aims at, and the best of each sample.

    start -> run -> kept iterate and its scores, merged per sample: success first, then loss

In a cascade runs search in bf16; what they keep is scored in fp32, and who is not fooled there goes on in fp32.
"""

import dataclasses
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import Tensor

from rvlm.attacks.ball import Ball, Noise
from rvlm.attacks.kept import Kept
from rvlm.attacks.objective import Objective, Scores
from rvlm.attacks.slots import in_slots

__all__ = ["Disagreement", "Judge", "Run", "Runs", "Starts", "left_over"]


class Run(Protocol):
    """One run of an attack, from a start (which it may overwrite) to what it keeps and the steps [B] it took.

    scored: the scores of what it keeps are needed. noise: None for an attack that draws nothing. A run that can go on
    from any point has `continued(whole) -> Run`, the run of as many steps, or of a quarter, that does. One that may
    share a batch (`rvlm.attacks.slots`) has `begin(objective, ball, start) -> Climb`.
    """

    def __call__(
        self, objective: Objective, ball: Ball, start: Tensor, scored: bool, noise: Noise | None
    ) -> tuple[Kept, Tensor]: ...


def left_over(steps: int, whole: bool) -> int:
    """Steps in fp32 of a run that goes on where a search in bf16 has ended: a quarter, or all of them again."""
    return steps if whole else math.ceil(steps / 4)


@dataclasses.dataclass
class Starts:
    """Where runs start, and what they draw.

    Attributes:
        ids: of the samples.
        noise_of: noise_of(number of the run, ids); None: nothing is drawn.
        x_init: start of the first run.
        random: starts are noise.
        restarts: runs for each class.
        x_first, on_sphere, scale: `x_first`, `on_sphere` and `start_scale` of `search`.
    """

    ball: Ball
    ids: Tensor
    noise_of: Callable[[int, Tensor], Noise] | None
    x_init: Tensor | None
    random: bool
    restarts: int
    x_first: bool
    on_sphere: bool
    scale: float

    def noise(self, number: int, rows: Tensor | None = None) -> Noise | None:
        """Of a run."""
        if self.noise_of is None:
            return None
        return self.noise_of(number, self.ids if rows is None else self.ids[rows])

    def at(self, number: int, rows: Tensor | None, noise: Noise | None) -> Tensor:
        """The start of a run."""
        part = self.ball.at(rows)
        around = part.scaled(self.scale)
        if self.x_init is not None and number == 0:
            return around.project(self.x_init if rows is None else self.x_init[rows])
        at_x = not self.random or (self.x_first and number % self.restarts == 0)
        return part.x.clone() if at_x else around.random_start(noise, self.on_sphere)


class Disagreement:
    """How many images fool the model in bf16 only, and in fp32 only; on the device."""

    def __init__(self, device: torch.device) -> None:
        self.both = torch.zeros(2, dtype=torch.int64, device=device)

    def settle(self, kept: Kept, scores: Scores) -> Tensor:
        """Gives what was kept in bf16 its scores in fp32; returns who [B] fools the model in bf16 only."""
        narrow, kept.scores = kept.fooled, scores
        if narrow is None:
            return torch.zeros_like(scores.loss, dtype=torch.bool)
        self.both += torch.stack([(narrow & ~scores.fooled).sum(), (scores.fooled & ~narrow).sum()])
        return narrow & ~scores.fooled

    def counts(self) -> list[int]:
        return self.both.tolist()


class Judge:
    """Gives what a search in bf16 keeps its scores in fp32.

    Attributes:
        cut: bool [B], whom bf16 took for fooled and fp32 does not, in some run.
        fooled: bool [B], who is fooled in fp32, in some run.
    """

    def __init__(
        self, in_float32: Callable[[], AbstractContextManager], disagreement: Disagreement, objective: Objective
    ) -> None:
        self.in_float32, self.disagreement, self.trace = in_float32, disagreement, objective.trace
        self.cut = torch.zeros_like(objective.labels, dtype=torch.bool)
        self.fooled = self.cut.clone()

    def __call__(self, objective: Objective, kept: Kept, rows: Tensor | None) -> Kept:
        """What was kept of these samples; None: of all."""
        with self.in_float32():
            scores = objective.score(kept.x_adv)
        rows = torch.arange(len(self.cut), device=self.cut.device) if rows is None else rows
        wrongly = self.disagreement.settle(kept, scores)
        self.cut[rows[wrongly]] = True
        if kept.fooled is not None:
            self.fooled[rows[kept.fooled]] = True
            if self.trace is not None:
                self.trace.recant(rows[wrongly & ~self.fooled[rows]])
        return kept


@dataclasses.dataclass
class Runs:
    """The runs of an attack, of which the best of each sample counts.

    Attributes:
        runs: how many, restarts times classes that are aimed at.
        aims: these classes, [B, runs / restarts]; None for a loss that does not aim.
        judge: of a cascade, else None.
        queued: they share a batch that a queue keeps full.
        scored: the scores of what runs keep are needed.
        restarts, survivors: as in `search`.
    """

    run: Run
    objective: Objective
    ball: Ball
    starts: Starts
    runs: int
    restarts: int
    aims: Tensor | None
    judge: Judge | None
    survivors: bool
    queued: bool
    scored: bool

    def in_turn(self) -> tuple[Kept, Tensor]:
        """What is kept, and the steps [B] taken, one run after the other; with `survivors` only by who is left."""
        chosen, batch = None, len(self.ball.x)
        steps_used = torch.zeros(batch, dtype=torch.int64, device=self.ball.x.device)
        for number in range(self.runs):
            rows = None
            if self.survivors and chosen is not None:
                left = (~chosen.fooled).nonzero().flatten()
                if not len(left):
                    break
                if len(left) < batch and self._may_shrink:
                    rows = left
            if self.aims is not None:
                self.objective.target = self.aims[:, number // self.restarts]
            noise = self.starts.noise(number, rows)
            start = self.starts.at(number, rows, noise)
            self._note_next_run()
            asked = self.objective if rows is None else self.objective.at(rows)
            kept, steps = self.run(asked, self.ball.at(rows), start, self.scored, noise)
            if self.judge is not None:
                kept = self.judge(asked, kept, rows)
            if rows is None:
                steps_used += steps
                chosen = kept if chosen is None else chosen.merge(kept, self.objective)
            else:
                steps_used[rows] += steps
                chosen.put(rows, chosen.at(rows).merge(kept, self.objective))
        return chosen, steps_used

    def in_slots(self) -> tuple[Kept, Tensor]:
        """The same with all runs in a batch that is kept full (`rvlm.attacks.slots`)."""

        def start_of(number: int, rows: Tensor) -> Tensor:
            return self.starts.at(number, rows, self.starts.noise(number, rows))

        def aim(samples: Tensor, numbers: Tensor) -> Tensor:
            return self.aims[samples, numbers // self.restarts]

        return in_slots(
            self.run, self.objective, self.ball, start_of, None if self.aims is None else aim, self.runs,
            stop=self.survivors, judge=self.judge,
        )  # fmt: skip

    def go_on(self, chosen: Kept, steps_used: Tensor) -> None:
        """The end of a cascade, to be called in fp32: who is not fooled goes on from its best image.

        For a quarter of the steps; for all of them whom bf16 took for fooled, since it may have left early.
        """
        for whole in (True, False):
            left = (~chosen.fooled & (self.judge.cut == whole)).nonzero().flatten()
            if not len(left):
                continue
            noise = self.starts.noise(self.runs + whole)
            self._note_next_run()
            if self.aims is not None:
                self.objective.target = self.objective.runners_up(chosen.x_adv, 1)[:, 0]
            run, objective, ball = self.run.continued(whole), self.objective, self.ball
            start = chosen.x_adv.clone()
            if self._may_shrink:
                objective, ball, start = objective.at(left), ball.at(left), start[left]
                noise = noise and noise.at(left)
            if self.queued:
                starts = lambda _, rows, at=start: at[rows]  # noqa: E731
                kept, steps = in_slots(run, objective, ball, starts, None, 1, stop=self.survivors)
            else:
                kept, steps = run(objective, ball, start, True, noise)
            if not self._may_shrink:
                kept, steps = kept.at(left), steps[left]
            steps_used[left] += steps
            chosen.put(left, chosen.at(left).merge(kept, self.objective))

    @property
    def _may_shrink(self) -> bool:
        """Whether a run may be given some of the samples: a loss of the caller's own may know the whole batch."""
        return self.objective.named and (self.objective.slots is not None or not self.objective.static)

    def _note_next_run(self) -> None:
        if self.objective.trace is not None:
            self.objective.trace.next_run()
