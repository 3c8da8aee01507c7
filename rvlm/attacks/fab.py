"""Fast adaptive boundary attack (Croce & Hein 2020, arXiv 1907.02044): the nearest point across a decision boundary.

    at x_k the difference z_c - z_y is linearised:  w = its gradient, {v : <w, v> = b} where it would be 0
    d_k = shortest way from x_k to that plane inside the box,   d_0 = the same from x
    x_{k+1} = (1 - a) (x_k + eta d_k) + a (x + eta d_0),        a = min(|d_k| / (|d_k| + |d_0|), alpha_max)
    if x_{k+1} fools the model it is a candidate, and x_{k+1} = x + beta (x_{k+1} - x)

FAB takes for c the class whose plane is nearest, which costs a backward pass per class; FAB-T aims at one class after
the other, the likeliest wrong ones. Both look for short perturbations and know eps only in the end.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rvlm import profiling
from rvlm.attacks.ball import DUAL, ORDER, Ball, Noise, rowwise
from rvlm.attacks.kept import Kept
from rvlm.attacks.nearest import Nearest
from rvlm.attacks.objective import AttackResult, Objective, Passes, most_targets
from rvlm.attacks.search import Attack, check_count, search

__all__ = ["FAB", "fab"]


def fab(
    model: Callable[[Tensor], Any],
    x: Tensor,
    y: Tensor | None = None,
    *,
    eps: float | Tensor | None = 8 / 255,
    steps: int = 100,
    norm: str = "linf",
    aimed: bool = True,
    targets: int | None = None,
    alpha_max: float = 0.1,
    eta: float = 1.05,
    beta: float = 0.9,
    restarts: int = 1,
    bounds: tuple[float, float] = (0.0, 1.0),
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
    """FAB-T, or FAB with aimed=False. What is not listed means what it means in `pgd`.

    Args:
        eps: radius; None looks for the nearest image at any distance.
        steps: of a run; each is two forward passes and one backward pass (aimed=False: one for each class).
        aimed: one run for each of `targets` wrong classes, likeliest first.
        targets: how many; None means nine, or all if there are fewer.
        alpha_max, eta, beta: pull to x, overshoot across the plane, and the step back.
        restarts: runs (per target class); the first starts from x, the others from noise of length eps / 2. A run is
            for the samples that no earlier one has fooled within eps, or, without eps, for all.
        quantize: the result is rounded inside the ball, and scored so.
        callback: called as callback(step, x_adv, distance of the nearest candidate) after every step.

    Returns:
        As `pgd`. Where the nearest candidate is farther than eps it is projected into the ball. `loss` is minus its
        distance from x, minus infinity where there is none.

    Raises:
        As `pgd`.
    """
    check_count("steps", steps, 1)
    if targets is not None:
        check_count("targets", targets, 1)
    for name, value in (("alpha_max", alpha_max), ("beta", beta)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name} must be in [0, 1], got {value}")
    if eps is None and restarts > 1:
        raise ValueError("restarts > 1 start from noise of length eps / 2: give eps")
    run = _Boundary(steps, aimed, alpha_max, eta, beta, restarts, callback)
    return search(
        "fab", run, model, x, y, eps=eps, norm=norm, loss="margin", bounds=bounds,
        aimed=aimed, targets=targets, distances=True, random_start=restarts > 1, own_start=True, restarts=restarts,
        survivors=eps is not None, generator=generator, sample_ids=sample_ids, precision=precision,
        strict_eps=strict_eps, quantize=quantize, model_mode=model_mode, engine=engine, return_info=return_info,
    )  # fmt: skip


class FAB(Attack):
    """`fab` with its settings fixed: `FAB(model, eps=4/255)(x, y)`. Its keywords are attributes."""

    function = fab

    @staticmethod
    def _passes(classes: int, norm: str, given: dict[str, Any]) -> Passes:
        """Every run: the verdict on x and, at the end, on what is kept; for each step the planes of one class or of
        all, and the verdict. Before runs that aim at classes, those are looked up."""
        aimed, steps = given["aimed"], given["steps"]
        runs = given["restarts"] * (most_targets(given["targets"], classes) if aimed else 1)
        return Passes(runs * (2 * steps + 2) + aimed, runs * steps * (1 if aimed else classes))


class _Boundary:
    """One run."""

    def __init__(self, steps, aimed, alpha_max, eta, beta, restarts, callback) -> None:
        self.steps, self.aimed, self.restarts, self.callback = steps, aimed, restarts, callback
        self.alpha_max, self.eta, self.beta = alpha_max, eta, beta

    def __call__(self, objective: Objective, ball: Ball, x: Tensor, scored: bool, noise) -> tuple[Kept, Tensor]:
        clean, norm, (lo, hi) = ball.x, ball.norm, ball.bounds
        point = self._start(ball, noise)
        logits = objective.logits(clean)
        classes = logits.shape[1]
        nearest = Nearest(ball, logits.argmax(1) != objective.labels)
        both, rows = torch.cat([clean, clean]), len(clean)
        for k in range(self.steps):
            gap, w = self._plane(objective, point, norm, classes)
            with profiling.phase("step", len(point)):
                offset = (w * point).flatten(1).sum(1) - gap
                both[:rows] = point
                d = to_plane(both, torch.cat([w, w]), torch.cat([offset, offset]), norm, lo, hi)
                length = d.flatten(1).norm(ORDER[norm], dim=1).clamp(min=1e-8)
                a = rowwise((length[:rows] / (length[:rows] + length[rows:])).clamp(max=self.alpha_max), point)
                moved = (point + self.eta * d[:rows]) * (1 - a) + (clean + self.eta * d[rows:]) * a
                point = torch.empty_like(clean).copy_(moved.clamp(lo, hi))
            wrong = objective.logits(point).argmax(1) != objective.labels
            nearest.take(point, wrong)
            point = torch.where(rowwise(wrong, point), clean + (point - clean) * self.beta, point)
            if self.callback is not None:
                self.callback(k, point, nearest.distance)
        return nearest.kept(objective), torch.full((rows,), self.steps, device=x.device)

    def _start(self, ball: Ball, noise: Noise | None) -> Tensor:
        if noise is None or noise.run % self.restarts == 0:
            return ball.x.clone()
        return ball.scaled(0.5).random_start(noise, on_sphere=True)

    def _plane(self, objective: Objective, point: Tensor, norm: str, classes: int) -> tuple[Tensor, Tensor]:
        """The difference z_c - z_y [B] and its gradient [B, ...] for the class aimed at, or the one that is nearest."""
        samples = torch.arange(len(point), device=point.device)
        if self.aimed:
            gap, (w,), _ = objective.differences(point, objective.target[:, None])
            return gap[:, 0], w
        gap, w, _ = objective.differences(point, torch.arange(classes, device=point.device).expand(len(point), -1))
        size = torch.stack([g.flatten(1).norm(DUAL[norm], dim=1) for g in w], 1)
        far = (gap.abs() / (1e-12 + size)).scatter(1, objective.labels[:, None], torch.inf)
        nearest = far.argmin(1)
        return gap[samples, nearest], torch.stack(w)[nearest, samples]


def to_plane(t: Tensor, w: Tensor, b: Tensor, norm: str, lo: float, hi: float) -> Tensor:
    """The shortest d, in a norm, with <w, t + d> = b and t + d in the box; as close as the box allows if there is none.

    Every pixel may move against the sign of its weight by up to room_i, which brings the plane nearer by |w_i| a unit.

        Linf   m_i = min(l, room_i)            L2   m_i = min(l |w_i|, room_i)        the smallest l that arrives
        L1     the pixels with the largest weights first, each as far as it goes

    Args:
        t, w: points inside the box and weights [B, ...].
        b: [B].
        norm: "linf", "l2" or "l1".
        lo, hi: the box.

    Returns:
        d, like t.
    """
    shape = t.shape
    t, w = t.flatten(1), w.flatten(1)
    missing = (w * t).sum(1) - b
    w = torch.where(missing >= 0, 1.0, -1.0).to(w.dtype)[:, None] * w
    missing, size = missing.abs()[:, None], w.abs()
    room = torch.where(w > 0, t - lo, torch.where(w < 0, hi - t, 0.0))
    if norm == "l1":
        order = size.argsort(dim=1, descending=True)
        gain = (size * room).gather(1, order).cumsum(1)
        before = torch.nn.functional.pad(gain[:, :-1], (1, 0))
        share = ((missing - before) / (gain - before).clamp(min=torch.finfo(t.dtype).tiny)).clamp(0, 1)
        moved = torch.zeros_like(t).scatter_(1, order, share * room.gather(1, order))
    else:
        power = size if norm == "linf" else size * size
        bend = room if norm == "linf" else torch.where(size > 0, room / size, 0.0)
        ends, order = bend.sort(1)
        left = power.sum(1, keepdim=True) - power.gather(1, order).cumsum(1)  # what still moves after each bend
        full = (size * room).gather(1, order).cumsum(1)
        first = (full + ends * left < missing).sum(1, keepdim=True)  # bends before the plane is reached
        before = (first - 1).clamp(min=0)
        done = torch.where(first > 0, full.gather(1, before), 0.0)
        slope = torch.where(first > 0, left.gather(1, before), power.sum(1, keepdim=True))
        level = torch.where(slope > 0, (missing - done) / slope.clamp(min=torch.finfo(t.dtype).tiny), 0.0)
        level = torch.where(first == ends.shape[1], torch.inf, level)
        moved = torch.minimum(level if norm == "linf" else level * size, room)
        moved = torch.where(size > 0, moved, 0.0)
    return (-w.sign() * moved).view(shape)
