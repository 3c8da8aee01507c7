"""Projected gradient descent (Madry et al. 2018, arXiv 1706.06083) in the Linf, L2 and L1 balls.

    x_0     = clip(x + noise)                                     random start
    x_{k+1} = project(x_k + alpha * direction(grad loss(x_k)))    sign(g) for Linf, g / ||g|| for L2,
                                                                  the largest 5 % of the gradient for L1 (SLIDE)

With low_frequency the model sees x + G (x_k - x), G a Gaussian low-pass filter, and the gradient is G times its own.

From the same start it gives the images of torchattacks.PGD and foolbox's PGD, bit for bit where the gradients agree.
"""

import copy
import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rvlm import profiling
from rvlm.attacks.ball import Ball
from rvlm.attacks.checks import check_radius
from rvlm.attacks.climb import Climb, in_step, unscored
from rvlm.attacks.cycle import Cycle
from rvlm.attacks.engines import FIXED
from rvlm.attacks.kept import Kept
from rvlm.attacks.objective import AttackResult, Objective, Passes, Scores
from rvlm.attacks.rows import on_device
from rvlm.attacks.runs import left_over
from rvlm.attacks.search import Attack, check_choices, check_count, check_slots, check_stop, search

__all__ = ["PGD", "pgd"]

STOPS = (None, "freeze", "compact", "cycle", "compact+cycle")


def pgd(
    model: Callable[[Tensor], Any],
    x: Tensor,
    y: Any = None,
    *,
    eps: float | Tensor = 8 / 255,
    alpha: float | Tensor | None = None,
    steps: int = 10,
    norm: str = "linf",
    targeted: bool = False,
    loss: str | Callable[[Any, Any], Tensor] = "ce",
    random_start: bool = True,
    restarts: int = 1,
    eot: int = 1,
    x_init: Tensor | None = None,
    bounds: tuple[float, float] = (0.0, 1.0),
    best: str = "last",
    early_stop: str | None = None,
    slots: int | None = None,
    generator: torch.Generator | None = None,
    sample_ids: Tensor | None = None,
    precision: str | None = None,
    strict_eps: bool = False,
    quantize: int | None = None,
    low_frequency: float | None = None,
    model_mode: str = "eval",
    engine: str = "auto",
    callback: Callable[[int, Tensor, Tensor], None] | None = None,
    return_info: bool = False,
) -> Tensor | AttackResult:
    """PGD attack on any callable.

    The model is left exactly as it was, also if it raises: see `rvlm.attacks.contract`. With generator=None one 64-bit
    seed is drawn from torch's default CPU generator if the start is random; nothing else touches global state.

    Args:
        model: callable from pixels [B, ...] inside `bounds` to logits [B, C]. Normalisation belongs inside it.
        x: clean images [B, ...], float32 or float64, inside `bounds`; any device and memory format.
        y: labels [B], or target labels if `targeted`. None: the model's own predictions on x. With a callable loss,
            whatever that loss takes.
        eps: radius in pixel units (8/255, not 8), a float or [B].
        alpha: step size in pixel units, a float or [B]; None means 2.5 * eps / steps.
        steps: number of steps; 0 returns the start.
        norm: "linf", "l2" or "l1".
        targeted: lower the loss toward y instead of raising it.
        loss: "ce", "margin", "dlr" (three classes or more), or a callable (output, y) -> [B].
        random_start: start from uniform noise in the ball (L2: a uniform direction, a radius uniform in [0, eps); L1:
            Gaussian noise of standard deviation one bounds' width, projected).
        restarts: independent runs; per sample the run that fools the model wins, then the one with the better loss.
        eot: gradients per iterate, averaged, for models that draw random numbers (Athalye et al., arXiv 1707.07397);
            an image counts as fooled if most draws say so.
        x_init: start of the first run instead of noise; pixels outside ball or box are projected.
        bounds: valid pixel range.
        best: what a run returns: its "last" iterate, the iterate with the best "loss", or the last "adv"ersarial one
            (the best loss where there is none). "loss" and "adv" choose among every iterate that was scored, the start
            and the end included.
        early_stop: "freeze" leaves a sample alone once an iterate of it fools the model (needs labels) and ends when
            all are; "compact" also takes it out of the batch, so that what is left costs less; "cycle" ends a sample
            when its trajectory has returned to an earlier iterate (`rvlm.attacks.cycle`). That is exact where the model
            draws no random numbers (eot > 1 is refused): Linf with a fixed alpha moves on a finite grid, and the
            iterate of the last step follows from the period. With a loss by name and in eager mode such samples leave
            the batch, too; then models whose last bits depend on the batch's size may, for those that stay, give
            gradients with other last bits than the full run's. "compact+cycle" ends a sample for either reason: the
            verdicts and images of "compact".
        slots: the largest batch that the model is asked about at once, so that x may be larger and batches stay full
            when samples leave; restarts of one sample go side by side where there is room (`rvlm.attacks.slots`), but
            under "freeze". With "compile" and "cudagraph" all batches have that size, and samples may leave. For a loss
            by name, without a callback. Where several restarts fool a sample, the image may be another one's than
            without slots.
        generator: source of the seed of the random start.
        sample_ids: int64 [B], stable numbers that key each sample's noise; None means 0 .. B-1.
        precision: None runs the model as it is (under the caller's autocast, if any); "fp32" turns autocast off; "tf32"
            lets CUDA devices cut the inputs of matrix products and convolutions to ten bits, during the attack; "bf16"
            autocasts the model, its weights once. Images, ball and steps stay in x's dtype, and `return_info` scores
            the result without any of it. "cascade" searches in bf16, scores what every run keeps in fp32, where alone
            a verdict counts, and lets the samples that fool the model there in no run go on in fp32 from their best
            image, once, for a quarter of a run's steps more, or for all of them where bf16 took them for fooled;
            needs labels. An AttackResult counts the disagreements.
        strict_eps: no pixel exceeds eps even in exact arithmetic (fp32 rounding otherwise adds up to 6e-8).
        quantize: 255 returns images that survive uint8 storage: every iterate that the model sees is on the grid, and
            gradients pass straight through the rounding. x must be on the grid. For L2 and L1 pixels round toward x,
            which costs norm: about half a level per pixel.
        low_frequency: D0 in DFT bins of a Gaussian filter (`ops.gaussian_filter`) that every change of the images
            passes, so that a defence that low-passes them hardly weakens it; x must be [B, C, H, W]. Where ball and
            box cut the filtered change, at black and white pixels, it has edges again.
        model_mode: "eval", "train" or "keep" (flags as they are).
        engine: how gradients of a named loss are run (`rvlm.attacks.engines`): "eager" or "auto", which is the same;
            "compile", one region of torch.compile, compiled at the first attack on a model and shape and kept for
            later ones; "cudagraph", eager kernels captured at the start of each attack, for small batches on a GPU.
        callback: called as callback(step, x_adv, loss) after every gradient, with live tensors that it must not change
            (of the samples that are left, where some leave).
        return_info: return an AttackResult.

    Returns:
        Adversarial images, detached, with x's dtype, device and memory format; or an AttackResult.

    Raises:
        TypeError, ValueError: wrong input; the message says what was expected. Nothing has changed then.

    Warns:
        AttackWarning: empty batch; outputs that look like probabilities; NaN logits (with `slots` and restarts
            those of the first batch).
    """
    check_choices(best=(best, ("last", "loss", "adv")), early_stop=(early_stop, STOPS))
    check_count("steps", steps, 0)
    stops = early_stop.split("+") if early_stop else []
    check_stop(early_stop, "auto" if slots else engine, loss)
    if slots is not None:
        check_slots(loss, callback)
    if low_frequency is not None:
        if not 0 < low_frequency < math.inf:
            raise ValueError(f"low_frequency must be a finite number of DFT bins above 0, got {low_frequency}")
        if isinstance(x, Tensor) and x.dim() != 4:
            raise ValueError(f"low_frequency needs images [B, C, H, W], got {list(x.shape)}")
    if "cycle" in stops and norm != "linf":
        raise ValueError(f"early_stop={early_stop!r} is exact for norm='linf' only; use 'compact', 'freeze' or None")
    if "cycle" in stops and eot > 1:
        raise ValueError(
            f"eot={eot} is for models that draw random numbers, whose trajectories do not repeat for good: "
            f"early_stop={early_stop!r} would cut the attack short; use 'compact', 'freeze' or None"
        )
    if alpha is not None and isinstance(x, Tensor):
        check_radius("alpha", alpha, len(x), norm, bounds)
    shrinks = isinstance(loss, str) and (slots is not None or engine not in FIXED)
    leave = "compact" in stops or ("cycle" in stops and shrinks)
    run = _Steps(alpha, steps, best, stops, leave, callback)
    return search(
        "pgd", run, model, x, y, eps=eps, norm=norm, loss=loss, bounds=bounds, targeted=targeted,
        random_start=random_start, restarts=restarts, x_init=x_init, survivors="freeze" in stops or "compact" in stops,
        slots=slots, queue=slots is not None and restarts > 1 and "freeze" not in stops, generator=generator,
        sample_ids=sample_ids, precision=precision, strict_eps=strict_eps, quantize=quantize,
        low_frequency=low_frequency, model_mode=model_mode, engine=engine, eot=eot, return_info=return_info,
    )  # fmt: skip


class _Steps:
    """One run: a fixed number of steps of a fixed size."""

    def __init__(self, alpha, steps, best, stops, leave, callback) -> None:
        self.alpha, self.steps, self.best, self.stops, self.callback = alpha, steps, best, stops, callback
        self.leave = leave  # whether samples that are done leave the batch
        self.planned = steps

    def continued(self, whole: bool) -> "_Steps":
        """Steps of the same size."""
        run = copy.copy(self)
        run.steps = left_over(self.steps, whole)
        return run

    def __call__(self, objective: Objective, ball: Ball, start: Tensor, scored: bool, noise) -> tuple[Kept, Tensor]:
        walk = self.begin(objective, ball, start)
        walk.score_last = scored or self.leave
        return in_step(walk, objective, ball, leave=self.leave, callback=self.callback)

    def begin(self, objective: Objective, ball: Ball, start: Tensor) -> "_Walk":
        if self.alpha is None:
            alpha = ball.like(2.5 * ball.radius / max(self.planned, 1))
        else:
            alpha = ball.per_sample(self.alpha)
        alpha = (-alpha if objective.targeted else alpha).expand(len(start))
        none, fooled_leave = unscored(start, objective), "freeze" in self.stops or "compact" in self.stops
        return _Walk(
            self.steps, start, none, [0] * len(start), torch.zeros_like(none.pred),
            self.best, fooled_leave, True, alpha, torch.zeros_like(start),
            Kept(start if self.best == "last" else start.clone(), none),
            torch.zeros_like(none.pred, dtype=torch.bool) if self.stops else None,
            Cycle.of(self.steps, start) if "cycle" in self.stops else None,
        )  # fmt: skip


@dataclasses.dataclass
class _Walk(Climb):
    """Where runs stand.

    Attributes:
        best: as in `pgd`.
        fooled_leave: who has been fooled is done.
        score_last: the iterate of the last step is scored in any case.
        grad: of the loss at what the model saw last.
        chosen: the iterate that counts so far.
        over: bool [B], who is done; None if nobody is before the last step.
    """

    best: str
    fooled_leave: bool
    score_last: bool
    alpha: Tensor
    grad: Tensor
    chosen: Kept
    over: Tensor | None
    cycle: Cycle | None

    @property
    def done(self) -> Tensor | None:
        """Who has been fooled or has returned, if either ends a run."""
        return self.over

    def look(self, objective: Objective, ball: Ball) -> None:
        """Evaluates the iterates, without a gradient if all are of the last step."""
        seen = ball.as_seen(self.x_adv)
        if not all(self.ended):
            self.scores, self.grad = objective.gradient(seen)
        else:
            self.scores = objective.score(seen) if self.score_last or self.best != "last" else None
        if self.best == "last":
            self.chosen = Kept(seen, self.scores)
        else:
            self._choose(seen, self.scores, objective)
        if self.fooled_leave and self.scores is not None:
            if self.scores.fooled is None:
                raise ValueError("early_stop needs a model that returns logits [B, C]")
            self.over = self.over | self.scores.fooled

    def _choose(self, seen: Tensor, scores: Scores, objective: Objective) -> None:
        rows = objective.better(scores.loss, self.chosen.scores.loss)
        if self.best == "adv" and scores.fooled is not None:
            rows = scores.fooled | (rows & ~self.chosen.fooled)
        rows[self.begun :] = True
        self.chosen.take(rows, seen, scores)

    def move(self, ball: Ball) -> None:
        """One step of who is not done."""
        active = None if self.over is None else ~self.over
        with profiling.phase("step", len(self.x_adv)):
            ball.step(self.x_adv, ball.of_iterate(self.grad), self.alpha, active)
        self.k = [k + 1 for k in self.k]
        self.moved += 1 if active is None else active
        if self.cycle is not None:
            self.cycle.look(self.k, self.x_adv)
            self.over = self.over | (self.cycle.last_step <= on_device(self.over, self.k))

    def kept(self) -> Kept:
        return self.chosen


class PGD(Attack):
    """`pgd` with its settings fixed: `PGD(model, eps=4/255, steps=10)(x, y)`. Its keywords are attributes."""

    function = pgd

    @staticmethod
    def _passes(classes: int, norm: str, given: dict[str, Any]) -> Passes:
        """Every run: a gradient for each step, and the verdict."""
        runs, steps = given["restarts"] * given["eot"], given["steps"]
        return Passes(runs * (steps + 1), runs * steps)
