"""Other ways to write attention with an anchor or a prefix. q, k, v are [B, H, N, d]."""

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import flex_attention


def anchored_by_matmul(q: Tensor, k: Tensor, v: Tensor, anchor: Tensor, alpha: float) -> Tensor:
    """As one would write it: broadcasting copies the anchor [H, N, N] for every sample."""
    return F.scaled_dot_product_attention(q, k, v) + alpha * (anchor @ v)


def anchored_naive(q: Tensor, k: Tensor, v: Tensor, anchor: Tensor, alpha: float) -> Tensor:
    """With the map [B, H, N, N] in memory."""
    return (torch.softmax(q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5, -1) + alpha * anchor) @ v


def anchored_by_einsum(q: Tensor, k: Tensor, v: Tensor, anchor: Tensor, alpha: float) -> Tensor:
    """One matrix product per head beside the library's attention."""
    return F.scaled_dot_product_attention(q, k, v) + alpha * torch.einsum("hnm,bhmd->bhnd", anchor, v)


def anchored_by_flex(q: Tensor, k: Tensor, v: Tensor, anchor: Tensor, alpha: float) -> Tensor:
    """FlexAttention sees scores before the softmax, so it goes twice: for the normaliser, and for the mixed map.

    The mixed rows add up to 1 + alpha sum_j A, by which its own softmax divides. The anchor must not be negative.
    """
    _, norm = flex_attention(q, k, v, return_lse=True)

    def mixed(score, b, h, i, j):
        return torch.log(torch.exp(score - norm[b, h, i]) + alpha * anchor[h, i, j])

    return flex_attention(q, k, v, score_mod=mixed) * (1 + alpha * anchor.sum(-1, keepdim=True))


def keys_concatenated(q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor) -> Tensor:
    """Prompts as keys and values alone, in the library's attention."""
    k, v = (torch.cat([t, p.expand(len(q), -1, -1, -1)], 2) for t, p in ((k, prefix_k), (v, prefix_v)))
    return F.scaled_dot_product_attention(q, k, v)


def tokens_concatenated(q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor) -> Tensor:
    """Prompts as full tokens: their rows are computed and thrown away. Their queries are their keys here."""
    batch = len(q)
    q, k, v = (torch.cat([t, p.expand(batch, -1, -1, -1)], 2) for t, p in ((q, prefix_k), (k, prefix_k), (v, prefix_v)))
    return F.scaled_dot_product_attention(q, k, v)[:, :, : -prefix_k.shape[1]]
