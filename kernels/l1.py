"""Steps in an L1 ball, on rows of n elements, one row per sample, stored row after row.

l1_project     u = x_adv - x,  b = hi - x where u > 0, else x - lo
               length(mu) = sum min(max(|u| - mu, 0), b)
               y = clip(x + sign(u) max(|u| - mu, 0), lo, hi) at length(mu) = eps
sparse_step    y = x_adv + sign(g) [|g| >= t] alpha / k,  t = the |g| that `still` pixels are below, k how many move

The specification is the eager reference in rvlm/ops/l1.py. No sort. l1_project: one pass evaluates the length at KNOTS
thresholds that cut the bracket of mu into equal parts, and the bracket shrinks to one of them. Four passes shrink it a
million times, and between its ends the length is a line but for the few pixels that lie in it. Sums are float64 in
slots of their own, without atomics, so runs repeat to the bit. sparse_step: the bits of |g| order it, and every pass
over a histogram fixes DIGIT of them. Nothing asks the host.
"""

import torch
import triton
import triton.language as tl

from rvlm.kernels._launch import launch, step_sizes, sums_sizes
from rvlm.kernels.steps import _clip, _place, _sign

MAX_PARTS = 256  # most programs that share the sums of one row, a power of two
KNOTS = 32
ROUNDS = 4
DIGIT = 5  # bits
BLOCK = 128  # pixels at a time, each against all thresholds: 16 elements a thread at 8 warps


@triton.jit
def _l1_largest_kernel(
    bracket_ptr,  # [B, parts] float64: largest |u| over each part, NaN if one is not finite
    x_adv_ptr,  # [B, n]
    x_ptr,  # [B, n]
    n,
    parts,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0) // parts
    part = tl.program_id(0) % parts
    start = row.to(tl.int64) * n
    largest = tl.zeros([BLOCK], tl.float64)
    first = part * BLOCK
    while first < n:  # not range(): Triton 3.6's interpreter cannot make one from tensors under numpy 2.4 and later
        offset = first + tl.arange(0, BLOCK)
        x_adv = tl.load(x_adv_ptr + start + offset, mask=offset < n, other=0.0)
        x = tl.load(x_ptr + start + offset, mask=offset < n, other=0.0)
        size = tl.abs(x_adv - x).to(tl.float64)
        largest += tl.where(size < float("inf"), 0.0, float("nan"))
        largest = tl.where(size > largest, size, largest)
        first += parts * BLOCK
    broken = tl.sum((largest != largest).to(tl.int32), axis=0) > 0
    most = tl.max(tl.where(largest == largest, largest, 0.0), axis=0)
    tl.store(bracket_ptr + row.to(tl.int64) * parts + part, tl.where(broken, float("nan"), most))


@triton.jit
def _l1_lengths_kernel(
    sums_ptr,  # [B, parts, KNOTS] float64: length over each part at each threshold
    x_adv_ptr,  # [B, n]
    x_ptr,  # [B, n]
    low_ptr,  # [B] float64, as is high
    high_ptr,  # [B]
    n,
    parts,
    LO: tl.constexpr,
    HI: tl.constexpr,
    KNOTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0) // parts
    part = tl.program_id(0) % parts
    start = row.to(tl.int64) * n
    low = tl.load(low_ptr + row)
    knot = tl.arange(0, KNOTS)
    mu = low + (tl.load(high_ptr + row) - low) * (knot.to(tl.float64) / (KNOTS - 1))
    total = tl.zeros([KNOTS], tl.float64)
    first = part * BLOCK
    while first < n:
        offset = first + tl.arange(0, BLOCK)
        inside = offset < n
        x = tl.load(x_ptr + start + offset, mask=inside, other=0.0)
        u = (tl.load(x_adv_ptr + start + offset, mask=inside, other=0.0) - x).to(tl.float64)
        wide = x.to(tl.float64)
        room = tl.where(inside, tl.where(u > 0, HI - wide, wide - LO), 0.0)
        left = tl.abs(u)[:, None] - mu[None, :]
        left = tl.where(left < 0, 0.0, left)
        total += tl.sum(tl.where(left > room[:, None], room[:, None], left), axis=0)
        first += parts * BLOCK
    tl.store(sums_ptr + (row.to(tl.int64) * parts + part) * KNOTS + knot, total)


@triton.jit
def _l1_bracket_kernel(
    low_ptr,  # [B] float64, updated, as are the next three
    high_ptr,  # [B]
    length_low_ptr,  # [B] length at low
    length_high_ptr,  # [B]
    sums_ptr,  # [B, parts, KNOTS] float64
    eps_ptr,  # [B]
    parts,
    KNOTS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    knot = tl.arange(0, KNOTS)
    length = tl.zeros([KNOTS], tl.float64)
    part = 0
    while part < parts:
        length += tl.load(sums_ptr + (row * parts + part) * KNOTS + knot)
        part += 1
    low, high = tl.load(low_ptr + row), tl.load(high_ptr + row)
    outside = length > tl.load(eps_ptr + row).to(tl.float64)
    last = tl.max(tl.where(outside, knot, 0), axis=0)  # the last threshold that is too small
    last = tl.minimum(last, KNOTS - 2)
    step = high - low
    tl.store(low_ptr + row, low + step * (last.to(tl.float64) / (KNOTS - 1)))
    tl.store(high_ptr + row, low + step * ((last + 1).to(tl.float64) / (KNOTS - 1)))
    tl.store(length_low_ptr + row, tl.sum(tl.where(knot == last, length, 0.0), axis=0))
    tl.store(length_high_ptr + row, tl.sum(tl.where(knot == last + 1, length, 0.0), axis=0))


@triton.jit
def _l1_shrink_kernel(
    out_ptr,  # [B, n]
    x_adv_ptr,  # [B, n]
    x_ptr,  # [B, n]
    low_ptr,  # [B] float64, as are the next three
    high_ptr,  # [B]
    length_low_ptr,  # [B]
    length_high_ptr,  # [B]
    eps_ptr,  # [B]
    n,
    LO: tl.constexpr,
    HI: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, offset, inside, start = _place(n, BLOCK)
    x_adv = tl.load(x_adv_ptr + start + offset, mask=inside, other=0.0)
    x = tl.load(x_ptr + start + offset, mask=inside, other=0.0)
    low, high = tl.load(low_ptr + row), tl.load(high_ptr + row)
    length_low, length_high = tl.load(length_low_ptr + row), tl.load(length_high_ptr + row)
    eps = tl.load(eps_ptr + row).to(tl.float64)
    # Between the ends of the bracket the length is a line; low = 0 with a length within eps needs no threshold.
    fall = length_low - length_high
    share = tl.where(fall > 0, (length_low - eps) / tl.where(fall > 0, fall, 1.0), 1.0)
    mu = (low + (high - low) * share).to(x.dtype)
    u = x_adv - x
    left = tl.abs(u) - mu
    left = tl.where(left < 0, 0.0, left)
    shrunk = x + tl.where(u < 0, -left, left)
    y = _clip(tl.where(length_low > eps, shrunk, x_adv), LO, HI)
    y = tl.where(high == high, y, float("nan"))  # a pixel is not finite
    tl.store(out_ptr + start + offset, y, mask=inside)


@triton.jit
def _key(grad, WIDE: tl.constexpr):
    # An integer that orders as |g| in float64 or float32; NaN is 0.
    if WIDE:
        g = tl.abs(grad.to(tl.float64))
        key = tl.where(g == g, g, 0.0).to(tl.int64, bitcast=True)
    else:
        g = tl.abs(grad.to(tl.float32))
        key = tl.where(g == g, g, 0.0).to(tl.int32, bitcast=True).to(tl.int64)
    return key


@triton.jit
def _select_histogram_kernel(
    counts_ptr,  # [B, parts, BINS] int32: how many elements of each part have each next digit
    grad_ptr,  # [B, n], any floating dtype
    prefix_ptr,  # [B] int64: the digits found so far
    n,
    parts,
    SHIFT: tl.constexpr,
    DIGIT: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0) // parts
    part = tl.program_id(0) % parts
    start = row.to(tl.int64) * n
    prefix = tl.load(prefix_ptr + row)
    digit = tl.arange(0, 1 << DIGIT)
    counts = tl.zeros([1 << DIGIT], tl.int32)
    first = part * BLOCK
    while first < n:
        offset = first + tl.arange(0, BLOCK)
        inside = offset < n
        grad = tl.load(grad_ptr + start + offset, mask=inside, other=0.0)
        key = _key(grad, WIDE)
        chosen = inside & ((key >> SHIFT >> DIGIT) == prefix)  # by both at once would be by more than 63 bits
        mine = tl.where(chosen, (key >> SHIFT) & ((1 << DIGIT) - 1), -1).to(tl.int32)
        counts += tl.sum((mine[:, None] == digit[None, :]).to(tl.int32), axis=0)
        first += parts * BLOCK
    tl.store(counts_ptr + (row.to(tl.int64) * parts + part) * (1 << DIGIT) + digit, counts)


@triton.jit
def _select_digit_kernel(
    prefix_ptr,  # [B] int64, updated, as are the next two
    below_ptr,  # [B] int64: how many elements are smaller than all that begin with the prefix
    equal_ptr,  # [B] int64: how many begin with it
    counts_ptr,  # [B, parts, BINS] int32
    still_ptr,  # [B] int64
    parts,
    DIGIT: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    digit = tl.arange(0, 1 << DIGIT)
    counts = tl.zeros([1 << DIGIT], tl.int64)
    part = 0
    while part < parts:
        counts += tl.load(counts_ptr + (row * parts + part) * (1 << DIGIT) + digit)
        part += 1
    below = tl.load(below_ptr + row)
    smaller = tl.sum(tl.where(digit[None, :] < digit[:, None], counts[None, :], 0), axis=1) + below
    # The last digit with no more than `still` elements before it; after a digit without elements the next one fits too.
    found = tl.max(tl.where(smaller <= tl.load(still_ptr + row), digit, 0), axis=0)
    tl.store(prefix_ptr + row, tl.load(prefix_ptr + row) * (1 << DIGIT) + found)
    tl.store(below_ptr + row, tl.sum(tl.where(digit == found, smaller, 0), axis=0))
    tl.store(equal_ptr + row, tl.sum(tl.where(digit == found, counts, 0), axis=0))


@triton.jit
def _sparse_step_kernel(
    out_ptr,  # [B, n]
    x_adv_ptr,  # [B, n]
    grad_ptr,  # [B, n], any floating dtype
    alpha_ptr,  # [B] or [1]
    least_ptr,  # [B] int64: the bits of t
    below_ptr,  # [B] int64: how many elements are below t
    equal_ptr,  # [B] int64: how many are t
    n,
    ALPHA_STRIDE: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, offset, inside, start = _place(n, BLOCK)
    x_adv = tl.load(x_adv_ptr + start + offset, mask=inside, other=0.0)
    grad = tl.load(grad_ptr + start + offset, mask=inside, other=0.0)
    least = tl.load(least_ptr + row)
    moving = n - tl.load(below_ptr + row)
    moving -= tl.where(least == 0, tl.load(equal_ptr + row), 0)  # zeros do not move
    alpha = tl.load(alpha_ptr + row * ALPHA_STRIDE).to(tl.float64)
    share = tl.where(moving > 0, alpha / tl.where(moving > 0, moving, 1).to(tl.float64), 0.0).to(x_adv.dtype)
    sign = tl.where(_key(grad, WIDE) >= least, _sign(grad.to(x_adv.dtype)), 0.0)
    tl.store(out_ptr + start + offset, x_adv + sign * share, mask=inside)


def sparse_step(
    out: torch.Tensor, x_adv: torch.Tensor, grad: torch.Tensor, alpha: torch.Tensor, still: torch.Tensor
) -> None:
    """Writes x_adv + alpha / k * sign(g) at the k pixels of every row with the largest |g|.

    Args:
        out, x_adv: [B, ...] in one memory layout, each sample a dense block, fp32 or fp64.
        grad: like x_adv, any floating dtype.
        alpha: [B] or [1], dtype and device of x_adv.
        still: int64 [B], how many of the smallest |g| stay, 0 .. n-1; those equal to the next one move.
    """
    if out.numel() == 0:
        return
    rows, n, device = len(out), out.numel() // len(out), out.device
    sizes, wide = step_sizes(n), sums_sizes(n, MAX_PARTS)
    block = min(BLOCK, wide.block)
    parts = min(triton.cdiv(n, block), MAX_PARTS)
    counts = torch.empty((rows, parts, 1 << DIGIT), dtype=torch.int32, device=device)
    least, below, equal = torch.zeros((3, rows), dtype=torch.int64, device=device)
    wide_images = x_adv.dtype == torch.float64
    for shift in reversed(range(0, 63 if wide_images else 31, DIGIT)):
        launch(
            _select_histogram_kernel,
            rows * parts,
            device,
            counts,
            grad,
            least,
            n,
            parts,
            SHIFT=shift,
            DIGIT=DIGIT,
            WIDE=wide_images,
            BLOCK=block,
            num_warps=8,
        )
        launch(_select_digit_kernel, rows, device, least, below, equal, counts, still, parts, DIGIT=DIGIT, num_warps=1)
    launch(
        _sparse_step_kernel,
        rows * sizes.programs,
        device,
        out,
        x_adv,
        grad,
        alpha,
        least,
        below,
        equal,
        n,
        ALPHA_STRIDE=int(alpha.numel() > 1),
        WIDE=wide_images,
        BLOCK=sizes.block,
        num_warps=sizes.num_warps,
    )


def l1_project(
    out: torch.Tensor, x_adv: torch.Tensor, x: torch.Tensor, eps: torch.Tensor, lo: float, hi: float
) -> None:
    """Writes the projection of every row of x_adv to `out`.

    Args:
        out, x_adv, x: [B, ...] in one memory layout, each sample a dense block, fp32 or fp64.
        eps: radius [B], dtype and device of x.
        lo, hi: pixel range.
    """
    if out.numel() == 0:
        return
    rows, n, device = len(out), out.numel() // len(out), out.device
    sizes, wide = step_sizes(n), sums_sizes(n, MAX_PARTS)
    block = min(BLOCK, wide.block)
    parts = min(triton.cdiv(n, block), MAX_PARTS)
    largest = torch.empty((rows, wide.programs), dtype=torch.float64, device=device)
    launch(
        _l1_largest_kernel,
        rows * wide.programs,
        device,
        largest,
        x_adv,
        x,
        n,
        wide.programs,
        BLOCK=wide.block,
        num_warps=wide.num_warps,
    )
    low, high = torch.zeros(rows, dtype=torch.float64, device=device), largest.amax(1)
    length_low, length_high = torch.empty_like(low), torch.empty_like(low)
    sums = torch.empty((rows, parts, KNOTS), dtype=torch.float64, device=device)
    for _ in range(ROUNDS):
        launch(
            _l1_lengths_kernel,
            rows * parts,
            device,
            sums,
            x_adv,
            x,
            low,
            high,
            n,
            parts,
            LO=lo,
            HI=hi,
            KNOTS=KNOTS,
            BLOCK=block,
            num_warps=8,
        )
        launch(
            _l1_bracket_kernel,
            rows,
            device,
            low,
            high,
            length_low,
            length_high,
            sums,
            eps,
            parts,
            KNOTS=KNOTS,
            num_warps=1,
        )
    launch(
        _l1_shrink_kernel,
        rows * sizes.programs,
        device,
        out,
        x_adv,
        x,
        low,
        high,
        length_low,
        length_high,
        eps,
        n,
        LO=lo,
        HI=hi,
        BLOCK=sizes.block,
        num_warps=sizes.num_warps,
    )
