"""Steps that look back: APGD's and momentum's, in one pass over memory, and the book-keeping of the best iterate.

    apgd_step_      z = P(x_k + step sign(g));  x_{k+1} = P(x_k + a (z - x_k) + (1 - a) (x_k - x_{k-1}))
                    (Croce & Hein 2020, arXiv 2003.01690), P the projection on ball and box, in AutoAttack's order
    momentum_step_  "mi":    v = mu v + g / ||g||_1       (MI-FGSM, Dong et al. 2018, arXiv 1710.06081)
                    "sign":  v = sign(mu v + sign(g))     (the momentum PGD that RobustVLM trains with)
                    then the Linf step along sign(v)
    keep_best_      rows of one tensor replaced by rows of another where a flag is set

Eager APGD moves its iterates through memory 51 times a step and keeps the best of them in 14 passes and two questions
to the device; here a step is five passes, and a row that is not kept is not read.
"""

import torch
from torch import Tensor

from rvlm.ops._dispatch import Op
from rvlm.ops.steps import as_layout, check_apart, check_flags, check_step, per_row, rows_dense

__all__ = ["apgd_step_", "keep_best_", "momentum_step_"]

MOMENTA = ("mi", "sign")


def _apgd_step_(x_prev, x_adv, grad, x, step, eps, a, lo, hi, active):
    step, eps = per_row(step, x), per_row(eps, x)

    def project(u):
        return torch.clamp(torch.clamp(u, x - eps, x + eps), lo, hi)

    z = project(x_adv + step * grad.to(x.dtype).nan_to_num(0.0).sign())
    y = project(x_adv + (z - x_adv) * a + (x_adv - x_prev) * (1 - a))
    x_prev.copy_(y if active is None else torch.where(per_row(active, x), y, x_adv))


def _momentum_step_(x_adv, velocity, grad, x, alpha, eps, mu, kind, lo, hi, active):
    grad = grad.to(x.dtype).nan_to_num(0.0, posinf=torch.inf, neginf=-torch.inf)
    if MOMENTA[kind] == "mi":
        length = grad.abs().flatten(1).sum(1, dtype=torch.float64)
        share = torch.where((length > 0) & length.isfinite(), 1 / length, 0.0).to(x.dtype)
        scaled = torch.where(per_row(share, x) == 0, 0.0, per_row(share, x) * grad)
        v = mu * velocity + scaled
    else:
        v = (mu * velocity + grad.sign()).sign()
    alpha, eps = per_row(alpha, x), per_row(eps, x)
    y = torch.clamp(x + torch.clamp(x_adv + alpha * v.sign() - x, -eps, eps), lo, hi)
    if active is not None:
        v, y = torch.where(per_row(active, x), v, velocity), torch.where(per_row(active, x), y, x_adv)
    velocity.copy_(v)
    x_adv.copy_(y)


def _keep_best_(best, src, flag):
    best.copy_(torch.where(per_row(flag, best), src, best))


_apgd_op = Op(
    "apgd_step_",
    "(Tensor(a!) x_prev, Tensor x_adv, Tensor grad, Tensor x, Tensor step, Tensor eps, float a, float lo, float hi, "
    "Tensor? active) -> ()",
    fake=lambda *args: None,
    reference=_apgd_step_,
    triton="rvlm.ops._triton:apgd_step_",
)
_momentum_op = Op(
    "momentum_step_",
    "(Tensor(a!) x_adv, Tensor(b!) velocity, Tensor grad, Tensor x, Tensor alpha, Tensor eps, float mu, int kind, "
    "float lo, float hi, Tensor? active) -> ()",
    fake=lambda *args: None,
    reference=_momentum_step_,
    triton="rvlm.ops._triton:momentum_step_",
)
_keep_op = Op(
    "keep_best_",
    "(Tensor(a!) best, Tensor src, Tensor flag) -> ()",
    fake=lambda *args: None,
    reference=_keep_best_,
    triton="rvlm.ops._triton:keep_best_",
)


def apgd_step_(
    x_prev: Tensor,
    x_adv: Tensor,
    grad: Tensor,
    x: Tensor,
    step: float | Tensor,
    eps: float | Tensor,
    a: float = 0.75,
    lo: float = 0.0,
    hi: float = 1.0,
    active: Tensor | None = None,
) -> Tensor:
    """One APGD step in the Linf ball; the new iterate is written over the one before the last.

    Args:
        x_prev: iterate x_{k-1} [B, ...], float32 or float64; overwritten with x_{k+1}. Swap the two names afterwards.
        x_adv: iterate x_k, where the gradient was taken.
        grad: gradient at x_adv, any floating dtype; sign(0) and sign(NaN) are 0.
        x: clean images.
        step: step size in pixel units, a float or [B] (APGD halves it per sample).
        eps: radius in pixel units, a float or [B].
        a: weight of the new direction, 1 in the first step, else 0.75; 1 - a is the momentum's.
        lo, hi: pixel range.
        active: bool [B]; of rows that are False x_prev becomes x_adv, so that they stay where they are.

    Returns:
        x_prev. Errors as `linf_step_`.
    """
    if x_prev.data_ptr() == x_adv.data_ptr() and x_adv.numel() and not torch.compiler.is_compiling():
        raise ValueError("x_prev and x_adv share memory: the step would overwrite the iterate that it starts from")
    like, grad, clean, step, eps, active = check_step(x_adv, grad, x, step, eps, lo, hi, active)
    if x_prev.shape != x_adv.shape or x_prev.dtype != x_adv.dtype or x_prev.device != x_adv.device:
        raise ValueError(f"x_prev must be like x_adv, {list(x_adv.shape)} {x_adv.dtype}, got {list(x_prev.shape)}")
    check_apart(x_prev, x, "x_prev")
    out = as_layout(x_prev, like)
    _apgd_op(out, like, grad, clean, step, eps, float(a), float(lo), float(hi), active)
    return x_prev if out is x_prev else x_prev.copy_(out)


def momentum_step_(
    x_adv: Tensor,
    velocity: Tensor,
    grad: Tensor,
    x: Tensor,
    alpha: float | Tensor,
    eps: float | Tensor,
    mu: float = 1.0,
    kind: str = "mi",
    lo: float = 0.0,
    hi: float = 1.0,
    active: Tensor | None = None,
) -> Tensor:
    """One Linf step along an accumulated gradient; x_adv and velocity are both updated in place.

    Args:
        x_adv: iterate [B, ...], float32 or float64.
        velocity: accumulated gradient, like x_adv; zeros at first.
        grad: gradient, any floating dtype; NaN counts as 0. "mi": a row whose L1 norm is 0 or infinite adds nothing.
        x: clean images.
        alpha, eps: step size and radius in pixel units, floats or [B].
        mu: decay of the velocity (MI-FGSM 1.0, RobustVLM 0.9).
        kind: "mi" or "sign". Of "sign" only pixels with a zero gradient ever feel the past: elsewhere |sign(g)| = 1
            outweighs mu < 1.
        lo, hi: pixel range.
        active: bool [B]; rows that are False keep iterate and velocity.

    Returns:
        x_adv. Errors as `linf_step_`.
    """
    if kind not in MOMENTA:
        raise ValueError(f"kind must be one of {', '.join(map(repr, MOMENTA))}, got {kind!r}")
    like, grad, clean, alpha, eps, active = check_step(x_adv, grad, x, alpha, eps, lo, hi, active)
    if velocity.shape != x_adv.shape or velocity.dtype != x_adv.dtype or velocity.device != x_adv.device:
        raise ValueError(f"velocity must be like x_adv, {list(x_adv.shape)} {x_adv.dtype}, got {list(velocity.shape)}")
    check_apart(velocity, x, "velocity")
    if velocity.data_ptr() == x_adv.data_ptr() and x_adv.numel() and not torch.compiler.is_compiling():
        raise ValueError("velocity and x_adv share memory, and both are updated: pass velocity = torch.zeros_like(x)")
    v = as_layout(velocity, like)
    _momentum_op(like, v, grad, clean, alpha, eps, float(mu), MOMENTA.index(kind), float(lo), float(hi), active)
    if v is not velocity:
        velocity.copy_(v)
    return x_adv if like is x_adv else x_adv.copy_(like)


def keep_best_(best: Tensor, src: Tensor, flag: Tensor) -> Tensor:
    """Copies the rows of src whose flag is set over those of best. On a GPU nobody waits, and other rows are not read.

    Args:
        best: [B, ...], any dtype; overwritten.
        src: like best.
        flag: bool [B].

    Returns:
        best.
    """
    if src.shape != best.shape or src.dtype != best.dtype or src.device != best.device or best.dim() < 1:
        raise ValueError(
            f"src must be like best, {list(best.shape)} {best.dtype} on {best.device}, "
            f"got {list(src.shape)} {src.dtype} on {src.device}"
        )
    flag = check_flags(flag, best, "flag")
    out = rows_dense(best)
    _keep_op(out, as_layout(src.detach(), out), flag)
    return best if out is best else best.copy_(out)
