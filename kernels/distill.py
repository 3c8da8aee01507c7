"""Divergences between distributions over C classes, of T teachers and their students, one program per sample.

l = z / tau - log sum exp(z / tau) for student (l, q = exp(l)) and teachers (lp, p = exp(lp));  with m = (p + q) / 2

forward  KL = sum p (lp - l)        d_student = q P - p                     d_teacher = p (lp - l + 1 - KL - P)
reverse  KL = sum q (l - lp)        d_student = q (l - lp + 1 - KL - Q)     d_teacher = p Q - q
js       half of KL(p || m) and KL(q || m), each gradient half of q (l - lm - KL(q || m))

times weight / tau. P and Q sum over the classes where the second distribution is not masked (-inf); the others are left
out of the sum. The specification is the eager reference in rvlm/ops/distill.py.

What is fused: everything. A program walks three times along a tile of all T teachers and their students, [T, BLOCK]:
for the normalisers, for the divergences, for the gradients. The second and third walk find the row in the cache.
"""

import torch
import triton
import triton.language as tl

from rvlm.kernels._launch import launch, tile_sizes

FORWARD, REVERSE, JS = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def _tile(row_ptr, first, real, tau, classes, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    # Logits over tau [T, BLOCK]; -inf behind the last class, 0 in rows that pad T to a power of two.
    column = first + tl.arange(0, BLOCK)
    mask = real[:, None] & (column < classes)[None, :]
    z = tl.load(row_ptr[:, None] + column[None, :], mask=mask, other=-float("inf")).to(DTYPE) / tau[:, None]
    return tl.where(real[:, None], z, 0.0)


@triton.jit
def _log_norm(row_ptr, real, tau, classes, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    # log sum exp along each row in two parts, since their sum would round what is subtracted from a logit: the largest
    # logit (0 where all are masked) and the log of the sum without it (-inf where all are masked).
    high = tl.full(real.shape, -float("inf"), DTYPE)
    total = tl.zeros(real.shape, DTYPE)
    first = 0
    while first < classes:
        z = _tile(row_ptr, first, real, tau, classes, DTYPE, BLOCK)
        higher = tl.maximum(high, tl.max(z, axis=1))
        shift = tl.where(higher == -float("inf"), 0.0, higher)
        total = total * tl.exp(high - shift) + tl.sum(tl.exp(z - shift[:, None]), axis=1)
        high = higher
        first += BLOCK
    return tl.where(high == -float("inf"), 0.0, high), tl.log(total)


@triton.jit
def _log_softmax(row_ptr, first, high, norm, real, tau, classes, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    return _tile(row_ptr, first, real, tau, classes, DTYPE, BLOCK) - high[:, None] - norm[:, None]


@triton.jit
def _gap(first, log_first, log_second):
    # log(first / second), 0 where first is 0 or only second is.
    return tl.where((log_second != -float("inf")) & (first > 0), log_first - log_second, 0.0)


@triton.jit
def _log_mean(p, q):
    mean = 0.5 * (p + q)
    return tl.log(tl.where(mean > 0, mean, 1.0))


@triton.jit
def _multi_teacher_kl_kernel(
    loss_ptr,  # [B]
    kl_ptr,  # [T, B]
    d_student_ptr,  # [S, B, C] or None
    d_teachers_ptr,  # [T, B, C] or None
    student_ptr,  # [S, B, C], any floating dtype, as are the teachers
    teachers_ptr,  # [T, B, C]
    weights_ptr,  # [T, B]
    temperature_ptr,  # [T]
    rows,
    classes,
    STUDENT_OF: tl.constexpr,  # four bits per teacher
    KIND: tl.constexpr,
    S: tl.constexpr,
    T: tl.constexpr,
    T_PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    DTYPE: tl.constexpr = loss_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    t = tl.arange(0, T_PADDED).to(tl.int64)
    real = t < T
    of = (tl.full([T_PADDED], STUDENT_OF, tl.int64) >> (4 * t)) & 15
    tau = tl.load(temperature_ptr + t, mask=real, other=1.0)
    weight = tl.load(weights_ptr + t * rows + row, mask=real, other=0.0)
    student_row = student_ptr + (of * rows + row) * classes
    teacher_row = teachers_ptr + (t * rows + row) * classes
    high_q, norm_q = _log_norm(student_row, real, tau, classes, DTYPE, BLOCK)
    high_p, norm_p = _log_norm(teacher_row, real, tau, classes, DTYPE, BLOCK)

    of_p = tl.zeros([T_PADDED], DTYPE)  # KL whose first distribution is p
    of_q = tl.zeros([T_PADDED], DTYPE)
    total = tl.zeros([T_PADDED], DTYPE)  # P or Q
    first = 0
    while first < classes:
        log_q = _log_softmax(student_row, first, high_q, norm_q, real, tau, classes, DTYPE, BLOCK)
        log_p = _log_softmax(teacher_row, first, high_p, norm_p, real, tau, classes, DTYPE, BLOCK)
        p, q = tl.exp(log_p), tl.exp(log_q)
        if KIND == FORWARD:
            of_p += tl.sum(p * _gap(p, log_p, log_q), axis=1)
            total += tl.sum(tl.where(log_q != -float("inf"), p, 0.0), axis=1)
        elif KIND == REVERSE:
            of_q += tl.sum(q * _gap(q, log_q, log_p), axis=1)
            total += tl.sum(tl.where(log_p != -float("inf"), q, 0.0), axis=1)
        else:
            log_mean = _log_mean(p, q)
            of_p += tl.sum(p * _gap(p, log_p, log_mean), axis=1)
            of_q += tl.sum(q * _gap(q, log_q, log_mean), axis=1)
        first += BLOCK
    kl = 0.5 * (of_p + of_q) if KIND == JS else of_p + of_q
    tl.store(kl_ptr + t * rows + row, kl, mask=real)
    tl.store(loss_ptr + row, tl.sum(tl.where(real, weight * kl, 0.0), axis=0))

    if d_student_ptr is not None or d_teachers_ptr is not None:
        scale = (weight / tau)[:, None]
        first = 0
        while first < classes:
            log_q = _log_softmax(student_row, first, high_q, norm_q, real, tau, classes, DTYPE, BLOCK)
            log_p = _log_softmax(teacher_row, first, high_p, norm_p, real, tau, classes, DTYPE, BLOCK)
            p, q = tl.exp(log_p), tl.exp(log_q)
            if KIND == FORWARD:
                counts = tl.where(log_q != -float("inf"), 1.0, 0.0)
                grad_q = q * total[:, None] - p * counts
                grad_p = p * (_gap(p, log_p, log_q) + (counts - total[:, None]) - of_p[:, None])
            elif KIND == REVERSE:
                counts = tl.where(log_p != -float("inf"), 1.0, 0.0)
                grad_q = q * (_gap(q, log_q, log_p) + (counts - total[:, None]) - of_q[:, None])
                grad_p = p * total[:, None] - q * counts
            else:
                log_mean = _log_mean(p, q)
                grad_q = 0.5 * q * (_gap(q, log_q, log_mean) - of_q[:, None])
                grad_p = 0.5 * p * (_gap(p, log_p, log_mean) - of_p[:, None])
            column = first + tl.arange(0, BLOCK)
            inside = column < classes
            if d_student_ptr is not None:
                for s in tl.static_range(S):
                    mine = (real & (of == s))[:, None]
                    grad = tl.sum(tl.where(mine, scale * grad_q, 0.0), axis=0)
                    to = d_student_ptr + (s * rows + row) * classes + column
                    tl.store(to, grad.to(d_student_ptr.dtype.element_ty), mask=inside)
            if d_teachers_ptr is not None:
                to = d_teachers_ptr + ((t * rows + row) * classes)[:, None] + column[None, :]
                grad = (scale * grad_p).to(d_teachers_ptr.dtype.element_ty)
                tl.store(to, grad, mask=real[:, None] & inside[None, :])
            first += BLOCK


@triton.jit
def _fold_teachers_kernel(
    out_ptr,  # [B, C]
    teachers_ptr,  # [T, B, C], any floating dtype
    weights_ptr,  # [T, B]
    temperature_ptr,  # [T]
    rows,
    classes,
    T: tl.constexpr,
    T_PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    DTYPE: tl.constexpr = out_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    t = tl.arange(0, T_PADDED).to(tl.int64)
    real = t < T
    tau = tl.load(temperature_ptr + t, mask=real, other=1.0)
    weight = tl.load(weights_ptr + t * rows + row, mask=real, other=0.0)
    teacher_row = teachers_ptr + (t * rows + row) * classes
    high, norm = _log_norm(teacher_row, real, tau, classes, DTYPE, BLOCK)
    first = 0
    while first < classes:
        p = tl.exp(_log_softmax(teacher_row, first, high, norm, real, tau, classes, DTYPE, BLOCK))
        column = first + tl.arange(0, BLOCK)
        mean = tl.sum(tl.where(real[:, None], weight[:, None] * p, 0.0), axis=0)
        tl.store(out_ptr + row * classes + column, mean, mask=column < classes)
        first += BLOCK


def multi_teacher_kl(
    loss: torch.Tensor,
    kl: torch.Tensor,
    d_student: torch.Tensor | None,
    d_teachers: torch.Tensor | None,
    student: torch.Tensor,
    teachers: torch.Tensor,
    weights: torch.Tensor,
    temperature: torch.Tensor,
    student_of: int,
    kind: int,
) -> None:
    """Writes the divergences of every sample, and the gradients of the weighted sum where there is room for them.

    Args:
        loss, kl: results [B] and [T, B], fp32 or fp64, the type that is computed in.
        d_student, d_teachers: results like student and teachers, or None.
        student, teachers: logits [B, C] or [S, B, C], and [T, B, C], contiguous, any floating dtype.
        weights, temperature: [T, B] and [T], contiguous, dtype of `loss`.
        student_of: number of each teacher's student, four bits each, the first teacher lowest.
        kind: 0 forward, 1 reverse, 2 js.
    """
    count, rows, classes = teachers.shape
    sizes = tile_sizes(count, classes)
    if rows:
        launch(
            _multi_teacher_kl_kernel,
            rows,
            student.device,
            loss,
            kl,
            d_student,
            d_teachers,
            student,
            teachers,
            weights,
            temperature,
            rows,
            classes,
            STUDENT_OF=student_of,
            KIND=kind,
            S=student.numel() // (rows * classes),
            T=count,
            T_PADDED=triton.next_power_of_2(count),
            BLOCK=sizes.block,
            num_warps=sizes.num_warps,
        )


def fold_teachers(out: torch.Tensor, teachers: torch.Tensor, weights: torch.Tensor, temperature: torch.Tensor) -> None:
    """Writes sum_t weights_t softmax(teachers_t / tau_t) of every sample to `out` [B, C]. Arguments as above."""
    count, rows, classes = teachers.shape
    sizes = tile_sizes(count, classes)
    if rows:
        launch(
            _fold_teachers_kernel,
            rows,
            teachers.device,
            out,
            teachers,
            weights,
            temperature,
            rows,
            classes,
            T=count,
            T_PADDED=triton.next_power_of_2(count),
            BLOCK=sizes.block,
            num_warps=sizes.num_warps,
        )
