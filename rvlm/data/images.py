"""How images become uint8 pixels, which every data set with images on disk shares."""

import io
import os
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

__all__ = ["Reader", "fit"]


class Reader:
    """index [B] -> uint8 pixels [B, 3, H, W]; an image is decoded each time that it is asked for.

    Args:
        get: number of a sample -> bytes of an image file, a PIL image, or an array [H, W] or [H, W, 3] of uint8.
        where: the data set, for errors.
        names: of the samples, for errors; without, they are called by their number.
        size: see `fit`; without, images keep their size.

    Raises:
        ValueError: a sample, which is named, cannot be decoded, or has another size than the first one read.
    """

    def __init__(
        self,
        get: Callable[[int], object],
        where: str | os.PathLike,
        names: Sequence[str] | None = None,
        size: int | None = None,
    ) -> None:
        self.get, self.where, self.names, self.size = get, where, names, size
        self.shape: torch.Size | None = None

    def __call__(self, index: Tensor) -> Tensor:
        images = [self._read(i) for i in index.tolist()]
        return torch.stack(images) if images else torch.zeros(0, 3, self.size or 0, self.size or 0, dtype=torch.uint8)

    def _read(self, i: int) -> Tensor:
        name = self.names[i] if self.names else f"sample {i}"
        try:
            image = _as_image(self.get(i))
        except Exception as error:  # decoders raise almost anything on broken files
            raise ValueError(f"{self.where}: cannot decode {name} ({error}). Repair or remove it.") from error
        if self.size is not None:
            return fit(image, self.size)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        self.shape = self.shape or pixels.shape
        if pixels.shape != self.shape:
            raise ValueError(
                f"{self.where}: images differ in size ({name} is {pixels.shape[2]} x {pixels.shape[1]}, the first read "
                f"was {self.shape[2]} x {self.shape[1]}). Pass size= to resize and crop them."
            )
        return pixels


def fit(image, size: int) -> Tensor:
    """Shorter side to `size` (bicubic, antialiased), centre crop: CLIP's preprocessing, on uint8."""
    from PIL import Image

    scale = size / min(image.size)
    width, height = (max(size, round(side * scale)) for side in image.size)
    left, top = (width - size) // 2, (height - size) // 2
    if (width, height) != image.size:
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(image.crop((left, top, left + size, top + size)))).permute(2, 0, 1)


def _as_image(found):
    from PIL import Image

    if isinstance(found, bytes):
        found = Image.open(io.BytesIO(found))
    elif isinstance(found, np.ndarray):
        found = Image.fromarray(found)
    return found.convert("RGB")
