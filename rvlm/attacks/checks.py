"""What attacks take: checks of images, radii, labels and outputs, each with a message that says what was expected."""

import numbers

import torch
from torch import Tensor

from rvlm.ops.steps import check_levels

__all__ = [
    "ROUNDING", "AttackWarning", "are_probabilities", "check_grid", "check_images", "check_labels", "check_radius",
]  # fmt: skip

ROUNDING = 1e-6  # that a pixel in fp32 may be off, as a share of the pixels' range: several roundings


class AttackWarning(UserWarning):
    """The attack runs, but its result may not mean what it seems to."""


def check_images(x: Tensor, bounds: tuple[float, float]) -> None:
    """Raises unless x is a batch of finite float images inside bounds."""
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a tensor [B, ...] of pixels in {list(bounds)}, got {type(x).__name__}")
    if not x.is_floating_point():
        raise TypeError(
            f"x must hold floats in {list(bounds)}, got {x.dtype}. For uint8 images pass x.float() / 255, "
            "and quantize=255 to get valid uint8 images back."
        )
    if x.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"x must be float32 or float64, got {x.dtype}: a ball of radius 1/255 does not survive in 16 bits. "
            "Pass x.float(); the model may still run in 16 bits (precision='bf16')."
        )
    if x.dim() < 2:
        raise ValueError(f"x must be a batch [B, ...] such as [B, 3, H, W], got shape {list(x.shape)}")
    lo, hi = bounds
    if not lo < hi:
        raise ValueError(f"bounds must be (low, high) with low < high, got {bounds}")
    if not x.numel():
        return
    low, high = (v.item() for v in torch.aminmax(x.detach()))
    if low != low or high != high:
        bad = x.detach().isnan().flatten(1).any(1).nonzero().flatten().tolist()
        raise ValueError(f"x has NaN pixels in sample(s) {_some(bad)}: remove or repair them first")
    slack = ROUNDING * (hi - lo)
    if low < lo - slack or high > hi + slack:
        raise ValueError(
            f"x must lie in bounds {list(bounds)}, got values in [{low:.4g}, {high:.4g}]. Attacks work on pixels, "
            "before normalisation: put the normalisation into the model, or pass bounds=(low, high)."
        )


def check_radius(name: str, value: float | Tensor, batch: int, norm: str, bounds: tuple[float, float]) -> None:
    """Raises unless a radius or step size is a non-negative float or tensor [B]; a Linf eps must not span the box."""
    if isinstance(value, Tensor):
        if value.dim() > 1 or value.numel() not in (1, batch):
            raise ValueError(f"{name} must be a float or a tensor [{batch}], got shape {list(value.shape)}")
        least, most = (value.min().item(), value.max().item()) if value.numel() else (0.0, 0.0)
    elif isinstance(value, numbers.Real) and not isinstance(value, bool):
        least = most = float(value)
    else:
        raise TypeError(f"{name} must be a float or a tensor [{batch}], got {type(value).__name__}")
    if not (least >= 0 and most < float("inf")):
        raise ValueError(f"{name} must be finite and not negative, got {least:g} (to descend, use targeted=True)")
    if name == "eps" and norm == "linf" and most >= bounds[1] - bounds[0]:
        hint = f": did you mean {most:g}/255?" if bounds[1] - bounds[0] == 1 else ""
        raise ValueError(f"Linf eps must be below the pixel range {bounds[1] - bounds[0]:g}, got {most:g}{hint}")


def check_labels(y: Tensor, batch: int) -> Tensor:
    """Integer labels [B] as int64."""
    if not isinstance(y, Tensor) or y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
        got = y.dtype if isinstance(y, Tensor) else type(y).__name__
        raise TypeError(f"y must be integer labels [{batch}], got {got}. Other targets need a callable loss.")
    if y.shape != (batch,):
        raise ValueError(f"y must have shape [{batch}], one label per image, got {list(y.shape)}")
    return y.long()


def check_grid(x: Tensor, levels: int, strict_eps: bool) -> None:
    """Raises unless the pixels of x are multiples of 1 / levels."""
    check_levels(levels, strict_eps)
    off = (x * levels - (x * levels).round()).abs().max().item()
    if off > levels * 1e-6 + 1e-3:
        raise ValueError(
            f"quantize={levels} needs clean images on the grid k/{levels}, but a pixel is {off:.3g} levels off it. "
            f"Round them first: x = (x * {levels}).round() / {levels}."
        )


def are_probabilities(outputs: Tensor) -> bool:
    """Whether outputs [B, C] look like a softmax's: no row has a negative number, and every row sums to 1."""
    return outputs.shape[1] > 1 and bool((outputs >= 0).all() and ((outputs.sum(1) - 1).abs() < 1e-3).all())


def _some(items: list, most: int = 8) -> str:
    text = ", ".join(map(str, items[:most]))
    return text if len(items) <= most else f"{text}, ... ({len(items)} in all)"
