"""The ops' signatures on top of the Triton launchers: allocates outputs, nothing else."""

import torch

from rvlm.kernels import attention, distill, iterates, l1, losses, steps


def linf_step_(x_adv, *args):
    steps.linf_step(x_adv, x_adv, *args)


def linf_step(x_adv, *args):
    out = torch.empty_like(x_adv)
    steps.linf_step(out, x_adv, *args)
    return out


def l2_step_(x_adv, *args):
    steps.l2_step(x_adv, x_adv, *args)


def uniform_start(x, *args):
    out = torch.empty_like(x)
    steps.uniform_start(out, x, *args)
    return out


def multi_teacher_kl(student, teachers, weights, temperature, student_of, kind, student_grad, teacher_grad):
    loss, kl = torch.empty_like(weights[0]), torch.empty_like(weights)
    d_student = torch.empty_like(student) if student_grad else None
    d_teachers = torch.empty_like(teachers) if teacher_grad else None
    distill.multi_teacher_kl(loss, kl, d_student, d_teachers, student, teachers, weights, temperature, student_of, kind)
    return (
        loss,
        kl,
        student.new_empty(0) if d_student is None else d_student,
        teachers.new_empty(0) if d_teachers is None else d_teachers,
    )


def fold_teachers(teachers, weights, temperature):
    out = torch.empty_like(teachers[0], dtype=weights.dtype)
    distill.fold_teachers(out, teachers, weights, temperature)
    return out


def attack_loss(logits, y, target, kind):
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    loss = torch.empty(len(logits), dtype=dtype, device=logits.device)
    correct = torch.empty(len(logits), dtype=torch.bool, device=logits.device)
    grad = torch.empty_like(logits)
    losses.attack_loss(loss, correct, grad, logits, y, target, kind)
    return loss, correct, grad


apgd_step_ = iterates.apgd_step
momentum_step_ = iterates.momentum_step
keep_best_ = iterates.keep_best


def l1_project(x_adv, *args):
    out = torch.empty_like(x_adv)
    l1.l1_project(out, x_adv, *args)
    return out


def sparse_step(x_adv, *args):
    out = torch.empty_like(x_adv)
    l1.sparse_step(out, x_adv, *args)
    return out


def anchored_residual(x0, *args):
    x1, y = torch.empty_like(x0), torch.empty_like(x0)
    mean = x0.new_empty(x0.shape[:2], dtype=args[1].dtype)
    rstd = torch.empty_like(mean)
    attention.anchored_residual(x1, y, mean, rstd, x0, *args)
    return x1, y, mean, rstd


def anchored_residual_backward(of_x1, of_y, x1, o, mean, rstd, weight, anchor_grad, norm_grad):
    batch, tokens, width = x1.shape
    parts, g = attention.part_count(batch, tokens), torch.empty_like(x1)
    make = mean.new_zeros if not x1.numel() else mean.new_empty  # of an empty batch nothing is written

    def room(wanted, *shape):
        return make((parts, tokens, *shape)) if wanted else None

    total, of_o = room(anchor_grad, width), room(o is not None)
    d_weight, d_bias = room(norm_grad, width), room(norm_grad, width)
    attention.anchored_residual_backward(g, total, of_o, d_weight, d_bias, of_x1, of_y, x1, o, mean, rstd, weight)
    none = mean.new_empty(0)
    sums = (total.sum(0) if anchor_grad else none, none if o is None else of_o.sum().view(1))
    norms = (d_weight.sum((0, 1)), d_bias.sum((0, 1))) if norm_grad else (none, none)
    return g, *sums, *norms
