"""Adversarial images on disk: safetensors, npz, WebDataset tars, and PNGs that are read back and scored again."""

import io
import json
import math
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from rvlm.attacks import scoring
from rvlm.data import Data
from rvlm.data.make_wds import make_wds
from rvlm.evaluation.evaluate import Evaluation
from rvlm.evaluation.saved import ABOUT, COLUMNS, FACTS
from rvlm.files import whole_file, write_bytes
from rvlm.models.weights import settings_of, weights_of

PIECE = 16  # images that are written at once

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
    path = Path(path)
    told = (
        evaluation.attack, evaluation.eps, evaluation.norm, evaluation.target, evaluation.seed,
        evaluation.quantize or 0, model, weights_of(made_on), data.name, data.split, data.fingerprint,
    )  # fmt: skip
    facts = {name: str(fact) for name, fact in zip(FACTS, told, strict=True)}
    facts["settings"] = json.dumps(settings_of(made_on))
    columns = {name: getattr(evaluation, name) for name in COLUMNS}
    if path.suffix in (".safetensors", ".npz"):
        with whole_file(path) as file:
            write = _write_safetensors if path.suffix == ".safetensors" else _write_npz
            write(file, evaluation.x_adv, {name: column.numpy() for name, column in columns.items()}, facts)
        return path
    if evaluation.quantize != 255:
        raise ValueError("PNGs hold 8 bits, which would undo some of the attack: make the images with quantize=255")
    x_adv, rows = evaluation.x_adv, torch.arange(len(evaluation))
    adversarial = Data(
        data.name, "test", data.class_names, data.y, rows, lambda i: (x_adv[i] * 255).round().to(torch.uint8),
        data.template, len(rows),
    )  # fmt: skip
    make_wds(adversarial, path)
    about = {"facts": facts, **{name: columns[name].tolist() for name in ("index", "broken_by")}}
    write_bytes(path / ABOUT, (json.dumps(about) + "\n").encode())
    return path


def _write_safetensors(file: BinaryIO, x_adv: Tensor, columns: dict[str, np.ndarray], facts: dict[str, str]) -> None:
    """The format's header, and the arrays in its order, images a few at a time."""
    header: dict[str, Any] = {"__metadata__": facts}
    kinds = [("x_adv", "F32", list(x_adv.shape), 4)] + [(name, "I64", list(c.shape), 8) for name, c in columns.items()]
    end = 0
    for name, dtype, shape, size in kinds:
        begin, end = end, end + size * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(struct.pack("<Q", len(text)) + text)
    for piece in x_adv.split(PIECE):
        file.write(piece.contiguous().numpy().data)
    for column in columns.values():
        file.write(column.data)


def _write_npz(file: BinaryIO, x_adv: Tensor, columns: dict[str, np.ndarray], facts: dict[str, str]) -> None:
    """As numpy.savez_compressed does, images a few at a time."""
    about = {"descr": "<f4", "fortran_order": False, "shape": tuple(x_adv.shape)}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, array in {"facts": np.array(json.dumps(facts)), **columns}.items():
            with archive.open(f"{name}.npy", "w") as member:
                np.lib.format.write_array(member, array, allow_pickle=False)
        with archive.open("x_adv.npy", "w", force_zip64=True) as member:
            np.lib.format.write_array_header_1_0(member, about)
            for piece in x_adv.split(PIECE):
                member.write(piece.contiguous().numpy().data)


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
