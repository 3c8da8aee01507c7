"""Steps of iterated attacks: move along the gradient, stay in the ball, stay in the box, in one pass over memory.

An eager Linf step is seven kernels and seventeen passes over the batch; a fused one reads three tensors and writes one.

The Linf step is x + clip(x_adv + alpha * sign(g) - x, -eps, eps), then the box: in fp32 bit for bit the arithmetic of
torchattacks, foolbox, robustness, cleverhans and ART. The L2 step is foolbox's: a unit-norm direction, projection on
the ball, then the box. Random starts come from Philox4x32-10 (Salmon et al., SC 2011) keyed by sample, so a sample's
noise does not depend on the batch it is in.
"""

import math

import torch
from torch import Tensor

from rvlm.ops._dispatch import Op

__all__ = ["l2_step_", "linf_step", "linf_step_", "uniform_start"]

_STEP = (
    "(Tensor{} x_adv, Tensor grad, Tensor x, Tensor alpha, Tensor eps, float lo, float hi, "
    "Tensor? active, float levels)"
)
_START = "(Tensor x, Tensor eps, Tensor sample_ids, int seed, float lo, float hi, int stream) -> Tensor"


def per_row(t: Tensor, x: Tensor) -> Tensor:
    return t.view(-1, *[1] * (x.dim() - 1))


def _linf_step(x_adv, grad, x, alpha, eps, lo, hi, active, levels):
    alpha, eps = per_row(alpha, x), per_row(eps, x)
    delta = torch.clamp(x_adv + alpha * grad.to(x.dtype).sign() - x, -eps, eps)
    y = torch.clamp(x + delta, lo, hi)
    if levels:
        y = _quantize_linf(y, x, eps, lo, hi, levels)
    return y if active is None else torch.where(per_row(active, x), y, x_adv)


def _linf_step_(x_adv, *args):
    x_adv.copy_(_linf_step(x_adv, *args))


def _quantize_linf(y, x, eps, lo, hi, levels):
    # A bound that misses a level by rounding alone counts as reaching it: 8/255 in fp32 holds eight levels.
    slack = levels * 1e-6
    q = torch.floor(levels * y + 0.5)
    q = torch.maximum(q, torch.ceil(levels * (x - eps) - slack))
    q = torch.minimum(q, torch.floor(levels * (x + eps) + slack))
    return torch.clamp(q, math.ceil(levels * lo), math.floor(levels * hi)) / _levels_like(q, levels)


def _levels_like(q, levels):
    # A tensor, since torch on CUDA divides by a Python number through its reciprocal, an ulp off.
    return torch.full((), levels, dtype=q.dtype, device=q.device)


def _l2_step_(x_adv, grad, x, alpha, eps, lo, hi, active, levels):
    alpha, eps = per_row(alpha, x).double(), per_row(eps, x).double()
    grad, delta = grad.to(x.dtype), x_adv - x
    norm = _row_norm(grad)
    scale = alpha / norm
    directed = (norm > 0) & norm.isfinite() & scale.to(x.dtype).isfinite()  # a row without a direction keeps its place
    scale = torch.where(directed, scale, 0.0)
    moved = delta.double() + torch.where(directed, scale * grad.double(), 0.0)
    shrink = torch.clamp(eps / _row_norm(moved), max=1.0).nan_to_num(1.0)  # 0/0: eps = 0 and nothing moved
    scale, shrink = scale.to(x.dtype), shrink.to(x.dtype)
    y = torch.clamp(x + (delta + torch.where(scale != 0, scale * grad, 0.0)) * shrink, lo, hi)
    if levels:
        y = quantize_toward(y, x, levels)
    x_adv.copy_(y if active is None else torch.where(per_row(active, x), y, x_adv))


def _row_norm(t):
    return per_row(torch.linalg.vector_norm(t.flatten(1), dim=1, dtype=torch.float64), t)


def quantize_toward(y, x, levels):
    moved = levels * (y - x)
    whole = torch.floor(moved.abs() + levels * 1e-6)
    return (torch.floor(levels * x + 0.5) + torch.where(moved < 0, -whole, whole)) / _levels_like(y, levels)


def _uniform_start(x, eps, sample_ids, seed, lo, hi, stream):
    n = x[0].numel() if len(x) else 0
    block = torch.arange((n + 3) // 4, device=x.device)
    ids = sample_ids[:, None]
    words = philox(block & _WORD, ids & _WORD, ids >> 32 & _WORD, torch.tensor(stream, device=x.device), seed)
    u = (words.flatten(1)[:, :n] >> 8).to(x.dtype) * 2.0**-24  # [0, 1), 24 bits: the same numbers in fp32 and fp64
    return torch.clamp(x + (u.view(x.shape) * 2 - 1) * per_row(eps, x), lo, hi)


_WORD = 0xFFFFFFFF


def philox(c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor, seed: int) -> Tensor:
    """Philox4x32-10 on int64 tensors that hold 32-bit words.

    Args:
        c0, c1, c2, c3: counter words in [0, 2^32), broadcast against each other.
        seed: 64-bit key.

    Returns:
        int64 [..., 4], words in [0, 2^32).
    """
    c0, c1, c2, c3 = torch.broadcast_tensors(c0, c1, c2, c3)
    k0, k1 = seed & _WORD, seed >> 32 & _WORD
    for _ in range(10):
        (h0, l0), (h1, l1) = _mul_words(c0, 0xD2511F53), _mul_words(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = h1 ^ c1 ^ k0, l1, h0 ^ c3 ^ k1, l0
        k0, k1 = k0 + 0x9E3779B9 & _WORD, k1 + 0xBB67AE85 & _WORD
    return torch.stack((c0, c1, c2, c3), dim=-1)


def _mul_words(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """High and low words of a 32 x 32-bit product; by halves, since int64 cannot hold 64 unsigned bits."""
    low = (a & 0xFFFF) * b
    high = (a >> 16) * b + (low >> 16)
    return high >> 16, (high & 0xFFFF) << 16 | low & 0xFFFF


_linf_op_ = Op(
    "linf_step_",
    _STEP.format("(a!)") + " -> ()",
    fake=lambda *args: None,
    reference=_linf_step_,
    triton="rvlm.ops._triton:linf_step_",
)
_linf_op = Op(
    "linf_step",
    _STEP.format("") + " -> Tensor",
    fake=lambda x_adv, *args: torch.empty_like(x_adv),
    reference=_linf_step,
    triton="rvlm.ops._triton:linf_step",
)
_l2_op_ = Op(
    "l2_step_",
    _STEP.format("(a!)") + " -> ()",
    fake=lambda *args: None,
    reference=_l2_step_,
    triton="rvlm.ops._triton:l2_step_",
)
_start_op = Op(
    "uniform_start",
    _START,
    fake=lambda x, *args: torch.empty_like(x),
    reference=_uniform_start,
    triton="rvlm.ops._triton:uniform_start",
)


def linf_step_(
    x_adv: Tensor,
    grad: Tensor,
    x: Tensor,
    alpha: float | Tensor,
    eps: float | Tensor,
    lo: float = 0.0,
    hi: float = 1.0,
    active: Tensor | None = None,
    *,
    strict_eps: bool = False,
    quantize: int | None = None,
) -> Tensor:
    """One Linf PGD step, in place: x + clip(x_adv + alpha * sign(grad) - x, -eps, eps), then the box [lo, hi].

    With alpha = 0 it is the projection of x_adv on ball and box.

    Args:
        x_adv: iterate [B, ...], float32 or float64, any layout; overwritten.
        grad: gradient [B, ...], any floating dtype; bfloat16 and float16 are widened pixel by pixel, without a copy.
            sign(0) and sign(NaN) are 0.
        x: clean images, shape, dtype and device of x_adv, inside [lo, hi]; may be expanded, must not be x_adv itself.
        alpha: step size in pixel units, a float or [B]; negative to descend.
        eps: radius in pixel units, a float or [B].
        lo, hi: pixel range.
        active: bool [B]; rows that are False are left as they are, bit for bit.
        strict_eps: |x_adv - x| <= eps also in exact arithmetic. Rounding in fp32 otherwise exceeds eps by up to 6e-8 on
            several per cent of the pixels, here as in every attack library; strict takes 1.2e-7 off eps.
        quantize: levels of an integer image, 255 for uint8: the result is k / levels, within floor(levels * eps) levels
            of x. x must be on that grid.

    Returns:
        x_adv.

    Raises:
        TypeError: a dtype that is not listed. ValueError: shapes, devices or values that do not fit.

    Source: projected gradient descent of Madry et al. 2018 (arXiv 1706.06083), in torchattacks' order of operations.
    """
    return _step_(_linf_op_, x_adv, grad, x, alpha, eps, lo, hi, active, strict_eps, quantize)


def linf_step(
    x_adv: Tensor,
    grad: Tensor,
    x: Tensor,
    alpha: float | Tensor,
    eps: float | Tensor,
    lo: float = 0.0,
    hi: float = 1.0,
    active: Tensor | None = None,
    *,
    strict_eps: bool = False,
    quantize: int | None = None,
) -> Tensor:
    """`linf_step_` into a new tensor; x_adv is not changed. For torch.compile and functional code."""
    args = _step_args(x_adv, grad, x, alpha, eps, lo, hi, active, strict_eps, quantize, linf=True)
    return _linf_op(rows_dense(x_adv), *args)


def l2_step_(
    x_adv: Tensor,
    grad: Tensor,
    x: Tensor,
    alpha: float | Tensor,
    eps: float | Tensor,
    lo: float = 0.0,
    hi: float = 1.0,
    active: Tensor | None = None,
    *,
    strict_eps: bool = False,
    quantize: int | None = None,
) -> Tensor:
    """One L2 PGD step, in place: x_adv - x + alpha * grad / ||grad||, scaled back to norm eps, then the box.

    Norms are per sample, over all other dimensions, summed in float64. A row whose gradient norm is zero or not finite
    has no direction: it is only projected. Arguments, errors and result as `linf_step_`, with two differences:
    `strict_eps` takes off what n rounded pixels can add to a norm (1.2e-7 * sqrt(n)), and `quantize` rounds every pixel
    toward x, so that no coordinate, and so no norm, grows.

    Source: order of foolbox's L2 PGD.
    """
    return _step_(_l2_op_, x_adv, grad, x, alpha, eps, lo, hi, active, strict_eps, quantize)


def uniform_start(
    x: Tensor,
    eps: float | Tensor,
    sample_ids: Tensor | None,
    seed: int,
    lo: float = 0.0,
    hi: float = 1.0,
    stream: int = 0,
    *,
    strict_eps: bool = False,
) -> Tensor:
    """x plus noise uniform in [-eps, eps), clipped to the box: the random start of Linf attacks.

    The noise of pixel i of a sample is word i % 4 of Philox4x32-10 at counter (i // 4, id low, id high, stream) under
    key `seed`, with i counted in row-major order whatever the memory format. It is bitwise independent of batch size,
    batch order and device.

    Args:
        x: images [B, ...], float32 or float64.
        eps: radius in pixel units, a float or [B].
        sample_ids: int64 [B], a stable number per sample; None means 0 .. B-1.
        seed: 64-bit integer.
        lo, hi: pixel range.
        stream: 32-bit number that separates draws for the same sample: restarts, targets.
        strict_eps: as in `linf_step_`.

    Returns:
        New tensor with the shape, dtype and memory format of x.
    """
    _check_images(x, "x")
    _check_bounds(lo, hi)
    if sample_ids is None:
        sample_ids = torch.arange(len(x), device=x.device)
    if not isinstance(sample_ids, Tensor) or sample_ids.dtype != torch.int64 or sample_ids.shape != (len(x),):
        raise ValueError(f"sample_ids must be int64 [{len(x)}], one stable number per sample, got {_kind(sample_ids)}")
    if not 0 <= stream < 2**32:
        raise ValueError(f"stream must fit in 32 bits, got {stream}")
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed must fit in 64 bits, got {seed}")
    seed = seed - 2**64 if seed >= 2**63 else seed  # the dispatcher's int is signed
    radius = _per_sample(eps, x, "eps")
    if strict_eps:
        radius = strictly_inside(radius, x, lo, hi, pixels=1)
    out = _start_op(x.contiguous(), radius, sample_ids.to(x.device).contiguous(), seed, float(lo), float(hi), stream)
    return out if x.is_contiguous() else torch.empty_like(x).copy_(out)


def _step_(op, x_adv, grad, x, alpha, eps, lo, hi, active, strict_eps, quantize):
    linf = op is _linf_op_
    args = _step_args(x_adv, grad, x, alpha, eps, lo, hi, active, strict_eps, quantize, linf=linf)
    dense = rows_dense(x_adv)
    op(dense, *args)
    if dense is not x_adv:
        x_adv.copy_(dense)
    return x_adv


def _step_args(x_adv, grad, x, alpha, eps, lo, hi, active, strict_eps, quantize, *, linf):
    """Checked arguments behind x_adv, brought to the memory layout that the kernels walk linearly."""
    _, grad, x, alpha, radius, active = check_step(x_adv, grad, x, alpha, eps, lo, hi, active)
    if quantize is not None:
        check_levels(quantize, strict_eps)
    if strict_eps:
        radius = strictly_inside(radius, x_adv, lo, hi, pixels=1 if linf else x_adv[:1].numel())
    return grad, x, alpha, radius, float(lo), float(hi), active, float(quantize or 0)


def check_step(x_adv, grad, x, alpha, eps, lo, hi, active):
    """Checks what every step takes; returns x_adv, grad and x in one dense memory layout, alpha and eps as [1] or [B].

    x_adv itself comes back where its layout allows it, else a contiguous copy. What there is per sample, active too, is
    contiguous.
    """
    _check_images(x_adv, "x_adv")
    _check_bounds(lo, hi)
    for name, t in (("grad", grad), ("x", x)):
        if not isinstance(t, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(t).__name__}")
        if t.shape != x_adv.shape or t.device != x_adv.device:
            raise ValueError(f"{name} must be like x_adv, {_kind(x_adv)}, got {_kind(t)}")
    if x.dtype != x_adv.dtype:
        raise TypeError(f"x must have the dtype of x_adv, {x_adv.dtype}, got {x.dtype}")
    if not grad.is_floating_point():
        raise TypeError(f"grad must be a floating-point tensor, got {grad.dtype}")
    if torch.is_grad_enabled() and (x_adv.requires_grad or x.requires_grad or grad.requires_grad):
        raise ValueError(
            "attack steps are not differentiable: detach x_adv, grad and x, or call under torch.no_grad(). "
            "rvlm.ops.steps documents the formula, which is plain PyTorch."
        )
    check_apart(x_adv, x, "x_adv")
    if active is not None:
        active = check_flags(active, x_adv, "active")
    like = rows_dense(x_adv)
    grad_dtype = grad.dtype if x_adv.dtype == torch.float32 and grad.dtype != torch.float64 else x_adv.dtype
    grad = grad if grad.dtype == grad_dtype else grad.to(grad_dtype)
    scalars = _per_sample(alpha, x_adv, "alpha"), _per_sample(eps, x_adv, "eps")
    return like, as_layout(grad, like), as_layout(x, like), *scalars, active


def check_flags(flags: Tensor, x: Tensor, name: str) -> Tensor:
    """One bool per sample of x, contiguous."""
    if (
        not isinstance(flags, Tensor)
        or flags.dtype != torch.bool
        or flags.shape != x.shape[:1]
        or flags.device != x.device
    ):
        raise ValueError(f"{name} must be bool [{len(x)}] on {x.device}, got {_kind(flags)}")
    return flags.contiguous()


def check_apart(t: Tensor, x: Tensor, name: str) -> None:
    """Raises where a tensor that is updated is the clean image."""
    if not torch.compiler.is_compiling() and t.numel() and t.data_ptr() == x.data_ptr():
        raise ValueError(f"{name} and x share memory, so the step would lose the clean image: pass {name} = x.clone()")


def check_levels(levels: int, strict_eps: bool) -> None:
    """Raises unless `levels` is a number of levels that images can be quantised to."""
    if strict_eps:
        raise ValueError(
            "strict_eps and quantize exclude each other: a quantised image is exact in levels (at most "
            "floor(levels * eps) of them), while k/levels itself is rounded in fp32. Choose one."
        )
    if not isinstance(levels, int) or not 1 <= levels <= 65535:
        raise ValueError(f"quantize must be the number of levels, 1 to 65535 (255 for uint8), got {levels!r}")


def strictly_inside(radius: Tensor, x: Tensor, lo: float, hi: float, pixels: int) -> Tensor:
    """The radius, less what rounding can add: half an ulp at the largest pixel value, twice over for safety."""
    margin = max(abs(lo), abs(hi), 1.0) * torch.finfo(x.dtype).eps * math.sqrt(pixels)
    relative = 4 * torch.finfo(x.dtype).eps  # rounding of eps itself and of a norm
    return (radius * (1 - relative) - margin).clamp(min=0)


def _per_sample(value: float | Tensor, x: Tensor, name: str) -> Tensor:
    """A float or [B] tensor as a tensor of 1 or B elements in the dtype and on the device of x."""
    if not isinstance(value, Tensor):
        return torch.full((1,), float(value), dtype=x.dtype, device=x.device)
    if value.dim() > 1 or value.numel() not in (1, x.shape[0]):
        raise ValueError(f"{name} must be a float or a tensor [{len(x)}], one value per sample; got {_kind(value)}")
    if value.dim() == 1 and value.dtype == x.dtype and value.device == x.device:
        return value.contiguous()  # itself: what an attack passes at every step
    return value.to(x.device, x.dtype).reshape(-1).contiguous()


def rows_dense(t: Tensor) -> Tensor:
    """t itself if each sample is one block of memory (contiguous or channels-last), else a contiguous copy."""
    if t.is_contiguous() or any(t.dim() == d and t.is_contiguous(memory_format=f) for d, f in _CHANNELS_LAST):
        return t
    return t.contiguous()


_CHANNELS_LAST = ((4, torch.channels_last), (5, torch.channels_last_3d))


def as_layout(t: Tensor, like: Tensor) -> Tensor:
    return t if t.stride() == like.stride() else torch.empty_like(like, dtype=t.dtype).copy_(t)


def _check_images(t: Tensor, name: str) -> None:
    if not isinstance(t, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(t).__name__}")
    if t.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"{name} must be float32 or float64, got {t.dtype}: steps of 1/255 do not survive in 16 bits. "
            f"Keep images in float32 (x.float()); gradients may be bfloat16 or float16."
        )
    if t.dim() < 2:
        raise ValueError(f"{name} must be a batch [B, ...], got {_kind(t)}")


def _check_bounds(lo: float, hi: float) -> None:
    if not lo < hi:
        raise ValueError(f"bounds must satisfy lo < hi, got lo={lo}, hi={hi}")


def _kind(t: Tensor) -> str:
    return (
        type(t).__name__
        if not isinstance(t, Tensor)
        else f"{str(t.dtype).removeprefix('torch.')} {list(t.shape)} on {t.device}"
    )
