"""torchattacks' APGD, FAB, Square, and the attacks that are made of attacks."""

import dataclasses
import time
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rvlm.attacks.checks import AttackWarning
from rvlm.compat.parts import attacked
from rvlm.compat.torchattacks.attack import Attack, Model, settings

__all__ = ["APGD", "APGDT", "FAB", "AutoAttack", "MultiAttack", "Square"]


class _Part(Attack):
    """A part of AutoAttack; early_stop is set by AutoAttack, for which the verdict is all that counts."""

    supported_mode: Sequence[str] = ("default",)
    early_stop: str | None = None

    def _attacked(self, name: str, model: Model, images: Tensor, labels: Tensor, **given: Any) -> Tensor:
        return attacked(
            name, model, images, labels, norm=self.norm, eps=self.eps, seed=self.seed, restarts=self.n_restarts,
            targeted=self.targeted, early_stop=self.early_stop, **given,
        )  # fmt: skip


@settings
class APGD(_Part):
    """`apgd` on "ce" or "dlr", Linf or L2."""

    model: Model
    norm: str = "Linf"
    eps: float = 8 / 255
    steps: int = 10
    n_restarts: int = 1
    seed: float = 0
    loss: str = "ce"
    eot_iter: int = 1
    rho: dataclasses.InitVar[float] = 0.75
    verbose: bool = False

    def __post_init__(self, rho: float) -> None:
        super().__post_init__()
        self.thr_decr = rho

    def _find(self, model: Model, images: Tensor, labels: Tensor) -> Tensor:
        given = {"steps": self.steps, "loss": self.loss, "eot": self.eot_iter, "rho": self.thr_decr}
        return self._attacked("apgd", model, images, labels, **given)


@settings
class APGDT(_Part):
    """`apgd` on "dlr-targeted", against the n_classes - 1 likeliest wrong classes."""

    model: Model
    norm: str = "Linf"
    eps: float = 8 / 255
    steps: int = 10
    n_restarts: int = 1
    seed: float = 0
    eot_iter: int = 1
    rho: dataclasses.InitVar[float] = 0.75
    verbose: bool = False
    n_classes: dataclasses.InitVar[int] = 10

    def __post_init__(self, rho: float, n_classes: int) -> None:
        super().__post_init__()
        self.thr_decr, self.n_target_classes = rho, n_classes - 1

    def _find(self, model: Model, images: Tensor, labels: Tensor) -> Tensor:
        given = {"steps": self.steps, "loss": "dlr-targeted", "eot": self.eot_iter, "rho": self.thr_decr}
        return self._attacked("apgd", model, images, labels, targets=self.n_target_classes, **given)


@settings
class FAB(_Part):
    """`fab`; with multi_targeted against the n_classes - 1 likeliest wrong classes. No targeted mode."""

    model: Model
    norm: str = "Linf"
    eps: float | None = 8 / 255
    steps: int = 10
    n_restarts: int = 1
    alpha_max: float = 0.1
    eta: float = 1.05
    beta: float = 0.9
    verbose: bool = False
    seed: float = 0
    multi_targeted: bool = False
    n_classes: dataclasses.InitVar[int] = 10

    def __post_init__(self, n_classes: int) -> None:
        super().__post_init__()
        self.eps = {"Linf": 0.3, "L2": 1.0, "L1": 5.0}[self.norm] if self.eps is None else self.eps
        self.n_target_classes = n_classes - 1

    def _find(self, model: Model, images: Tensor, labels: Tensor) -> Tensor:
        aimed = {"aimed": True, "targets": self.n_target_classes} if self.multi_targeted else {"aimed": False}
        given = {"steps": self.steps, "alpha_max": self.alpha_max, "eta": self.eta, "beta": self.beta}
        return self._attacked("fab", model, images, labels, **aimed, **given)


@settings
class Square(_Part):
    """`square`, Linf or L2."""

    supported_mode = ("default", "targeted")
    model: Model
    norm: str = "Linf"
    eps: float = 8 / 255
    n_queries: int = 5000
    n_restarts: int = 1
    p_init: float = 0.8
    loss: str = "margin"
    resc_schedule: dataclasses.InitVar[bool] = True
    seed: float | None = 0
    verbose: bool = False

    def __post_init__(self, resc_schedule: bool) -> None:
        super().__post_init__()
        self.rescale_schedule = resc_schedule
        self.seed = time.time() if self.seed is None else self.seed

    def _find(self, model: Model, images: Tensor, labels: Tensor) -> Tensor:
        given = {"queries": self.n_queries, "p_init": self.p_init, "loss": self.loss}
        return self._attacked("square", model, images, labels, rescale=self.rescale_schedule, **given)


class MultiAttack(Attack):
    """Attacks of one model, each on what the ones before left; images that nothing fooled stay clean."""

    supported_mode = ("default",)

    def __init__(self, attacks: Sequence[Attack], verbose: bool = False) -> None:
        if len(attacks) < 2:
            raise ValueError("More than two attacks should be given.")
        if any(attack.model is not attacks[0].model for attack in attacks):
            raise ValueError("At least one of attacks is referencing a different model.")
        self.model, self.attacks, self.verbose = attacks[0].model, attacks, verbose
        self.__post_init__()
        used = [attack.normalization_used for attack in attacks]
        if any((a is None) != (used[0] is None) for a in used):
            raise ValueError("set_normalization_used must be called on all of the attacks, or on none")
        self.normalization_used = used[0]

    def set_normalization_used(self, mean: Sequence[float], std: Sequence[float]) -> None:
        for attack in (super(), *self.attacks):
            attack.set_normalization_used(mean, std)

    def _find(self, model: Model, images: Tensor, labels: Tensor) -> Tensor:
        x_adv = images.clone()
        left, counts = torch.arange(len(images), device=images.device), [len(images)]
        for attack in self.attacks:
            with attack._mode():
                found = attack._attack(images[left], labels[left])
            with torch.no_grad():
                wrong = model(found).argmax(1) != labels[left]
            x_adv[left[wrong]] = found[wrong]
            left = left[~wrong]
            counts.append(len(left))
            if not len(left):
                break
        if self.verbose:
            rates = " | ".join(f"{100 * (1 - n / counts[0]):2.2f} %" for n in counts[1:])
            print(f"Attack success rate: {rates}")
        return x_adv


@settings
class AutoAttack(Attack):
    """torchattacks' AutoAttack, whose APGD and FAB run 10 steps where the original runs 100.

    Its robust accuracies are not those of AutoAttack (torchattacks issue 188): for these use
    `rvlm.compat.autoattack`, `rvlm.attacks.autoattack` or `rvlm eval --attack autoattack`. Samples leave APGD once they
    are fooled, so verdicts are torchattacks', images of fooled samples come from earlier iterates.
    """

    supported_mode = ("default",)
    model: Model
    norm: str = "Linf"
    eps: float = 8 / 255
    version: str = "standard"
    n_classes: int = 10
    seed: float | None = None
    verbose: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        warnings.warn(
            "torchattacks' AutoAttack runs APGD and FAB for 10 steps, AutoAttack for 100: its figures are not "
            "comparable with published ones (use rvlm.compat.autoattack for those)",
            AttackWarning,
            stacklevel=3,
        )
        model, common = self.model, {"norm": self.norm, "eps": self.eps, "verbose": self.verbose}
        common["seed"] = self.get_seed()
        aimed = [
            APGDT(model, n_classes=self.n_classes, **common),
            FAB(model, multi_targeted=True, n_classes=self.n_classes, **common),
        ]
        parts = {
            "standard": [APGD(model, **common), *aimed, Square(model, **common)],
            "plus": [
                APGD(model, n_restarts=5, **common), APGD(model, loss="dlr", n_restarts=5, **common),
                FAB(model, n_restarts=5, **common), Square(model, **common), *aimed,
            ],
            "rand": [APGD(model, loss=loss, eot_iter=20, **common) for loss in ("ce", "dlr")],
        }  # fmt: skip
        if self.version not in parts:
            raise ValueError(f"Not valid version. {list(parts)}")
        for part in parts[self.version]:
            part.early_stop = "compact"
        self._autoattack = MultiAttack(parts[self.version])

    def set_normalization_used(self, mean: Sequence[float], std: Sequence[float]) -> None:
        for attack in (super(), self._autoattack):
            attack.set_normalization_used(mean, std)

    def get_seed(self) -> float:
        return time.time() if self.seed is None else self.seed

    def _find(self, model: Model, images: Tensor, labels: Tensor) -> Tensor:
        return self._autoattack._find(model, images, labels)
