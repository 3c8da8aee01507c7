"""Attacks on image-text retrieval: images that no longer lie near their captions, found without labels.

    SGA (Lu et al. 2023, arXiv 2307.14061), its image part: raise the sum over a set of scales of x and a set of
    captions of -<f(x_scale), t>. A scale is x plus noise, resized, cut to [0, 1] and resized back; x itself is one.

    Co-Attack (Zhang et al. 2022, arXiv 2206.09391), its image part for encoders without fusion:
    raise KL(s(f(x)) || s(f(x'))) + 3 mean_k KL(s(t_k) || s(f(x') / |f(x')|)), s the softmax over the dimensions

Both take Linf steps from a random start. Captions that were attacked, too, are given as any others: the attacks ask
for embeddings.

    captions = caption_sets(clip.encode_text(texts), image_of_text, len(x))
    x_adv = sga(clip.encode_pixels, x, captions, eps=2 / 255)
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from rvlm import ops
from rvlm.attacks.ball import normal
from rvlm.attacks.checks import check_images
from rvlm.attacks.contract import scoring
from rvlm.attacks.mifgsm import DRAWS, MIFGSM, Ask, Now, Transform, mifgsm
from rvlm.attacks.objective import AttackResult, Passes, Scores
from rvlm.attacks.search import Attack

__all__ = ["SGA", "CoAttack", "Scales", "caption_sets", "coattack", "sga"]


@dataclasses.dataclass
class Scales(Transform):
    """Gradients at x and at resized copies of it, added up; also a transform for `mifgsm`.

    scales: of the sides. noise: its standard deviation before resizing, in pixel units. antialias: low-pass before
    making it smaller; what the published code did depends on its torchvision, so that this is our choice.
    """

    scales: Sequence[float] = (0.5, 0.75, 1.25, 1.5)
    noise: float = 0.05
    antialias: bool = True
    images = True

    def __post_init__(self) -> None:
        self.asks = 1 + len(self.scales)
        self.draws = self.noise > 0 and len(self.scales) > 0
        if not all(0 < scale <= 8 for scale in self.scales) or len(self.scales) > DRAWS - 2:
            raise ValueError(f"scales must be at most {DRAWS - 2} factors in (0, 8], got {list(self.scales)}")
        if self.noise < 0:
            raise ValueError(f"noise must be at least 0, got {self.noise}")

    def __call__(self, ask: Ask, x: Tensor, now: Now) -> tuple[Scores, Tensor]:
        scores, total = ask(x)
        for scale in self.scales:
            added = self.noise * normal(now.noise(x)) if self.draws else 0.0
            total = total + ask(x, functools.partial(self._resized, added, scale, now.ball.bounds))[1]
        return scores, total

    def _resized(self, added: Tensor | float, scale: float, bounds: tuple[float, float], x: Tensor) -> Tensor:
        there = [max(1, int(scale * side)) for side in x.shape[-2:]]
        resize = {"mode": "bicubic", "align_corners": False, "antialias": self.antialias}
        return F.interpolate(F.interpolate(x + added, there, **resize).clamp(*bounds), list(x.shape[-2:]), **resize)


def sga(
    model: Callable[[Tensor], Tensor],
    x: Tensor,
    y: Tensor,
    *,
    eps: float | Tensor = 2 / 255,
    alpha: float | Tensor | None = None,
    steps: int = 10,
    norm: str = "linf",
    targeted: bool = False,
    scales: Sequence[float] = Scales.scales,
    noise: float = Scales.noise,
    random_start: bool = True,
    restarts: int = 1,
    x_init: Tensor | None = None,
    bounds: tuple[float, float] = (0.0, 1.0),
    generator: torch.Generator | None = None,
    sample_ids: Tensor | None = None,
    precision: str | None = None,
    strict_eps: bool = False,
    quantize: int | None = None,
    model_mode: str = "eval",
    engine: str = "auto",
    callback: Callable[[int, Tensor, Tensor], None] | None = None,
    return_info: bool = False,
) -> Tensor | AttackResult:
    """The image part of SGA. What is not listed means what it means in `pgd`.

    Args:
        model: image encoder, pixels [B, C, H, W] -> embeddings [B, D] of unit length.
        x: images [B, C, H, W].
        y: embeddings of every image's captions, [B, K, D] (see `caption_sets`) or [B, D].
        alpha: step size; None means eps / 4.
        targeted: toward captions y instead of away from them.
        scales: sides of the resized copies, as shares; () asks for x alone.
        noise: standard deviation of what is added to a copy, in pixel units.

    Returns:
        As `pgd`, the last iterate. `loss` is minus the sum of the inner products at x; there is no verdict on single
        samples, measure the recall.

    Raises:
        As `pgd`; ValueError for captions of another shape than the embeddings'.
    """
    captions = _checked(y, x)
    # The sum over captions of inner products is the inner product with their sum.
    return mifgsm(
        model, x, captions.sum(1), mu=0.0, loss=lambda image, caption: -(_embedding(image, caption) * caption).sum(1),
        alpha=_share(eps, 1 / 4) if alpha is None else alpha, transforms=[Scales(scales, noise)] if scales else [],
        eps=eps, steps=steps, norm=norm, targeted=targeted, random_start=random_start, restarts=restarts,
        x_init=x_init, bounds=bounds, generator=generator, sample_ids=sample_ids, precision=precision,
        strict_eps=strict_eps, quantize=quantize, model_mode=model_mode, engine=engine, callback=callback,
        return_info=return_info,
    )  # fmt: skip


def coattack(
    model: Callable[[Tensor], Tensor],
    x: Tensor,
    y: Tensor,
    *,
    eps: float | Tensor = 2 / 255,
    alpha: float | Tensor | None = None,
    steps: int = 10,
    norm: str = "linf",
    weight: float = 3.0,
    random_start: bool = True,
    restarts: int = 1,
    x_init: Tensor | None = None,
    bounds: tuple[float, float] = (0.0, 1.0),
    generator: torch.Generator | None = None,
    sample_ids: Tensor | None = None,
    precision: str | None = None,
    strict_eps: bool = False,
    quantize: int | None = None,
    model_mode: str = "eval",
    engine: str = "auto",
    callback: Callable[[int, Tensor, Tensor], None] | None = None,
    return_info: bool = False,
) -> Tensor | AttackResult:
    """The image part of Co-Attack. What is not listed means what it means in `pgd`.

    The published code starts in [0, eps) only; this one is uniform on both sides.

    Args:
        model: image encoder, pixels [B, ...] -> embeddings [B, D].
        y: embeddings of every image's captions, [B, K, D] (see `caption_sets`) or [B, D]; the paper has one caption,
            the mean over several is ours.
        alpha: step size; None means 1.25 eps / steps.
        weight: of the captions' term; 0 moves images away from themselves alone.

    Returns, raises:
        As `sga`; `loss` is the sum of both divergences.
    """
    if weight < 0:
        raise ValueError(f"weight must be at least 0, got {weight}")
    captions = _checked(y, x)
    check_images(x, bounds)
    if not callable(model):
        raise TypeError(f"model must be callable, got {type(model).__name__}")
    with scoring(model):
        clean = _embedding(model(x), captions[:, 0]).detach()

    def loss(image: Tensor, reference: Tensor) -> Tensor:
        image = _embedding(image, reference[:, 0])
        away = _divergence(reference[:, 0], image)
        captions = reference[:, 1:]
        given = captions.ne(0).any(-1)  # [B, K], False where a set is filled up
        texts = _divergence(F.normalize(captions, dim=-1), F.normalize(image, dim=-1)[:, None])
        return away + weight * (texts * given).sum(1) / given.sum(1).clamp(min=1)

    return mifgsm(
        model, x, torch.cat([clean[:, None], captions], 1), mu=0.0, loss=loss,
        alpha=_share(eps, 1.25 / max(steps, 1)) if alpha is None else alpha, transforms=[], eps=eps, steps=steps,
        norm=norm, random_start=random_start, restarts=restarts, x_init=x_init, bounds=bounds, generator=generator,
        sample_ids=sample_ids, precision=precision, strict_eps=strict_eps, quantize=quantize, model_mode=model_mode,
        engine=engine, callback=callback, return_info=return_info,
    )  # fmt: skip


class SGA(Attack):
    """`sga` with its settings fixed: `SGA(clip.encode_pixels, eps=4/255)(x, captions)`."""

    function = sga

    @staticmethod
    def _passes(classes: int, norm: str, given: dict[str, Any]) -> Passes:
        """Every run: for each step a gradient at x and at each scale, and the loss at the end."""
        chain = [Scales(given["scales"])]
        return MIFGSM.passes(classes, norm, steps=given["steps"], restarts=given["restarts"], transforms=chain)


class CoAttack(Attack):
    """`coattack` with its settings fixed: `CoAttack(clip.encode_pixels, eps=4/255)(x, captions)`."""

    function = coattack

    @staticmethod
    def _passes(classes: int, norm: str, given: dict[str, Any]) -> Passes:
        """The clean embedding; every run: a gradient for each step, and the loss at the end."""
        return Passes(1) + MIFGSM.passes(classes, norm, steps=given["steps"], restarts=given["restarts"])


def caption_sets(embeddings: Tensor, images: Tensor, count: int) -> Tensor:
    """Captions by image: [count, K, D], K captions of the image that has most, zeros where another has fewer.

    Args:
        embeddings: of all captions [T, D].
        images: int64 [T], whose caption each is.
        count: number of images.

    Raises:
        ValueError: shapes that do not match, numbers out of range, or an image without a caption.
    """
    if embeddings.dim() != 2 or images.shape != embeddings.shape[:1]:
        raise ValueError(
            f"expected embeddings [T, D] and images [T], got {list(embeddings.shape)}, {list(images.shape)}"
        )
    if not len(images) or int(images.min()) < 0 or int(images.max()) >= count:
        raise ValueError(f"images must be numbers in 0 .. {count - 1}, one for each caption")
    size = images.bincount(minlength=count)
    if (size == 0).any():
        raise ValueError(f"{int((size == 0).sum())} of {count} images have no caption, the first is {size.argmin()}")
    order = images.argsort(stable=True)
    place = torch.arange(len(images), device=images.device) - (size.cumsum(0) - size)[images[order]]
    sets = embeddings.new_zeros(count, int(size.max()), embeddings.shape[1])
    sets[images[order], place] = embeddings[order]
    return sets


def _share(eps: Any, share: float) -> Any:
    return eps * share if isinstance(eps, float | int | Tensor) else None  # the frame says what is wrong with it


def _checked(y: Any, x: Any) -> Tensor:
    """Caption embeddings as [B, K, D], without a graph."""
    if not isinstance(y, Tensor) or not y.is_floating_point():
        raise TypeError(f"y must be the embeddings of the captions, a float tensor, got {type(y).__name__}")
    y = y[:, None] if y.dim() == 2 else y
    if y.dim() != 3 or (isinstance(x, Tensor) and len(y) != len(x)):
        images = len(x) if isinstance(x, Tensor) else "B"
        raise ValueError(f"captions must be embeddings [{images}, K, D] or [{images}, D], got {list(y.shape)}")
    return y.detach()


def _embedding(image: Any, like: Tensor) -> Tensor:
    if not isinstance(image, Tensor) or image.shape != like.shape:
        got = list(image.shape) if isinstance(image, Tensor) else type(image).__name__
        raise ValueError(f"the encoder must return embeddings {list(like.shape)}, as the captions', got {got}")
    return image.to(like.dtype)


def _divergence(reference: Tensor, image: Tensor) -> Tensor:
    """KL(softmax(reference) || softmax(image)) over the last dimension, for image that broadcasts to reference."""
    rows = image.expand_as(reference).flatten(0, -2)
    return ops.multi_teacher_kl(rows, reference.flatten(0, -2)[None], [1.0])[0].view(reference.shape[:-1])
