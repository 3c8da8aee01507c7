"""Losses that attacks raise: value, verdict and gradient with respect to the logits z, in one pass without a sort.

    ce            softplus(m) = -log softmax(z)_y,  m = logsumexp_{c != y} z_c - z_y
    cw            max_{c != y} z_c - z_y                                       (Carlini & Wagner 2017; also "margin")
    dlr           -(z_y - max_{c != y} z_c) / (z_(1) - z_(3) + 1e-12)          (Croce & Hein 2020, arXiv 2003.01690)
    dlr-targeted  -(z_y - z_t) / (z_(1) - (z_(3) + z_(4)) / 2 + 1e-12)         (the same)
    soft-ce       -sum_c y_c log softmax(z)_c,  y [B, C] a distribution or any non-negative weights

z_(k) is the k-th largest logit. Among equal logits the first one gets the gradient.

Written with m, cross-entropy keeps its gradient when the model is certain: 1 - softmax(z)_y is computed as sigmoid(m),
not as a difference, which in float32 rounds to 0 from a gap of 17 logits on. A logit of -inf is a masked class. A NaN
makes its row's loss and gradient NaN and its verdict "not correct".
"""

import torch
from torch import Tensor

from rvlm.ops._dispatch import Op, known_signature, once_differentiable, reference_forced

__all__ = ["attack_loss", "clip_head_loss"]

KINDS = ("ce", "cw", "dlr", "dlr-targeted", "soft-ce")
CLASSES = {"cw": 2, "dlr": 3, "dlr-targeted": 4}  # fewest classes that the formula needs
TINY = 1e-12


def _reference(logits, y, target, kind):
    z = logits if logits.dtype == torch.float64 else logits.float()
    name = KINDS[kind]
    if name == "soft-ce":
        loss, grad, label = *_soft_ce(z, y.to(z.dtype)), y.argmax(1)
    else:
        loss, grad = {"ce": _ce, "cw": _cw, "dlr": _dlr, "dlr-targeted": _dlr}[name](z, y[:, None], target)
        label = y
    broken = z.isnan().any(1)
    loss = torch.where(broken, torch.nan, loss)
    grad = torch.where(broken[:, None], torch.nan, grad)
    return loss, (z.argmax(1) == label) & ~broken, grad.to(logits.dtype)


def _ce(z, y, _):
    others = z.scatter(1, y, -torch.inf)
    m = others.logsumexp(1, keepdim=True) - z.gather(1, y)
    loss = torch.logaddexp(m, torch.zeros_like(m)).squeeze(1)
    # A class beside y has softmax(others) * sigmoid(m); y itself has minus their sum.
    grad = torch.where(others == -torch.inf, 0.0, others.softmax(1) * m.sigmoid())
    return loss, grad.scatter(1, y, torch.where(m == -torch.inf, 0.0, -m.sigmoid()))


def _soft_ce(z, y):
    weight = y.sum(1, keepdim=True)
    log_q = z.log_softmax(1)
    return -torch.where(y > 0, y * log_q, 0.0).sum(1), weight * log_q.exp() - y


def _cw(z, y, _):
    other, at = z.scatter(1, y, -torch.inf).max(1, keepdim=True)
    grad = torch.zeros_like(z).scatter_(1, at, 1.0).scatter_add_(1, y, -torch.ones_like(other))
    return (other - z.gather(1, y)).squeeze(1), grad


def _dlr(z, y, target):
    # A stable sort, since of equal logits the first one counts.
    top, order = z.sort(dim=1, descending=True, stable=True)
    if target is None:
        second = torch.where(order[:, :1] == y, 1, 0)
        other, at = top.gather(1, second), order.gather(1, second)
        low, share = top[:, 2:3], ((2, 1.0),)
    else:
        other, at = z.gather(1, target[:, None]), target[:, None]
        low, share = 0.5 * (top[:, 2:3] + top[:, 3:4]), ((2, 0.5), (3, 0.5))
    gap, scale = other - z.gather(1, y), top[:, :1] - low + TINY
    loss = gap / scale
    one, slope = 1 / scale, loss / scale
    grad = torch.zeros_like(z).scatter_add_(1, at, one).scatter_add_(1, y, -one)
    grad = grad.scatter_add_(1, order[:, :1], -slope)
    for place, part in share:
        grad = grad.scatter_add_(1, order[:, place : place + 1], part * slope)
    return loss.squeeze(1), grad


def _fake(logits, y, target, kind):
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    rows = logits.shape[0]
    return (
        logits.new_empty(rows, dtype=dtype),
        logits.new_empty(rows, dtype=torch.bool),
        torch.empty_like(logits),
    )


_op = Op(
    "attack_loss",
    "(Tensor logits, Tensor y, Tensor? target, int kind) -> (Tensor, Tensor, Tensor)",
    fake=_fake,
    reference=_reference,
    triton="rvlm.ops._triton:attack_loss",
)


class _AttackLoss(torch.autograd.Function):
    """The forward pass has computed the gradient already; backward scales its rows."""

    @staticmethod
    @known_signature
    def forward(*args):
        return _op(*args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(output[2], inputs[0])
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)

    @staticmethod
    @once_differentiable("attack_loss")
    def backward(ctx, of_loss, *_):
        grad, _ = ctx.saved_tensors
        return None if of_loss is None else grad * of_loss[:, None].to(grad.dtype), None, None, None


def attack_loss(
    logits: Tensor, y: Tensor, kind: str = "ce", target: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, verdict and gradient of a batch of logits.

    Args:
        logits: [B, C], any floating dtype; computed in float32, float64 logits in float64.
        y: labels, int64 [B]; for "soft-ce" weights [B, C], floating and not negative.
        kind: "ce", "cw" (or "margin"), "dlr", "dlr-targeted" or "soft-ce"; see the module for the formulas.
        target: class to move to, int64 [B], for "dlr-targeted" alone.

    Returns:
        loss [B], differentiable once with respect to the logits; correct, bool [B], whether the first largest logit is
        that of y ("soft-ce": of y's first largest weight); dlogits [B, C], the gradient of loss.sum(), a constant in
        the dtype of the logits: `torch.autograd.grad(logits, x, dlogits)` needs no graph for the loss.

    Raises:
        TypeError: dtypes. ValueError: shapes, an unknown kind, too few classes (cw 2, dlr 3, dlr-targeted 4).
        RuntimeError: a second derivative, which needs use_backend("reference").

    Labels outside 0 .. C-1 are undefined behaviour on a GPU, as in every indexing op; attacks check them once.
    """
    kind = "cw" if kind == "margin" else kind
    _check(logits, y, kind, target)
    wide = logits
    if logits.device.type == "cpu" and logits.dtype not in (torch.float32, torch.float64):
        wide = logits.float()  # on a GPU the kernel reads 16-bit logits as they are
    if kind == "soft-ce":
        y = y.to(torch.float64 if wide.dtype == torch.float64 else torch.float32)
    args = (wide.contiguous(), y.contiguous(), None if target is None else target.contiguous(), KINDS.index(kind))
    if reference_forced():  # plain PyTorch, differentiable as often as one likes
        loss, correct, grad = _reference(*args)
    elif torch.is_grad_enabled() and wide.requires_grad:
        loss, correct, grad = _AttackLoss.apply(*args)
    else:
        loss, correct, grad = _op(*args)
    return loss, correct, grad.detach().to(logits.dtype)


def clip_head_loss(
    embedding: Tensor,
    head: Tensor,
    y: Tensor,
    kind: str = "ce",
    target: Tensor | None = None,
    *,
    normalize: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss of a CLIP head and its gradient with respect to the embedding, without autograd.

    logits z = e @ head with e = embedding, or embedding / ||embedding||. With dz from `attack_loss`, de = dz @ head^T,
    and through the norm (de - e <e, de>) / ||embedding||. Two matrix products by the library around one fused loss.

    Args:
        embedding: [B, D].
        head: scaled class embeddings [D, C]; computed in the wider of both dtypes, also under autocast.
        y, kind, target: as in `attack_loss`.
        normalize: the embedding is not of unit norm yet.

    Returns:
        loss [B], correct [B], logits [B, C], d_embedding [B, D], the gradient of loss.sum(); all constants. Start the
        backward pass with `torch.autograd.grad(embedding, x, d_embedding)`.
    """
    if embedding.dim() != 2 or head.dim() != 2 or embedding.shape[1] != head.shape[0]:
        raise ValueError(f"expected embedding [B, D] and head [D, C], got {list(embedding.shape)}, {list(head.shape)}")
    dtype = torch.promote_types(embedding.dtype, head.dtype)
    with torch.no_grad(), torch.autocast(embedding.device.type, enabled=False):  # 16 bits round a logit of 100 to 0.5
        e, head = embedding.detach().to(dtype), head.detach().to(dtype)
        if normalize:
            length = torch.linalg.vector_norm(e, dim=1, keepdim=True).clamp(min=TINY)
            e = e / length
        logits = e @ head
        loss, correct, d_logits = attack_loss(logits, y, kind, target)
        d_embedding = d_logits @ head.T
        if normalize:
            d_embedding = (d_embedding - e * (e * d_embedding).sum(1, keepdim=True)) / length
    return loss, correct, logits, d_embedding.to(embedding.dtype)


def _check(logits, y, kind, target):
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(map(repr, KINDS))} or 'margin', got {kind!r}")
    if not isinstance(logits, Tensor) or not logits.is_floating_point():
        raise TypeError(
            f"logits must be a floating-point tensor, got {getattr(logits, 'dtype', type(logits).__name__)}"
        )
    if logits.dim() != 2 or logits.shape[1] < CLASSES.get(kind, 1):
        raise ValueError(
            f"{kind} needs logits [B, C] with at least {CLASSES.get(kind, 1)} classes, got {list(logits.shape)}"
        )
    for name, labels in (("y", y), ("target", target)):
        soft = kind == "soft-ce" and name == "y"
        if name == "target" and (labels is not None) != (kind == "dlr-targeted"):
            raise ValueError(f"target, int64 [B], belongs to 'dlr-targeted' and nothing else; kind is {kind!r}")
        if labels is None and name == "target":
            continue
        shape = logits.shape if soft else logits.shape[:1]
        if not isinstance(labels, Tensor) or labels.shape != shape or labels.device != logits.device:
            got = f"{list(labels.shape)} on {labels.device}" if isinstance(labels, Tensor) else type(labels).__name__
            raise ValueError(f"{name} must be a tensor {list(shape)} on {logits.device}, got {got}")
        if not (labels.is_floating_point() if soft else labels.dtype == torch.int64):
            raise TypeError(f"{name} must be {'floating-point' if soft else 'int64'} for {kind!r}, got {labels.dtype}")
