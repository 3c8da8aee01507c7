"""Losses that attacks raise, on rows of C logits z: loss, verdict and gradient, one program per sample.

ce            softplus(m), m = logsumexp_{c != y} z_c - z_y;  d_c = softmax_{c != y}(z)_c sigmoid(m),  d_y = -sigmoid(m)
cw            max_{c != y} z_c - z_y;                         d = +1 there, -1 at y
dlr           N / D, N = max_{c != y} z_c - z_y,              d = 1/D and -1/D at the two of N,
              D = z_(1) - z_(3) + 1e-12                           -N/D^2 at (1), N/D^2 at (3)
dlr-targeted  N / D, N = z_t - z_y,                           the same, with half of N/D^2 each at (3) and (4)
              D = z_(1) - (z_(3) + z_(4)) / 2 + 1e-12
soft-ce       sum_c y_c (logsumexp z - z_c);                  d = softmax(z) sum_c y_c - y

The specification is the eager reference in rvlm/ops/losses.py. What is fused: everything. The k-th largest logit is
found by walking along the row k times, past the ones found before, instead of sorting; after the first walk the row is
in the cache.
"""

import torch
import triton
import triton.language as tl

from rvlm.kernels._launch import launch, tile_sizes

CE, CW, DLR, DLR_TARGETED, SOFT_CE = (tl.constexpr(k) for k in range(5))
NOBODY = tl.constexpr(-1)


@triton.jit
def _row(ptr, first, classes, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    # One block of a row, -inf behind its end.
    column = first + tl.arange(0, BLOCK)
    return tl.load(ptr + column, mask=column < classes, other=-float("inf")).to(DTYPE), column


@triton.jit
def _best(ptr, classes, skip0, skip1, skip2, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    # Largest logit beside up to three skipped columns, and the first column that has it.
    best = tl.full([], -float("inf"), DTYPE)
    at = tl.full([], 2147483647, tl.int32)
    first = 0
    while first < classes:
        z, column = _row(ptr, first, classes, DTYPE, BLOCK)
        allowed = (column < classes) & (column != skip0) & (column != skip1) & (column != skip2)
        here = tl.max(tl.where(allowed, z, -float("inf")), axis=0)
        where = tl.min(tl.where(allowed & (z == here), column, 2147483647), axis=0)
        better = (here > best) | (at == 2147483647)
        at = tl.where(better, where, at)
        best = tl.where(better, here, best)
        first += BLOCK
    return best, at


@triton.jit
def _log_norm(ptr, classes, skip, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    # logsumexp of a row beside one column in two parts, since their sum would round what is subtracted from a logit.
    high = tl.full([], -float("inf"), DTYPE)
    total = tl.zeros([], DTYPE)
    first = 0
    while first < classes:
        z, column = _row(ptr, first, classes, DTYPE, BLOCK)
        z = tl.where(column == skip, -float("inf"), z)
        higher = tl.maximum(high, tl.max(z, axis=0))
        shift = tl.where(higher == -float("inf"), 0.0, higher)
        total = total * tl.exp(high - shift) + tl.sum(tl.exp(z - shift), axis=0)
        high = higher
        first += BLOCK
    return tl.where(high == -float("inf"), 0.0, high), tl.log(total)


@triton.jit
def _any_nan(ptr, classes, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    count = tl.zeros([], tl.int32)
    first = 0
    while first < classes:
        z, _ = _row(ptr, first, classes, DTYPE, BLOCK)
        count += tl.sum((z != z).to(tl.int32), axis=0)
        first += BLOCK
    return count > 0


@triton.jit
def _attack_loss_kernel(
    loss_ptr,  # [B]
    correct_ptr,  # [B] bool
    grad_ptr,  # [B, C]
    logits_ptr,  # [B, C], any floating dtype
    y_ptr,  # [B] int64; for soft-ce [B, C]
    target_ptr,  # [B] int64 or None
    classes,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    DTYPE: tl.constexpr = loss_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    z_ptr = logits_ptr + row * classes
    top, at_top = _best(z_ptr, classes, NOBODY, NOBODY, NOBODY, DTYPE, BLOCK)
    broken = _any_nan(z_ptr, classes, DTYPE, BLOCK)
    nan = tl.where(broken, float("nan"), 0.0).to(DTYPE)

    # What the gradient is made of: slope * softmax beside `skip`, minus weights, plus up to five single columns.
    high = tl.zeros([], DTYPE)
    norm = tl.zeros([], DTYPE)
    slope = tl.zeros([], DTYPE)
    one = tl.zeros([], DTYPE)
    bent = tl.zeros([], DTYPE)
    at_other, at_third, at_fourth = at_top, at_top, at_top
    if KIND == SOFT_CE:
        label_row = y_ptr + row * classes
        _, label = _best(label_row, classes, NOBODY, NOBODY, NOBODY, DTYPE, BLOCK)
        high, norm = _log_norm(z_ptr, classes, NOBODY, DTYPE, BLOCK)
        loss = tl.zeros([], DTYPE)
        first = 0
        while first < classes:
            z, column = _row(z_ptr, first, classes, DTYPE, BLOCK)
            weight = tl.load(label_row + column, mask=column < classes, other=0.0).to(DTYPE)
            loss += tl.sum(tl.where(weight > 0, weight * (norm - (z - high)), 0.0), axis=0)
            slope += tl.sum(weight, axis=0)
            first += BLOCK
    else:
        label = tl.load(y_ptr + row).to(tl.int32)
        own = tl.load(z_ptr + label).to(DTYPE)
        if KIND == CE:
            high, norm = _log_norm(z_ptr, classes, label, DTYPE, BLOCK)
            m = (high - own) + norm
            small = tl.exp(-tl.abs(m))
            # log1p by its series where 1 + small rounds.
            loss = tl.maximum(m, 0.0) + tl.where(small < 1e-4, small - 0.5 * small * small, tl.log(1.0 + small))
            slope = tl.where(m > 0, 1.0, small) / (1.0 + small)
            one = -slope
        else:
            if KIND == DLR_TARGETED:
                at_other = tl.load(target_ptr + row).to(tl.int32)
                other = tl.load(z_ptr + at_other).to(DTYPE)
            else:
                other, at_other = _best(z_ptr, classes, label, NOBODY, NOBODY, DTYPE, BLOCK)
            loss = other - own
            one = tl.full([], 1.0, DTYPE)
            if KIND != CW:
                _, at_second = _best(z_ptr, classes, at_top, NOBODY, NOBODY, DTYPE, BLOCK)
                low, at_third = _best(z_ptr, classes, at_top, at_second, NOBODY, DTYPE, BLOCK)
                if KIND == DLR_TARGETED:
                    fourth, at_fourth = _best(z_ptr, classes, at_top, at_second, at_third, DTYPE, BLOCK)
                    low = 0.5 * (low + fourth)
                scale = top - low + 1e-12
                loss = loss / scale
                one = 1.0 / scale
                bent = loss / scale
    tl.store(loss_ptr + row, loss + nan)
    tl.store(correct_ptr + row, (at_top == label) & (broken == 0))

    first = 0
    while first < classes:
        z, column = _row(z_ptr, first, classes, DTYPE, BLOCK)
        if KIND == SOFT_CE:
            weight = tl.load(y_ptr + row * classes + column, mask=column < classes, other=0.0).to(DTYPE)
            grad = slope * tl.exp(z - high - norm) - weight
        elif KIND == CE:
            grad = tl.where((column == label) | (z == -float("inf")), 0.0, slope * tl.exp(z - high - norm))
            grad += tl.where(column == label, one, 0.0)
        else:
            grad = tl.where(column == at_other, one, 0.0) - tl.where(column == label, one, 0.0)
            if KIND != CW:
                grad -= tl.where(column == at_top, bent, 0.0)
                if KIND == DLR:
                    grad += tl.where(column == at_third, bent, 0.0)
                else:
                    grad += tl.where((column == at_third) | (column == at_fourth), 0.5 * bent, 0.0)
        to = grad_ptr + row * classes + column
        tl.store(to, (grad + nan).to(grad_ptr.dtype.element_ty), mask=column < classes)
        first += BLOCK


def attack_loss(
    loss: torch.Tensor,
    correct: torch.Tensor,
    grad: torch.Tensor,
    logits: torch.Tensor,
    y: torch.Tensor,
    target: torch.Tensor | None,
    kind: int,
) -> None:
    """Writes loss, verdict and gradient of every row.

    Args:
        loss: result [B], fp32 or fp64, the type that is computed in.
        correct: result, bool [B].
        grad: result [B, C], dtype of the logits.
        logits: [B, C], contiguous, any floating dtype.
        y: int64 [B]; for soft-ce [B, C] in the type of `loss`, contiguous.
        target: int64 [B] for dlr-targeted, else None.
        kind: 0 ce, 1 cw, 2 dlr, 3 dlr-targeted, 4 soft-ce.
    """
    rows, classes = logits.shape
    sizes = tile_sizes(2, classes)  # logits and their gradient are alive together
    if rows:
        launch(
            _attack_loss_kernel,
            rows,
            logits.device,
            loss,
            correct,
            grad,
            logits,
            y,
            target,
            classes,
            KIND=kind,
            BLOCK=sizes.block,
            num_warps=sizes.num_warps,
        )
