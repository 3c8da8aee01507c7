"""How images become uint8 pixels, which every data set with images on disk shares."""

import dataclasses
import io
import os
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from rvlm import profiling

__all__ = ["Fit", "Reader", "as_png", "fit"]

FORMATS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}  # what goes into a tar as it is


@dataclasses.dataclass(frozen=True)
class Fit:
    """Shorter side to `resize` pixels (antialiased), then a square of `size` pixels from the centre; on uint8, to the
    bit what torchvision's Resize and CenterCrop make of a PIL image.

    size: what comes out. resize: None means size, which is CLIP's preprocessing. interpolation: bicubic or bilinear.
    squash: both sides to `size` pixels instead, whatever the image's shape.
    """

    size: int
    resize: int | None = None
    interpolation: str = "bicubic"
    squash: bool = False

    def __post_init__(self) -> None:
        if self.interpolation not in ("bicubic", "bilinear"):
            raise ValueError(f"interpolation must be bicubic or bilinear, got {self.interpolation!r}")
        if not 0 < self.size <= (self.resize or self.size):
            raise ValueError(f"cannot cut {self.size} pixels out of {self.resize or self.size}")

    def __call__(self, image) -> Tensor:
        """A PIL image in RGB -> uint8 [3, size, size]."""
        from PIL import Image

        side, size, shorter = self.resize or self.size, self.size, min(image.size)
        width, height = (int(side * edge / shorter) for edge in image.size)  # cut off, not rounded, as torchvision does
        if self.squash:
            width = height = size
        left, top = (round((edge - size) / 2) for edge in (width, height))
        if (width, height) != image.size:
            image = image.resize((width, height), Image.Resampling[self.interpolation.upper()])
        return torch.from_numpy(np.array(image.crop((left, top, left + size, top + size)))).permute(2, 0, 1)


class Reader:
    """index [B] -> uint8 pixels [B, 3, H, W]; an image is decoded each time that it is asked for.

    Args:
        get: number of a sample -> bytes of an image file, a PIL image, or an array [H, W] or [H, W, 3] of uint8.
        where: the data set, for errors.
        names: of the samples, for errors; without, they are called by their number.
        size: see `fit`; None: images keep their size.

    Raises:
        ValueError: a sample, which is named, cannot be decoded, or has another size than the first one read.
    """

    def __init__(
        self,
        get: Callable[[int], object],
        where: str | os.PathLike,
        names: Sequence[str] | None = None,
        size: int | Fit | None = None,
    ) -> None:
        self.get, self.where, self.names, self.size = get, where, names, size
        self.shape: torch.Size | None = None

    def __call__(self, index: Tensor) -> Tensor:
        images = [self._read(i) for i in index.tolist()]
        side = self.size.size if isinstance(self.size, Fit) else self.size or 0
        return torch.stack(images) if images else torch.zeros(0, 3, side, side, dtype=torch.uint8)

    def name(self, i: int) -> str:
        return self.names[i] if self.names else f"sample {i}"

    def image(self, i: int):
        """The sample as a PIL image in RGB, as large as it is."""
        try:
            return _as_image(self.get(i))
        except Exception as error:  # decoders raise almost anything on broken files
            raise ValueError(f"{self.where}: cannot decode {self.name(i)} ({error}). Repair or remove it.") from error

    def encoded(self, i: int) -> tuple[str, bytes]:
        """The suffix and the bytes of an image file: its own, where it is a JPEG, PNG or WebP, else a PNG of it."""
        from PIL import Image

        image, found = self.image(i), self.get(i)
        if isinstance(found, bytes) and (kind := Image.open(io.BytesIO(found)).format) in FORMATS:
            return FORMATS[kind], found
        return "png", as_png(image)

    def _read(self, i: int) -> Tensor:
        with profiling.phase("read and decode", 1):
            name, image = self.name(i), self.image(i)
        if self.size is not None:
            with profiling.phase("resize and crop", 1):
                return fit(image, self.size)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        self.shape = self.shape or pixels.shape
        if pixels.shape != self.shape:
            raise ValueError(
                f"{self.where}: images differ in size ({name} is {pixels.shape[2]} x {pixels.shape[1]}, the first read "
                f"was {self.shape[2]} x {self.shape[1]}). Pass size= to resize and crop them."
            )
        return pixels


def fit(image, size: int | Fit) -> Tensor:
    """A PIL image in RGB -> uint8 [3, size, size]; a number means CLIP's preprocessing."""
    return (size if isinstance(size, Fit) else Fit(size))(image)


def as_png(image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "png")
    return buffer.getvalue()


def _as_image(found):
    from PIL import Image

    if isinstance(found, bytes):
        found = Image.open(io.BytesIO(found))
    elif isinstance(found, np.ndarray):
        found = Image.fromarray(found)
    return found.convert("RGB")
