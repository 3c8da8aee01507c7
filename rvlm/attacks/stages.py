"""Attacks by name, as a list of stages that each see what the ones before left.

fgsm            one step of size eps
pgd-N           PGD, N steps, cross-entropy; pgd-N-margin on the margin loss
pgd-NxR         PGD, N steps, R random starts on cross-entropy and then R on the margin loss
mifgsm-N, tifgsm-N    momentum; momentum, input diversity and translations, for images that are to transfer
fmn-N, cw-N, deepfool-N    smallest changes in N steps (cw: a round), which count where they are within eps
apgd-ce, apgd-dlr, apgd-t, fab, fab-t, square    each with the settings of AutoAttack; -N sets steps or queries,
                as in apgd-ce-50 and square-1000
autoattack      AutoAttack's standard version: apgd-ce, apgd-t, fab-t, square
fgsm@lowfreq=D0, pgd-N@lowfreq=D0, pgd-NxR@lowfreq=D0    the change low-passed by a Gaussian of D0 DFT bins, as
                attacks on defences that low-pass images should be: pgd-20@lowfreq=5.7
pgd-N@alpha=STEP, pgd-NxR@alpha=STEP    with steps of that size: pgd-10@alpha=1/255
autoattack-plus, autoattack-rand    its other versions: 5 restarts and apgd-dlr and fab as well; only apgd-ce and
                apgd-dlr with gradients averaged over 20 draws, for models that draw random numbers
FILE.py:NAME    your own, a callable (model, x, y, *, eps, ...) -> x_adv (see rvlm.attacks.own)
a,b,c           one after the other
"""

import dataclasses
import inspect
import re
from collections.abc import Callable
from typing import Any

from torch import Tensor

from rvlm.attacks.apgd import APGD
from rvlm.attacks.cw import CW
from rvlm.attacks.deepfool import DeepFool
from rvlm.attacks.engines import FIXED
from rvlm.attacks.fab import FAB
from rvlm.attacks.fmn import FMN
from rvlm.attacks.mifgsm import MIFGSM
from rvlm.attacks.objective import AttackResult, Passes
from rvlm.attacks.own import own_settings, run_own
from rvlm.attacks.pgd import PGD
from rvlm.attacks.square import Square
from rvlm.plugins import file_sha, from_file, is_own
from rvlm.units import Eps

__all__ = ["PATTERNS", "Stage", "parse_attack", "usable"]

ATTACKS = {
    "pgd": PGD, "mifgsm": MIFGSM, "apgd": APGD, "fab": FAB, "fmn": FMN, "square": Square,
    "cw": CW, "deepfool": DeepFool,
}  # fmt: skip
REFILLED = ("pgd", "apgd", "fab", "square")  # that take `slots`: batches are cut, and kept full as samples leave
CONTINUED = ("pgd", "mifgsm", "apgd", "square")  # from the best image of a search in bf16
PATTERNS = (
    "fgsm", "pgd-STEPS", "pgd-STEPS-margin", "pgd-STEPSxRESTARTS", "mifgsm-STEPS", "tifgsm-STEPS",
    "fmn-STEPS", "cw-STEPS", "deepfool-STEPS",
    *(f"{name}[-STEPS]" for name in ("apgd-ce", "apgd-dlr", "apgd-t", "fab", "fab-t", "square")),
    "autoattack", "autoattack-plus", "autoattack-rand",
    *(f"{name}@lowfreq=BINS" for name in ("fgsm", "pgd-STEPS", "pgd-STEPSxRESTARTS")), "pgd-STEPS@alpha=STEP",
    "FILE.py:NAME",
)  # fmt: skip
PER_CALL = {  # keywords that come with every call of a stage, and are no settings of its own
    "eps", "norm", "bounds", "x_init", "best", "early_stop", "generator", "sample_ids", "precision", "strict_eps",
    "quantize", "model_mode", "engine", "callback", "return_info", "slots",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Stage:
    """One attack with its settings.

    Attributes:
        name: of the stage.
        attack: function, by its name, or FILE.py:NAME.
        settings: its keywords.
        restart: numbers the random start of stages that are restarts of one attack.
        classes: fewest classes that it needs.
        sha256: hash of the file, of an attack of one's own.
    """

    name: str
    attack: str
    settings: dict[str, Any]
    restart: int = 0
    classes: int = 2
    sha256: str | None = None

    @property
    def refills(self) -> bool:
        """Whether its batches are kept full, so that it may be given more images than go through the model at once."""
        return self.attack in REFILLED and not self.settings.get("larger_eps")

    def __call__(
        self,
        model: Callable,
        x: Tensor,
        y: Tensor,
        *,
        transfer: bool = False,
        slots: int | None = None,
        repeats: bool = False,
        **more: Any,
    ) -> AttackResult:
        """Runs it.

        Args:
            transfer: the images will be scored on another model, so this model's verdict decides nothing.
            slots: the largest batch of a stage that `refills`; None: as many as there are images.
            repeats: the model says the same of the same images again, so that a trajectory that has returned is over.
        """
        if "precision" in more:
            more["precision"] = self.precision(more["precision"])
        if self.sha256 is not None:
            return run_own(from_file(self.attack, self.sha256), self.attack, self.settings, model, x, y, **more)
        keeps = {"slots": slots or max(len(x), 1)} if self.refills else {}
        if self.attack in ("pgd", "apgd") and transfer:
            keeps["best"] = "last" if self.attack == "pgd" else "loss"
        elif self.attack == "pgd":
            returns = repeats and more.get("norm", PGD.defaults["norm"]) == "linf"
            keeps |= {"best": "adv", "early_stop": "compact+cycle" if returns else "compact"}
        elif self.attack == "apgd":
            shrinks = self.refills or more.get("engine") not in FIXED
            keeps |= {"best": "adv", "early_stop": "compact" if shrinks else None}
        elif self.attack == "fab" and not transfer:
            keeps["early_stop"] = "compact"
        function = ATTACKS[self.attack].function
        if "generator" not in inspect.signature(function).parameters:
            more.pop("generator", None)  # it draws nothing
        return function(model, x, y, **keeps, **self.settings, **more, return_info=True)

    def precision(self, asked: str | None) -> str | None:
        """What it runs in where that was asked for."""
        return "fp32" if asked == "cascade" and self.attack not in CONTINUED else asked

    def every_setting(self) -> dict[str, Any]:
        """Its settings and the function's defaults: what decides what it does but the threat model."""
        if self.sha256 is not None:
            return self.settings
        parameters = inspect.signature(ATTACKS[self.attack].function).parameters.values()
        usual = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in PER_CALL}
        return usual | self.settings

    def record(self) -> dict[str, Any]:
        """The stage in a record."""
        every = self.every_setting()
        about = {"name": self.name, "attack": self.attack, "settings": every, "restart": self.restart}
        return about if self.sha256 is None else about | {"sha256": self.sha256}

    def passes(self, classes: int, norm: str = "linf") -> Passes:
        """What an image costs that is never fooled: the most (see `rvlm.attacks.search.Attack.passes`).

        Of an attack of one's own it is a guess by its `steps`, since nobody can see what happens inside.
        """
        if self.sha256 is not None:
            steps = self.settings.get("steps")
            steps = steps if isinstance(steps, int) else 1
            return Passes(steps, steps)
        return ATTACKS[self.attack].passes(classes, norm, **self.settings)


def parse_attack(text: str, norm: str = "linf") -> list[Stage]:
    """Stages of an attack by name; see the module.

    Raises:
        ValueError: a name that is not known. FileNotFoundError: no such file of one's own.
    """
    return [stage for part in text.split(",") for stage in _varied(part.strip(), norm)]


def usable(stages: list[Stage], classes: int) -> tuple[list[Stage], list[str]]:
    """The stages that a number of classes allows, and a sentence for each one that it does not.

    Raises:
        ValueError: no stage is left.
    """
    fit = [stage for stage in stages if stage.classes <= classes]
    refused = [f"{s.name} needs {s.classes} classes, there are {classes}" for s in stages if s.classes > classes]
    if not fit:
        raise ValueError("; ".join(refused))
    return fit, refused


def _varied(name: str, norm: str) -> list[Stage]:
    """Stages of NAME, NAME@lowfreq=BINS, NAME@alpha=STEP or FILE.py:NAME."""
    if is_own(name):
        function = from_file(name)
        return [Stage(name, name, own_settings(function, name, norm), sha256=file_sha(function))]
    plain, at, variant = name.partition("@")
    stages = _stages(plain, norm)
    if not at:
        return stages
    kind, _, value = variant.partition("=")
    if kind == "lowfreq" and re.fullmatch(r"\d+(\.\d*)?|\.\d+", value) and float(value) > 0:
        changed = {"low_frequency": float(value)}
    elif kind == "alpha" and value and Eps(value) > 0:
        changed = {"alpha": float(Eps(value))}
    else:
        raise ValueError(
            f"unknown variant @{variant} of {name!r}: expected @lowfreq=BINS or @alpha=STEP, a number above 0"
        )
    if any(stage.attack != "pgd" for stage in stages):
        raise ValueError(f"{name!r}: @{kind} is for fgsm and pgd-STEPS[xRESTARTS]")
    return [
        dataclasses.replace(stage, name=f"{stage.name}@{variant}", settings=stage.settings | changed)
        for stage in stages
    ]


def _stages(name: str, norm: str) -> list[Stage]:
    one, five = (5, 5) if norm == "l1" else (1, 5)
    versions = {
        "autoattack": [("apgd-ce", one), ("apgd-t", 1), ("fab-t", 1), ("square", 1)],
        "autoattack-plus": [
            ("apgd-ce", five), ("apgd-dlr", five), ("fab", five), ("square", 1), ("apgd-t", 1), ("fab-t", 1),
        ],
    }  # fmt: skip
    if name in versions:
        return [_named(part, norm, restarts, name == "autoattack") for part, restarts in versions[name]]
    if name == "autoattack-rand":
        rand = [_named(part, norm) for part in ("apgd-ce", "apgd-dlr")]
        return [dataclasses.replace(stage, settings=stage.settings | {"eot": 20}) for stage in rand]
    if name == "fgsm":
        return [Stage("fgsm", "pgd", {"steps": 1, "random_start": False, "loss": "ce"})]
    if match := re.fullmatch(r"pgd-([1-9]\d*)(-margin)?", name):
        return [Stage(name, "pgd", {"steps": int(match[1]), "loss": "margin" if match[2] else "ce"})]
    if match := re.fullmatch(r"pgd-([1-9]\d*)x([1-9]\d*)", name):
        steps = int(match[1])
        starts = [(loss, k) for loss in ("ce", "margin") for k in range(int(match[2]))]
        return [Stage(f"pgd-{steps}-{loss}-{k + 1}", "pgd", {"steps": steps, "loss": loss}, k) for loss, k in starts]
    if match := re.fullmatch(r"(fmn|cw|deepfool)-([1-9]\d*)", name):
        if norm == "l1" and match[1] != "fmn":
            raise ValueError(f"{name} knows the norms 'linf' and 'l2', got 'l1'")
        return [Stage(name, match[1], {"steps": int(match[2])})]
    if match := re.fullmatch(r"(mi|ti)fgsm-([1-9]\d*)", name):
        chain = ["ti", "di"] if match[1] == "ti" else []
        return [Stage(name, "mifgsm", {"steps": int(match[2]), "transforms": chain})]
    if match := re.fullmatch(r"(apgd-ce|apgd-dlr|apgd-t|fab|fab-t|square)(?:-([1-9]\d*))?", name):
        return [_named(match[1], norm, count=int(match[2]) if match[2] else None)]
    raise ValueError(f"unknown attack {name!r}: expected {', '.join(PATTERNS)}, or several separated by commas")


def _named(name: str, norm: str, restarts: int = 1, standard: bool = False, count: int | None = None) -> Stage:
    full = name if count is None else f"{name}-{count}"
    if name == "square":
        return Stage(full, "square", {"queries": count} if count else {})
    settings: dict[str, Any] = {"restarts": restarts} | ({"steps": count} if count else {})
    if name in ("fab", "fab-t"):
        return Stage(full, "fab", settings | {"aimed": name == "fab-t"})
    loss, classes = {"apgd-ce": ("ce", 2), "apgd-dlr": ("dlr", 3), "apgd-t": ("dlr-targeted", 4)}[name]
    if standard and norm == "l1":
        settings |= {"larger_eps": True} | ({"targets": 5} if name == "apgd-t" else {})
    return Stage(full, "apgd", settings | {"loss": loss}, classes=classes)
