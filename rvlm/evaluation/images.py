"""Adversarial images on disk: safetensors, npz, WebDataset tars, and PNGs that are read back and scored again."""

import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from rvlm.attacks import scoring
from rvlm.data import Data
from rvlm.data.make_wds import make_wds
from rvlm.evaluation.evaluate import Evaluation
from rvlm.evaluation.saved import ABOUT, COLUMNS, FACTS
from rvlm.files import write_bytes
from rvlm.models.weights import settings_of, weights_of

__all__ = ["read_png", "save_images", "save_pngs"]


def save_images(path: str | Path, evaluation: Evaluation, data: Data, made_on: Callable, model: str) -> Path:
    """The images of an evaluation, its samples' y, index and broken_by, and the facts of `rvlm.evaluation.saved`.

    Args:
        path: FILE.safetensors (facts as metadata) or FILE.npz (facts as JSON), both with x_adv fp32 [N, 3, H, W]; or a
            folder for WebDataset tars of PNGs, which `wds:PATH` reads, too, with the rest in adversarial.json.
        evaluation: with its images; for PNGs with quantize=255, so that they are what the attack made.
        data: what was evaluated on.
        made_on, model: what the attack saw, and its name.

    Raises:
        ValueError: PNGs of images that 8 bits do not hold.
    """
    from safetensors.torch import save

    path = Path(path)
    told = (
        evaluation.attack, evaluation.eps, evaluation.norm, evaluation.target, evaluation.seed,
        evaluation.quantize or 0, model, weights_of(made_on), data.name, data.split, data.fingerprint,
    )  # fmt: skip
    facts = {name: str(fact) for name, fact in zip(FACTS, told, strict=True)}
    facts["settings"] = json.dumps(settings_of(made_on))
    columns = {name: getattr(evaluation, name) for name in COLUMNS}
    if path.suffix == ".safetensors":
        return write_bytes(path, save({"x_adv": evaluation.x_adv.contiguous(), **columns}, metadata=facts))
    if path.suffix == ".npz":
        buffer = io.BytesIO()
        arrays = {name: column.numpy() for name, column in ({"x_adv": evaluation.x_adv} | columns).items()}
        np.savez_compressed(buffer, facts=json.dumps(facts), **arrays)
        return write_bytes(path, buffer.getvalue())
    if evaluation.quantize != 255:
        raise ValueError("PNGs hold 8 bits, which would undo some of the attack: make the images with quantize=255")
    pixels = (evaluation.x_adv * 255).round().to(torch.uint8)
    rows = torch.arange(len(pixels))
    adversarial = Data(data.name, "test", data.class_names, data.y, rows, lambda i: pixels[i], data.template, len(rows))
    make_wds(adversarial, path)
    about = {"facts": facts, **{name: columns[name].tolist() for name in ("index", "broken_by")}}
    write_bytes(path / ABOUT, (json.dumps(about) + "\n").encode())
    return path


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
