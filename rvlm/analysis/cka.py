"""Linear centred kernel alignment (Kornblith et al. 2019), with the unbiased estimator of Nguyen et al. (2021)."""

import torch
from torch import Tensor, nn

from rvlm.data import Data
from rvlm.models import Clip
from rvlm.models.towers import tower_of

__all__ = ["cka_matrix", "layers", "linear_cka"]

TOKENS = ("cls", "mean", "all")


def linear_cka(x: Tensor, y: Tensor, unbiased: bool = False, batch_size: int | None = None) -> float:
    """CKA of two sets of features of the same samples: 1 for the same up to rotation and scale.

    Args:
        x, y: [n, p] and [n, q]; computed in float64.
        unbiased: HSIC_1, which does not grow with the features' dimensions; needs more than 3 samples and may be below
            0. Otherwise |Y^T X|^2 / (|X^T X| |Y^T Y|) of centred features.
        batch_size: mean HSIC over parts of so many samples (the last part is left out if it is smaller), as for
            features that do not fit into memory. It is close to the whole only for the unbiased estimator.

    Raises:
        ValueError: different or too few samples.
    """
    if x.dim() != 2 or y.dim() != 2 or len(x) != len(y):
        raise ValueError(
            f"features must be [n, p] and [n, q] of the same samples, got {list(x.shape)}, {list(y.shape)}"
        )
    size, least = batch_size or len(x), 4 if unbiased else 2
    if min(size, len(x)) < least:
        raise ValueError(f"CKA needs at least {least} samples in a part, got {min(size, len(x))}")
    parts = [part for part in torch.arange(len(x)).split(size) if len(part) == min(size, len(x))]
    hsic = _hsic_1 if unbiased else _hsic
    xy = xx = yy = 0.0
    for part in parts:
        a, b = x[part].double(), y[part].double()
        xy, xx, yy = xy + hsic(a, b), xx + hsic(a, a), yy + hsic(b, b)
    return float(xy / (xx * yy) ** 0.5) if xx > 0 and yy > 0 else float("nan")


def cka_matrix(
    first: Clip, second: Clip, data: Data, tokens: str = "cls", unbiased: bool = False, batch_size: int = 100
) -> tuple[Tensor, list[str], list[str]]:
    """CKA of every layer of the first tower with every layer of the second, [L, L'], and the layers' names.

    Args:
        tokens: "cls" the class token's features, "mean" the mean over tokens, "all" every token as a sample. A ResNet
            has no class token: its stages give "mean" (or "all" positions).
        unbiased: see `linear_cka`.
        batch_size: images per forward.
    """
    if tokens not in TOKENS:
        raise ValueError(f"tokens must be one of {', '.join(TOKENS)}, got {tokens!r}")
    ours, theirs = (_features(clip, data, tokens, batch_size) for clip in (first, second))
    rows = [[linear_cka(a, b, unbiased) for b in theirs.values()] for a in ours.values()]
    return torch.tensor(rows), list(ours), list(theirs)


def layers(clip: Clip) -> dict[str, nn.Module]:
    """The stages of a ResNet ("layer1", ...), or the blocks of a ViT ("B1", ...) of `rvlm.models.towers`."""
    names = ("layer1", "layer2", "layer3", "layer4")
    stages = {name: getattr(clip.visual, name) for name in names if hasattr(clip.visual, name)}
    return stages or {f"B{k + 1}": block.module for k, block in enumerate(tower_of(clip).blocks)}


def _features(clip: Clip, data: Data, tokens: str, batch_size: int) -> dict[str, Tensor]:
    """What every layer says of the images, [n, p] (or [n * tokens, p])."""
    found: dict[str, list[Tensor]] = {name: [] for name in layers(clip)}
    tower = tower_of(clip) if "B1" in found else None
    if tokens == "cls" and (tower is None or not tower.lead):
        raise ValueError(f"{clip.name} has no class token: choose tokens='mean'")

    def keep(name: str):
        def hook(module: nn.Module, given: tuple, out: Tensor) -> None:
            out = out.flatten(2).transpose(1, 2) if tower is None else out[:, : tower.tokens]  # without prompts
            chosen = {"cls": lambda: out[:, 0], "mean": lambda: out.mean(1), "all": lambda: out.flatten(0, 1)}[tokens]()
            found[name].append(chosen.float().cpu())

        return hook

    handles = [module.register_forward_hook(keep(name)) for name, module in layers(clip).items()]
    try:
        with torch.no_grad():
            for rows in torch.arange(len(data)).split(batch_size):
                clip.encode_pixels(data.batch(rows)[0].to(clip.device))
    finally:
        for handle in handles:
            handle.remove()
    return {name: torch.cat(parts) for name, parts in found.items()}


def _hsic(x: Tensor, y: Tensor) -> Tensor:
    """|Y^T X|^2 of centred features; the gram matrices where they are the smaller ones."""
    x, y = x - x.mean(0), y - y.mean(0)
    if len(x) < max(x.shape[1], y.shape[1]):
        return ((x @ x.T) * (y @ y.T)).sum()
    return (y.T @ x).square().sum()


def _hsic_1(x: Tensor, y: Tensor) -> Tensor:
    """The unbiased estimator of Song et al. (2012), equation 4."""
    n = len(x)
    k, m = ((t @ t.T).fill_diagonal_(0) for t in (x - x.mean(0), y - y.mean(0)))
    total = (k * m).sum() + k.sum() * m.sum() / ((n - 1) * (n - 2)) - 2 * (k.sum(0) @ m.sum(0)) / (n - 2)
    return total / (n * (n - 3))
