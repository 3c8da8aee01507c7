"""cleverhans' projected_gradient_descent on `pgd`.

Same arguments, defaults, errors and draws. The result is detached, and keeps x's dtype.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from rvlm.attacks.pgd import pgd
from rvlm.compat.common import predicted, within

__all__ = ["projected_gradient_descent"]


def projected_gradient_descent(
    model_fn: Callable[[Tensor], Tensor],
    x: Tensor,
    eps: float,
    eps_iter: float,
    nb_iter: int,
    norm: float,
    clip_min: float | None = None,
    clip_max: float | None = None,
    y: Tensor | None = None,
    targeted: bool = False,
    rand_init: bool = True,
    rand_minmax: float | None = None,
    sanity_checks: bool = True,
) -> Tensor:
    """PGD on the cross-entropy.

    Args:
        model_fn: callable from pixels to logits; runs in the mode that it is in.
        norm: numpy.inf or 2.
        clip_min, clip_max: the box; None: no limit on that side.
        y: labels, or targets; None: the model's own predictions.
        rand_minmax: the random start is uniform in [-rand_minmax, rand_minmax), projected; None: eps.
        sanity_checks: images outside the box are an error in any case.
    """
    if norm == 1:
        raise NotImplementedError("It's not clear that FGM is a good inner loop step for PGD when norm=1")
    if norm not in (torch.inf, 2):
        raise ValueError("Norm order must be either np.inf or 2.")
    for name, value in (("eps", eps), ("eps_iter", eps_iter)):
        if value < 0:
            raise ValueError(f"{name} must be greater than or equal to 0, got {value} instead")
    if clip_min is not None and clip_max is not None and clip_min > clip_max:
        raise ValueError(f"clip_min must be less than or equal to clip_max, got {clip_min=} and {clip_max=}")
    if eps == 0 or eps_iter == 0:
        return x
    if eps_iter > eps:
        raise AssertionError(f"eps_iter ({eps_iter}) must not be larger than eps ({eps})")
    x = x.detach()
    width = 3 * eps  # of room on a side without a limit, more than an iterate can use
    lo = x.min().item() - width if clip_min is None else clip_min
    hi = x.max().item() + width if clip_max is None else clip_max
    start = None
    if rand_init:
        reach = eps if rand_minmax is None else rand_minmax
        noisy = x + torch.zeros_like(x).uniform_(-reach, reach)
        start = within(x, noisy, eps, norm).clamp(lo, hi)
    y = predicted(model_fn, x) if y is None else y
    return pgd(
        model_fn, x, y, eps=eps, alpha=eps_iter, steps=nb_iter, norm="linf" if norm == torch.inf else "l2",
        targeted=targeted, random_start=False, x_init=start, bounds=(lo, hi), model_mode="keep",
    )  # fmt: skip
