"""advertorch's PGD attacks: LinfPGDAttack(predict, eps=...).perturb(x, y).

Same constructors, defaults and random draws. Iterates are projected by their distance from x, where advertorch clamps
the perturbation: pixels may differ by rounding, below 1e-6. The result is that of the originals' last iterate; the
model stays in the mode that it is in.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rvlm.attacks.ball import rowwise
from rvlm.attacks.pgd import pgd
from rvlm.compat.common import per_sample_loss, predicted, within

__all__ = [
    "FGSM",
    "GradientSignAttack",
    "L2BasicIterativeAttack",
    "L2PGDAttack",
    "LinfBasicIterativeAttack",
    "LinfPGDAttack",
    "PGDAttack",
]

Model = Callable[[Tensor], Any]
Loss = Callable[[Any, Any], Tensor] | None


class _Attack:
    """`pgd`, from the fields of a dataclass."""

    ord: float = torch.inf
    rand_init = False

    def perturb(self, x: Tensor, y: Any = None) -> Tensor:
        """Adversarial images of x [B, ...]. y: labels, or targets; None: the model's own predictions."""
        if y is None and self.targeted:
            raise ValueError("a targeted attack needs target labels y, got None")
        x = x.detach()
        y = predicted(self.predict, x) if y is None else y
        return pgd(
            self.predict, x, y, eps=self.eps, alpha=getattr(self, "eps_iter", self.eps),
            steps=getattr(self, "nb_iter", 1), norm="linf" if self.ord == torch.inf else "l2", targeted=self.targeted,
            random_start=False, loss=per_sample_loss(self.loss_fn, y),
            x_init=self._start(x) if self.rand_init else None, bounds=(self.clip_min, self.clip_max),
            model_mode="keep",
        )  # fmt: skip

    __call__ = perturb

    def _start(self, x: Tensor) -> Tensor:
        delta = torch.zeros_like(x)
        if self.ord == torch.inf:
            eps = torch.as_tensor(self.eps, dtype=x.dtype, device=x.device)
            noise = delta.uniform_(-1, 1) * (rowwise(eps, x) if eps.dim() else eps)
            return (x + noise).clamp(self.clip_min, self.clip_max)
        return within(x, delta.uniform_(self.clip_min, self.clip_max), self.eps, 2)  # pixels anywhere in the box


@dataclasses.dataclass(eq=False)
class PGDAttack(_Attack):
    """`pgd`.

    Args:
        predict: callable from pixels to logits, or to what loss_fn takes.
        loss_fn: callable (outputs, y) that returns one number or [B]; None: the sum of cross-entropies.
        eps, eps_iter: radius and step size, a float or [B].
        clip_min, clip_max: the box; images must lie in it.
        ord: numpy.inf or 2.
    """

    predict: Model
    loss_fn: Loss = None
    eps: float | Tensor = 0.3
    nb_iter: int = 40
    eps_iter: float | Tensor = 0.01
    rand_init: bool = True
    clip_min: float = 0.0
    clip_max: float = 1.0
    ord: float = torch.inf
    l1_sparsity: Any = None
    targeted: bool = False

    def __post_init__(self) -> None:
        if self.ord not in (torch.inf, 2) or self.l1_sparsity is not None:
            raise NotImplementedError(f"only ord = inf and ord = 2 are supported here, got ord={self.ord}")


@dataclasses.dataclass(eq=False)
class LinfPGDAttack(_Attack):
    """PGD in Linf; arguments as in PGDAttack."""

    predict: Model
    loss_fn: Loss = None
    eps: float | Tensor = 0.3
    nb_iter: int = 40
    eps_iter: float | Tensor = 0.01
    rand_init: bool = True
    clip_min: float = 0.0
    clip_max: float = 1.0
    targeted: bool = False


class L2PGDAttack(LinfPGDAttack):
    """PGD in L2."""

    ord = 2


@dataclasses.dataclass(eq=False)
class LinfBasicIterativeAttack(_Attack):
    """PGD in Linf without a random start."""

    predict: Model
    loss_fn: Loss = None
    eps: float | Tensor = 0.1
    nb_iter: int = 10
    eps_iter: float | Tensor = 0.05
    clip_min: float = 0.0
    clip_max: float = 1.0
    targeted: bool = False


class L2BasicIterativeAttack(LinfBasicIterativeAttack):
    """PGD in L2 without a random start."""

    ord = 2


@dataclasses.dataclass(eq=False)
class GradientSignAttack(_Attack):
    """One step of size eps, also known as FGSM."""

    predict: Model
    loss_fn: Loss = None
    eps: float | Tensor = 0.3
    clip_min: float = 0.0
    clip_max: float = 1.0
    targeted: bool = False


FGSM = GradientSignAttack
