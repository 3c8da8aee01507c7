"""What adversarial training does to the patch embedding's filters, by spatial frequency."""

import torch
from torch import Tensor

from rvlm.analysis.replace import without_adapters
from rvlm.models import Clip

__all__ = ["spectral_shift"]


def spectral_shift(base: Clip, robust: Clip, normalise: str = "relative") -> Tensor:
    """Difference of the mean spectra of two patch embeddings, [k, k], frequency 0 at (k // 2, k // 2).

    S(u, v) is the mean over filters and channels of |DFT(w)|, shifted. The paper does not say how it normalises.

    Args:
        normalise: "relative" (S' - S) / S, or "raw" S' - S.

    Raises:
        ValueError: towers without a patch embedding, or with different ones.
    """
    if normalise not in ("relative", "raw"):
        raise ValueError(f"normalise must be relative or raw, got {normalise!r}")
    without_adapters(base, robust)
    filters = [getattr(clip.model.visual, "conv1", None) for clip in (base, robust)]
    if None in filters or filters[0].weight.shape != filters[1].weight.shape:
        raise ValueError(f"{base.name} and {robust.name} have no patch embeddings of one shape to compare")
    before, after = (
        torch.fft.fftshift(torch.fft.fft2(conv.weight.detach().double()).abs().mean((0, 1))) for conv in filters
    )
    return ((after - before) / before if normalise == "relative" else after - before).float().cpu()
