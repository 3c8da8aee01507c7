"""What shallow adapter layers do to attention: an anchor in its map, its heads or its output, and prefix tokens.

    anchored_residual   x1 = x0 + c_o o + c_a A,   y = LayerNorm(x1),   A [N, D] shared by the batch
    anchored_attention  site "map":    c softmax(q k^T / sqrt(d)) v + alpha A v,   A [H, N, N]
                        site "heads":  c softmax(q k^T / sqrt(d)) v + alpha A,     A [H, N, d]
                        with c = 1 for "add" and 1 - alpha for "lerp"
    prefix_attention    softmax(q [k; prefix_k]^T / sqrt(d)) [v; prefix_v]: tokens that are the same for the whole batch
                        and whose own outputs nobody reads, so that they need neither queries nor an MLP; exact to
                        concatenating tokens. Causal: of k and v, a query sees no rows behind its own

The last two are compositions of the library's: mixing after the softmax is linear, so torch's scaled-dot-product
attention stays what it is and a matrix product stands beside it; on a CPU, whose fused attention has a slow backward
pass, up to EXPLICIT_KEYS keys the map is made in memory. docs/performance.md has what was measured.

        mix        c_o            c_a               R-Adapt's anchor A at the output of the attention o (specs of the
        add        1              alpha             mix are readings of its figure; "add" is the default everywhere)
        lerp       1 - alpha      alpha
        normadd    1 / (1+alpha)  alpha / (1+alpha)

Backward, with G the gradient at x1 (its own plus what comes through the LayerNorm): dx0 = G, do = c_o G,
dA = c_a sum_b G, dc_o = <G, o>, dc_a = <A, sum_b G>. The sums run over the batch in float32, in one pass with G.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from rvlm.ops._dispatch import Op, known_signature, once_differentiable, reference_forced

__all__ = ["anchored_attention", "anchored_residual", "prefix_attention"]

MIXES = ("add", "lerp", "normadd")
EXPLICIT_KEYS = 320


def _wide(t: Tensor) -> torch.dtype:
    return torch.float64 if t.dtype == torch.float64 else torch.float32


def _forward(x0, o, anchor, mix, weight, bias, eps):
    """mix [2] holds c_o and c_a; weight and bias are those of the LayerNorm."""
    dtype = _wide(x0)
    x1 = x0.to(dtype) + mix[0] * o.to(dtype) + mix[1] * anchor
    mean = x1.mean(-1, keepdim=True)
    centred = x1 - mean
    rstd = (centred.square().mean(-1, keepdim=True) + eps).rsqrt()
    y = centred * rstd * weight + bias
    return x1.to(x0.dtype), y.to(x0.dtype), mean.squeeze(-1), rstd.squeeze(-1)


def _backward(of_x1, of_y, x1, o, mean, rstd, weight, anchor_grad, norm_grad):
    """o is None where nobody asks for <G, o>."""
    dtype = mean.dtype
    centred = (x1.to(dtype) - mean[..., None]) * rstd[..., None]
    of_y = of_y.to(dtype)
    scaled = of_y * weight
    through = scaled - scaled.mean(-1, keepdim=True) - centred * (scaled * centred).mean(-1, keepdim=True)
    g = of_x1.to(dtype) + rstd[..., None] * through
    none = g.new_empty(0)
    sums = (g.sum(0) if anchor_grad else none, none if o is None else (g * o.to(dtype)).sum().view(1))
    norms = ((of_y * centred).sum((0, 1)), of_y.sum((0, 1))) if norm_grad else (none, none)
    return g.to(x1.dtype), *sums, *norms


def _fake_forward(x0, o, anchor, mix, weight, bias, eps):
    rows = x0.new_empty(x0.shape[:2], dtype=_wide(x0))
    return torch.empty_like(x0), torch.empty_like(x0), rows, torch.empty_like(rows)


def _fake_backward(of_x1, of_y, x1, o, mean, rstd, weight, anchor_grad, norm_grad):
    n, d = x1.shape[1:]
    return (
        torch.empty_like(x1),
        mean.new_empty((n, d) if anchor_grad else 0),
        mean.new_empty(0 if o is None else 1),
        mean.new_empty(d if norm_grad else 0),
        mean.new_empty(d if norm_grad else 0),
    )


_forward_op = Op(
    "anchored_residual",
    "(Tensor x0, Tensor o, Tensor anchor, Tensor mix, Tensor weight, Tensor bias, float eps) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    fake=_fake_forward,
    reference=_forward,
    triton="rvlm.ops._triton:anchored_residual",
)
_backward_op = Op(
    "anchored_residual_backward",
    "(Tensor of_x1, Tensor of_y, Tensor x1, Tensor? o, Tensor mean, Tensor rstd, Tensor weight, bool anchor_grad, "
    "bool norm_grad) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=_fake_backward,
    reference=_backward,
    triton="rvlm.ops._triton:anchored_residual_backward",
)


class _AnchoredResidual(torch.autograd.Function):
    @staticmethod
    @known_signature
    def forward(*args):
        return _forward_op(*args[:-1])

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, o, anchor, mix, weight, _, _, ctx.whole = inputs
        x1, _, mean, rstd = output
        ctx.mark_non_differentiable(mean, rstd)
        learned = mix.requires_grad  # only then the backward pass reads o and the anchor
        ctx.save_for_backward(x1, o if learned else None, anchor if learned else None, mix, weight, mean, rstd)

    @staticmethod
    @once_differentiable("anchored_residual")
    def backward(ctx, of_x1, of_y, *_):
        x1, o, anchor, mix, weight, mean, rstd = ctx.saved_tensors
        _, needs_o, needs_anchor, needs_mix, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        g, total, of_o, d_weight, d_bias = _backward_op(
            of_x1.contiguous(), of_y.contiguous(), x1, o, mean, rstd, weight,
            needs_anchor or needs_mix, needs_weight or needs_bias,
        )  # fmt: skip
        return (
            g,
            None if not needs_o else g if ctx.whole else mix[0].to(g.dtype) * g,
            total * mix[1] if needs_anchor else None,
            torch.cat([of_o, (anchor * total).sum().view(1)]) if needs_mix else None,
            d_weight if needs_weight else None,
            d_bias if needs_bias else None,
            None,
            None,
        )


def anchored_residual(
    x0: Tensor,
    o: Tensor,
    anchor: Tensor,
    alpha: float | Tensor,
    mix: str,
    ln_weight: Tensor,
    ln_bias: Tensor,
    ln_eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """Residual, anchor and the LayerNorm that follows, in one pass.

    Args:
        x0: residual stream [B, N, D], any floating dtype.
        o: output of the attention, like x0.
        anchor: A [N, D], one for the whole batch; kept in float32 (float64 for float64 streams), as are its gradients.
        alpha: strength of the anchor, a float or a tensor with one element, which may be learned.
        mix: "add", "lerp" or "normadd"; see the module.
        ln_weight, ln_bias: [D].
        ln_eps: the LayerNorm's eps.

    Returns:
        x1 [B, N, D] and LayerNorm(x1) [B, N, D], in the dtype of x0; statistics in float32. Differentiable once with
        respect to every tensor.

    Raises:
        TypeError, ValueError: dtypes, shapes or a mix that do not fit. RuntimeError: a second derivative, which needs
        use_backend("reference").
    """
    if mix not in MIXES:
        raise ValueError(f"mix must be one of {', '.join(map(repr, MIXES))}, got {mix!r}")
    if x0.dim() != 3 or not x0.is_floating_point():
        raise TypeError(f"x0 must be a floating-point stream [B, N, D], got {x0.dtype} {list(x0.shape)}")
    if o.shape != x0.shape or o.dtype != x0.dtype or o.device != x0.device:
        raise ValueError(
            f"o must be like x0, {list(x0.shape)} {x0.dtype} on {x0.device}, "
            f"got {list(o.shape)} {o.dtype} on {o.device}"
        )
    n, d = x0.shape[1:]
    for name, t, shape in (("anchor", anchor, (n, d)), ("ln_weight", ln_weight, (d,)), ("ln_bias", ln_bias, (d,))):
        if tuple(t.shape) != shape or t.device != x0.device:
            raise ValueError(f"{name} must be {list(shape)} on {x0.device}, got {list(t.shape)} on {t.device}")
    dtype, stream = _wide(x0), x0.dtype
    factors = _factors(alpha, mix, dtype, x0.device)
    if x0.device.type == "cpu" and stream != dtype:
        x0, o = x0.to(dtype), o.to(dtype)  # on a GPU the kernels read 16-bit streams as they are
    parameters = [t if t.dtype == dtype else t.to(dtype) for t in (anchor, factors, ln_weight, ln_bias)]
    args = [t.contiguous() for t in (x0, o, *parameters)]
    if reference_forced():
        x1, y, *_ = _forward(*args, float(ln_eps))
    else:
        x1, y, *_ = _AnchoredResidual.apply(*args, float(ln_eps), mix == "add")  # then c_o is 1, and do is dx0
    return (x1, y) if x1.dtype == stream else (x1.to(stream), y.to(stream))


def _factors(alpha, mix, dtype, device):
    """c_o and c_a, [2]. Nothing is copied to the device, so that CUDA graphs can be captured."""
    learned = isinstance(alpha, Tensor)
    if learned and alpha.numel() != 1:
        raise ValueError(f"alpha must be a float or one element, got {list(alpha.shape)}")
    alpha = alpha.to(device, dtype).reshape(()) if learned else float(alpha)
    total = 1 + alpha if mix == "normadd" else 1
    c_o, c_a = 1 - alpha if mix == "lerp" else 1 / total, alpha / total
    if learned:
        return torch.stack((torch.ones_like(alpha) if mix == "add" else c_o, c_a))
    factors = torch.full((2,), c_a, dtype=dtype, device=device)
    factors[0] = c_o
    return factors


def anchored_attention(
    q: Tensor, k: Tensor, v: Tensor, anchor: Tensor, alpha: float | Tensor, site: str = "map", mix: str = "add"
) -> Tensor:
    """Attention, not causal, with an anchor that the whole batch shares mixed in after the softmax.

    Args:
        q, k, v: [B, H, N, d], any floating dtype.
        anchor: [H, N, N], a map over keys, for site "map"; [H, N, d] for site "heads".
        alpha: strength, a float or a tensor with one element.
        site: "map" or "heads".
        mix: "add" or "lerp"; see the module.

    Returns:
        [B, H, N, d] in the dtype of q, differentiable with respect to every tensor; the anchor's gradient is summed
        over the batch.

    Raises:
        TypeError, ValueError: dtypes, shapes, a site or a mix that do not fit.
    """
    _check_heads(q, k, v)
    if site not in ("map", "heads") or mix not in ("add", "lerp"):
        raise ValueError(f"site must be 'map' or 'heads' and mix 'add' or 'lerp', got {site!r} and {mix!r}")
    _, heads, tokens, width = v.shape
    shape = (heads, tokens, tokens if site == "map" else width)
    if tuple(anchor.shape) != shape or anchor.device != v.device:
        raise ValueError(
            f"anchor must be {list(shape)} on {v.device} for site {site!r}, got {list(anchor.shape)} on {anchor.device}"
        )
    if isinstance(alpha, Tensor):
        if alpha.numel() != 1:
            raise ValueError(f"alpha must be a float or one element, got {list(alpha.shape)}")
        alpha = alpha.to(v.device, v.dtype).reshape(())
    share, anchor = 1.0 if mix == "add" else 1 - alpha, anchor.to(v.dtype)
    if site == "map" and _explicit(k):
        return (share * _map(q, k) + alpha * anchor) @ v
    live = _attention(q, k, v)
    # One matrix product per head over [N, B d]: matmul would copy the anchor for every sample.
    anchored = torch.einsum("hnm,bhmd->bhnd", anchor, v) if site == "map" else anchor
    return share * live + alpha * anchored


def prefix_attention(
    q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor, causal: bool = False
) -> Tensor:
    """Attention, not causal, of N tokens to themselves and to P prefix tokens that the whole batch shares.

    Args:
        q, k, v: [B, H, N, d], any floating dtype.
        prefix_k, prefix_v: [H, P, d], keys and values of the prompts, computed once for the batch.
        causal: row n of q sees all of the prefix, and rows 0 .. n of k; the prompts stand before them all.

    Returns:
        [B, H, N, d], what the rows of q would be with the prompts as tokens. The prefix's gradients are summed over
        the batch; where nobody asks for them they are not computed.

    Raises:
        TypeError, ValueError: dtypes or shapes that do not fit.
    """
    _check_heads(q, k, v)
    batch, heads, _, width = v.shape
    for name, t in (("prefix_k", prefix_k), ("prefix_v", prefix_v)):
        if t.dim() != 3 or t.shape[::2] != (heads, width) or t.shape != prefix_k.shape or t.device != v.device:
            raise ValueError(f"{name} must be [{heads}, P, {width}] on {v.device}, got {list(t.shape)} on {t.device}")
    keys, values = (
        torch.cat([t, prefix.to(t.dtype).expand(batch, -1, -1, -1)], 2) for t, prefix in ((k, prefix_k), (v, prefix_v))
    )
    seen = None
    if causal:
        rows, prompts = q.shape[2], prefix_k.shape[1]
        seen = torch.ones(rows, rows + prompts, dtype=torch.bool, device=q.device).tril()
        seen[:, rows:] = True
    return _attention(q, keys, values, seen)


def _attention(q, k, v, seen=None):
    return _map(q, k, seen) @ v if _explicit(k) else F.scaled_dot_product_attention(q, k, v, attn_mask=seen)


def _map(q, k, seen=None):
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    if seen is not None:
        scores = scores.masked_fill(~seen, -torch.inf)
    return torch.softmax(scores, -1, dtype=_wide(q)).to(q.dtype)


def _explicit(k):
    return k.device.type == "cpu" and k.shape[2] <= EXPLICIT_KEYS


def _check_heads(q, k, v):
    if q.dim() != 4 or not q.is_floating_point():
        raise TypeError(f"q must be floating-point [B, H, N, d], got {q.dtype} {list(q.shape)}")
    for name, t in (("k", k), ("v", v)):
        if t.shape != q.shape or t.dtype != q.dtype or t.device != q.device:
            raise ValueError(f"{name} must be like q, {list(q.shape)} {q.dtype}, got {list(t.shape)} {t.dtype}")
