"""adversarial-library's pgd_linf on `pgd`: `from rvlm.compat.adv_lib import pgd_linf`.

Same arguments, defaults and draws. As there, of every sample the last iterate that fooled the model is returned, the
clean image where none did, the last step's iterate is not used, and later restarts are for the samples that are left.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rvlm.attacks.ball import rowwise
from rvlm.attacks.pgd import pgd

__all__ = ["pgd_linf"]

LOSSES = {"ce": "ce", "dl": "margin", "dlr": "dlr"}


def pgd_linf(
    model: Callable[[Tensor], Tensor],
    inputs: Tensor,
    labels: Tensor,
    ε: float | Tensor,
    targeted: bool = False,
    steps: int = 40,
    random_init: bool = True,
    restarts: int = 1,
    loss_function: str = "ce",
    relative_step_size: float = 0.01 / 0.3,
    absolute_step_size: float | None = None,
    callback: Any = None,
) -> Tensor:
    """PGD in Linf.

    Args:
        model: callable from pixels in [0, 1] to logits; runs in the mode that it is in.
        labels: labels [B], or targets.
        ε: radius in pixel units, a float or [B].
        loss_function: "ce", "dl" (the margin) or "dlr" (untargeted here).
        relative_step_size: in radii; absolute_step_size, in pixel units, goes before it.
        callback: not called.

    Returns:
        Adversarial images, detached.
    """
    if loss_function.lower() not in LOSSES or (targeted and loss_function.lower() == "dlr"):
        raise ValueError(f"loss_function must be 'ce', 'dl' or, untargeted, 'dlr', got {loss_function!r}")
    eps = torch.as_tensor(ε, dtype=inputs.dtype, device=inputs.device).expand(len(inputs))
    x_adv, left = inputs.detach().clone(), torch.arange(len(inputs), device=inputs.device)
    for _ in range(restarts):
        x, radii = inputs[left].detach(), eps[left]
        noise = torch.zeros_like(x).uniform_(-1, 1) * rowwise(radii, x) if random_init else torch.zeros_like(x)
        found = pgd(
            model, x, labels[left], eps=radii, steps=steps - 1, targeted=targeted, loss=LOSSES[loss_function.lower()],
            alpha=relative_step_size * radii if absolute_step_size is None else absolute_step_size, best="adv",
            x_init=(x + noise).clamp(0, 1), random_start=False, model_mode="keep", return_info=True,
        )  # fmt: skip
        x_adv[left[found.success]] = found.x_adv[found.success]
        left = left[~found.success]
        if not len(left):
            break
    return x_adv
