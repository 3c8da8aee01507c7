"""torchattacks' attacks with momentum: `mifgsm` with the transforms and draws of there."""

import torch
from torch import Tensor
from torch.nn import functional as F

from rvlm.attacks.mifgsm import NI, SI, TI, VMI, Ask, Now, Transform, mifgsm
from rvlm.attacks.objective import Scores
from rvlm.compat.common import GlobalDraws, linf_start
from rvlm.compat.torchattacks.attack import Attack, Model, settings

__all__ = ["DIFGSM", "MIFGSM", "NIFGSM", "SINIFGSM", "TIFGSM", "VMIFGSM", "VNIFGSM"]


class _Momentum(Attack):
    random_start = False

    def _transforms(self) -> list[Transform]:
        return []

    def _find(self, model: Model, images: Tensor, labels: Tensor) -> Tensor:
        start = linf_start(images, self.eps) if self.random_start else None
        return mifgsm(
            model, images, labels, eps=self.eps, alpha=self.alpha, steps=self.steps, mu=self.decay, x_init=start,
            transforms=self._transforms(), targeted=self.targeted, generator=GlobalDraws(), model_mode="keep",
        )  # fmt: skip


@settings
class MIFGSM(_Momentum):
    """MI-FGSM."""

    model: Model
    eps: float = 8 / 255
    alpha: float = 2 / 255
    steps: int = 10
    decay: float = 1.0


@settings
class NIFGSM(MIFGSM):
    """With NI."""

    def _transforms(self) -> list[Transform]:
        return [NI()]


@settings
class SINIFGSM(MIFGSM):
    """With NI and m copies of SI."""

    m: int = 5

    def _transforms(self) -> list[Transform]:
        return [NI(), SI(self.m)]


@settings
class VMIFGSM(MIFGSM):
    """With VMI, N neighbours."""

    N: int = 5
    beta: float = 3 / 2

    def _transforms(self) -> list[Transform]:
        return [VMI(self.N, self.beta)]


@settings
class VNIFGSM(VMIFGSM):
    """With VMI, whose own gradient is taken at NI's look ahead, and its neighbours' around the iterate."""

    def _transforms(self) -> list[Transform]:
        return [_AheadVMI(self.N, self.beta)]


class _AheadVMI(VMI):
    def __call__(self, ask: Ask, x: Tensor, now: Now) -> tuple[Scores, Tensor]:
        return super().__call__(lambda v: NI()(ask, v, now) if v is x else ask(v), x, now)


@settings
class DIFGSM(_Momentum):
    """With torchattacks' own input diversity, which draws once for the batch (ours: for each sample)."""

    model: Model
    eps: float = 8 / 255
    alpha: float = 2 / 255
    steps: int = 10
    decay: float = 0.0
    resize_rate: float = 0.9
    diversity_prob: float = 0.5
    random_start: bool = False

    def _transforms(self) -> list[Transform]:
        return [_Resized(self.resize_rate, self.diversity_prob)]


class _Resized(Transform):
    """The image made smaller and padded on both sides."""

    images = True

    def __init__(self, resize_rate: float, diversity_prob: float) -> None:
        self.resize_rate, self.diversity_prob = resize_rate, diversity_prob

    def __call__(self, ask: Ask, x: Tensor, now: Now) -> tuple[Scores, Tensor]:
        sides = sorted((int(x.shape[-1] * self.resize_rate), x.shape[-1]))
        side = _between(*sides)
        spare = sides[1] - side
        top, left = _between(0, spare), _between(0, spare)
        if torch.rand(1) >= self.diversity_prob:
            return ask(x)
        padding = [left, spare - left, top, spare - top]
        return ask(x, lambda v: F.pad(F.interpolate(v, [side, side], mode="bilinear", align_corners=False), padding))


def _between(low: int, high: int) -> int:
    return int(torch.randint(low, high, (1,), dtype=torch.int32))


@settings
class TIFGSM(_Momentum):
    """DIFGSM with a Gaussian over its gradients; kernel_name "linear" and "uniform" are refused."""

    model: Model
    eps: float = 8 / 255
    alpha: float = 2 / 255
    steps: int = 10
    decay: float = 0.0
    kernel_name: str = "gaussian"
    len_kernel: int = 15
    nsig: float = 3
    resize_rate: float = 0.9
    diversity_prob: float = 0.5
    random_start: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kernel_name != "gaussian":
            raise ValueError(f"kernel_name must be 'gaussian' here, got {self.kernel_name!r}")

    def _transforms(self) -> list[Transform]:
        return [TI(self.len_kernel, self.nsig), _Resized(self.resize_rate, self.diversity_prob)]
