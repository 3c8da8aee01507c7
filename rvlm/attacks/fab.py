"""Fast adaptive boundary attack (Croce & Hein 2020, arXiv 1907.02044): the nearest point across a decision boundary.

    at x_k the difference z_c - z_y is linearised:  w = its gradient, {v : <w, v> = b} where it would be 0
    d_k = shortest way from x_k to that plane inside the box,   d_0 = the same from x
    x_{k+1} = (1 - a) (x_k + eta d_k) + a (x + eta d_0),        a = min(|d_k| / (|d_k| + |d_0|), alpha_max)
    if x_{k+1} fools the model it is a candidate, and x_{k+1} = x + beta (x_{k+1} - x)

FAB takes for c the class whose plane is nearest, which costs a backward pass per class; FAB-T aims at one class after
the other, the likeliest wrong ones. Both look for short perturbations and know eps only in the end, or to stop early.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rvlm import profiling
from rvlm.attacks.ball import DUAL, ORDER, Ball, rowwise
from rvlm.attacks.climb import Climb, in_step, unscored
from rvlm.attacks.kept import Kept
from rvlm.attacks.losses import margin
from rvlm.attacks.nearest import Nearest
from rvlm.attacks.objective import AttackResult, Objective, Passes, Scores, most_targets
from rvlm.attacks.rows import on_device
from rvlm.attacks.search import Attack, check_choices, check_count, check_slots, check_stop, search

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
    """FAB-T, or FAB with aimed=False. What is not listed means what it means in `pgd`.

    Args:
        eps: radius; None looks for the nearest image at any distance.
        steps: of a run; each is two forward passes and one backward pass (aimed=False: one for each class).
        aimed: one run for each of `targets` wrong classes, likeliest first.
        targets: how many; None means nine, or all if there are fewer.
        alpha_max, eta, beta: pull to x, overshoot across the plane, and the step back.
        restarts: runs (per target class); the first starts from x, the others from noise of length eps / 2. A run is
            for the samples that no earlier one has fooled within eps, or, without eps, for all.
        early_stop: "compact" takes samples out of the batch once they are fooled within eps, by the image that would be
            returned, projected and rounded: the same verdicts for less. Such an image is one within eps, not the
            nearest. With `strict_eps` or `quantize`, where rounding may undo what the nearest candidate does, another
            one counts, so more samples may be fooled than without.
        slots: the largest batch that is attacked, as in `apgd`; without early_stop runs make all of their steps.
        quantize: the result is rounded inside the ball, and scored so.
        callback: called as callback(step, x_adv, distance of the nearest candidate) after every step.

    Returns:
        As `pgd`. Where the nearest candidate is farther than eps it is projected into the ball. `loss` is minus its
        distance from x, minus infinity where there is none. In `trace` losses are margins, and an image counts as
        fooling the model if it is within eps.

    Raises:
        As `pgd`.
    """
    check_choices(early_stop=(early_stop, (None, "compact")))
    check_stop(early_stop, "auto" if slots else engine)
    check_count("steps", steps, 1)
    if targets is not None:
        check_count("targets", targets, 1)
    for name, value in (("alpha_max", alpha_max), ("beta", beta)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name} must be in [0, 1], got {value}")
    if eps is None and restarts > 1:
        raise ValueError("restarts > 1 start from noise of length eps / 2: give eps")
    if early_stop and eps is None:
        raise ValueError("early_stop='compact' ends with the first image within eps that fools the model: give eps")
    if slots is not None:
        check_slots(None, callback)
    run = _Boundary(steps, aimed, alpha_max, eta, beta, early_stop == "compact", callback)
    return search(
        "fab", run, model, x, y, eps=eps, norm=norm, loss="margin", bounds=bounds,
        aimed=aimed, targets=targets, distances=True, random_start=restarts > 1, x_first=True, on_sphere=True,
        start_scale=0.5, restarts=restarts, survivors=eps is not None, slots=slots, queue=slots is not None,
        generator=generator, sample_ids=sample_ids, precision=precision, strict_eps=strict_eps, quantize=quantize,
        model_mode=model_mode, engine=engine, return_info=return_info,
    )  # fmt: skip


class FAB(Attack):
    """`fab` with its settings fixed: `FAB(model, eps=4/255)(x, y)`. Its keywords are attributes."""

    function = fab

    @staticmethod
    def _passes(classes: int, norm: str, given: dict[str, Any]) -> Passes:
        """Every run: for each step the planes of one class or of all, and the verdict; at the end that on what is kept.
        Before runs that aim at classes, those are looked up."""
        aimed, steps = given["aimed"], given["steps"]
        runs = given["restarts"] * (most_targets(given["targets"], classes) if aimed else 1)
        return Passes(runs * (2 * steps + 1) + aimed, runs * steps * (1 if aimed else classes))


class _Boundary:
    """One run."""

    def __init__(self, steps, aimed, alpha_max, eta, beta, compact, callback) -> None:
        self.steps, self.aimed, self.compact, self.callback = steps, aimed, compact, callback
        self.alpha_max, self.eta, self.beta = alpha_max, eta, beta

    def __call__(self, objective: Objective, ball: Ball, start: Tensor, scored: bool, noise) -> tuple[Kept, Tensor]:
        return in_step(self.begin(objective, ball, start), objective, ball, leave=self.compact)

    def begin(self, objective: Objective, ball: Ball, start: Tensor) -> "_Walk":
        return _Walk.of(self, objective, ball, start)

    def planes(self, objective: Objective, point: Tensor, norm: str) -> tuple[Tensor, Tensor, Tensor]:
        """The difference z_c - z_y [B] and its gradient [B, ...] for the class aimed at, or the one that is nearest,
        and the logits [B, C]."""
        if self.aimed:
            gap, (w,), logits = objective.differences(point, objective.target[:, None])
            return gap[:, 0], w, logits
        samples = torch.arange(len(point), device=point.device)
        gap, w, logits = objective.differences(point, None)
        size = torch.stack([g.flatten(1).norm(DUAL[norm], dim=1) for g in w], 1)
        far = (gap.abs() / (1e-12 + size)).scatter(1, objective.labels[:, None], torch.inf)
        nearest = far.argmin(1)
        return gap[samples, nearest], torch.stack(w)[nearest, samples], logits


@dataclasses.dataclass
class _Walk(Climb):
    """Where runs stand. Scores are those of the iterate that the model was asked about last: its margin, and whether it
    is a candidate within eps.

    Attributes:
        looks: so far.
        gap, w: of the plane at x_adv.
        nearest: candidates so far.
        claims: bool [B], whose nearest candidate is within eps, and has not been scored as it would be returned.
        found: what runs return, once they are at their end or, if they may stop early, once it fools the model.
    """

    run: _Boundary
    looks: int
    gap: Tensor
    w: Tensor
    nearest: Nearest
    claims: Tensor
    found: Kept

    @classmethod
    def of(cls, run: _Boundary, objective: Objective, ball: Ball, start: Tensor) -> "_Walk":
        none, nearest = unscored(start, objective), Nearest.of(ball)
        nobody, nowhere = torch.zeros_like(none.fooled), torch.zeros_like(none.pred)
        found = Kept(start.clone(), Scores(-nearest.distance, nobody, nowhere))
        return cls(
            run.steps, start, none, [0] * len(start), nowhere.clone(),
            run, 0, nearest.distance, torch.zeros_like(start), nearest, nobody.clone(), found,
        )  # fmt: skip

    @property
    def done(self) -> Tensor | None:
        """Who is fooled by what would be returned; None if all are to make all of their steps."""
        return self.found.fooled if self.run.compact else None

    def look(self, objective: Objective, ball: Ball) -> None:
        """Asks whether the iterates fool the model, whose candidates count, and for the planes of those that go on. The
        passes for the planes tell of the first iterates, too."""
        self.looks += 1
        made = self.begun
        if made:
            wrong = rowwise(self._saw(slice(made), objective.logits(self.x_adv[:made]), objective, ball), self.x_adv)
            self.x_adv = torch.where(wrong, ball.x + (self.x_adv - ball.x) * self.run.beta, self.x_adv)
            if self.run.callback is not None:
                self.run.callback(self.k[0] - 1, self.x_adv, self.nearest.distance)
        self._settle(objective, ball)
        rows = self._going()
        if rows is None:
            self.gap, self.w, logits = self.run.planes(objective, self.x_adv, ball.norm)
        elif len(rows):
            gap, w, logits = self.run.planes(objective.at(rows), self.x_adv[rows], ball.norm)
            self.gap, self.w = self.gap.index_copy(0, rows, gap), self.w.index_copy(0, rows, w)
        if made < len(self.k):
            self._saw(slice(made, None), logits[made - len(self.k) :], objective, ball)

    def move(self, ball: Ball) -> None:
        """One step."""
        clean, run, rows, (lo, hi) = ball.x, self.run, len(self.x_adv), ball.bounds
        with profiling.phase("step", rows):
            offset = (self.w * self.x_adv).flatten(1).sum(1) - self.gap
            points, w, b = (torch.cat(pair) for pair in ((self.x_adv, clean), (self.w, self.w), (offset, offset)))
            d = to_plane(points, w, b, ball.norm, lo, hi)
            length = d.flatten(1).norm(ORDER[ball.norm], dim=1).clamp(min=1e-8)
            a = rowwise((length[:rows] / (length[:rows] + length[rows:])).clamp(max=run.alpha_max), clean)
            moved = (self.x_adv + run.eta * d[:rows]) * (1 - a) + (clean + run.eta * d[rows:]) * a
            self.x_adv = torch.empty_like(clean).copy_(moved.clamp(lo, hi))
        self.k = [k + 1 for k in self.k]
        self.moved += 1

    def kept(self) -> Kept:
        return self.found

    def _saw(self, rows: slice, logits: Tensor, objective: Objective, ball: Ball) -> Tensor:
        """Notes what the model says of the iterates in rows; returns who of all [B] fools it there."""
        labels, wrong = objective.labels[rows], torch.zeros_like(self.claims)
        wrong[rows] = logits.argmax(1) != labels
        candidates = self.nearest.take(self.x_adv, wrong, ball) & (self.nearest.distance <= ball.eps)
        self.claims = self.claims | candidates
        loss, fooled = self.scores.loss.clone(), self.scores.fooled.clone()
        loss[rows], fooled[rows] = margin(logits, labels).to(loss.dtype), candidates[rows]
        self.scores = Scores(loss, fooled, None)
        return wrong

    def _settle(self, objective: Objective, ball: Ball) -> None:
        """Scores what would be returned of runs that are at their end, and of those that claim to be done."""
        asks = self.run.compact and (not self.x_adv.is_cuda or self.looks % 8 == 0)  # a GPU waits for it
        if not asks and not any(self.ended):
            return
        due = on_device(self.claims, self.ended)
        if asks:
            due = due | self.claims
        rows = (due & ~self.found.fooled).nonzero().flatten()
        if len(rows):
            self.found.put(rows, self.nearest.at(rows).kept(objective.at(rows), ball.at(rows)))
        self.claims = self.claims & ~due

    def _going(self) -> Tensor | None:
        """Whose planes are needed; None: all."""
        if all(self.ended):
            return torch.zeros(0, dtype=torch.int64, device=self.x_adv.device)
        if self.x_adv.is_cuda:
            return None
        over = self.found.fooled | on_device(self.claims, self.ended)
        return (~over).nonzero().flatten() if over.any() else None


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
