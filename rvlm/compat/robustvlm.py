"""RobustVLM's training attacks (FARE, TeCoA) on rvlm's engine: `from rvlm.compat.robustvlm import pgd, apgd_train`.

Same arguments as `train.pgd_train.pgd` and `train.apgd_train.apgd_train`. Its AutoAttack is `rvlm.compat.autoattack`.
"""

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rvlm.attacks.apgd import apgd
from rvlm.attacks.checks import AttackWarning
from rvlm.attacks.mifgsm import mifgsm
from rvlm.attacks.pgd import pgd as plain_pgd
from rvlm.compat.common import per_sample_loss

__all__ = ["apgd_train", "pgd"]

NORMS = {
    **dict.fromkeys(("inf", "linf", "Linf"), "linf"),
    **dict.fromkeys(("2", "2.0", "l2", "L2"), "l2"),
    **dict.fromkeys(("l1", "L1"), "l1"),
}


def pgd(
    forward: Callable[..., Any],
    loss_fn: Callable[[Any, Any], Tensor],
    data_clean: Tensor,
    targets: Any,
    norm: str | float,
    eps: float,
    iterations: int,
    stepsize: float,
    output_normalize: bool,
    perturbation: Tensor | None = None,
    mode: str = "min",
    momentum: float = 0.9,
    verbose: bool = False,
) -> Tensor:
    """PGD with RobustVLM's momentum of signs, which differs from plain PGD where a gradient is exactly 0.

    Args:
        forward: called as forward(images, output_normalize=output_normalize).
        loss_fn: callable (outputs, targets) that returns one number or [B].
        data_clean: images [B, ...] in [0, 1].
        norm: "linf", or "l2" with momentum=0; "inf", 2 and the like mean the same.
        perturbation: where to start, added to data_clean; the sum is cut to ball and box before the first gradient
            (there only after it). None: zero.
        mode: "min" or "max", of the loss.
        verbose: prints nothing here.

    Returns:
        Adversarial images, detached.
    """
    if mode not in ("min", "max"):
        raise ValueError(f"Unknown mode: {mode}")
    norm = _norm(norm)
    start = None if perturbation is None else data_clean + perturbation.detach()
    settings = {
        "eps": eps, "alpha": stepsize, "steps": iterations, "targeted": mode == "min", "x_init": start,
        "random_start": False, "loss": per_sample_loss(loss_fn, targets), "model_mode": "keep",
    }  # fmt: skip
    model = functools.partial(forward, output_normalize=output_normalize)
    if norm != "linf":
        if momentum:
            raise ValueError(f"momentum={momentum} is for norm='linf' here; with norm={norm!r} pass momentum=0")
        return plain_pgd(model, data_clean, targets, norm=norm, **settings)
    return mifgsm(model, data_clean, targets, mu=momentum, velocity="sign", **settings)


def apgd_train(
    model: Callable[..., Tensor],
    x: Tensor,
    y: Any,
    norm: str,
    eps: float,
    n_iter: int = 10,
    use_rs: bool = False,
    loss_fn: Callable[[Tensor, Any], Tensor] | None = None,
    verbose: bool = False,
    is_train: bool = True,
    initial_stepsize: float | None = None,
) -> Tensor:
    """APGD from the images, on a model called as model(images, output_normalize=True).

    As there, what counts is whether the argmax of the output is y: the last image of which it is not is returned, the
    clean one where there is none. That means something where outputs are logits and y [B] are labels. With other y the
    image with the best loss is returned, and a warning says so (there: an error, or nonsense).

    Args:
        norm: "linf" or "l2"; "l1" starts with 20 % of the pixels (there, if is_train, with 5 %).
        loss_fn: callable (outputs, y) -> [B], made large.
        initial_stepsize: in pixel units; None: 2 eps, for "l1" eps.
        verbose, is_train: change nothing here.
    """
    if use_rs:
        raise NotImplementedError("use_rs=True is not there in RobustVLM either; rvlm.attacks.apgd has random_start")
    settings = {
        "eps": eps, "norm": _norm(norm), "steps": n_iter, "loss": per_sample_loss(loss_fn, y), "random_start": False,
        "first_step": initial_stepsize / eps if initial_stepsize else None, "model_mode": "keep", "return_info": True,
    }  # fmt: skip
    call = functools.partial(model, output_normalize=True)
    found = apgd(call, x, y, best="adv", **settings)
    if found.success is None:
        warnings.warn(
            "y are no labels [B] of the model's outputs: the images with the best loss are returned",
            AttackWarning,
            stacklevel=2,
        )
        return found.x_adv
    return torch.where(found.success.view(-1, *[1] * (x.dim() - 1)), found.x_adv, x)


def _norm(given: str | float) -> str:
    if str(given) not in NORMS:
        raise NotImplementedError(f"Norm {given} not supported: expected one of {', '.join(NORMS)}")
    return NORMS[str(given)]
