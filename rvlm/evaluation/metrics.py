"""Statistics of accuracies."""

import math
from typing import Any

import torch
from torch import Tensor

__all__ = ["clustered_interval", "clustered_share", "effective_size", "pooled_reliability", "reliability", "wilson"]

BINS = 15  # of confidence, as in Guo et al. 2017


def wilson(successes: float, n: float, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's 95 % score interval for successes out of n (Wilson 1927); (0, 1) when n = 0.

    Unlike the normal interval it is right at 0 and at 1, where robust accuracies often are. Both may be fractions, for
    samples that count less than one each (`effective_size`).
    """
    if not 0 <= successes <= n:
        raise ValueError(f"successes must lie in 0 .. n, got {successes} of {n}")
    if n == 0:
        return 0.0, 1.0
    p = successes / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    # At the ends the sums are 0 and 1 but for rounding, which must not leave the share itself outside.
    return max(0.0, centre - half) if successes > 0 else 0.0, min(1.0, centre + half) if successes < n else 1.0


def effective_size(right: Tensor, cluster: Tensor) -> float:
    """How many independent samples say as much as these, which come in clusters, as the captions of one image do.

        p = sum_i y_i / sum_i m_i    var p = N / (N - 1) sum_i (y_i - p m_i)^2 / (sum_i m_i)^2     n = p (1 - p) / var p

    with y_i right ones of the m_i samples of cluster i, of N: the variance of a ratio between sums over clusters
    (Cochran 1977, Sampling Techniques, 6.3). An interval for a share takes this n in place of the number of samples
    (Korn & Graubard 1998, who do so with Clopper and Pearson's). n is at most the number of samples; where the clusters
    do not tell (p is 0 or 1, or there is one) it is their number.

    Args:
        right: bool [T], or scores in [0, 1].
        cluster: int64 [T], number of the sample's cluster.
    """
    p, variance, clusters = _of_clusters(right.double(), cluster)
    if not 0 < p < 1 or clusters < 2:
        return float(clusters)
    return min(p * (1 - p) / variance, float(len(right))) if variance > 0 else float(len(right))


def clustered_share(right: Tensor, cluster: Tensor | None) -> tuple[float, tuple[float, float], float]:
    """The mean of what `effective_size` takes, its Wilson interval at that size, and the size; cluster None: every
    sample stands alone."""
    size = float(len(right)) if cluster is None else effective_size(right, cluster)
    share = right.double().mean().item()
    return share, wilson(min(share, 1.0) * size, size), size


def clustered_interval(values: Tensor, cluster: Tensor, most: float, z: float = 1.959964) -> tuple[float, float]:
    """The normal 95 % interval of the mean of values in [0, most], by the variance of `effective_size`.

    Where the clusters do not tell (all have one mean, or there is one) it is all of [0, most].
    """
    mean, variance, clusters = _of_clusters(values.double(), cluster)
    half = z * math.sqrt(variance) if clusters > 1 and variance > 0 else most
    return max(0.0, mean - half), min(most, mean + half)


def _of_clusters(values: Tensor, cluster: Tensor) -> tuple[float, float, int]:
    """Mean of all values, its variance (0 for one cluster), and how many clusters there are."""
    _, place = cluster.unique(return_inverse=True)
    sizes, first = place.bincount().double(), values[0]
    from_first = values - first  # so that equal values have no variance, not even by rounding
    mean, clusters = from_first.mean(), len(sizes)
    rest = torch.zeros_like(sizes).index_add_(0, place, from_first) - mean * sizes
    variance = clusters / max(clusters - 1, 1) * (rest**2).sum() / len(values) ** 2
    return (first + mean).item(), variance.item(), clusters


def reliability(confidence: Tensor, right: Tensor) -> dict[str, Any]:
    """How often a model is right when it is so sure, and the expected calibration error (Guo et al. 2017).

        ECE = sum over bins of n_bin / N * |accuracy of the bin - mean confidence of the bin|

    Args:
        confidence: [N] in [0, 1], probability of the predicted class.
        right: bool [N].

    Returns:
        {"ece", and for 15 bins of equal width "n": samples, "right": how many of them, "confidence": the sum of
        theirs}.
    """
    place = (confidence * BINS).long().clamp(max=BINS - 1)
    sums = [
        torch.zeros(BINS, dtype=torch.float64).index_add_(0, place, values.double())
        for values in (torch.ones_like(confidence), right, confidence)
    ]
    return _of_bins(torch.stack(sums))


def pooled_reliability(several: list[dict[str, Any]]) -> dict[str, Any]:
    """`reliability` of several samples as if they were one."""
    sums = [[one[key] for key in ("n", "right", "confidence")] for one in several]
    return _of_bins(torch.tensor(sums, dtype=torch.float64).sum(0))


def _of_bins(sums: Tensor) -> dict[str, Any]:
    """What `reliability` returns, of the samples in every bin, those that are right, and all confidence: [3, 15]."""
    n, right, confidence = sums
    ece = (right - confidence).abs().sum() / n.sum().clamp(min=1)
    counts = {"n": n.long().tolist(), "right": right.long().tolist()}
    return {"ece": ece.item(), **counts, "confidence": confidence.tolist()}
