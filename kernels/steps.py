"""Attack steps on rows of n elements, one row per sample, stored row after row.

linf_step      s = x_adv + alpha * sign(grad);  y = clip(x + clip(s - x, -eps, eps), lo, hi)
l2_step        delta = x_adv - x;  scale = alpha / ||grad||;  shrink = min(1, eps / ||delta + scale * grad||)
               y = clip(x + (delta + scale * grad) * shrink, lo, hi)
uniform_start  u[i] = (word i % 4 of Philox4x32-10 at (i // 4, id low, id high, stream), key seed) >> 8, times 2^-24
               y = clip(x + (2 * u - 1) * eps, lo, hi)

With levels > 0 a step ends on a grid point k / levels: the nearest inside ball and box (linf), or the next one toward x
(l2). The specification is the eager reference in rvlm/ops/steps.py; linf_step and uniform_start give its bits.

What is fused: linf_step reads three tensors and writes one in one pass. l2_step needs one pass of sums instead of two,
because ||delta + scale * grad||^2 = <delta, delta> + 2 * scale * <delta, grad> + alpha^2; each program writes its sums
in float64 to its own slot and every program of the second kernel adds them up in the same order, without atomics, so
runs repeat to the bit. Rows with active = False end before they load an image.
"""

import math

import torch
import triton
import triton.language as tl

from rvlm.kernels._launch import launch, step_sizes, sums_sizes

MAX_PARTS = 256  # most programs that share the sums of one row, a power of two


@triton.jit
def _clip(v, low, high):
    # Comparisons, not tl.clamp: NaN falls through, as in torch.clamp.
    v = tl.where(v < low, low, v)
    return tl.where(v > high, high, v)


@triton.jit
def _sign(grad):
    return (grad > 0).to(grad.dtype) - (grad < 0).to(grad.dtype)  # sign(NaN) = 0


@triton.jit
def _place(n, BLOCK: tl.constexpr):
    # Of this program: its row, its offsets in it and which of them exist, and where the row begins, in 64 bits.
    blocks = tl.cdiv(n, BLOCK)
    row = tl.program_id(0) // blocks
    offset = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = offset < n
    return row, offset, inside, row.to(tl.int64) * n


@triton.jit
def _grid_point(q, LEVELS: tl.constexpr):
    # q / LEVELS as IEEE division; Triton's `/` is approximate in fp32, and div_rn exists in fp32 only.
    if q.dtype == tl.float32:
        return tl.div_rn(q, tl.full(q.shape, LEVELS, tl.float32))
    return q / LEVELS


@triton.jit
def _linf_step_kernel(
    out_ptr,  # [B, n]
    x_adv_ptr,  # [B, n]
    grad_ptr,  # [B, n], any floating dtype
    x_ptr,  # [B, n]
    alpha_ptr,  # [B] or [1]
    eps_ptr,  # [B] or [1]
    active_ptr,  # [B] bool, or None
    n,
    ALPHA_STRIDE: tl.constexpr,
    EPS_STRIDE: tl.constexpr,
    LO: tl.constexpr,
    HI: tl.constexpr,
    LEVELS: tl.constexpr,
    FIRST_LEVEL: tl.constexpr,
    LAST_LEVEL: tl.constexpr,
    IN_PLACE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, offset, inside, start = _place(n, BLOCK)
    if active_ptr is not None:
        if not tl.load(active_ptr + row):
            if not IN_PLACE:
                kept = tl.load(x_adv_ptr + start + offset, mask=inside, other=0.0)
                tl.store(out_ptr + start + offset, kept, mask=inside)
            return
    alpha = tl.load(alpha_ptr + row * ALPHA_STRIDE)
    eps = tl.load(eps_ptr + row * EPS_STRIDE)
    x_adv = tl.load(x_adv_ptr + start + offset, mask=inside, other=0.0)
    x = tl.load(x_ptr + start + offset, mask=inside, other=0.0)
    grad = tl.load(grad_ptr + start + offset, mask=inside, other=0.0).to(x.dtype)

    moved = x_adv + alpha * _sign(grad)
    y = _clip(x + _clip(moved - x, -eps, eps), LO, HI)
    if LEVELS > 0:
        # A bound that misses a level by rounding alone counts as reaching it: 8/255 in fp32 holds eight levels.
        q = tl.floor(LEVELS * y + 0.5)
        lowest = tl.ceil(LEVELS * (x - eps) - LEVELS * 1e-6)
        highest = tl.floor(LEVELS * (x + eps) + LEVELS * 1e-6)
        q = _clip(_clip(q, lowest, highest), FIRST_LEVEL, LAST_LEVEL)
        y = _grid_point(q, LEVELS)
    tl.store(out_ptr + start + offset, y, mask=inside)


@triton.jit
def _l2_sums_kernel(
    sums_ptr,  # [B, 3, parts] float64: <grad, grad>, <delta, grad>, <delta, delta> over each part of the row
    x_adv_ptr,  # [B, n]
    grad_ptr,  # [B, n], any floating dtype
    x_ptr,  # [B, n]
    active_ptr,  # [B] bool, or None
    n,
    parts,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0) // parts
    part = tl.program_id(0) % parts
    if active_ptr is not None:
        if not tl.load(active_ptr + row):
            return
    start = row.to(tl.int64) * n
    gg = tl.zeros([BLOCK], tl.float64)
    dg = tl.zeros([BLOCK], tl.float64)
    dd = tl.zeros([BLOCK], tl.float64)
    first = part * BLOCK
    while first < n:  # not range(): Triton 3.6's interpreter cannot make one from tensors under numpy 2.4 and later
        offset = first + tl.arange(0, BLOCK)
        inside = offset < n
        x_adv = tl.load(x_adv_ptr + start + offset, mask=inside, other=0.0)
        x = tl.load(x_ptr + start + offset, mask=inside, other=0.0)
        g = tl.load(grad_ptr + start + offset, mask=inside, other=0.0).to(x.dtype).to(tl.float64)
        delta = (x_adv - x).to(tl.float64)
        gg += g * g
        dg += delta * g
        dd += delta * delta
        first += parts * BLOCK
    slot = sums_ptr + row.to(tl.int64) * 3 * parts + part
    tl.store(slot, tl.sum(gg, axis=0))
    tl.store(slot + parts, tl.sum(dg, axis=0))
    tl.store(slot + 2 * parts, tl.sum(dd, axis=0))


@triton.jit
def _l2_apply_kernel(
    out_ptr,  # [B, n]
    x_adv_ptr,  # [B, n]
    grad_ptr,  # [B, n], any floating dtype
    x_ptr,  # [B, n]
    alpha_ptr,  # [B] or [1]
    eps_ptr,  # [B] or [1]
    active_ptr,  # [B] bool, or None
    sums_ptr,  # [B, 3, parts] float64
    n,
    parts,
    ALPHA_STRIDE: tl.constexpr,
    EPS_STRIDE: tl.constexpr,
    LO: tl.constexpr,
    HI: tl.constexpr,
    LEVELS: tl.constexpr,
    IN_PLACE: tl.constexpr,
    MAX_PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, offset, inside, start = _place(n, BLOCK)
    if active_ptr is not None:
        if not tl.load(active_ptr + row):
            if not IN_PLACE:
                kept = tl.load(x_adv_ptr + start + offset, mask=inside, other=0.0)
                tl.store(out_ptr + start + offset, kept, mask=inside)
            return
    # The images are asked for first, so that they travel while the sums are added up.
    x_adv = tl.load(x_adv_ptr + start + offset, mask=inside, other=0.0)
    x = tl.load(x_ptr + start + offset, mask=inside, other=0.0)
    grad = tl.load(grad_ptr + start + offset, mask=inside, other=0.0).to(x.dtype)
    alpha = tl.load(alpha_ptr + row * ALPHA_STRIDE).to(tl.float64)
    eps = tl.load(eps_ptr + row * EPS_STRIDE).to(tl.float64)
    part = tl.arange(0, MAX_PARTS)
    slot = sums_ptr + row.to(tl.int64) * 3 * parts + part
    gg = tl.sum(tl.load(slot, mask=part < parts, other=0.0), axis=0)
    dg = tl.sum(tl.load(slot + parts, mask=part < parts, other=0.0), axis=0)
    dd = tl.sum(tl.load(slot + 2 * parts, mask=part < parts, other=0.0), axis=0)

    norm = tl.sqrt(gg)
    scale = alpha / tl.where(norm > 0, norm, 1.0)
    # A row without a direction keeps its place; so does one whose scale overflows the image type.
    directed = (norm > 0) & (norm < float("inf")) & (tl.abs(scale.to(x.dtype)) < float("inf"))
    scale = tl.where(directed, scale, 0.0)
    length = tl.sqrt(dd + tl.where(directed, 2.0 * scale * dg + alpha * alpha, 0.0))
    shrink = tl.where(length > eps, eps / length, 1.0)  # not for a NaN length: rounding took its square below zero
    scale = scale.to(x.dtype)
    shrink = shrink.to(x.dtype)

    direction = tl.where(scale == 0, 0.0, scale * grad)
    y = _clip(x + ((x_adv - x) + direction) * shrink, LO, HI)
    if LEVELS > 0:
        # Rounded toward x, so that no coordinate of y - x, and so no norm, grows; x is on the grid.
        levels_moved = LEVELS * (y - x)
        whole = tl.floor(tl.abs(levels_moved) + LEVELS * 1e-6)
        y = _grid_point(tl.floor(LEVELS * x + 0.5) + tl.where(levels_moved < 0, -whole, whole), LEVELS)
    tl.store(out_ptr + start + offset, y, mask=inside)


@triton.jit
def _philox(c0, c1, c2, c3, k0, k1):
    # Philox4x32-10 (Salmon et al., SC 2011): ten rounds of two 32 x 32 -> 64-bit products. All arguments uint32 blocks.
    m0 = tl.full(c0.shape, 0xD2511F53, tl.uint32)
    m1 = tl.full(c0.shape, 0xCD9E8D57, tl.uint32)
    bump0 = tl.full(k0.shape, 0x9E3779B9, tl.uint32)
    bump1 = tl.full(k1.shape, 0xBB67AE85, tl.uint32)
    for _ in tl.static_range(10):
        low0, high0 = c0 * m0, tl.umulhi(c0, m0)
        low1, high1 = c2 * m1, tl.umulhi(c2, m1)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = k0 + bump0, k1 + bump1
    return c0, c1, c2, c3


# Unspecialised and of a fixed type: otherwise a seed's size and its divisibility by 16 would each compile a variant.
@triton.jit(do_not_specialize=["seed_low", "seed_high", "stream"])
def _uniform_start_kernel(
    out_ptr,  # [B, n]
    x_ptr,  # [B, n]
    eps_ptr,  # [B] or [1]
    ids_ptr,  # [B] int64
    n,
    seed_low: tl.int64,  # 32-bit words, as is stream
    seed_high: tl.int64,
    stream: tl.int64,
    EPS_STRIDE: tl.constexpr,
    LO: tl.constexpr,
    HI: tl.constexpr,
    BLOCK: tl.constexpr,
):
    blocks = tl.cdiv(n, BLOCK)
    row = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    counter = block * (BLOCK // 4) + tl.arange(0, BLOCK // 4)
    zero = tl.zeros([BLOCK // 4], tl.uint32)
    sample = tl.load(ids_ptr + row)
    w0, w1, w2, w3 = _philox(
        counter.to(tl.uint32),
        zero + sample.to(tl.uint32),
        zero + (sample >> 32).to(tl.uint32),
        zero + stream.to(tl.uint32),
        zero + seed_low.to(tl.uint32),
        zero + seed_high.to(tl.uint32),
    )
    word = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))  # w0[0] w1[0] w2[0] w3[0] w0[1] ...

    offset = block * BLOCK + tl.arange(0, BLOCK)
    inside = offset < n
    start = row.to(tl.int64) * n
    eps = tl.load(eps_ptr + row * EPS_STRIDE)
    x = tl.load(x_ptr + start + offset, mask=inside, other=0.0)
    u = (word >> 8).to(x.dtype) * 5.9604644775390625e-08  # 2^-24: [0, 1) in 24 bits, the same numbers in fp32 and fp64
    y = _clip(x + (u * 2 - 1) * eps, LO, HI)
    tl.store(out_ptr + start + offset, y, mask=inside)


def linf_step(
    out: torch.Tensor,
    x_adv: torch.Tensor,
    grad: torch.Tensor,
    x: torch.Tensor,
    alpha: torch.Tensor,
    eps: torch.Tensor,
    lo: float,
    hi: float,
    active: torch.Tensor | None,
    levels: float,
) -> None:
    """Writes the Linf step of every row to `out`.

    Args:
        out: result [B, ...], fp32 or fp64; may be x_adv itself.
        x_adv, grad, x: iterate, gradient and clean images in the memory layout of `out`, each sample a dense block;
            x_adv and x have the dtype of `out`, grad any floating dtype.
        alpha, eps: step size and radius in pixel units, [1] or [B], dtype and device of x.
        lo, hi: pixel range.
        active: bool [B] or None; rows that are False keep x_adv.
        levels: grid points k / levels, 0 for none.
    """
    if out.numel() == 0:
        return
    n = out.numel() // len(out)
    sizes = step_sizes(n)
    launch(
        _linf_step_kernel,
        len(out) * sizes.programs,
        out.device,
        out,
        x_adv,
        grad,
        x,
        alpha,
        eps,
        active,
        n,
        ALPHA_STRIDE=_stride(alpha),
        EPS_STRIDE=_stride(eps),
        LO=lo,
        HI=hi,
        LEVELS=levels,
        FIRST_LEVEL=math.ceil(levels * lo) if levels else 0,
        LAST_LEVEL=math.floor(levels * hi) if levels else 0,
        IN_PLACE=out.data_ptr() == x_adv.data_ptr(),
        BLOCK=sizes.block,
        num_warps=sizes.num_warps,
    )


def l2_step(
    out: torch.Tensor,
    x_adv: torch.Tensor,
    grad: torch.Tensor,
    x: torch.Tensor,
    alpha: torch.Tensor,
    eps: torch.Tensor,
    lo: float,
    hi: float,
    active: torch.Tensor | None,
    levels: float,
) -> None:
    """Writes the L2 step of every row to `out`. Arguments as `linf_step`."""
    if out.numel() == 0:
        return
    n = out.numel() // len(out)
    sizes, sums_over = step_sizes(n), sums_sizes(n, MAX_PARTS)
    parts = sums_over.programs
    sums = torch.empty((len(out), 3, parts), dtype=torch.float64, device=out.device)
    launch(
        _l2_sums_kernel,
        len(out) * parts,
        out.device,
        sums,
        x_adv,
        grad,
        x,
        active,
        n,
        parts,
        BLOCK=sums_over.block,
        num_warps=sums_over.num_warps,
    )
    launch(
        _l2_apply_kernel,
        len(out) * sizes.programs,
        out.device,
        out,
        x_adv,
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
        LO=lo,
        HI=hi,
        LEVELS=levels,
        IN_PLACE=out.data_ptr() == x_adv.data_ptr(),
        MAX_PARTS=MAX_PARTS,
        BLOCK=sizes.block,
        num_warps=sizes.num_warps,
    )


def uniform_start(
    out: torch.Tensor,
    x: torch.Tensor,
    eps: torch.Tensor,
    sample_ids: torch.Tensor,
    seed: int,
    lo: float,
    hi: float,
    stream: int,
) -> None:
    """Writes x plus uniform noise in [-eps, eps), clipped to the box, to `out`.

    Args:
        out: result [B, ...], fp32 or fp64, contiguous.
        x: clean images, dtype and layout of `out`.
        eps: radius in pixel units, [1] or [B], dtype and device of x.
        sample_ids: int64 [B], the number that a sample's noise belongs to.
        seed: key of the generator, 64 bits, signed or not.
        lo, hi: pixel range.
        stream: last counter word, in [0, 2^32).
    """
    if out.numel() == 0:
        return
    n = out.numel() // len(out)
    sizes = step_sizes(n)
    launch(
        _uniform_start_kernel,
        len(out) * sizes.programs,
        out.device,
        out,
        x,
        eps,
        sample_ids,
        n,
        seed & 0xFFFFFFFF,
        seed >> 32 & 0xFFFFFFFF,
        stream,
        EPS_STRIDE=_stride(eps),
        LO=lo,
        HI=hi,
        BLOCK=sizes.block,
        num_warps=sizes.num_warps,
    )


def _stride(t: torch.Tensor) -> int:
    return 1 if t.numel() > 1 else 0
