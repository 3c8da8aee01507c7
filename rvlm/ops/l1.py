"""Steps in the intersection of an L1 ball and the pixel box: its nearest point, and the sparse ascent, without a sort.

l1_project: with u = x_adv - x and b the distance from x to the wall that u points at, the projection is

    delta(mu) = sign(u) min(max(|u| - mu, 0), b),    mu >= 0 the smallest number with ||delta(mu)||_1 <= eps

(soft thresholding, then the box; the set that Croce & Hein 2021, arXiv 2103.01208, attack in). ||delta(mu)||_1 falls
with mu, so mu is bracketed: on a GPU by evaluating many thresholds in one pass, on a CPU by Newton's method inside the
bracket. Projecting on ball and box in turn does not give this point.

l1_step_: the pixels with the largest gradients move, all by the same amount, and the result is projected:

    z = x_adv + alpha sign(g) [|g| >= t] / k,    t the |g| that the share `top` of the pixels reaches, k how many move

(SLIDE, Tramer & Boneh 2019, arXiv 1904.13000; the direction of APGD in L1, Croce & Hein 2021). t is selected, not
sorted for: 5 bits of it in one pass over a histogram on a GPU, by quickselect on a CPU.
"""

import torch
from torch import Tensor

from rvlm.ops._dispatch import Op
from rvlm.ops.iterates import keep_best_
from rvlm.ops.steps import check_levels, check_step, per_row, quantize_toward, rows_dense, strictly_inside

__all__ = ["l1_project", "l1_step_"]


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


def _sparse_step(x_adv, grad, alpha, still):
    """`still` [B] counts the smallest gradients of a row, which stay; equal ones move together."""
    grad = grad.to(x_adv.dtype).nan_to_num(0.0, posinf=torch.inf, neginf=-torch.inf).flatten(1)
    if not grad.numel():
        return x_adv.clone()
    least = grad.abs().sort(1).values.gather(1, still.clamp(0, grad.shape[1] - 1)[:, None])
    sign = torch.where(grad.abs() >= least, grad.sign(), 0.0)
    moving = (sign != 0).sum(1)
    share = torch.where(moving > 0, alpha.double() / moving, 0.0).to(x_adv.dtype)
    return torch.empty_like(x_adv).copy_(x_adv + sign.view(x_adv.shape) * per_row(share, x_adv))


_sparse_op = Op(
    "sparse_step",
    "(Tensor x_adv, Tensor grad, Tensor alpha, Tensor still) -> Tensor",
    fake=lambda x_adv, *args: torch.empty_like(x_adv),
    reference=_sparse_step,
    triton="rvlm.ops._triton:sparse_step",
)
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
    like, _, x, _, eps, _ = check_step(x_adv, x_adv, x, 0.0, eps, lo, hi, None)
    out = _op(like, x, _for_rows(eps, like), float(lo), float(hi))
    return out if rows_dense(x_adv) is x_adv else torch.empty_like(x_adv).copy_(out)


def l1_step_(
    x_adv: Tensor,
    grad: Tensor,
    x: Tensor,
    alpha: float | Tensor,
    eps: float | Tensor,
    lo: float = 0.0,
    hi: float = 1.0,
    active: Tensor | None = None,
    *,
    top: float | Tensor = 0.05,
    strict_eps: bool = False,
    quantize: int | None = None,
) -> Tensor:
    """One L1 PGD step, in place: alpha along the signs of the largest gradients, then `l1_project`.

    Arguments, errors and result as `linf_step_`, with these differences:

    Args:
        alpha: L1 length of the step, shared equally by the pixels that move; 0 projects only.
        top: share of a sample's pixels that move, in (0, 1], a float or [B]; equal gradients move together, zero and
            NaN never. The default is advertorch's; APGD adapts it.
        strict_eps: takes 1.2e-7 * n off eps, what n rounded pixels can add to a sum.
        quantize: every pixel rounds toward x, so that no coordinate, and so no sum, grows.
    """
    like, grad, x, alpha, eps, active = check_step(x_adv, grad, x, alpha, eps, lo, hi, active)
    n = like[:1].numel()
    if quantize is not None:
        check_levels(quantize, strict_eps)
    if strict_eps:
        eps = strictly_inside(eps, like, lo, hi, pixels=n * n)
    moved = _sparse_op(like, grad, alpha, _still(top, like))
    y = _op(moved, x, _for_rows(eps, like), float(lo), float(hi))
    if quantize is not None:
        y = quantize_toward(y, x, quantize)
    if active is not None:
        keep_best_(like, y, active)
        return x_adv if like is x_adv else x_adv.copy_(like)
    return x_adv.copy_(y)


def _still(top: float | Tensor, x_adv: Tensor) -> Tensor:
    """How many pixels of each sample stay, int64 [B]."""
    rows, n = len(x_adv), x_adv[:1].numel()
    if not isinstance(top, Tensor):
        if not 0 < top <= 1:
            raise ValueError(f"top must be a share of the pixels, in (0, 1], got {top}")
        return torch.full((rows,), min(int((1 - top) * n), max(n - 1, 0)), device=x_adv.device)
    if top.shape not in ((), (1,), (rows,)):
        raise ValueError(f"top must be a float or a tensor [{rows}], one share per sample; got {list(top.shape)}")
    return _for_rows(((1 - top.to(x_adv.device)) * n).clamp(0, max(n - 1, 0)).long().reshape(-1), x_adv)


def _for_rows(value: Tensor, x: Tensor) -> Tensor:
    return value if value.numel() == len(x) else value.expand(len(x)).contiguous()
