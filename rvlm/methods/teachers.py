"""Frozen models that a method learns from, and what they say of clean images, computed once.

A teacher is a spec of `load_clip`, a Clip, or any callable from pixels [B, 3, H, W] to logits [B, C]. It runs in eval
mode without gradients, and never receives one.

Clean training images never change, so what a teacher says of them is a constant of the run: it is computed before the
first step and kept in memory, and on disk for teachers whose weights can be hashed.
"""

import copy
import hashlib
import json
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from rvlm.attacks import scoring
from rvlm.data import Data
from rvlm.files import cache_root, write_bytes
from rvlm.methods.base import Batch
from rvlm.models import Clip, load_clip
from rvlm.models.weights import settings_of, weights_sha
from rvlm.models.zero_shot import text_head

__all__ = ["Teacher", "classifier", "embedder", "frozen_copy", "look", "twin"]


class Teacher:
    """A frozen callable from pixels to rows [B, K], with a memory for clean images.

    Args:
        call: what it does; a module is left exactly as it was.
        name: for messages and records.
        precision: "bf16" runs it under autocast; rows are fp32 all the same.
    """

    def __init__(self, call: Callable[[Tensor], Tensor], name: str, precision: str = "fp32") -> None:
        self.call, self.name, self.precision = call, name, precision
        self.scale = call.scale if isinstance(call, _ClipClassifier) else None  # on the cosines of a CLIP
        self.rows: Tensor | None = None
        self.place: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        with scoring(self.call), torch.autocast(x.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            return self.call(x).float()

    def remember(self, data: Data, device: torch.device, batch_size: int = 256) -> None:
        """Computes its rows for all samples of `data` (with a bar on a terminal), or reads them from disk."""
        path = None
        if isinstance(self.call, _ClipClassifier | _Embedder):
            key = [
                type(self.call).__name__,
                weights_sha(self.call),
                settings_of(self.call),
                data.fingerprint,
                look(data),
                self.precision,
                device.type,
            ]
            digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:20]
            path = cache_root() / "teachers" / f"{digest}.safetensors"
        if path is not None and path.is_file():
            from safetensors.torch import load

            self.rows = load(path.read_bytes())["rows"].to(device)
        else:
            from safetensors.torch import save
            from tqdm import tqdm

            chunks = torch.arange(len(data)).split(batch_size)
            shown = tqdm(chunks, desc=f"{self.name} on clean images", disable=None, unit="batch")
            self.rows = torch.cat([self(data.batch(rows)[0].to(device)) for rows in shown])
            if path is not None:
                write_bytes(path, save({"rows": self.rows.cpu().contiguous()}))
        self.place = torch.full((int(data.index.max()) + 1,), -1, device=device)
        self.place[data.index.to(device)] = torch.arange(len(data), device=device)

    def on_clean(self, batch: Batch) -> Tensor:
        """Its rows for a batch's clean images."""
        return self(batch.x) if self.rows is None else self.rows[self.place[batch.index]]


def classifier(
    source: Any, student: Clip, data: Data, templates: list[str], scale: float | None = None, precision: str = "fp32"
) -> Teacher:
    """A teacher of class logits.

    Args:
        source: spec of `load_clip`, a Clip, or a callable to logits, which are taken as they are.
        student: whose device it goes to.
        data: the training classes.
        templates: prompts for them; each CLIP encodes them with its own text tower.
        scale: on the cosines; None means the teacher's own logit scale.
        precision: see Teacher.

    Raises:
        ValueError: logits for another number of classes, or a teacher that cannot take the images.
    """
    clip = load_clip(source, student.device) if isinstance(source, str) else source
    name = source if isinstance(source, str) else getattr(source, "name", type(source).__name__)
    if isinstance(clip, Clip):
        with torch.no_grad():
            clip = _ClipClassifier(clip, data.class_names, templates, scale)
    teacher = Teacher(clip, name, precision)
    images = data.batch(slice(0, 2))[0].to(student.device)
    try:
        got = teacher(images)
    except Exception as error:
        size = " x ".join(map(str, images.shape[-2:]))
        raise ValueError(f"teacher {name} fails on images of {size} pixels, those of {data.name}: {error}") from error
    if got.dim() != 2 or got.shape[1] != len(data.class_names):
        classes = len(data.class_names)
        raise ValueError(
            f"teacher {name} returns {list(got.shape)} for two images, but {data.name} has {classes} classes"
        )
    return teacher


def embedder(student: Clip, unit_norm: bool, precision: str = "fp32") -> Teacher:
    """The student as it is now, as a teacher of embeddings."""
    return Teacher(_Embedder(frozen_copy(student), unit_norm), f"{student.name}, frozen", precision)


def twin(clip: Clip) -> Clip:
    """A model of its own around the same weights: what is put around the one, such as prompts, the other has not."""
    shared = {id(t): t for t in (*clip.parameters(), *clip.buffers())}
    return copy.deepcopy(clip, shared).eval()


def frozen_copy(student: Clip) -> Clip:
    """The student as it is now."""
    return copy.deepcopy(student).eval().requires_grad_(False)


class _ClipClassifier(nn.Module):
    def __init__(self, clip: Clip, class_names: list[str], templates: list[str], scale: float | None) -> None:
        super().__init__()
        self.clip = clip
        self.scale = clip.logit_scale.item() if scale is None else scale
        self.register_buffer("head", self.scale * text_head(clip, class_names, templates))

    def forward(self, x: Tensor) -> Tensor:
        return self.clip.encode_pixels(x) @ self.head


class _Embedder(nn.Module):
    def __init__(self, clip: Clip, unit_norm: bool) -> None:
        super().__init__()
        self.clip, self.unit_norm = clip, unit_norm
        self.register_buffer("norm", torch.tensor(unit_norm))  # so that the hash tells the two apart

    def forward(self, x: Tensor) -> Tensor:
        return self.clip.encode_pixels(x, self.unit_norm)


def look(data: Data) -> str:
    """Hash of some of the pixels, since a fingerprint knows labels and numbers alone."""
    rows = torch.linspace(0, len(data) - 1, min(len(data), 64)).long()
    return hashlib.sha256(data.batch(rows)[0].numpy().tobytes()).hexdigest()
