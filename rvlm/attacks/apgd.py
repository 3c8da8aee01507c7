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

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rvlm import ops, profiling
from rvlm.attacks.ball import Ball
from rvlm.attacks.losses import AIMED
from rvlm.attacks.objective import AttackResult, Objective, Scores
from rvlm.attacks.search import Attack, Kept, Roll, check_choices, check_count, check_stop, left_over, search

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

    Returns:
        As `pgd`.

    Raises:
        As `pgd`; ValueError: too few classes for the loss or for `targets`.
    """
    check_choices(best=(best, ("adv", "loss")), early_stop=(early_stop, (None, "compact")))
    check_stop(early_stop, engine, loss)
    if early_stop and best != "adv":
        raise ValueError("early_stop='compact' ends with the first image that fools the model: for best='adv'")
    check_count("steps", steps, 1)
    if not 0 < rho <= 1:
        raise ValueError(f"rho must be a share of the steps, in (0, 1], got {rho}")
    if first_step is not None and not 0 < first_step < math.inf:
        raise ValueError(f"first_step must be a number of radii above 0, got {first_step}")
    if targets is not None:
        check_count("targets", targets, 1)
    if larger_eps and norm != "l1":
        raise ValueError("larger_eps=True is for norm='l1'")
    run = _AutoSteps(steps, rho, first_step, best, early_stop == "compact", larger_eps, callback)
    return search(
        "apgd", run, model, x, y, eps=eps, norm=norm, loss=loss, bounds=bounds, targeted=targeted,
        aimed=isinstance(loss, str) and loss in AIMED, targets=targets, random_start=random_start, on_sphere=True,
        start_scale=RADII[0] if larger_eps else 1.0,
        restarts=restarts, x_init=x_init, survivors=best == "adv" and isinstance(loss, str), generator=generator,
        sample_ids=sample_ids, precision=precision, strict_eps=strict_eps, quantize=quantize, model_mode=model_mode,
        engine=engine, eot=eot, return_info=return_info,
    )  # fmt: skip


class APGD(Attack):
    """`apgd` with its settings fixed: `APGD(model, eps=4/255, loss="dlr")(x, y)`. Its keywords are attributes."""

    function = apgd


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
        used = torch.zeros(len(start), dtype=torch.int64, device=start.device)
        if not self.larger_eps:
            return self._run(objective, ball, start, self.steps, _rule(ball, objective, self), used), used
        counts = [math.ceil(share * self.steps) for share in SHARES[:2]]
        for radius, steps in zip(RADII, (*counts, self.steps - sum(counts)), strict=True):
            scaled = ball.scaled(radius)
            start = scaled.nearest_(start)
            rule = _Sparsity(scaled, objective, steps, self.first_step, start)
            best = self._run(objective, scaled, start, steps, rule, used, last=radius == RADII[-1])
            start = best.x_adv.clone()
        return best, used

    def _run(
        self, objective: Objective, ball: Ball, start: Tensor, steps: int, rule, used: Tensor, last: bool = True
    ) -> Kept:
        """What one run keeps; counts its steps in `used`. last: not one in a larger ball, whose success is none."""
        x_adv, x_prev = start, start.clone()
        seen = ball.as_seen(x_adv)
        scores, grad = objective.gradient(seen)
        best, best_grad = Kept(seen.clone(), scores), grad.clone()
        hit = Kept(seen.clone(), scores) if last and self.best == "adv" and scores.fooled is not None else None
        roll = Roll()
        for k in range(steps):
            if self.compact and hit is not None and (left := roll.call(hit.fooled, k)) is not None:
                if not roll.dismiss(hit, left):
                    return roll.kept
                objective, ball, rule = objective.at(left), ball.at(left), rule.at(left)
                x_adv, x_prev, grad, best_grad = x_adv[left], x_prev[left], grad[left], best_grad[left]
                best, hit, seen, scores = best.at(left), hit.at(left), seen[left], scores.at(left)
            if self.callback is not None:
                self.callback(k, seen, scores.loss)
            with profiling.phase("step"):
                x_prev, x_adv = x_adv, rule.step(x_prev, x_adv, grad, 1.0 if k == 0 else MOMENTUM)
            seen = ball.as_seen(x_adv)
            scores, grad = objective.gradient(seen)
            used[roll.rows] += 1
            if hit is not None:
                hit.take(scores.fooled, seen, scores)
            rose = objective.better(scores.loss, best.scores.loss)
            best.take(rose, seen, scores)
            ops.keep_best_(best_grad, grad, rose)
            back = rule.look(k, scores, best)
            if back is not None:  # a checkpoint: these samples go on from their best point
                ops.keep_best_(x_adv, best.x_adv, back)
                grad = ops.keep_best_(grad.clone(), best_grad, back)
        if hit is not None:
            best.take(hit.fooled, hit.x_adv, hit.scores)
        return roll.close(best)


def _rule(ball: Ball, objective: Objective, settings: _AutoSteps):
    if ball.norm == "l1":
        return _Sparsity(ball, objective, settings.steps, settings.first_step)
    return _Halving(ball, objective, settings.steps, settings.first_step, settings.rho)


class _Halving:
    """Step sizes in Linf and L2."""

    def __init__(self, ball: Ball, objective: Objective, steps: int, first_step: float | None, rho: float) -> None:
        self.ball, self.objective, self.rho = ball, objective, rho
        self.interval, self.shortest = max(int(0.22 * steps), 1), max(int(0.06 * steps), 1)
        self.shrink, self.since = max(int(0.03 * steps), 1), 0
        rows, device = len(ball.x), ball.x.device
        first_step = 2.0 if first_step is None else first_step
        self.size = (-first_step if objective.targeted else first_step) * ball.eps.expand(rows)
        self.rises = torch.zeros(rows, dtype=torch.int64, device=device)
        self.halved = torch.ones(rows, dtype=torch.bool, device=device)
        self.loss = torch.zeros(rows, device=device)  # AutoAttack's, in place of the start's
        self.best_loss: Tensor | None = None  # at the last checkpoint

    def at(self, rows: Tensor) -> "_Halving":
        """The same for some of the samples."""
        part = copy.copy(self)
        part.ball, part.objective = self.ball.at(rows), self.objective.at(rows)
        part.size, part.rises, part.halved, part.loss = (
            t[rows] for t in (self.size, self.rises, self.halved, self.loss)
        )
        part.best_loss = None if self.best_loss is None else self.best_loss[rows]
        return part

    def step(self, x_prev: Tensor, x_adv: Tensor, grad: Tensor, a: float) -> Tensor:
        """x_{k+1}, in the memory of x_{k-1}."""
        ball = self.ball
        lo, hi = ball.bounds
        if ball.norm == "linf" and not ball.strict_eps:
            return ops.apgd_step_(x_prev, x_adv, grad, ball.x, self.size, ball.eps, a, lo, hi)
        z = ball.step(x_adv.clone(), grad, self.size)
        return ball.nearest_(x_prev.copy_(x_adv + (z - x_adv) * a + (x_adv - x_prev) * (1 - a)))

    def look(self, k: int, scores: Scores, best: Kept) -> Tensor | None:
        """Which samples go back to their best point; None between checkpoints."""
        self.rises += scores.loss < self.loss if self.objective.targeted else scores.loss > self.loss
        self.loss, self.since = scores.loss, self.since + 1
        if self.since < self.interval:
            return None
        many = self.rises > self.rho * self.interval
        if self.best_loss is None:
            self.halved = ~many
        else:
            stuck = ~self.halved & ~self.objective.better(best.scores.loss, self.best_loss)
            self.halved = ~many | stuck
        self.size = torch.where(self.halved, self.size / 2, self.size)
        self.best_loss, self.rises, self.since = best.scores.loss, torch.zeros_like(self.rises), 0
        self.interval = max(self.interval - self.shrink, self.shortest)
        return self.halved


class _Sparsity:
    """Step sizes and the share of pixels that move in L1; both begin where a start that was chosen with care is."""

    def __init__(
        self, ball: Ball, objective: Objective, steps: int, first_step: float | None, start: Tensor | None = None
    ) -> None:
        self.ball, self.interval = ball, max(int(0.04 * steps), 1)
        rows, self.pixels, like = len(ball.x), ball.x[0].numel(), {"dtype": ball.x.dtype, "device": ball.x.device}
        first_step = 1.0 if first_step is None else first_step
        self.largest = (-first_step if objective.targeted else first_step) * ball.eps.expand(rows)
        self.size = self.largest
        if start is None:
            self.top = torch.full((rows,), 0.2, **like)
            self.differ = torch.full((rows,), float(self.pixels), **like)
        else:
            self.differ = self._differing(start)
            self.top = self.differ / self.pixels / 1.5

    def at(self, rows: Tensor) -> "_Sparsity":
        """The same for some of the samples."""
        part = copy.copy(self)
        part.ball, part.largest, part.size = self.ball.at(rows), self.largest[rows], self.size[rows]
        part.top, part.differ = self.top[rows], self.differ[rows]
        return part

    def step(self, x_prev: Tensor, x_adv: Tensor, grad: Tensor, a: float) -> Tensor:
        return self.ball.step(x_prev.copy_(x_adv), grad, self.size, top=self.top)

    def look(self, k: int, scores: Scores, best: Kept) -> Tensor | None:
        if (k + 1) % self.interval:
            return None
        differ = self._differing(best.x_adv)
        sparser = differ / self.differ < 0.95
        self.top, self.differ = differ / self.pixels / 1.5, differ
        shorter = self.size / 1.5
        shorter = torch.where(shorter.abs() < self.largest.abs() / 10, self.largest / 10, shorter)
        self.size = torch.where(sparser, self.largest, shorter)
        return sparser

    def _differing(self, x_adv: Tensor) -> Tensor:
        return (x_adv != self.ball.x).flatten(1).sum(1).to(x_adv.dtype)
