"""DeepFool (Moosavi-Dezfooli et al. 2016, arXiv 1511.04599): straight to the boundary that looks nearest, repeatedly.

    for the likeliest wrong classes c:  the plane where the linearised z_c - z_y is 0 is |z_c - z_y| / ||w_c||_dual away
    p += (that distance + 1e-4) times the unit step toward the nearest one
    x' = x + (1 + overshoot) p, cut to the box, until it fools the model

FAB corrects what it lacks, a pull back to x; this one needs few steps and gives an upper bound on the distance.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rvlm import profiling
from rvlm.attacks.ball import DUAL, Ball, rowwise
from rvlm.attacks.kept import Kept
from rvlm.attacks.nearest import Nearest
from rvlm.attacks.objective import AttackResult, Objective, Passes
from rvlm.attacks.search import Attack, check_choices, check_count, search

__all__ = ["DeepFool", "deepfool"]


def deepfool(
    model: Callable[[Tensor], Any],
    x: Tensor,
    y: Tensor | None = None,
    *,
    eps: float | Tensor | None = None,
    steps: int = 50,
    norm: str = "l2",
    candidates: int = 10,
    overshoot: float = 0.02,
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
    """DeepFool. Untargeted, draws nothing. What is not listed means what it means in `pgd`.

    Args:
        eps: None: whatever distance it takes. A radius: images farther away are projected into the ball, and `success`
            is about what is left of them.
        steps: at most; each is one forward pass and candidates - 1 backward passes. It ends when all are fooled.
        norm: "l2" or "linf".
        candidates: classes looked at, the label and the likeliest others on x; all if there are fewer.
        overshoot: share of the way that is added to it.
        callback: called as callback(step, x_adv, distance of the images that fooled the model) after every gradient.

    Returns:
        As `pgd`; images of samples that were never fooled are clean. `loss` is minus the distance from x, minus
        infinity where nothing fooled the model.

    Raises:
        As `pgd`.
    """
    check_count("steps", steps, 1)
    check_count("candidates", candidates, 2)
    check_choices(norm=(norm, ("l2", "linf")))
    if overshoot < 0:
        raise ValueError(f"overshoot must be at least 0, got {overshoot}")
    return search(
        "deepfool", _Straight(steps, candidates, overshoot, callback), model, x, y, eps=eps, norm=norm, loss="margin",
        bounds=bounds, distances=True, random_start=False, sample_ids=sample_ids, precision=precision,
        strict_eps=strict_eps, quantize=quantize, model_mode=model_mode, engine=engine, return_info=return_info,
    )  # fmt: skip


class DeepFool(Attack):
    """`deepfool` with its settings fixed: `DeepFool(model, norm="linf")(x, y)`. Its keywords are attributes."""

    function = deepfool

    @staticmethod
    def _passes(classes: int, norm: str, given: dict[str, Any]) -> Passes:
        """The candidates are looked up; for each step a forward pass and a backward one for each; two verdicts."""
        steps = given["steps"]
        return Passes(steps + 3, steps * (min(given["candidates"], classes) - 1))


class _Straight:
    """One run."""

    def __init__(self, steps: int, candidates: int, overshoot: float, callback) -> None:
        self.steps, self.candidates, self.overshoot, self.callback = steps, candidates, overshoot, callback

    def __call__(self, objective: Objective, ball: Ball, x_adv: Tensor, scored: bool, noise) -> tuple[Kept, Tensor]:
        clean, (lo, hi) = ball.x, ball.bounds
        classes = objective.runners_up(clean, None, at_most=self.candidates - 1)
        samples = torch.arange(len(clean), device=clean.device)
        nearest = Nearest.of(ball)
        way, taken = torch.zeros_like(clean), torch.zeros_like(samples)
        for k in range(self.steps):
            gaps, gradients, logits = objective.differences(x_adv, classes)
            nearest.take(x_adv, logits.argmax(1) != objective.labels, ball)
            if self.callback is not None:
                self.callback(k, x_adv, nearest.distance)
            missing = nearest.distance.isinf()
            if not missing.any():  # waits for the device once a step, which has a backward pass for each class
                break
            with profiling.phase("step", len(x_adv)):
                slopes = torch.stack([g.flatten(1).norm(DUAL[ball.norm], dim=1) for g in gradients], 1) + 1e-8
                far = gaps.abs() / slopes
                which = far.argmin(1)
                length, toward = far[samples, which] + 1e-4, torch.stack(gradients)[which, samples]
                unit = toward.sign() if ball.norm == "linf" else toward / rowwise(slopes[samples, which], toward)
                way = way + rowwise(length, way) * unit
                moved = (clean + (1 + self.overshoot) * way).clamp(lo, hi)
                x_adv = torch.where(rowwise(missing, clean), moved, x_adv)
                taken += missing
        else:
            nearest.take(x_adv, objective.logits(x_adv).argmax(1) != objective.labels, ball)
        return nearest.kept(objective, ball), taken
