"""Carlini & Wagner's attacks (2017, arXiv 1608.04644): the smallest change that still fools the model, by Adam.

    x' = lo + (hi - lo) (1 + tanh w) / 2                     inside the box whatever w is
    f  = max(0, kappa - margin(x')),  margin = max_{c != y} z_c - z_y     (targeted: + margin of the target)
    L2     minimise  ||x' - x||^2 + c f.       Between rounds c is bisected: smaller if it fooled, larger if not
    Linf   minimise  sum_i max(0, |x'_i - x_i| - t) + c f.      A round that gets to 0 continues from there with
           t = 0.9 min(t, ||x' - x||_inf), one that does not tries again with 2 c, as long as c stays below 20

Every image on the way that fools the model is a candidate; the nearest is returned.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rvlm import profiling
from rvlm.attacks.ball import Ball, rowwise
from rvlm.attacks.kept import Kept
from rvlm.attacks.nearest import Nearest
from rvlm.attacks.objective import AttackResult, Objective, Passes
from rvlm.attacks.search import Attack, check_choices, check_count, search

__all__ = ["CW", "cw"]

ROUNDS_L2 = 9  # of the search for the trade-off, unless told otherwise

INSIDE = 0.999999  # tanh reaches the walls of the box at infinity, so x is drawn this near to them
LARGEST_L2, LARGEST_LINF = 1e10, 20.0  # weights c
SHRINK, SMALLEST = 0.9, 1 / 256  # of the threshold t, the latter in pixel ranges


def cw(
    model: Callable[[Tensor], Any],
    x: Tensor,
    y: Tensor | None = None,
    *,
    eps: float | Tensor | None = None,
    steps: int = 1000,
    norm: str = "l2",
    targeted: bool = False,
    rounds: int | None = None,
    const: float | None = None,
    lr: float | None = None,
    confidence: float = 0.0,
    abort_early: bool = True,
    bounds: tuple[float, float] = (0.0, 1.0),
    sample_ids: Tensor | None = None,
    precision: str | None = None,
    strict_eps: bool = False,
    quantize: int | None = None,
    model_mode: str = "eval",
    engine: str = "auto",
    callback: Callable[[int, Tensor, Tensor], None] | None = None,
    return_info: bool = False,
) -> Tensor | AttackResult:
    """CW-L2, or CW-Linf with norm="linf". Draws nothing. What is not listed means what it means in `pgd`.

    What adversarial training calls "CW" is another attack: `pgd(model, x, y, loss="margin")`.

    Args:
        eps: None: whatever distance it takes. A radius: images farther away are projected into the ball, and `success`
            is about what is left of them; in Linf the threshold t starts there instead of at the whole range.
        steps: of Adam in each round.
        rounds: None: 9 for L2; for Linf, until every sample is done.
        const: first weight c; None: 0.001 for L2, 0.00001 for Linf.
        lr: Adam's; None: 0.01 for L2, 0.005 for Linf.
        confidence: kappa, the margin that counts as fooled, in logits.
        abort_early: a sample whose objective has not fallen by a ten-thousandth in a tenth of the steps sits out the
            rest of the round.
        callback: called as callback(step, x_adv, distance of the nearest image so far) after every gradient.

    Returns:
        As `pgd`; images of samples that nothing fooled are clean. `loss` is minus the distance from x, minus infinity
        where nothing fooled the model.

    Raises:
        As `pgd`.
    """
    check_choices(norm=(norm, ("l2", "linf")))
    check_count("steps", steps, 1)
    if rounds is not None:
        check_count("rounds", rounds, 1)
    const = _first_weight(const, norm)
    lr = (0.01 if norm == "l2" else 0.005) if lr is None else lr
    for name, value in (("const", const), ("lr", lr)):
        if not 0 < value < math.inf:
            raise ValueError(f"{name} must be a number above 0, got {value}")
    if confidence < 0:
        raise ValueError(f"confidence must be at least 0, got {confidence}")
    settings = _Settings(steps, rounds, const, lr, confidence, abort_early, callback)
    rounds_of = _L2 if norm == "l2" else _Linf
    return search(
        "cw", lambda objective, ball, *_: rounds_of(objective, ball, settings).run(), model, x, y, eps=eps, norm=norm,
        loss="margin", bounds=bounds, targeted=targeted, distances=True, random_start=False, sample_ids=sample_ids,
        precision=precision, strict_eps=strict_eps, quantize=quantize, model_mode=model_mode, engine=engine,
        return_info=return_info,
    )  # fmt: skip


class CW(Attack):
    """`cw` with its settings fixed: `CW(model, steps=100)(x, y)`. Its keywords are attributes."""

    function = cw

    @staticmethod
    def _passes(classes: int, norm: str, given: dict[str, Any]) -> Passes:
        """The verdict on x and on what is kept, and a gradient for each step of every round. In Linf without `rounds`
        there are as many as it takes to double c up to its end; samples that are fooled go on longer than others."""
        const = _first_weight(given["const"], norm)
        usual = ROUNDS_L2 if norm == "l2" else math.ceil(math.log2(LARGEST_LINF / const))
        gradients = given["steps"] * (usual if given["rounds"] is None else given["rounds"])
        return Passes(gradients + 2, gradients)


def _first_weight(const: float | None, norm: str) -> float:
    return (1e-3 if norm == "l2" else 1e-5) if const is None else const


@dataclasses.dataclass(frozen=True)
class _Settings:
    steps: int
    rounds: int | None
    const: float
    lr: float
    confidence: float
    abort_early: bool
    callback: Callable | None


class _Rounds:
    """Rounds of Adam, with something learned between them.

    Attributes:
        c: weights of f [B].
        w: where the next round starts, before the tanh [B, ...].
        origin: the clean images as the tanh reproduces them; distances in the objective are from there.
        won: bool [B], who has reached in this round what a round is for.
        most: rounds, or None for as many as it takes; set by the norm.
    """

    def __init__(self, objective: Objective, ball: Ball, settings: _Settings) -> None:
        self.objective, self.ball, self.settings = objective, ball, settings
        self.middle, self.half = sum(ball.bounds) / 2, (ball.bounds[1] - ball.bounds[0]) / 2
        self.w = ((ball.x - self.middle) / self.half * INSIDE).atanh()
        self.origin = self.pixels(self.w)
        self.c = torch.full(ball.x.shape[:1], settings.const, dtype=ball.x.dtype, device=ball.x.device)
        self.won = torch.zeros_like(self.c, dtype=torch.bool)
        self.nearest = Nearest.of(ball)
        self.nearest.take(ball.x, objective.score(ball.x).fooled, ball)

    def run(self) -> tuple[Kept, Tensor]:
        taken, number = torch.zeros_like(self.c, dtype=torch.int64), 0
        while number != self.most and not (over := self.over()).all():
            self.won = torch.zeros_like(over)
            taken += self._round(~over)
            self.learn()
            number += 1
        return self.nearest.kept(self.objective, self.ball), taken

    def pixels(self, w: Tensor) -> Tensor:
        return torch.empty_like(self.ball.x).copy_(self.middle + self.half * w.tanh())

    def _round(self, active: Tensor) -> Tensor:
        """Adam for the samples that are active; the steps that each took."""
        w, given, sign = self.w, self.settings, -1.0 if self.objective.targeted else 1.0
        first, second = torch.zeros_like(w), torch.zeros_like(w)
        before = torch.full_like(self.c, torch.inf)
        taken = torch.zeros_like(active, dtype=torch.int64)
        for k in range(given.steps):
            x_adv = self.pixels(w)
            scores, grad = self.objective.gradient(x_adv)
            with profiling.phase("step", len(x_adv)):
                surplus = sign * scores.loss.to(w.dtype)
                fooled = scores.fooled & (surplus >= given.confidence) & active
                self.nearest.take(x_adv, fooled, self.ball)
                size, of_size = self.size(x_adv - self.origin)
                total = size + self.c * (given.confidence - surplus).clamp(min=0)
                active = active & ~self.arrived(w, total, fooled)
                if given.callback is not None:
                    given.callback(k, x_adv, self.nearest.distance)
                if k % math.ceil(given.steps / 10) == 0:
                    if given.abort_early:
                        active = active & (total <= 0.9999 * before)
                        before = total
                    if not active.any():  # waits for the device, ten times a round
                        break
                pull = torch.where(surplus < given.confidence, sign * self.c, 0.0)
                inner = (x_adv - self.middle) / self.half
                grad = (of_size - rowwise(pull, grad) * grad) * self.half * (1 - inner * inner)
                first = 0.9 * first + 0.1 * grad
                second = 0.999 * second + 0.001 * grad * grad
                step = first / (1 - 0.9 ** (k + 1)) / ((second / (1 - 0.999 ** (k + 1))).sqrt() + 1e-8)
                w = torch.where(rowwise(active, w), w - given.lr * step, w)
                taken += active
        return taken


class _L2(_Rounds):
    def __init__(self, objective: Objective, ball: Ball, settings: _Settings) -> None:
        super().__init__(objective, ball, settings)
        self.most = ROUNDS_L2 if settings.rounds is None else settings.rounds
        self.low, self.high = torch.zeros_like(self.c), torch.full_like(self.c, torch.inf)

    def over(self) -> Tensor:
        return self.nearest.distance == 0  # wrong when clean

    def size(self, delta: Tensor) -> tuple[Tensor, Tensor]:
        """What is made small [B], and its gradient."""
        return delta.square().flatten(1).sum(1), 2 * delta

    def arrived(self, w: Tensor, total: Tensor, fooled: Tensor) -> Tensor:
        """Samples that need no more of this round: none, there may be a nearer image."""
        self.won |= fooled
        return torch.zeros_like(fooled)

    def learn(self) -> None:
        self.high = torch.where(self.won, self.c, self.high)
        self.low = torch.where(self.won, self.low, self.c)
        self.c = torch.where(self.high.isinf(), 10 * self.c, (self.low + self.high) / 2).clamp(max=LARGEST_L2)


class _Linf(_Rounds):
    def __init__(self, objective: Objective, ball: Ball, settings: _Settings) -> None:
        super().__init__(objective, ball, settings)
        self.most = settings.rounds
        self.t = ball.eps.clamp(max=2 * self.half).expand_as(self.c).clone()

    def over(self) -> Tensor:
        small = self.t <= SMALLEST * 2 * self.half
        return small | (self.c >= LARGEST_LINF) | (self.nearest.distance == 0)

    def size(self, delta: Tensor) -> tuple[Tensor, Tensor]:
        over = delta.abs() - rowwise(self.t, delta)
        return over.clamp(min=0).flatten(1).sum(1), torch.where(over > 0, delta.sign(), 0.0)

    def arrived(self, w: Tensor, total: Tensor, fooled: Tensor) -> Tensor:
        there = fooled & (total < 1e-4 * self.c)
        self.w = torch.where(rowwise(there, w), w, self.w)
        self.won |= there
        return there

    def learn(self) -> None:
        reached = (self.pixels(self.w) - self.origin).abs().flatten(1).amax(1)
        self.t = torch.where(self.won, SHRINK * torch.minimum(self.t, reached), self.t)
        self.c = torch.where(self.won, self.c, 2 * self.c)
