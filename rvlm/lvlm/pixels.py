"""What the image processors of transformers do, differentiable: pixels [B, 3, H, W] in [0, 1] to a model's inputs.

    resize to S x S (bicubic, antialiased; the width, then the height), where the images have another size
    (255 x - 255 mean) / (255 std)
    CLIP: that.  Qwen-VL: cut into patches, those that are merged to one token beside each other, every frame twice

Images of size S become, to the bit, what the processor makes of the same images in uint8. Resized ones differ by what
rounding to uint8 loses there: 0.3 levels of 1 / (255 std) in the mean and 1.1 at most, from 20 to 336 pixels, of noise
too. Clipping after each direction, as uint8 does, is part of that: without it noise differs by 20 levels.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["Pixels", "QwenPixels"]

BICUBIC = 3  # PIL's number


class Pixels(nn.Module):
    """For a model whose tower takes images [B, 3, S, S], such as CLIP's.

    Args:
        processor: the model's image processor of transformers.
        size: S.

    Raises:
        ValueError: a processor that leaves out one of these steps, or resizes in another way.
    """

    def __init__(self, processor, size: int) -> None:
        super().__init__()
        if not (processor.do_rescale and processor.do_normalize and int(processor.resample) == BICUBIC):
            raise ValueError(
                f"{type(processor).__name__}: expected an image processor that rescales, normalises and resizes by "
                f"bicubic interpolation, got do_rescale={processor.do_rescale}, do_normalize={processor.do_normalize}, "
                f"resample={int(processor.resample)}"
            )
        self.size, self.levels = size, 1 / processor.rescale_factor
        for name, values in (("mean", processor.image_mean), ("std", processor.image_std)):
            self.register_buffer(name, torch.tensor(values).view(3, 1, 1) * self.levels, persistent=False)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"pixel_values": self._normalised(x)}

    def _normalised(self, x: Tensor) -> Tensor:
        if x.dim() != 4 or x.shape[1] != 3 or x.shape[2] != x.shape[3]:
            raise ValueError(f"pixels must be [B, 3, S, S], square images that are cropped first, got {list(x.shape)}")
        x = x.float()
        if x.shape[-1] != self.size:
            for shape in ((x.shape[2], self.size), (self.size, self.size)):
                x = F.interpolate(x, shape, mode="bicubic", align_corners=False, antialias=True).clamp(0, 1)
        return (x * self.levels - self.mean) / self.std


class QwenPixels(Pixels):
    """For Qwen-VL: patches [B (S / p)^2, 3 t p p] and grids [B, 3]."""

    def __init__(self, processor, size: int) -> None:
        super().__init__(processor, size)
        self.patch, self.merge, self.frames = processor.patch_size, processor.merge_size, processor.temporal_patch_size
        if size % (self.patch * self.merge):
            raise ValueError(f"size must be a multiple of {self.patch * self.merge} for this model, got {size}")

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        side = self.size // self.patch
        blocks = (side // self.merge, self.merge, self.patch)
        x = self._normalised(x).unflatten(3, blocks).unflatten(2, blocks)  # [B, 3, h, m, p, w, m, p]
        x = x.permute(0, 2, 5, 3, 6, 1, 4, 7)[..., None, :, :]  # [B, h, w, m, m, 3, 1, p, p]
        x = x.expand(*x.shape[:6], self.frames, -1, -1)
        grid = torch.tensor([[1, side, side]], device=x.device).expand(len(x), -1)
        return {"pixel_values": x.flatten(5).flatten(0, 4), "image_grid_thw": grid}
