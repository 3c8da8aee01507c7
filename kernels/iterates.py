"""Steps that look back, on rows of n elements, one row per sample, stored row after row.

apgd_step      z = P(x_adv + step * sign(grad));  y = P(x_adv + (z - x_adv) * a + (x_adv - x_prev) * (1 - a))
               with P(u) = clip(clip(u, x - eps, x + eps), lo, hi); y is written over x_prev
momentum_step  mi:   v = mu * v + grad / sum |grad|;  sign:  v = sign(mu * v + sign(grad))
               y = clip(x + clip(x_adv + alpha * sign(v) - x, -eps, eps), lo, hi)
keep_best      best = src where the row's flag is set

The specification is the eager reference in rvlm/ops/iterates.py; apgd_step, keep_best and the sign form give its bits.

What is fused: one pass each, but for the L1 norm of mi, whose partial sums a first kernel writes in float64 to slots of
their own: no atomics, the same bits at every run. Rows that do not move end before they load an image.
"""

import torch
import triton
import triton.language as tl

from rvlm.kernels._launch import launch, step_sizes, sums_sizes
from rvlm.kernels.steps import _clip, _place, _sign, _stride

MAX_PARTS = 256  # most programs that share the sum of one row, a power of two


@triton.jit
def _apgd_step_kernel(
    x_prev_ptr,  # [B, n], the result too
    x_adv_ptr,  # [B, n]
    grad_ptr,  # [B, n], any floating dtype
    x_ptr,  # [B, n]
    step_ptr,  # [B] or [1]
    eps_ptr,  # [B] or [1]
    active_ptr,  # [B] bool, or None
    n,
    STEP_STRIDE: tl.constexpr,
    EPS_STRIDE: tl.constexpr,
    A: tl.constexpr,
    LO: tl.constexpr,
    HI: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, offset, inside, start = _place(n, BLOCK)
    x_adv = tl.load(x_adv_ptr + start + offset, mask=inside, other=0.0)
    if active_ptr is not None:
        if not tl.load(active_ptr + row):
            tl.store(x_prev_ptr + start + offset, x_adv, mask=inside)
            return
    step = tl.load(step_ptr + row * STEP_STRIDE)
    eps = tl.load(eps_ptr + row * EPS_STRIDE)
    x_prev = tl.load(x_prev_ptr + start + offset, mask=inside, other=0.0)
    x = tl.load(x_ptr + start + offset, mask=inside, other=0.0)
    grad = tl.load(grad_ptr + start + offset, mask=inside, other=0.0).to(x.dtype)
    z = _clip(_clip(x_adv + step * _sign(grad), x - eps, x + eps), LO, HI)
    y = x_adv + (z - x_adv) * A + (x_adv - x_prev) * (1 - A)
    tl.store(x_prev_ptr + start + offset, _clip(_clip(y, x - eps, x + eps), LO, HI), mask=inside)


@triton.jit
def _l1_sums_kernel(
    sums_ptr,  # [B, parts] float64
    grad_ptr,  # [B, n], any floating dtype
    active_ptr,  # [B] bool, or None
    n,
    parts,
    DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0) // parts
    part = tl.program_id(0) % parts
    if active_ptr is not None:
        if not tl.load(active_ptr + row):
            return
    start = row.to(tl.int64) * n
    total = tl.zeros([BLOCK], tl.float64)
    first = part * BLOCK
    while first < n:  # not range(): Triton 3.6's interpreter cannot make one from tensors under numpy 2.4 and later
        offset = first + tl.arange(0, BLOCK)
        g = tl.load(grad_ptr + start + offset, mask=offset < n, other=0.0).to(DTYPE)
        total += tl.where(g == g, tl.abs(g), 0.0).to(tl.float64)
        first += parts * BLOCK
    tl.store(sums_ptr + row.to(tl.int64) * parts + part, tl.sum(total, axis=0))


@triton.jit
def _momentum_step_kernel(
    x_adv_ptr,  # [B, n], the result too
    velocity_ptr,  # [B, n], updated
    grad_ptr,  # [B, n], any floating dtype
    x_ptr,  # [B, n]
    alpha_ptr,  # [B] or [1]
    eps_ptr,  # [B] or [1]
    active_ptr,  # [B] bool, or None
    sums_ptr,  # [B, parts] float64 for mi, else None
    n,
    parts,
    ALPHA_STRIDE: tl.constexpr,
    EPS_STRIDE: tl.constexpr,
    MU: tl.constexpr,
    LO: tl.constexpr,
    HI: tl.constexpr,
    MAX_PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, offset, inside, start = _place(n, BLOCK)
    if active_ptr is not None:
        if not tl.load(active_ptr + row):
            return
    alpha = tl.load(alpha_ptr + row * ALPHA_STRIDE)
    eps = tl.load(eps_ptr + row * EPS_STRIDE)
    x_adv = tl.load(x_adv_ptr + start + offset, mask=inside, other=0.0)
    velocity = tl.load(velocity_ptr + start + offset, mask=inside, other=0.0)
    x = tl.load(x_ptr + start + offset, mask=inside, other=0.0)
    grad = tl.load(grad_ptr + start + offset, mask=inside, other=0.0).to(x.dtype)
    grad = tl.where(grad == grad, grad, 0.0)
    if sums_ptr is not None:
        part = tl.arange(0, MAX_PARTS)
        sums = tl.load(sums_ptr + row.to(tl.int64) * parts + part, mask=part < parts, other=0.0)
        length = tl.sum(sums, axis=0)
        usable = (length > 0) & (length < float("inf"))
        share = tl.where(usable, 1.0 / tl.where(usable, length, 1.0), 0.0).to(x.dtype)
        velocity = MU * velocity + tl.where(share == 0, 0.0, share * grad)
    else:
        velocity = _sign(MU * velocity + _sign(grad))
    y = _clip(x + _clip(x_adv + alpha * _sign(velocity) - x, -eps, eps), LO, HI)
    tl.store(velocity_ptr + start + offset, velocity, mask=inside)
    tl.store(x_adv_ptr + start + offset, y, mask=inside)


@triton.jit
def _keep_best_kernel(
    best_ptr,  # [B, n]
    src_ptr,  # [B, n]
    flag_ptr,  # [B] bool
    n,
    BLOCK: tl.constexpr,
):
    row, offset, inside, start = _place(n, BLOCK)
    if tl.load(flag_ptr + row):
        kept = tl.load(src_ptr + start + offset, mask=inside, other=0)
        tl.store(best_ptr + start + offset, kept, mask=inside)


def apgd_step(
    x_prev: torch.Tensor,
    x_adv: torch.Tensor,
    grad: torch.Tensor,
    x: torch.Tensor,
    step: torch.Tensor,
    eps: torch.Tensor,
    a: float,
    lo: float,
    hi: float,
    active: torch.Tensor | None,
) -> None:
    """Writes the next iterate of every row over `x_prev`; rows that are not active get x_adv.

    Args:
        x_prev, x_adv, grad, x: [B, ...] in one memory layout, each sample a dense block; grad any floating dtype.
        step, eps: step size and radius in pixel units, [1] or [B], dtype and device of x.
        a: weight of the new direction.
        lo, hi: pixel range.
        active: bool [B] or None.
    """
    if x_prev.numel() == 0:
        return
    n = x_prev.numel() // len(x_prev)
    sizes = step_sizes(n)
    launch(
        _apgd_step_kernel,
        len(x_prev) * sizes.programs,
        x_prev.device,
        x_prev,
        x_adv,
        grad,
        x,
        step,
        eps,
        active,
        n,
        STEP_STRIDE=_stride(step),
        EPS_STRIDE=_stride(eps),
        A=a,
        LO=lo,
        HI=hi,
        BLOCK=sizes.block,
        num_warps=sizes.num_warps,
    )


def momentum_step(
    x_adv: torch.Tensor,
    velocity: torch.Tensor,
    grad: torch.Tensor,
    x: torch.Tensor,
    alpha: torch.Tensor,
    eps: torch.Tensor,
    mu: float,
    kind: int,
    lo: float,
    hi: float,
    active: torch.Tensor | None,
) -> None:
    """Updates velocity and iterate of every active row. kind: 0 mi, 1 sign; other arguments as `apgd_step`."""
    if x_adv.numel() == 0:
        return
    n = x_adv.numel() // len(x_adv)
    sizes, sums_over = step_sizes(n), sums_sizes(n, MAX_PARTS)
    sums, parts = None, sums_over.programs
    if kind == 0:
        sums = torch.empty((len(x_adv), parts), dtype=torch.float64, device=x_adv.device)
        launch(
            _l1_sums_kernel,
            len(x_adv) * parts,
            x_adv.device,
            sums,
            grad,
            active,
            n,
            parts,
            DTYPE=tl.float64 if x.dtype == torch.float64 else tl.float32,
            BLOCK=sums_over.block,
            num_warps=sums_over.num_warps,
        )
    launch(
        _momentum_step_kernel,
        len(x_adv) * sizes.programs,
        x_adv.device,
        x_adv,
        velocity,
        grad,
        x,
        alpha,
        eps,
        active,
        sums,
        n,
        parts,
        ALPHA_STRIDE=_stride(alpha),
        EPS_STRIDE=_stride(eps),
        MU=mu,
        LO=lo,
        HI=hi,
        MAX_PARTS=MAX_PARTS,
        BLOCK=sizes.block,
        num_warps=sizes.num_warps,
    )


def keep_best(best: torch.Tensor, src: torch.Tensor, flag: torch.Tensor) -> None:
    """Copies the rows of `src` whose flag is set over those of `best`, [B, ...] in one memory layout and any dtype."""
    if best.numel() == 0:
        return
    n = best.numel() // len(best)
    sizes = step_sizes(n)
    launch(
        _keep_best_kernel,
        len(best) * sizes.programs,
        best.device,
        best,
        src,
        flag,
        n,
        BLOCK=sizes.block,
        num_warps=sizes.num_warps,
    )
