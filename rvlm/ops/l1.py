"""The nearest point in the intersection of an L1 ball and the pixel box, exactly and without a sort.

With u = x_adv - x and b the distance from x to the wall that u points at, the projection is

    delta(mu) = sign(u) min(max(|u| - mu, 0), b),    mu >= 0 the smallest number with ||delta(mu)||_1 <= eps

(soft thresholding, then the box; the set that Croce & Hein 2021, arXiv 2103.01208, attack in). ||delta(mu)||_1 falls
with mu, so mu is bracketed: on a GPU by evaluating many thresholds in one pass, on a CPU by Newton's method inside the
bracket. Projecting on ball and box in turn does not give this point.
"""

import torch
from torch import Tensor

from rvlm.ops._dispatch import Op
from rvlm.ops.steps import check_step, rows_dense

__all__ = ["l1_project"]


def _l1_project(x_adv, x, eps, lo, hi):
    """mu by bisection in float64 until the bracket has no number inside."""
    u = (x_adv - x).double().flatten(1)
    wide = x.double().flatten(1)
    size, room = u.abs(), torch.where(u > 0, hi - wide, wide - lo)
    low, high = torch.zeros_like(size[:, 0]), size.amax(1)
    for _ in range(80):
        middle = (low + high) / 2
        outside = _length(size, room, middle) > eps
        low, high = torch.where(outside, middle, low), torch.where(outside, high, middle)
    mu = high.to(x.dtype)[:, None]
    moved = x.flatten(1) + torch.sign(u).to(x.dtype) * (size.to(x.dtype) - mu).clamp(min=0)
    inside = _length(size, room, torch.zeros_like(low)) <= eps  # then only the box, and pixels keep their bits
    y = torch.where(inside[:, None], x_adv.flatten(1), moved).clamp(lo, hi)
    y = torch.where(size.amax(1).isfinite()[:, None], y, torch.nan)
    return torch.empty_like(x_adv).copy_(y.view(x.shape))


def _length(size, room, mu):
    return torch.minimum((size - mu[:, None]).clamp(min=0), room).sum(1)


_op = Op(
    "l1_project",
    "(Tensor x_adv, Tensor x, Tensor eps, float lo, float hi) -> Tensor",
    fake=lambda x_adv, *args: torch.empty_like(x_adv),
    reference=_l1_project,
    triton="rvlm.ops._triton:l1_project",
)


def l1_project(x_adv: Tensor, x: Tensor, eps: float | Tensor, lo: float = 0.0, hi: float = 1.0) -> Tensor:
    """The point nearest to x_adv among those within L1 distance eps of x and inside the box.

    Args:
        x_adv: points [B, ...], float32 or float64, anywhere.
        x: clean images, like x_adv, inside [lo, hi].
        eps: radius, the sum of |x_adv - x| over all pixels of a sample, a float or [B].
        lo, hi: pixel range.

    Returns:
        New tensor. Samples that are inside the ball once they are inside the box keep their pixels' bits. A pixel of
        x_adv that is not finite makes its sample NaN. Errors as `linf_step_`.
    """
    if not torch.compiler.is_compiling() and x_adv.data_ptr() == x.data_ptr():
        x_adv = x_adv.clone()  # steps refuse what shares memory with x; nothing is written here
    like, _, x, _, eps = check_step(x_adv, x_adv, x, 0.0, eps, lo, hi, None)
    rows = len(x_adv)
    out = _op(like, x, eps if eps.numel() == rows else eps.expand(rows).contiguous(), float(lo), float(hi))
    return out if rows_dense(x_adv) is x_adv else torch.empty_like(x_adv).copy_(out)
