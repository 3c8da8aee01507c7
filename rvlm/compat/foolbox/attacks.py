"""foolbox's attacks: attack(fmodel, inputs, criterion, epsilons=...) -> (raw, clipped, success).

With one radius the three are a tensor, a tensor and bool [B]; with K radii, lists of K tensors and bool [K, B].
"""

import dataclasses
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from rvlm.attacks.ball import ORDER, rowwise
from rvlm.attacks.contract import untouched
from rvlm.attacks.cw import cw
from rvlm.attacks.deepfool import deepfool
from rvlm.attacks.fmn import fmn
from rvlm.attacks.pgd import pgd
from rvlm.compat.common import within
from rvlm.compat.foolbox.criteria import Misclassification, TargetedMisclassification

__all__ = [
    "FGM",
    "FGSM",
    "PGD",
    "L1FMNAttack",
    "L2BasicIterativeAttack",
    "L2CarliniWagnerAttack",
    "L2DeepFoolAttack",
    "L2FMNAttack",
    "L2FastGradientAttack",
    "L2PGD",
    "L2ProjectedGradientDescentAttack",
    "LInfFMNAttack",
    "LinfBasicIterativeAttack",
    "LinfDeepFoolAttack",
    "LinfFastGradientAttack",
    "LinfPGD",
    "LinfProjectedGradientDescentAttack",
]

_keywords = dataclasses.dataclass(kw_only=True, eq=False)
Epsilons = float | None | Iterable[float | None]


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    raise AttributeError(f"rvlm.compat.foolbox.attacks has no {name}; it has {', '.join(__all__)}")


class _Attack:
    norm: str
    targets = True

    def __call__(self, model, inputs: Tensor, criterion: Any, *, epsilons: Epsilons) -> tuple[Any, Any, Tensor]:
        """Attacks inputs [B, ...] inside the model's bounds.

        Args:
            model: a PyTorchModel.
            criterion: labels [B], Misclassification or TargetedMisclassification.
            epsilons: a radius or several; None, for attacks that look for short perturbations, is any.

        Returns:
            raw: what the attack found; clipped: the same within the radius; success: of clipped.
        """
        several = isinstance(epsilons, Iterable)
        radii = list(epsilons) if several else [epsilons]
        x = inputs.detach()
        with untouched(model.model, "keep"):
            raw, clipped, success = self._runs(model, x, self._criterion(criterion), radii)
        return (raw, clipped, success) if several else (raw[0], clipped[0], success[0])

    def repeat(self, times: int) -> "Repeated":
        """The attack several times; of each input the first success counts (without a radius the shortest)."""
        return Repeated(self, times)

    def run(self, model, inputs: Tensor, criterion: Any, **settings: Any) -> Tensor:
        """What the attack finds: raw, for epsilon=... or, where it looks for short perturbations, without."""
        return self(model, inputs, criterion, epsilons=settings.get("epsilon"))[0]

    def _criterion(self, given: Any) -> Misclassification | TargetedMisclassification:
        criterion = Misclassification(given) if isinstance(given, Tensor) else given
        known = (Misclassification, TargetedMisclassification) if self.targets else (Misclassification,)
        if not isinstance(criterion, known):
            raise ValueError(
                f"unsupported criterion: {type(self).__name__} takes labels or {', '.join(c.__name__ for c in known)}, "
                f"got {type(given).__name__}"
            )
        return criterion

    def _judged(self, model, x: Tensor, raw: list[Tensor], criterion, radii: list) -> tuple[list, list, Tensor]:
        order = ORDER[self.norm]
        clipped = [t if e is None else within(x, t, e, order) for t, e in zip(raw, radii, strict=True)]
        with torch.no_grad():
            return raw, clipped, torch.stack([criterion(t, model.model(t)) for t in clipped])


def _labels(criterion) -> dict[str, Any]:
    if isinstance(criterion, TargetedMisclassification):
        return {"y": criterion.target_classes, "targeted": True}
    return {"y": criterion.labels}


class Repeated:
    """See `repeat`."""

    def __init__(self, attack: _Attack, times: int) -> None:
        if times < 1:
            raise ValueError(f"expected times >= 1, got {times}")
        self.attack, self.times = attack, times

    def __call__(self, model, inputs: Tensor, criterion: Any, *, epsilons: Epsilons) -> tuple[Any, Any, Tensor]:
        several = isinstance(epsilons, Iterable)
        radii = list(epsilons) if several else [epsilons]
        raw, clipped, success = self.attack(model, inputs, criterion, epsilons=radii)
        order = ORDER[self.attack.norm]
        for _ in range(self.times - 1):
            again = self.attack(model, inputs, criterion, epsilons=radii)
            for k, radius in enumerate(radii):
                better = again[2][k] & ~success[k]
                if radius is None:
                    lengths = [(t - inputs).flatten(1).norm(order, dim=1) for t in (again[0][k], raw[k])]
                    better = again[2][k] & (~success[k] | (lengths[0] < lengths[1]))
                rows = rowwise(better, inputs)
                raw[k], clipped[k] = torch.where(rows, again[0][k], raw[k]), torch.where(rows, again[1][k], clipped[k])
            success = success | again[2]
        return (raw, clipped, success) if several else (raw[0], clipped[0], success[0])

    def repeat(self, times: int) -> "Repeated":
        return Repeated(self.attack, self.times * times)


class _Gradient(_Attack):
    """`pgd`; the K radii run as one batch of K * B samples."""

    abs_stepsize: float | None = None

    def _runs(self, model, x: Tensor, criterion, radii: list) -> tuple[list, list, Tensor]:
        if any(radius is None for radius in radii):
            raise NotImplementedError(f"{type(self).__name__} needs radii: epsilons must not hold None")
        alphas = [self.rel_stepsize * e if self.abs_stepsize is None else self.abs_stepsize for e in radii]
        many, alpha = (
            torch.tensor(t, dtype=x.dtype, device=x.device).repeat_interleave(len(x)) for t in (radii, alphas)
        )
        start = torch.cat([self._start(x, e, model.bounds) for e in radii]) if self.random_start else None
        settings = _labels(criterion)
        found = pgd(
            model.model, x.repeat(len(radii), *[1] * (x.dim() - 1)), settings.pop("y").repeat(len(radii)), eps=many,
            alpha=alpha, steps=self.steps, norm=self.norm, random_start=False, x_init=start, bounds=model.bounds,
            model_mode="keep", **settings,
        )  # fmt: skip
        return self._judged(model, x, list(found.split(len(x))), criterion, radii)

    def _start(self, x: Tensor, eps: float, bounds: tuple[float, float]) -> Tensor:
        if self.norm == "linf":
            noise = torch.rand(x.shape, dtype=x.dtype, device=x.device) * (2 * eps) - eps
        else:  # uniform in the ball: some coordinates of a point on a sphere with two dimensions more
            pixels = x[0].numel()
            normal = torch.randn(len(x), pixels + 2, dtype=x.dtype, device=x.device)
            noise = eps * (normal / normal.norm(dim=1, keepdim=True))[:, :pixels].view(x.shape)
        return (x + noise).clamp(*bounds)


@_keywords
class LinfProjectedGradientDescentAttack(_Gradient):
    """PGD in the Linf ball."""

    norm = "linf"
    rel_stepsize: float = 0.01 / 0.3
    abs_stepsize: float | None = None
    steps: int = 40
    random_start: bool = True


@_keywords
class L2ProjectedGradientDescentAttack(_Gradient):
    """PGD in the L2 ball."""

    norm = "l2"
    rel_stepsize: float = 0.025
    abs_stepsize: float | None = None
    steps: int = 50
    random_start: bool = True


@_keywords
class LinfBasicIterativeAttack(_Gradient):
    """PGD in the Linf ball, from the image itself."""

    norm = "linf"
    rel_stepsize: float = 0.2
    abs_stepsize: float | None = None
    steps: int = 10
    random_start: bool = False


class L2BasicIterativeAttack(LinfBasicIterativeAttack):
    """PGD in the L2 ball, from the image itself."""

    norm = "l2"


@_keywords
class LinfFastGradientAttack(_Gradient):
    """One step of PGD in the Linf ball."""

    norm, targets, rel_stepsize, steps = "linf", False, 1.0, 1
    random_start: bool = False


class L2FastGradientAttack(LinfFastGradientAttack):
    """One step of PGD in the L2 ball."""

    norm = "l2"


class _Shortest(_Attack):
    """Looks for short perturbations once, for all radii."""

    def _runs(self, model, x: Tensor, criterion, radii: list) -> tuple[list, list, Tensor]:
        raw = self._find(model.model, x, bounds=model.bounds, norm=self.norm, model_mode="keep", **_labels(criterion))
        return self._judged(model, x, [raw] * len(radii), criterion, radii)


@dataclasses.dataclass(eq=False)
class L2CarliniWagnerAttack(_Shortest):
    """`cw`."""

    norm = "l2"
    binary_search_steps: int = 9
    steps: int = 10000
    stepsize: float = 1e-2
    confidence: float = 0
    initial_const: float = 1e-3
    abort_early: bool = True

    def _find(self, model, x: Tensor, **settings: Any) -> Tensor:
        return cw(
            model, x, steps=self.steps, rounds=self.binary_search_steps, lr=self.stepsize, const=self.initial_const,
            confidence=self.confidence, abort_early=self.abort_early, **settings,
        )  # fmt: skip


@_keywords
class L2DeepFoolAttack(_Shortest):
    """`deepfool`; loss "logits"."""

    norm, targets = "l2", False
    steps: int = 50
    candidates: int | None = 10
    overshoot: float = 0.02
    loss: str = "logits"

    def __post_init__(self) -> None:
        if self.loss != "logits":
            raise ValueError(f"loss must be 'logits' here, got {self.loss!r}")

    def _find(self, model, x: Tensor, **settings: Any) -> Tensor:
        candidates = 10**9 if self.candidates is None else self.candidates
        return deepfool(model, x, steps=self.steps, candidates=candidates, overshoot=self.overshoot, **settings)


class LinfDeepFoolAttack(L2DeepFoolAttack):
    """`L2DeepFoolAttack` in Linf."""

    norm = "linf"


@_keywords
class LInfFMNAttack(_Shortest):
    """`fmn`; the last step size is a hundredth of the first, and there is no init_attack."""

    norm = "linf"
    steps: int = 100
    max_stepsize: float = 1.0
    gamma: float = 0.05

    def _find(self, model, x: Tensor, **settings: Any) -> Tensor:
        return fmn(model, x, steps=self.steps, alpha=self.max_stepsize, gamma=self.gamma, **settings)


class L2FMNAttack(LInfFMNAttack):
    """`LInfFMNAttack` in L2."""

    norm = "l2"


class L1FMNAttack(LInfFMNAttack):
    """`LInfFMNAttack` in L1."""

    norm = "l1"


FGSM, FGM = LinfFastGradientAttack, L2FastGradientAttack
LinfPGD = PGD = LinfProjectedGradientDescentAttack
L2PGD = L2ProjectedGradientDescentAttack
