"""Auto-PGD (Croce & Hein 2020, arXiv 2003.01690; in L1, 2021, arXiv 2103.01208): PGD that chooses its own step sizes.

    z       = P(x_k + s d(g_k))                                     d(g) = sign(g); g / ||g||_2; sparse signs in L1
    x_{k+1} = P(x_k + 0.75 (z - x_k) + 0.25 (x_k - x_{k-1}))        Linf and L2; x_1 and all of L1: x_{k+1} = z

s begins at 2 eps (L1: eps). At checkpoints, which come more often as the run goes on (after 22 % of the steps, then at
intervals that shrink by 3 % down to 6 %), a sample halves s and returns to its best point so far if

    its loss rose in at most rho = 75 % of the steps since the last checkpoint, or
    s was not halved at the last checkpoint and the best loss has not improved since.

In L1 the share of pixels that move follows the sparsity of the best point: every 4 % of the steps it becomes two thirds
of the share that differs from x, and s is divided by 1.5, or set back to eps where that share has fallen by 5 %.

From the same start it scores the same points as AutoAttack's implementation, one of whose quirks is kept because it
decides about step sizes: the first loss after the start counts as a rise if it is above 0.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rvlm import ops, profiling
from rvlm.attacks.ball import Ball, rowwise
from rvlm.attacks.climb import Climb, in_step, unscored
from rvlm.attacks.kept import Kept
from rvlm.attacks.losses import AIMED
from rvlm.attacks.objective import AttackResult, Objective, Passes, Scores, most_targets
from rvlm.attacks.rows import Rows, on_device
from rvlm.attacks.runs import left_over
from rvlm.attacks.search import Attack, check_choices, check_count, check_slots, check_stop, search

__all__ = ["APGD", "apgd"]

MOMENTUM = 0.75
RADII, SHARES = (3.0, 2.0, 1.0), (0.3, 0.3, 0.4)  # of the runs with larger_eps


def apgd(
    model: Callable[[Tensor], Any],
    x: Tensor,
    y: Any = None,
    *,
    eps: float | Tensor = 8 / 255,
    steps: int = 100,
    norm: str = "linf",
    targeted: bool = False,
    loss: str | Callable[[Any, Any], Tensor] = "ce",
    targets: int | None = None,
    rho: float = 0.75,
    first_step: float | None = None,
    larger_eps: bool = False,
    eot: int = 1,
    random_start: bool = True,
    restarts: int = 1,
    x_init: Tensor | None = None,
    bounds: tuple[float, float] = (0.0, 1.0),
    best: str = "adv",
    early_stop: str | None = None,
    slots: int | None = None,
    generator: torch.Generator | None = None,
    sample_ids: Tensor | None = None,
    precision: str | None = None,
    strict_eps: bool = False,
    quantize: int | None = None,
    model_mode: str = "eval",
    engine: str = "auto",
    callback: Callable[[int, Tensor, Tensor], None] | None = None,
    return_info: bool = False,
) -> Tensor | AttackResult:
    """Auto-PGD. What is not listed means what it means in `pgd`.

    Args:
        steps: of a run; each run evaluates the model steps + 1 times.
        loss: "ce" (APGD-CE), "dlr" (APGD-DLR), "margin", a callable; or one that aims at wrong classes, "dlr-targeted"
            (APGD-T) or "ce-targeted", with one run per target class and restart. "dlr" needs three classes or more,
            "dlr-targeted" four.
        targets: how many wrong classes those aim at, likeliest first; None means nine, or all if there are fewer.
        rho: share of steps in which the loss must rise for the step size to stay.
        first_step: the first step size, in radii; None: 2, for L1 1.
        larger_eps: three runs in one, of 30, 30 and 40 % of the steps, in balls of 3, 2 and 1 eps, each from the best
            point of the one before, projected; for norm="l1" (AutoAttack's setting there).
        eot: gradients per iterate, averaged, for models that draw random numbers.
        random_start: start from noise stretched until it touches the ball (L1: Gaussian noise, projected).
        restarts: independent runs (per target class). With best="adv" and a named loss, a run is for the samples that
            no earlier one has fooled.
        best: "adv" returns the last adversarial iterate, or the one with the best loss where there is none (never the
            clean image); "loss" the one with the best loss of all runs.
        early_stop: "compact" takes samples out of the batch once they are fooled: the same verdicts for less.
        slots: the largest batch that is attacked (`rvlm.attacks.slots`). Runs, each of a sample, a restart and a
            target, take the places of those that are over, so that batches stay full, and x may be as large as memory
            allows; with "compile" and "cudagraph" all batches have that size. For a loss by name; best="adv" goes with
            early_stop="compact". The same verdicts as run after run: where several runs fool a sample, the image may be
            another one's.

    Returns:
        As `pgd`.

    Raises:
        As `pgd`; ValueError: too few classes for the loss or for `targets`.
    """
    check_choices(best=(best, ("adv", "loss")), early_stop=(early_stop, (None, "compact")))
    check_stop(early_stop, "auto" if slots else engine, loss)
    if early_stop and best != "adv":
        raise ValueError("early_stop='compact' ends with the first image that fools the model: for best='adv'")
    check_count("steps", steps, 1)
    if not 0 < rho <= 1:
        raise ValueError(f"rho must be a share of the steps, in (0, 1], got {rho}")
    if first_step is not None and not 0 < first_step < math.inf:
        raise ValueError(f"first_step must be a number of radii above 0, got {first_step}")
    if targets is not None:
        check_count("targets", targets, 1)
    if slots is not None:
        _check_slots(best, early_stop, loss, larger_eps, callback)
    if larger_eps and norm != "l1":
        raise ValueError("larger_eps=True is for norm='l1'")
    run = _AutoSteps(steps, rho, first_step, best, early_stop == "compact", larger_eps, callback)
    return search(
        "apgd", run, model, x, y, eps=eps, norm=norm, loss=loss, bounds=bounds, targeted=targeted,
        aimed=isinstance(loss, str) and loss in AIMED, targets=targets, random_start=random_start, on_sphere=True,
        start_scale=RADII[0] if larger_eps else 1.0,
        restarts=restarts, x_init=x_init, survivors=best == "adv" and isinstance(loss, str), slots=slots,
        queue=slots is not None,
        generator=generator, sample_ids=sample_ids, precision=precision, strict_eps=strict_eps, quantize=quantize,
        model_mode=model_mode, engine=engine, eot=eot, return_info=return_info,
    )  # fmt: skip


class APGD(Attack):
    """`apgd` with its settings fixed: `APGD(model, eps=4/255, loss="dlr")(x, y)`. Its keywords are attributes."""

    function = apgd

    @staticmethod
    def _passes(classes: int, norm: str, given: dict[str, Any]) -> Passes:
        """Every run: a gradient at the start and for each step; with larger_eps it starts three times. Before runs that
        aim at classes, those are looked up."""
        aimed = given["loss"] in AIMED
        runs = given["restarts"] * given["eot"] * (most_targets(given["targets"], classes) if aimed else 1)
        gradients = runs * (given["steps"] + (len(RADII) if given["larger_eps"] else 1))
        return Passes(gradients + aimed, gradients)


def _check_slots(best: str, early_stop: str | None, loss: Any, larger_eps: bool, callback: Any) -> None:
    check_slots(loss, callback)
    if best == "adv" and early_stop != "compact":
        raise ValueError("slots with best='adv' needs early_stop='compact': fooled samples make room for others")
    if larger_eps:
        raise ValueError("slots is not for larger_eps=True, whose runs change their balls")


class _AutoSteps:
    """One run, or with larger_eps three in a row."""

    def __init__(self, steps, rho, first_step, best, compact, larger_eps, callback) -> None:
        self.steps, self.rho, self.first_step, self.best, self.compact = steps, rho, first_step, best, compact
        self.larger_eps, self.callback = larger_eps, callback

    def continued(self, whole: bool) -> "_AutoSteps":
        """A run with a schedule of its own, in the ball."""
        steps = left_over(self.steps, whole)
        return _AutoSteps(steps, self.rho, self.first_step, self.best, self.compact, False, self.callback)

    def __call__(self, objective: Objective, ball: Ball, start: Tensor, scored: bool, noise) -> tuple[Kept, Tensor]:
        how = {"leave": self.compact, "callback": self.callback}
        if not self.larger_eps:
            return in_step(self.begin(objective, ball, start), objective, ball, **how)
        used = torch.zeros(len(start), dtype=torch.int64, device=start.device)
        counts, done = [math.ceil(share * self.steps) for share in SHARES[:2]], 0
        for radius, steps in zip(RADII, (*counts, self.steps - sum(counts)), strict=True):
            scaled = ball.scaled(radius)
            start = scaled.nearest_(start)
            rule = _Sparsity.of(scaled, objective, steps, self.first_step, start)
            last = radius == RADII[-1]  # success in a larger ball is none
            climb = _Ascent.of(rule, objective, start, steps, last and self.best == "adv", self.compact)
            best, moved = in_step(climb, objective, scaled, before=done, counts=last, **how)
            start, done, used = best.x_adv.clone(), done + steps, used + moved
        return best, used

    def begin(self, objective: Objective, ball: Ball, start: Tensor) -> "_Ascent":
        if ball.norm == "l1":
            rule = _Sparsity.of(ball, objective, self.steps, self.first_step)
        else:
            rule = _Halving.of(ball, objective, self.steps, self.first_step, self.rho)
        return _Ascent.of(rule, objective, start, self.steps, self.best == "adv", self.compact)


@dataclasses.dataclass
class _Ascent(Climb):
    """Where runs stand.

    Attributes:
        grad: of the loss at x_adv.
        best, best_grad: the iterate with the best loss so far, and the gradient there.
        hit: the last adversarial iterate; None if nobody asks for it.
        leave: who has one is done.
    """

    rule: "_Halving | _Sparsity"
    x_prev: Tensor
    grad: Tensor
    best: Kept
    best_grad: Tensor
    hit: Kept | None
    leave: bool

    @classmethod
    def of(cls, rule, objective: Objective, start: Tensor, steps: int, adversarial: bool, leave: bool) -> "_Ascent":
        """adversarial: keep such iterates."""
        none, zeros = unscored(start, objective), torch.zeros_like(start)
        hit = Kept(start.clone(), none) if adversarial and objective.labels is not None else None
        return cls(
            steps, start, none, [0] * len(start), torch.zeros_like(none.pred),
            rule, start.clone(), zeros, Kept(start.clone(), none), zeros.clone(), hit, leave,
        )  # fmt: skip

    @property
    def done(self) -> Tensor | None:
        """Who has been fooled."""
        return self.hit.fooled if self.leave and self.hit is not None else None

    def look(self, objective: Objective, ball: Ball) -> None:
        """Evaluates the iterates. At a checkpoint some become their best point."""
        seen = ball.as_seen(self.x_adv)
        self.scores, self.grad = scores, grad = objective.gradient(seen)
        if scores.fooled is None:
            self.hit = None
        elif self.hit is not None:
            self.hit.take(scores.fooled, seen, scores)
        rose = objective.better(scores.loss, self.best.scores.loss)
        rose[self.begun :] = True
        self.best.take(rose, seen, scores)
        ops.keep_best_(self.best_grad, grad, rose)
        back = self.rule.look(self.k, self.begun, scores, self.best, objective, ball)
        if back is not None:
            ops.keep_best_(self.x_adv, self.best.x_adv, back)
            self.grad = ops.keep_best_(grad.clone(), self.best_grad, back)

    def move(self, ball: Ball) -> None:
        """One step."""
        with profiling.phase("step", len(self.x_adv)):
            self.rule.step(self.x_prev, self.x_adv, self.grad, ball, self.begun)
        self.x_prev, self.x_adv, self.k = self.x_adv, self.x_prev, [k + 1 for k in self.k]
        self.moved += 1

    def kept(self) -> Kept:
        if self.hit is not None:
            self.best.take(self.hit.fooled, self.hit.x_adv, self.hit.scores)
        return self.best


@dataclasses.dataclass
class _Halving(Rows):
    """Step sizes in Linf and L2.

    Attributes:
        spans: for each number of steps, how many the checkpoint there looks back on; 0 where there is none.
        rises: since the last checkpoint.
        loss: of the last iterate; AutoAttack's 0 in place of the start's.
        best_loss: at the last checkpoint.
    """

    rho: float
    spans: tuple[int, ...]
    size: Tensor
    rises: Tensor
    halved: Tensor
    loss: Tensor
    best_loss: Tensor

    @classmethod
    def of(cls, ball: Ball, objective: Objective, steps: int, first_step: float | None, rho: float) -> "_Halving":
        rows, device = len(ball.x), ball.x.device
        zeros = torch.zeros(rows, device=device)
        return cls(
            rho, _spans(steps), _first_size(2.0 if first_step is None else first_step, ball, objective),
            torch.zeros(rows, dtype=torch.int64, device=device), torch.ones(rows, dtype=torch.bool, device=device),
            zeros, zeros,
        )  # fmt: skip

    def step(self, x_prev: Tensor, x_adv: Tensor, grad: Tensor, ball: Ball, old: int) -> None:
        """x_{k+1}, in the memory of x_{k-1}."""
        lo, hi = ball.bounds
        if ball.norm == "linf" and not ball.strict_eps:
            eps = ball.eps.expand(len(x_adv))
            for rows, a in ((slice(old), MOMENTUM), (slice(old, None), 1.0)):
                if len(x_adv[rows]):
                    ops.apgd_step_(
                        x_prev[rows], x_adv[rows], grad[rows], ball.x[rows], self.size[rows], eps[rows], a, lo, hi
                    )
            return
        z = ball.step(x_adv.clone(), grad, self.size)
        a = torch.ones_like(self.size)
        a[:old] = MOMENTUM
        a = rowwise(a, x_adv)
        ball.nearest_(x_prev.copy_(x_adv + (z - x_adv) * a + (x_adv - x_prev) * (1 - a)))

    def look(
        self, k: list[int], old: int, scores: Scores, best: Kept, objective: Objective, ball: Ball
    ) -> Tensor | None:
        """Which samples go back to their best point; None if nobody is at a checkpoint."""
        self.rises = self.rises + (scores.loss < self.loss if objective.targeted else scores.loss > self.loss)
        self.loss = scores.loss.clone()
        self.rises[old:], self.loss[old:] = 0, 0.0
        spans = [self.spans[steps] for steps in k]
        if not any(spans):
            return None
        span = on_device(self.rises, spans)
        here, many = span > 0, self.rises > self.rho * span
        stuck = ~self.halved & ~objective.better(best.scores.loss, self.best_loss)
        self.halved = torch.where(here, ~many | stuck, self.halved)
        back = here & self.halved
        self.size = torch.where(back, self.size / 2, self.size)
        self.best_loss = torch.where(here, best.scores.loss, self.best_loss)
        self.rises = torch.where(here, 0, self.rises)
        return back


def _spans(steps: int) -> tuple[int, ...]:
    interval, shortest, shrink = max(int(0.22 * steps), 1), max(int(0.06 * steps), 1), max(int(0.03 * steps), 1)
    spans, last = [0] * (steps + 1), 0
    while last + interval <= steps:
        last += interval
        spans[last] = interval
        interval = max(interval - shrink, shortest)
    return tuple(spans)


def _first_size(first_step: float, ball: Ball, objective: Objective) -> Tensor:
    return (-first_step if objective.targeted else first_step) * ball.eps.expand(len(ball.x))


@dataclasses.dataclass
class _Sparsity(Rows):
    """Step sizes and the share of pixels that move in L1; both begin where a start that was chosen with care is."""

    interval: int
    pixels: int
    largest: Tensor
    size: Tensor
    top: Tensor
    differ: Tensor

    @classmethod
    def of(
        cls, ball: Ball, objective: Objective, steps: int, first_step: float | None, start: Tensor | None = None
    ) -> "_Sparsity":
        pixels = ball.x[0].numel()
        largest = _first_size(1.0 if first_step is None else first_step, ball, objective)
        if start is None:
            top, differ = torch.full_like(largest, 0.2), torch.full_like(largest, float(pixels))
        else:
            differ = _differing(start, ball)
            top = differ / pixels / 1.5
        return cls(max(int(0.04 * steps), 1), pixels, largest, largest, top, differ)

    def step(self, x_prev: Tensor, x_adv: Tensor, grad: Tensor, ball: Ball, old: int) -> None:
        ball.step(x_prev.copy_(x_adv), grad, self.size, top=self.top)

    def look(
        self, k: list[int], old: int, scores: Scores, best: Kept, objective: Objective, ball: Ball
    ) -> Tensor | None:
        here = [steps > 0 and steps % self.interval == 0 for steps in k]
        if not any(here):
            return None
        here, differ = on_device(self.size, here), _differing(best.x_adv, ball)
        sparser = differ / self.differ < 0.95
        self.top = torch.where(here, differ / self.pixels / 1.5, self.top)
        self.differ = torch.where(here, differ, self.differ)
        shorter = self.size / 1.5
        shorter = torch.where(shorter.abs() < self.largest.abs() / 10, self.largest / 10, shorter)
        self.size = torch.where(here, torch.where(sparser, self.largest, shorter), self.size)
        return here & sparser


def _differing(x_adv: Tensor, ball: Ball) -> Tensor:
    """How many pixels are not the image's: [B]."""
    return (x_adv != ball.x).flatten(1).sum(1).to(x_adv.dtype)
