"""AutoAttack (Croce & Hein 2020, arXiv 2003.01690): attacks of different kinds, each on what the ones before left.

The standard version is the measure that robust classifiers are compared by; its settings are those of the original
implementation (`rvlm.attacks.stages`). A sample is robust if it is classified correctly when clean and after every
stage.
"""

import dataclasses
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from rvlm.attacks.checks import AttackWarning, check_images, check_radius
from rvlm.attacks.contract import arithmetic, untouched
from rvlm.attacks.objective import AttackResult, Objective, Passes, Scores
from rvlm.attacks.search import Attack, check_choices, check_count, drawn_seed, empty_result
from rvlm.attacks.stages import parse_attack, usable

__all__ = ["AutoAttack", "AutoAttackResult", "autoattack"]

VERSIONS = {"standard": "autoattack", "plus": "autoattack-plus", "rand": "autoattack-rand"}


@dataclasses.dataclass
class AutoAttackResult(AttackResult):
    """`AttackResult`, and who did it.

    Attributes:
        stages: names, in order.
        refused: sentences on stages that the number of classes rules out.
        broken_by: int64 [B], number of the stage that fooled the model, -1 robust, -2 wrong when clean.
        robust: by stage name, how many samples were still robust after it; "clean" before the first.
    """

    stages: list[str] = dataclasses.field(default_factory=list)
    refused: list[str] = dataclasses.field(default_factory=list)
    broken_by: Tensor | None = None
    robust: dict[str, int] = dataclasses.field(default_factory=dict)


def autoattack(
    model: Callable[[Tensor], Any],
    x: Tensor,
    y: Tensor | None = None,
    *,
    eps: float | Tensor = 8 / 255,
    norm: str = "linf",
    version: str = "standard",
    attacks: Sequence[str] | None = None,
    slots: int | None = None,
    bounds: tuple[float, float] = (0.0, 1.0),
    generator: torch.Generator | None = None,
    sample_ids: Tensor | None = None,
    precision: str | None = None,
    strict_eps: bool = False,
    quantize: int | None = None,
    model_mode: str = "eval",
    engine: str = "auto",
    callback: Callable[[str, int], None] | None = None,
    return_info: bool = False,
) -> Tensor | AutoAttackResult:
    """AutoAttack on one batch; `rvlm.evaluation.evaluate` runs it over a data set. The rest is as in `pgd`.

    Args:
        version: "standard", "plus", "rand", or "custom" with `attacks`.
        attacks: names of stages for version="custom", such as ["apgd-ce", "apgd-t", "square-1000"].
        precision: as in `pgd`; under "cascade" stages that cannot go on from a point (FAB, FMN, CW, DeepFool) run in
            fp32 (`Stage.precision`).
        slots: the largest batch that goes through the model in `pgd`, `apgd`, `fab` and `square`, for clean images and
            for the verdict; None: as many as images. APGD of the standard version in L1 takes all that are left.
        callback: called as callback(name of the stage, samples still robust) after every stage.

    Returns:
        Adversarial images; those of samples that stayed robust, or were wrong when clean, are the clean images, as in
        the original implementation. Or an AutoAttackResult, whose loss is the margin (largest other logit minus the
        label's).

    Raises:
        As `pgd`; ValueError: an unknown version or stage, or too few classes for every stage.

    Warns:
        AttackWarning: a stage is left out because there are too few classes for it.
    """
    check_choices(version=(version, (*VERSIONS, "custom")))
    if (version == "custom") != (attacks is not None):
        raise ValueError("attacks=[...] goes with version='custom', and the other way round")
    stages = parse_attack(VERSIONS.get(version) or ",".join(attacks), norm)
    if slots is not None:
        check_count("slots", slots, 1)
    if not callable(model):
        raise TypeError(f"model must be callable, got {type(model).__name__}")
    check_images(x, bounds)
    check_radius("eps", eps, len(x), norm, bounds)
    if not len(x):
        warnings.warn("autoattack got an empty batch and returns it unchanged", AttackWarning, stacklevel=2)
        return AutoAttackResult(**vars(empty_result(x))) if return_info else x.detach().clone()
    common = {
        "norm": norm, "bounds": bounds, "precision": precision, "strict_eps": strict_eps, "quantize": quantize,
        "model_mode": model_mode, "engine": engine, "slots": slots or len(x),
    }  # fmt: skip

    def scored(images: Tensor, labels: Tensor | None) -> tuple[Scores, Objective]:
        with untouched(model, model_mode), torch.no_grad(), arithmetic(model, x.device, precision and "fp32"):
            objective = Objective(model, x, labels, "margin", slots=slots)
            return objective.score(images), objective

    with drawn_seed(generator, True) as seed:
        x = x.detach()
        ids = torch.arange(len(x), device=x.device) if sample_ids is None else sample_ids.to(x.device)
        clean, objective = scored(x, y)
        y, count = objective.labels, objective.count
        stages, refused = usable(stages, count.classes)
        for sentence in refused:
            warnings.warn(f"AutoAttack leaves out a stage: {sentence}", AttackWarning, stacklevel=2)
        x_adv, broken_by = x.clone(), torch.where(clean.fooled, -2, -1)
        robust = {"clean": int((broken_by == -1).sum())}
        steps_used = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        disagreement = torch.zeros(2, dtype=torch.int64)
        for number, stage in enumerate(stages):
            rows = (broken_by == -1).nonzero().flatten()
            if len(rows):
                radius = eps.to(x.device)[rows] if isinstance(eps, Tensor) and eps.numel() > 1 else eps
                draws = torch.Generator().manual_seed((seed + stage.restart) % 2**63)
                found = stage(model, x[rows], y[rows], eps=radius, generator=draws, sample_ids=ids[rows], **common)
                count.forwards += found.forwards
                count.backwards += found.backwards
                count.zeros += found.zero_gradients
                disagreement += torch.tensor([found.fooled_in_bf16_only, found.fooled_in_fp32_only])
                steps_used[rows] += found.steps_used
                hit = rows[found.success]
                x_adv[hit], broken_by[hit] = found.x_adv[found.success], number
            robust[stage.name] = int((broken_by == -1).sum())
            if callback is not None:
                callback(stage.name, robust[stage.name])
    if not return_info:
        return x_adv
    final, last = scored(x_adv, y)
    forwards = count.forwards + last.count.forwards
    return AutoAttackResult(
        x_adv, final.fooled, final.loss, final.pred, steps_used, forwards, count.backwards, count.zeros,
        *disagreement.tolist(), stages=[stage.name for stage in stages], refused=refused, broken_by=broken_by,
        robust=robust,
    )  # fmt: skip


class AutoAttack(Attack):
    """`autoattack` with its settings fixed: `AutoAttack(model, eps=8/255)(x, y)`. Its keywords are attributes."""

    function = autoattack

    @staticmethod
    def _passes(classes: int, norm: str, given: dict[str, Any]) -> Passes:
        """The clean images, all stages that the classes allow, and the verdict."""
        stages, _ = usable(parse_attack(VERSIONS.get(given["version"]) or ",".join(given["attacks"]), norm), classes)
        return sum((stage.passes(classes, norm) for stage in stages), Passes(2))
