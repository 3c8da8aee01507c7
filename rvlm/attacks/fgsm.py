"""Fast gradient sign method (Goodfellow et al. 2015, arXiv 1412.6572): one step of size eps from the clean image."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from rvlm.attacks.objective import AttackResult
from rvlm.attacks.pgd import PGD, pgd

__all__ = ["FGSM", "fgsm"]


def fgsm(
    model: Callable[[Tensor], Any], x: Tensor, y: Any = None, *, eps: float | Tensor = 8 / 255, **settings: Any
) -> Tensor | AttackResult:
    """x + eps * sign(grad loss(x)), clipped to the box: `pgd` with one step of size eps and no random start.

    Takes every other keyword of `pgd`, of which `steps`, `alpha`, `random_start` are fixed here. Shapes, ranges and
    errors as there.
    """
    return pgd(model, x, y, **_as_pgd(eps, settings))


class FGSM(PGD):
    """`fgsm` with its settings fixed: `FGSM(model, eps=4/255)(x, y)`."""

    def __init__(self, model: Callable[[Tensor], Any], *, eps: float | Tensor = 8 / 255, **settings: Any) -> None:
        super().__init__(model, **_as_pgd(eps, settings))

    def __call__(self, x: Tensor, y: Any = None, **overrides: Any) -> Tensor | AttackResult:
        eps = overrides.pop("eps", self.eps)
        return super().__call__(x, y, **_as_pgd(eps, overrides))


def _as_pgd(eps: float | Tensor, settings: dict[str, Any]) -> dict[str, Any]:
    fixed = {"steps", "alpha", "random_start"} & set(settings)
    if fixed:
        raise TypeError(f"fgsm fixes {', '.join(sorted(fixed))}; use pgd to choose it")
    return settings | {"eps": eps, "alpha": eps, "steps": 1, "random_start": False}
