"""Projected gradient descent (Madry et al. 2018, arXiv 1706.06083) in the Linf, L2 and L1 balls.

    x_0     = clip(x + noise)                                     random start
    x_{k+1} = project(x_k + alpha * direction(grad loss(x_k)))    sign(g) for Linf, g / ||g|| for L2,
                                                                  the largest 5 % of the gradient for L1 (SLIDE)

From the same start it gives the images of torchattacks.PGD and foolbox's PGD, bit for bit where the gradients agree.
"""

import dataclasses
import inspect
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from rvlm import ops, profiling
from rvlm.attacks.checks import AttackWarning, check_grid, check_images, check_radius
from rvlm.attacks.contract import MODEL_MODES, arithmetic, untouched
from rvlm.attacks.objective import AttackResult, Objective, Scores

__all__ = ["PGD", "pgd"]

_STEPS = {"linf": ops.linf_step_, "l2": ops.l2_step_, "l1": ops.l1_step_}
_CHOICES = {
    "norm": tuple(_STEPS),
    "best": ("last", "loss", "adv"),
    "early_stop": (None, "freeze", "cycle"),
    "precision": (None, "fp32", "bf16"),
    "model_mode": MODEL_MODES,
    "engine": ("auto", "eager", "compile"),
}


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
    x_init: Tensor | None = None,
    bounds: tuple[float, float] = (0.0, 1.0),
    best: str = "last",
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
        x_init: start of the first run instead of noise; pixels outside ball or box are projected.
        bounds: valid pixel range.
        best: what a run returns: its "last" iterate, the iterate with the best "loss", or the last "adv"ersarial one
            (the best loss where there is none). "loss" and "adv" choose among every iterate that was scored, the start
            and the end included.
        early_stop: "freeze" leaves a sample alone once an iterate of it fools the model (needs labels) and ends when
            all are; "cycle" ends a sample when its trajectory has returned to an earlier iterate. That is exact: Linf
            with a fixed alpha moves on a finite grid, and the iterate of the last step follows from the period.
        generator: source of the seed of the random start.
        sample_ids: int64 [B], stable numbers that key each sample's noise; None means 0 .. B-1.
        precision: None runs the model as it is (under the caller's autocast, if any); "bf16" autocasts it, "fp32" turns
            autocast off. Images, ball and steps stay in x's dtype, and `return_info` scores the result without it.
        strict_eps: no pixel exceeds eps even in exact arithmetic (fp32 rounding otherwise adds up to 6e-8).
        quantize: 255 returns images that survive uint8 storage: every iterate that the model sees is on the grid, and
            gradients pass straight through the rounding. x must be on the grid. For L2 and L1 pixels round toward x,
            which costs norm: about half a level per pixel.
        model_mode: "eval", "train" or "keep" (flags as they are).
        engine: "eager", "compile" (torch.compile on the model, static shapes) or "auto" (eager).
        callback: called as callback(step, x_adv, loss) after every gradient, with live tensors that it must not change.
        return_info: return an AttackResult.

    Returns:
        Adversarial images, detached, with x's dtype, device and memory format; or an AttackResult.

    Raises:
        TypeError, ValueError: wrong input; the message says what was expected. Nothing has changed then.

    Warns:
        AttackWarning: empty batch; outputs that look like probabilities; NaN logits.
    """
    _check_choices(locals())
    check_images(x, bounds)
    check_radius("eps", eps, len(x), norm, bounds)
    if not isinstance(steps, int) or steps < 0:
        raise ValueError(f"steps must be an integer >= 0, got {steps!r}")
    if not isinstance(restarts, int) or restarts < 1:
        raise ValueError(f"restarts must be an integer >= 1, got {restarts!r}")
    if restarts > 1 and not random_start:
        raise ValueError("restarts > 1 repeat the same run without random_start=True")
    if early_stop == "cycle" and norm != "linf":
        raise ValueError("early_stop='cycle' is exact for norm='linf' only; use 'freeze' or None")
    alpha = 2.5 * eps / max(steps, 1) if alpha is None else alpha
    check_radius("alpha", alpha, len(x), norm, bounds)
    if x_init is not None and (x_init.shape != x.shape or x_init.dtype != x.dtype):
        raise ValueError(f"x_init must be like x, {list(x.shape)} {x.dtype}, got {list(x_init.shape)} {x_init.dtype}")
    if quantize is not None and len(x):
        check_grid(x, quantize, strict_eps)
    if len(x) == 0:
        warnings.warn("pgd got an empty batch and returns it unchanged", AttackWarning, stacklevel=2)
        return _empty_result(x) if return_info else x.detach().clone()

    with untouched(model, model_mode, compiled=engine == "compile"), torch.inference_mode(False), torch.enable_grad():
        x = x.detach().clone() if x.is_inference() else x.detach()
        call = torch.compile(model, dynamic=False) if engine == "compile" else model
        signed = -alpha if targeted else alpha
        run = _Run(x, eps, signed, steps, norm, bounds, strict_eps, quantize, best, early_stop, callback)
        draws = random_start and (x_init is None or restarts > 1)
        chosen: _Kept | None = None
        with arithmetic(model, x.device, precision), _seed(generator, draws) as seed:
            objective = Objective(call, x, y, loss, targeted)
            if early_stop == "freeze" and objective.labels is None:
                raise ValueError("early_stop='freeze' needs labels or targets y: int64 [B]")
            scored = return_info or restarts > 1
            for restart in range(restarts):
                if x_init is not None and restart == 0:
                    start = run.project(x_init.detach())
                elif random_start:
                    start = run.random_start(seed, restart, sample_ids)
                else:
                    start = x.clone()
                done = chosen.fooled if chosen is not None and early_stop == "freeze" else None
                if done is not None and done.all():
                    break
                kept = run(objective, start, scored, done)
                chosen = kept if chosen is None else chosen.merge(kept, objective)
        if not return_info:
            return chosen.x_adv
        verdict = chosen.scores
        if precision is not None:
            verdict = objective.score(chosen.x_adv)  # reference precision
        counts = objective.forwards, objective.backwards
        return AttackResult(chosen.x_adv, verdict.fooled, verdict.loss, verdict.pred, run.steps_used, *counts)


@dataclasses.dataclass
class _Kept:
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

    def merge(self, other: "_Kept", objective: Objective) -> "_Kept":
        """The better of two runs, per sample: success first, then loss."""
        rows = objective.better(other.scores.loss, self.scores.loss)
        if self.fooled is not None:
            rows = torch.where(self.fooled == other.fooled, rows, other.fooled)
        self.take(rows, other.x_adv, other.scores)
        return self


class _Run:
    """One run from a start to what is kept of it; the geometry of the ball lives here."""

    def __init__(self, x, eps, alpha, steps, norm, bounds, strict_eps, quantize, best, early_stop, callback) -> None:
        self.x, self.steps, self.norm, self.bounds = x, steps, norm, bounds
        self.eps, self.alpha = _per_sample(eps, x), _per_sample(alpha, x)
        self.strict_eps, self.quantize, self.best, self.early_stop = strict_eps, quantize, best, early_stop
        self.callback = callback
        self.still = torch.zeros((), dtype=x.dtype, device=x.device).expand_as(x)  # a gradient that moves nothing
        self.steps_used = torch.zeros(len(x), dtype=torch.int64, device=x.device)

    def __call__(self, objective: Objective, x_adv: Tensor, scored: bool, done: Tensor | None) -> _Kept:
        kept: _Kept | None = None
        active = None if self.early_stop is None else torch.ones(len(x_adv), dtype=torch.bool, device=x_adv.device)
        if done is not None:
            active = ~done
        cycle = _Cycle(x_adv, self.steps) if self.early_stop == "cycle" else None
        for k in range(self.steps):
            seen = self._as_seen(x_adv)
            scores, grad = objective.gradient(seen)
            kept = self._keep(kept, seen, scores, objective)
            if self.callback is not None:
                self.callback(k, seen, scores.loss)
            if self.early_stop == "freeze":
                active = active & ~scores.fooled
            elif cycle is not None:
                active = cycle.last_step > k
            if active is not None and self._all_done(active, k):
                break
            self.steps_used += 1 if active is None else active
            with profiling.phase("step"):
                self._step(x_adv, grad, active)
            if cycle is not None:
                cycle.look(x_adv, k + 1)
        seen = self._as_seen(x_adv)
        if not scored and self.best == "last":
            return _Kept(seen, None)
        scores = objective.score(seen)
        if self.best == "last":
            return _Kept(seen, scores)
        return self._keep(kept, seen, scores, objective)

    def _step(self, x_adv: Tensor, grad: Tensor, active: Tensor | None) -> None:
        lo, hi = self.bounds
        step = _STEPS[self.norm]
        step(x_adv, grad, self.x, self.alpha, self.eps, lo, hi, active, strict_eps=self.strict_eps)

    def _keep(self, kept: _Kept | None, x_adv: Tensor, scores: Scores, objective: Objective) -> _Kept | None:
        if self.best == "last":
            return None
        if kept is None:
            return _Kept(x_adv.clone(), scores)
        rows = objective.better(scores.loss, kept.scores.loss)
        if self.best == "adv" and scores.fooled is not None:
            rows = scores.fooled | (rows & ~kept.fooled)
        kept.take(rows, x_adv, scores)
        return kept

    def _as_seen(self, x_adv: Tensor) -> Tensor:
        """The iterate as the model sees it: itself, or its grid point under quantize."""
        if self.quantize is None:
            return x_adv
        seen = x_adv.clone()
        lo, hi = self.bounds
        return _STEPS[self.norm](seen, self.still, self.x, 0.0, self.eps, lo, hi, quantize=self.quantize)

    def project(self, start: Tensor) -> Tensor:
        """The start moved into ball and box; pixels (L2: samples) that are inside keep their bits."""
        lo, hi = self.bounds
        start = torch.empty_like(self.x).copy_(start)
        step = _STEPS[self.norm]
        inside = step(start.clone(), self.still, self.x, 0.0, self.eps, lo, hi, strict_eps=self.strict_eps)
        moved = (inside - start).abs()
        if self.norm != "linf":
            moved = _rowwise(moved.flatten(1).amax(1), start)
        return torch.where(moved > 1e-6 * (hi - lo) if not self.strict_eps else moved > 0, inside, start)

    def random_start(self, seed: int, restart: int, sample_ids: Tensor | None) -> Tensor:
        lo, hi = self.bounds
        if self.norm == "linf":
            return ops.uniform_start(
                self.x, self.eps, sample_ids, seed, lo, hi, stream=2 * restart, strict_eps=self.strict_eps
            )
        # A normal direction by the inverse error function, from the same counter-based uniform numbers as for Linf.
        zeros = torch.zeros_like(self.x, memory_format=torch.contiguous_format)
        edge = 1 - torch.finfo(torch.float32).eps
        uniform = ops.uniform_start(zeros, 1.0, sample_ids, seed, -1.0, 1.0, stream=2 * restart)
        normal = torch.erfinv(uniform.clamp(-edge, edge))
        if self.norm == "l1":
            return self.project(self.x + (hi - lo) * 2**0.5 * normal)
        radius = ops.uniform_start(zeros.flatten(1)[:, :1], 1.0, sample_ids, seed, -1.0, 1.0, stream=2 * restart + 1)
        length = (radius.squeeze(1) + 1) / 2 * self.eps / normal.flatten(1).norm(dim=1)
        return self.project(self.x + normal * _rowwise(length, self.x))

    @staticmethod
    def _all_done(active: Tensor, k: int) -> bool:
        # Asking waits for the device: on a GPU only now and then, steps of rows that are done change nothing.
        return (not active.is_cuda or k % 8 == 7) and not active.any().item()


class _Cycle:
    """Finds, per sample, when a trajectory has returned to an earlier iterate (Brent's algorithm).

    The iterate is compared with a stored one that is renewed at steps 1, 2, 4, 8, ... Once they are equal, all later
    iterates repeat with the period found, so only (steps left) mod period more steps are needed to land on the iterate
    of the last step. All iterates of the cycle have been scored by then.
    """

    def __init__(self, x_adv: Tensor, steps: int) -> None:
        self.anchor, self.anchor_step, self.steps = x_adv.clone(), 0, steps
        self.last_step = torch.full((len(x_adv),), steps, device=x_adv.device)
        self.found = torch.zeros(len(x_adv), dtype=torch.bool, device=x_adv.device)

    def look(self, x_adv: Tensor, step: int) -> None:
        same = (x_adv == self.anchor).flatten(1).all(1) & ~self.found
        remaining = (self.steps - step) % (step - self.anchor_step)
        self.last_step = torch.where(same, step + remaining, self.last_step)
        self.found |= same
        if step & (step - 1) == 0:
            self.anchor.copy_(x_adv)
            self.anchor_step = step


class PGD:
    """`pgd` with its settings fixed: `PGD(model, eps=4/255, steps=10)(x, y)`.

    Takes every keyword of `pgd`, with the same defaults, as attributes that may be changed later. A call may override
    them: `attack(x, y, steps=100)`.
    """

    def __init__(self, model: Callable[[Tensor], Any], **settings: Any) -> None:
        self.model = model
        unknown = set(settings) - set(_DEFAULTS)
        if unknown:
            raise TypeError(f"unknown argument(s) {', '.join(sorted(unknown))}; PGD takes {', '.join(_DEFAULTS)}")
        self.__dict__.update(_DEFAULTS | settings)

    def __call__(self, x: Tensor, y: Any = None, **overrides: Any) -> Tensor | AttackResult:
        return pgd(self.model, x, y, **({name: getattr(self, name) for name in _DEFAULTS} | overrides))

    def __repr__(self) -> str:
        changed = [f"{k}={getattr(self, k)!r}" for k, default in _DEFAULTS.items() if getattr(self, k) is not default]
        return f"PGD({', '.join([type(self.model).__name__, *changed])})"


_DEFAULTS = {
    name: p.default for name, p in inspect.signature(pgd).parameters.items() if p.kind is inspect.Parameter.KEYWORD_ONLY
}


def _check_choices(given: dict[str, Any]) -> None:
    for name, allowed in _CHOICES.items():
        if given[name] not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {given[name]!r}")
    if not callable(given["model"]):
        raise TypeError(f"model must be callable, got {type(given['model']).__name__}")


@contextmanager
def _seed(generator: torch.Generator | None, draws: bool) -> Iterator[int | None]:
    """One 64-bit seed from the generator, which an error in the block winds back."""
    source = torch.default_generator if generator is None else generator
    state = source.get_state() if draws else None
    try:
        yield int(torch.randint(-(2**63), 2**63 - 1, (), generator=source, device=source.device)) if draws else None
    except BaseException:
        if draws:
            source.set_state(state)
        raise


def _per_sample(value: float | Tensor, x: Tensor) -> Tensor:
    return torch.as_tensor(value, dtype=x.dtype, device=x.device).reshape(-1)


def _rowwise(value: Tensor, x: Tensor) -> Tensor:
    """value [B] in a shape that broadcasts against x [B, ...]."""
    return value.view(-1, *[1] * (x.dim() - 1))


def _empty_result(x: Tensor) -> AttackResult:
    none = torch.zeros(0, dtype=torch.int64, device=x.device)
    return AttackResult(x.detach().clone(), none.bool(), none.to(x.dtype), none, none.clone(), 0, 0)
