"""Where an anchor A [N, D] meets the residual stream [B, N, D], with the LayerNorm that follows.

forward    x1 = x0 + c_o o + c_a A;   y = (x1 - mean) rstd weight + bias, mean and rstd over D
backward   z = (x1 - mean) rstd;  s = of_y weight;  g = of_x1 + rstd (s - mean(s) - z mean(s z))
           total = sum_b g;  of_o = sum g o;  d_weight = sum of_y z;  d_bias = sum of_y

The specification is the eager reference in rvlm/ops/attention.py.

What is fused: residual, anchor and LayerNorm read two streams and write two instead of moving nine; backward reads the
stream once for g and for all sums. A program of the backward owns one token and a part of the batch; sums over parts
are added up afterwards, in float32 and always in the same order, without atomics. Rows of D fit in registers.
"""

import torch
import triton
import triton.language as tl

from rvlm.kernels._launch import launch, tile_sizes

MAX_PARTS = 16  # most programs that share a token


@triton.jit
def _anchored_residual_kernel(
    x1_ptr,  # [B, N, D]
    y_ptr,  # [B, N, D]
    mean_ptr,  # [B, N], the type that is computed in, as are rstd, anchor, mix, weight and bias
    rstd_ptr,  # [B, N]
    x0_ptr,  # [B, N, D], any floating dtype, as is o
    o_ptr,  # [B, N, D]
    anchor_ptr,  # [N, D]
    mix_ptr,  # [2]
    weight_ptr,  # [D]
    bias_ptr,  # [D]
    tokens,
    width,
    EPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    DTYPE: tl.constexpr = mean_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    at = row * width + column
    x0 = tl.load(x0_ptr + at, mask=inside, other=0.0).to(DTYPE)
    o = tl.load(o_ptr + at, mask=inside, other=0.0).to(DTYPE)
    anchor = tl.load(anchor_ptr + row % tokens * width + column, mask=inside, other=0.0)
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0)
    bias = tl.load(bias_ptr + column, mask=inside, other=0.0)
    x1 = x0 + tl.load(mix_ptr) * o + tl.load(mix_ptr + 1) * anchor
    mean = tl.sum(x1, axis=0) / width
    centred = tl.where(inside, x1 - mean, 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=0) / width + EPS)
    y = centred * rstd * weight + bias
    tl.store(x1_ptr + at, x1.to(x1_ptr.dtype.element_ty), mask=inside)
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=inside)
    tl.store(mean_ptr + row, mean)
    tl.store(rstd_ptr + row, rstd)


@triton.jit
def _anchored_residual_backward_kernel(
    g_ptr,  # [B, N, D]
    total_ptr,  # [parts, N, D] or None
    of_o_ptr,  # [parts, N] or None
    d_weight_ptr,  # [parts, N, D] or None
    d_bias_ptr,  # [parts, N, D] or None
    of_x1_ptr,  # [B, N, D], any floating dtype, as are the next three
    of_y_ptr,  # [B, N, D]
    x1_ptr,  # [B, N, D]
    o_ptr,  # [B, N, D], or None with of_o
    mean_ptr,  # [B, N], the type that is computed in, as are rstd and weight
    rstd_ptr,  # [B, N]
    weight_ptr,  # [D]
    batch,
    tokens,
    width,
    parts,
    BLOCK: tl.constexpr,
):
    DTYPE: tl.constexpr = mean_ptr.dtype.element_ty
    token = tl.program_id(0) % tokens
    part = tl.program_id(0) // tokens
    column = tl.arange(0, BLOCK)
    inside = column < width
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0)
    total = tl.zeros([BLOCK], DTYPE)
    products = tl.zeros([BLOCK], DTYPE)
    d_weight = tl.zeros([BLOCK], DTYPE)
    d_bias = tl.zeros([BLOCK], DTYPE)
    b = part
    while b < batch:
        row = b.to(tl.int64) * tokens + token
        at = row * width + column
        of_y = tl.load(of_y_ptr + at, mask=inside, other=0.0).to(DTYPE)
        x1 = tl.load(x1_ptr + at, mask=inside, other=0.0).to(DTYPE)
        of_x1 = tl.load(of_x1_ptr + at, mask=inside, other=0.0).to(DTYPE)
        rstd = tl.load(rstd_ptr + row)
        z = tl.where(inside, (x1 - tl.load(mean_ptr + row)) * rstd, 0.0)
        s = of_y * weight
        g = of_x1 + rstd * (s - tl.sum(s, axis=0) / width - z * (tl.sum(s * z, axis=0) / width))
        tl.store(g_ptr + at, g.to(g_ptr.dtype.element_ty), mask=inside)
        if total_ptr is not None:
            total += g
        if of_o_ptr is not None:
            o = tl.load(o_ptr + at, mask=inside, other=0.0).to(DTYPE)
            products += tl.where(inside, g * o, 0.0)
        if d_weight_ptr is not None:
            d_weight += of_y * z
            d_bias += of_y
        b += parts
    slot = part.to(tl.int64) * tokens + token
    if total_ptr is not None:
        tl.store(total_ptr + slot * width + column, total, mask=inside)
    if of_o_ptr is not None:
        tl.store(of_o_ptr + slot, tl.sum(products, axis=0))
    if d_weight_ptr is not None:
        tl.store(d_weight_ptr + slot * width + column, d_weight, mask=inside)
        tl.store(d_bias_ptr + slot * width + column, d_bias, mask=inside)


def anchored_residual(
    x1: torch.Tensor,
    y: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    x0: torch.Tensor,
    o: torch.Tensor,
    anchor: torch.Tensor,
    mix: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
) -> None:
    """Writes stream, normalised stream and statistics of every token.

    Args:
        x1, y: results [B, N, D], dtype of x0.
        mean, rstd: results [B, N], fp32 or fp64, the type that is computed in.
        x0, o: streams [B, N, D], contiguous, any floating dtype.
        anchor, mix, weight, bias: [N, D], [2], [D], [D] in the type of `mean`; mix holds c_o and c_a.
        eps: the LayerNorm's.
    """
    batch, tokens, width = x0.shape
    sizes = _row_sizes(width)
    if x0.numel():
        launch(
            _anchored_residual_kernel,
            batch * tokens,
            x0.device,
            x1,
            y,
            mean,
            rstd,
            x0,
            o,
            anchor,
            mix,
            weight,
            bias,
            tokens,
            width,
            EPS=eps,
            BLOCK=sizes.block,
            num_warps=sizes.num_warps,
        )


def anchored_residual_backward(
    g: torch.Tensor,
    total: torch.Tensor | None,
    of_o: torch.Tensor | None,
    d_weight: torch.Tensor | None,
    d_bias: torch.Tensor | None,
    of_x1: torch.Tensor,
    of_y: torch.Tensor,
    x1: torch.Tensor,
    o: torch.Tensor | None,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    weight: torch.Tensor,
) -> None:
    """Writes the gradient at x1 and, where there is room for them, the parts of the sums over the batch.

    Args:
        g: result [B, N, D], dtype of x1.
        total, d_weight, d_bias: results [parts, N, D] in the type of `mean`, or None; of_o: [parts, N] or None.
        of_x1, of_y, x1, o: [B, N, D], contiguous, any floating dtype; o may be None where of_o is.
        mean, rstd, weight: as the forward pass wrote and read them.
    """
    batch, tokens, width = x1.shape
    sizes = _row_sizes(width)
    if x1.numel():
        parts = part_count(batch, tokens)
        launch(
            _anchored_residual_backward_kernel,
            tokens * parts,
            x1.device,
            g,
            total,
            of_o,
            d_weight,
            d_bias,
            of_x1,
            of_y,
            x1,
            o,
            mean,
            rstd,
            weight,
            batch,
            tokens,
            width,
            parts,
            BLOCK=sizes.block,
            num_warps=sizes.num_warps,
        )


def part_count(batch: int, tokens: int) -> int:
    """Parts of the batch: enough programs to fill a GPU where the tokens alone do not."""
    return max(1, min(batch, MAX_PARTS, triton.cdiv(1024, tokens)))


def _row_sizes(width: int):
    sizes = tile_sizes(1, width)
    if sizes.block < width:
        raise ValueError(f"the stream is {width} wide, the kernels take at most {sizes.block}")
    return sizes
