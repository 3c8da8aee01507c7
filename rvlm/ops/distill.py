"""Divergences between a student's and several teachers' class distributions: values and gradients in one pass.

With q = softmax(student / tau), p_t = softmax(teacher_t / tau_t) and l, lp_t their logarithms, per row:

    forward  KL(p || q) = sum p (lp - l)          d/dstudent = (q P - p) / tau
    reverse  KL(q || p) = sum q (l - lp)          d/dstudent = q (l - lp + 1 - KL - Q) / tau
    js       KL(p || m) / 2 + KL(q || m) / 2      d/dstudent = q (l - lm - sum q (l - lm)) / (2 tau),   m = (p + q) / 2

P and Q are the sums of p and q over the classes that count, 1 unless a class is masked. The teacher's gradients are the
same with the roles exchanged. A logit of -inf is a masked class: its probability is 0 and 0 log 0 = 0. Where only the
second distribution of a KL is 0 the divergence would be infinite; such a class is left out of the sum, so that a mask
on one side costs neither NaN nor the batch. A row without a finite logit is NaN.

There is no factor tau^2 (Hinton et al. 2015, arXiv 1503.02531, section 2.1): it belongs to the weight.

Eager PyTorch takes some forty kernels for three teachers; these are one pass over the logits.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from rvlm.ops._dispatch import Op, known_signature, once_differentiable, reference_forced

__all__ = ["fold_teachers", "multi_teacher_kl"]

KINDS = ("forward", "reverse", "js")
MAX_TEACHERS, MAX_STUDENTS = 15, 16  # the map of teachers to students travels as one number, four bits a teacher


def _kl(first, log_first, log_second):
    """KL per row, the classes that count, and the sum of `first` over them."""
    counts = log_second != -torch.inf
    gap = torch.where(counts & (first > 0), log_first - log_second, 0.0)
    return (first * gap).sum(-1), gap, counts


def _divergence(log_p, log_q, kind):
    """Divergences [...] and their gradients with respect to the logits behind log_p and log_q, [..., C]."""
    p, q = log_p.exp(), log_q.exp()
    if kind == "js":
        m = 0.5 * (p + q)
        log_m = torch.where(m > 0, m, 1.0).log()
        (of_p, gap_p, _), (of_q, gap_q, _) = _kl(p, log_p, log_m), _kl(q, log_q, log_m)
        grad_p, grad_q = 0.5 * p * (gap_p - of_p[..., None]), 0.5 * q * (gap_q - of_q[..., None])
        return 0.5 * (of_p + of_q), grad_p, grad_q
    first, log_first, second, log_second = (p, log_p, q, log_q) if kind == "forward" else (q, log_q, p, log_p)
    value, gap, counts = _kl(first, log_first, log_second)
    total = (first * counts).sum(-1, keepdim=True)
    grad_first = first * (gap + (counts.to(first.dtype) - total) - value[..., None])
    grad_second = second * total - first * counts
    return (value, grad_first, grad_second) if kind == "forward" else (value, grad_second, grad_first)


def _log_softmax(logits, temperature):
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return torch.log_softmax(logits / temperature, -1)


def _reference(student, teachers, weights, temperature, student_of, kind, student_grad, teacher_grad):
    tau = temperature.view(-1, 1, 1)
    of = [student_of >> 4 * t & 15 for t in range(len(teachers))]
    students = student if student.dim() == 3 else student[None]
    log_q, log_p = _log_softmax(students[of], tau), _log_softmax(teachers, tau)
    kl, grad_p, grad_q = _divergence(log_p, log_q, KINDS[kind])
    scale = (weights / temperature[:, None])[..., None]
    d_student, d_teachers = student.new_empty(0), teachers.new_empty(0)
    if student_grad:
        d_student = torch.zeros(students.shape, dtype=kl.dtype, device=kl.device)
        d_student.index_add_(0, torch.tensor(of, device=kl.device), scale * grad_q)
        d_student = d_student.to(student.dtype).view(student.shape)
    if teacher_grad:
        d_teachers = (scale * grad_p).to(teachers.dtype)
    return (weights * kl).sum(0), kl, d_student, d_teachers


def _fake(student, teachers, weights, temperature, student_of, kind, student_grad, teacher_grad):
    dtype = torch.float64 if student.dtype == torch.float64 else torch.float32
    rows = teachers.shape[:2]
    return (
        student.new_empty(rows[1], dtype=dtype),
        student.new_empty(rows, dtype=dtype),
        student.new_empty(student.shape if student_grad else 0),
        teachers.new_empty(teachers.shape if teacher_grad else 0),
    )


def _fold_reference(teachers, weights, temperature):
    return (weights[..., None] * _log_softmax(teachers, temperature.view(-1, 1, 1)).exp()).sum(0)


_kl_op = Op(
    "multi_teacher_kl",
    "(Tensor student, Tensor teachers, Tensor weights, Tensor temperature, int student_of, int kind, "
    "bool student_grad, bool teacher_grad) -> (Tensor, Tensor, Tensor, Tensor)",
    fake=_fake,
    reference=_reference,
    triton="rvlm.ops._triton:multi_teacher_kl",
)
_fold_op = Op(
    "fold_teachers",
    "(Tensor teachers, Tensor weights, Tensor temperature) -> Tensor",
    fake=lambda teachers, weights, temperature: torch.empty_like(teachers[0], dtype=weights.dtype),
    reference=_fold_reference,
    triton="rvlm.ops._triton:fold_teachers",
)


class _MultiTeacherKL(torch.autograd.Function):
    """The forward pass has computed the gradients already; backward scales their rows."""

    @staticmethod
    @known_signature
    def forward(*args):
        return _kl_op(*args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*output[2:], *inputs[:2])
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)

    @staticmethod
    @once_differentiable("multi_teacher_kl")
    def backward(ctx, of_loss, *_):
        if of_loss is None:
            return (None,) * 8
        grads = [
            grad * of_loss.unsqueeze(1).to(grad.dtype) if needed else None
            for grad, needed in zip(ctx.saved_tensors, ctx.needs_input_grad, strict=False)
        ]
        return *grads, *[None] * 6


def multi_teacher_kl(
    student: Tensor,
    teachers: Tensor,
    weights: Tensor | Sequence[float],
    temperature: float | Tensor = 1.0,
    kind: str = "forward",
    teacher_grad: bool = False,
    student_of: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor]:
    """Weighted sum of divergences between a student and T teachers.

    Args:
        student: logits [B, C], any floating dtype; or [S, B, C], several students, with `student_of`.
        teachers: logits [T, B, C], T at most 15.
        weights: [T] or, per sample, [T, B]; constants, not differentiated. A factor tau^2 or 1/B goes here.
        temperature: tau, a float or a tensor [T], above 0; divides the student's logits and the teacher's.
        kind: "forward" KL(teacher || student), "reverse" KL(student || teacher), or "js", the Jensen-Shannon divergence
            with equal weights. See the module for masked classes (-inf).
        teacher_grad: let gradients flow to the teachers too (PMG-AFT's clean term); else they are constants.
        student_of: for each teacher, the number of its student, one of the first 16 (MMT-ARD: the student on
            adversarial images learns from the robust teacher, the student on clean images from the clean one).

    Returns:
        loss [B] = sum_t weights_t kl_t, differentiable once, and kl [T, B], unweighted and detached. float64 logits are
        computed in float64, all others in float32.

    Raises:
        TypeError: logits that are not floating point. ValueError: shapes, kinds or values that do not fit.
        RuntimeError: a second derivative, which needs use_backend("reference").
    """
    student, teachers, weights, temperature = _logit_args(student, teachers, weights, temperature)
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(map(repr, KINDS))}, got {kind!r}")
    if student.dim() not in (2, 3) or student.shape[-2:] != teachers.shape[1:]:
        raise ValueError(
            f"student must be [B, C] or [S, B, C] with the teachers' B and C, got {list(student.shape)} "
            f"for teachers {list(teachers.shape)}"
        )
    students, packed = len(student) if student.dim() == 3 else 1, 0
    if student_of is not None:
        named = min(students, MAX_STUDENTS)
        if len(student_of) != len(teachers) or not all(0 <= s < named for s in student_of):
            raise ValueError(
                f"student_of must name one of {named} student(s) for each of {len(teachers)} teachers, "
                f"got {list(student_of)}"
            )
        packed = sum(s << 4 * t for t, s in enumerate(student_of))
    elif students != 1:
        raise ValueError(f"{students} students need student_of, the number of each teacher's student")
    if teachers.requires_grad and not teacher_grad:
        teachers = teachers.detach()
    args = (student, teachers, weights, temperature, packed, KINDS.index(kind))
    if reference_forced():  # plain PyTorch, differentiable as often as one likes
        loss, kl, *_ = _reference(*args, False, False)
        return loss, kl.detach()
    wanted = [torch.is_grad_enabled() and t.requires_grad for t in (student, teachers)]
    return _MultiTeacherKL.apply(*args, *wanted)[:2]


def fold_teachers(teachers: Tensor, weights: Tensor | Sequence[float], temperature: float | Tensor = 1.0) -> Tensor:
    """Weighted mean of the teachers' distributions, sum_t w_t softmax(teacher_t / tau_t), computed once per batch.

    With one temperature for all, the forward KL to T frozen teachers and the soft cross-entropy to this mean have the
    same gradient, (W q - p_bar) / tau with W = sum_t w_t: so an attack that runs many steps against fixed teachers pays
    for them once. Pass the result to `attack_loss(logits / tau, p_bar, kind="soft-ce")`.

    Args:
        teachers, weights, temperature: as in `multi_teacher_kl`.

    Returns:
        p_bar [B, C], float32, or float64 for float64 logits; not differentiable.
    """
    _, teachers, weights, temperature = _logit_args(None, teachers, weights, temperature)
    return _fold_op(teachers.detach(), weights, temperature)


def _logit_args(student, teachers, weights, temperature):
    """Checked arguments: logits contiguous, on the CPU in float32 or float64; weights [T, B]; temperature [T]."""
    if not isinstance(teachers, Tensor) or teachers.dim() != 3:
        got = list(teachers.shape) if isinstance(teachers, Tensor) else type(teachers).__name__
        raise ValueError(f"teachers must be logits [T, B, C], got {got}: stack them with torch.stack")
    count, rows, classes = teachers.shape
    if not 1 <= count <= MAX_TEACHERS or not classes:
        raise ValueError(f"teachers must be 1 to {MAX_TEACHERS} and have classes, got {list(teachers.shape)}")
    device, logits = (
        teachers.device,
        {"teachers": teachers} if student is None else {"student": student, "teachers": teachers},
    )
    for name, t in logits.items():
        if not isinstance(t, Tensor) or not t.is_floating_point():
            raise TypeError(f"{name} must be floating-point logits, got {getattr(t, 'dtype', type(t).__name__)}")
        if t.device != device:
            raise ValueError(f"student and teachers must be on one device, got {t.device} and {device}")
    logits = [t.contiguous() for t in logits.values()]
    double = any(t.dtype == torch.float64 for t in logits)
    compute = torch.float64 if double else torch.float32
    if double or device.type == "cpu":  # on a GPU the kernels read 16-bit logits as they are
        logits = [t if t.dtype == compute else t.to(compute) for t in logits]
    weights = weights if isinstance(weights, Tensor) else torch.tensor(list(weights))
    if weights.requires_grad and torch.is_grad_enabled():
        raise ValueError("weights are constants of the loss: detach them, or weigh the returned values yourself")
    if weights.shape not in ((count,), (count, rows)):
        raise ValueError(f"weights must be [{count}] or [{count}, {rows}], got {list(weights.shape)}")
    weights = weights.to(device, compute)
    weights = (weights if weights.dim() == 2 else weights.unsqueeze(1).expand(count, rows)).contiguous()
    if not isinstance(temperature, Tensor):
        if not temperature > 0:
            raise ValueError(f"temperature must be above 0, got {temperature}")
        temperature = torch.full((count,), float(temperature), dtype=compute, device=device)
    elif temperature.numel() not in (1, count) or temperature.dim() > 1:
        raise ValueError(f"temperature must be a float or [{count}], got {list(temperature.shape)}")
    else:
        temperature = temperature.detach().to(device, compute).reshape(-1).expand(count).contiguous()
    return (None, *logits, weights, temperature)[-4:]
