"""torchattacks' gradient steps from a start: `pgd` with the start that is drawn there."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from rvlm.attacks.pgd import pgd
from rvlm.compat.common import l2_start, linf_start
from rvlm.compat.torchattacks.attack import Attack, Model, settings

__all__ = ["BIM", "EOTPGD", "FFGSM", "FGSM", "GN", "PGD", "PGDL2", "RFGSM", "TPGD", "VANILA"]


@settings
class VANILA(Attack):
    """No attack: the images."""

    supported_mode = ("default",)
    model: Model

    def _find(self, model: Model, images: Tensor, labels: Tensor | None) -> Tensor:
        return images.clone()


@settings
class GN(Attack):
    """Gaussian noise of deviation std."""

    supported_mode = ("default",)
    model: Model
    std: float = 0.1

    def _find(self, model: Model, images: Tensor, labels: Tensor | None) -> Tensor:
        return (images + self.std * torch.randn_like(images)).clamp(0, 1)


class _Steps(Attack):
    """`pgd` from the images or a start."""

    def _pgd(self, model: Model, images: Tensor, labels: Any, start: Tensor | None = None, **given: Any) -> Tensor:
        given = {"alpha": getattr(self, "alpha", self.eps), "steps": getattr(self, "steps", 1)} | given
        return pgd(
            model, images, labels, eps=self.eps, x_init=start, targeted=self.targeted, random_start=False,
            model_mode="keep", **given,
        )  # fmt: skip


@settings
class FGSM(_Steps):
    """One step of size eps from the image."""

    model: Model
    eps: float = 8 / 255

    def _find(self, model: Model, images: Tensor, labels: Tensor) -> Tensor:
        return self._pgd(model, images, labels)


@settings
class BIM(_Steps):
    """No random start; steps=0 stands for min(255 eps + 4, 1.25 * 255 eps)."""

    model: Model
    eps: float = 8 / 255
    alpha: float = 2 / 255
    steps: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        self.steps = self.steps or int(min(self.eps * 255 + 4, 1.25 * self.eps * 255))

    def _find(self, model: Model, images: Tensor, labels: Tensor) -> Tensor:
        return self._pgd(model, images, labels)


@settings
class FFGSM(_Steps):
    """One step of size alpha from uniform noise."""

    model: Model
    eps: float = 8 / 255
    alpha: float = 10 / 255

    def _find(self, model: Model, images: Tensor, labels: Tensor) -> Tensor:
        noise = torch.randn_like(images).uniform_(-self.eps, self.eps)  # draws twice, as there
        return self._pgd(model, images, labels, (images + noise).clamp(0, 1))


@settings
class RFGSM(_Steps):
    """From a step along random signs; a start outside the ball (alpha > eps) is projected first."""

    model: Model
    eps: float = 8 / 255
    alpha: float = 2 / 255
    steps: int = 10

    def _find(self, model: Model, images: Tensor, labels: Tensor) -> Tensor:
        start = (images + self.alpha * torch.randn_like(images).sign()).clamp(0, 1)
        return self._pgd(model, images, labels, start)


class _FromNoise(_Steps):
    def _find(self, model: Model, images: Tensor, labels: Tensor, draw=linf_start, **given: Any) -> Tensor:
        return self._pgd(model, images, labels, draw(images, self.eps) if self.random_start else None, **given)


@settings
class PGD(_FromNoise):
    """PGD in Linf."""

    model: Model
    eps: float = 8 / 255
    alpha: float = 2 / 255
    steps: int = 10
    random_start: bool = True


@settings
class EOTPGD(_FromNoise):
    """PGD with the mean of eot_iter gradients, for models that draw random numbers."""

    model: Model
    eps: float = 8 / 255
    alpha: float = 2 / 255
    steps: int = 10
    eot_iter: int = 2
    random_start: bool = True

    def _find(self, model: Model, images: Tensor, labels: Tensor) -> Tensor:
        return super()._find(model, images, labels, eot=self.eot_iter)


@settings
class PGDL2(_FromNoise):
    """PGD in L2. eps_for_division is not needed: a zero gradient is no step."""

    model: Model
    eps: float = 1.0
    alpha: float = 0.2
    steps: int = 10
    random_start: bool = True
    eps_for_division: float = 1e-10

    def _find(self, model: Model, images: Tensor, labels: Tensor) -> Tensor:
        return super()._find(model, images, labels, l2_start, norm="l2")


@settings
class TPGD(_Steps):
    """PGD on KL(f(x) || f(x')), TRADES' attack; takes no labels."""

    supported_mode = ("default",)
    model: Model
    eps: float = 8 / 255
    alpha: float = 2 / 255
    steps: int = 10

    def _find(self, model: Model, images: Tensor, labels: Tensor | None) -> Tensor:
        with torch.no_grad():
            clean = model(images).softmax(1)
        start = (images + 0.001 * torch.randn_like(images)).clamp(0, 1)
        return self._pgd(model, images, clean, start, loss=_divergence)


def _divergence(logits: Tensor, clean: Tensor) -> Tensor:
    return F.kl_div(logits.log_softmax(1), clean, reduction="none").sum(1)
