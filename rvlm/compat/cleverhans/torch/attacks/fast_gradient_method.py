"""cleverhans' fast_gradient_method on `pgd`: one step of size eps, without a random start."""

from collections.abc import Callable

from torch import Tensor

from rvlm.compat.cleverhans.torch.attacks.projected_gradient_descent import projected_gradient_descent

__all__ = ["fast_gradient_method"]


def fast_gradient_method(
    model_fn: Callable[[Tensor], Tensor],
    x: Tensor,
    eps: float,
    norm: float,
    clip_min: float | None = None,
    clip_max: float | None = None,
    y: Tensor | None = None,
    targeted: bool = False,
    sanity_checks: bool = False,
) -> Tensor:
    """x + eps times the sign of the gradient (norm=2: its direction). Arguments as in projected_gradient_descent."""
    return projected_gradient_descent(
        model_fn, x, eps, eps, 1, norm, clip_min, clip_max, y, targeted, rand_init=False, sanity_checks=sanity_checks
    )
