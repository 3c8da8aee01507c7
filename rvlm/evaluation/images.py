"""Adversarial images on disk: safetensors, and PNGs that are read back and scored again."""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from rvlm.attacks import scoring
from rvlm.evaluation.evaluate import Evaluation
from rvlm.files import write_bytes

__all__ = ["read_png", "save_images", "save_pngs"]


def save_images(path: str | Path, evaluation: Evaluation) -> Path:
    """One safetensors file: x_adv fp32 [N, 3, H, W], y, index, broken_by, with the threat model as metadata."""
    from safetensors.torch import save

    tensors = {"x_adv": evaluation.x_adv.contiguous(), "y": evaluation.y, "index": evaluation.index}
    tensors["broken_by"] = evaluation.broken_by
    facts = {
        "attack": evaluation.attack,
        "eps": str(evaluation.eps),
        "norm": evaluation.norm,
        "target": evaluation.target,
    }
    return write_bytes(path, save(tensors, metadata=facts))


def save_pngs(folder: str | Path, evaluation: Evaluation, classifier: Callable[[Tensor], Tensor]) -> dict[str, int]:
    """Writes a PNG per image that fooled the model, reads it back and asks the model again.

    Returns:
        {"written", "still_fool"}: equal for an evaluation with quantize=255; rounding afterwards undoes some.
    """
    rows = (evaluation.broken_by >= 0).nonzero().flatten()
    paths = []
    for row in rows.tolist():
        name = f"{int(evaluation.index[row]):06d}_label{int(evaluation.y[row])}.png"
        paths.append(write_png(Path(folder) / name, evaluation.x_adv[row]))
    device = next(iter(getattr(classifier, "parameters", list)()), evaluation.x_adv).device
    still = 0
    with scoring(classifier):
        for first in range(0, len(paths), evaluation.batch_size):
            chunk = slice(first, first + evaluation.batch_size)
            pixels = torch.stack([read_png(path) for path in paths[chunk]])
            still += int((classifier(pixels.to(device)).argmax(1).cpu() != evaluation.y[rows[chunk]]).sum())
    return {"written": len(paths), "still_fool": still}


def write_png(path: str | Path, pixels: Tensor) -> Path:
    """Pixels [3, H, W] in [0, 1], rounded to uint8."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray((pixels * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()).save(buffer, format="png")
    return write_bytes(path, buffer.getvalue())


def read_png(path: str | Path) -> Tensor:
    """fp32 [3, H, W] in [0, 1]."""
    from PIL import Image

    return torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1).float() / 255
