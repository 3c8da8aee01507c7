"""Adversarial images that were saved (`rvlm.evaluation.images.save_images`), to be shown to any model."""

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rvlm.attacks import AttackResult
from rvlm.attacks.objective import Passes
from rvlm.data import Data
from rvlm.data.rows import Places, StoredRows, npz_rows, safetensors_rows
from rvlm.data.wds import load_wds
from rvlm.models.weights import differing, weights_of

__all__ = ["ABOUT", "COLUMNS", "FACTS", "SavedImages", "load_images"]

COLUMNS = ("y", "index", "broken_by")
FACTS = ("attack", "eps", "norm", "target", "seed", "quantize", "model", "sha256", "data", "split", "fingerprint")
ABOUT = "adversarial.json"  # beside the tars


@dataclasses.dataclass(frozen=True)
class SavedImages:
    """A stage of an evaluation (see `rvlm.attacks.stages.Stage`) that hands out what was made before.

    Attributes:
        path: where they were read.
        read: rows int64 [B] -> fp32 [B, 3, H, W] in [0, 1], from disk. shape: [N, 3, H, W].
        y, index, broken_by: int64 [N]: labels, sample numbers, and the stage that fooled the model (-1: none, -2: wrong
            when clean).
        facts: the threat and what the images were made on; names in FACTS. `model` and `sha256` are of the model that
            the attack saw; `settings`, where it is there, what decides its outputs beside the weights, as JSON.
    """

    path: Path
    read: Callable[[Tensor], Tensor]
    shape: tuple[int, ...]
    y: Tensor
    index: Tensor
    broken_by: Tensor
    facts: dict[str, str]

    name = attack = "saved"
    classes = 2
    restart = 0
    refills = False

    def __call__(self, model: Callable, x: Tensor, y: Tensor, *, sample_ids: Tensor, **_: Any) -> AttackResult:
        rows = self._places(sample_ids.cpu())
        nothing = torch.zeros(len(rows), device=x.device)
        success = (self.broken_by[rows] != -1).to(x.device)
        return AttackResult(self.read(rows).to(x.device), success, nothing, None, nothing.long(), 0, 0)

    @property
    def x_adv(self) -> Tensor:
        """All images at once."""
        return self.read(torch.arange(len(self.y)))

    @functools.cached_property
    def _places(self) -> Places:
        return Places(self.index)

    def passes(self, classes: int, norm: str = "linf") -> Passes:
        return Passes()

    def record(self) -> dict[str, Any]:
        return {"name": self.name, "attack": self.attack, "settings": self.facts, "restart": self.restart}

    def white_box_of(self, classifier: Callable[[Tensor], Tensor]) -> bool:
        """Whether the attack saw this very model; of a plain callable nobody knows."""
        sha = weights_of(classifier)
        same = sha is not None and self.facts["sha256"] == sha
        told = json.loads(self.facts.get("settings", "{}"))  # images from before it was written lack it
        return same and self.facts["target"] == "white-box" and not differing(told, classifier)

    def as_transfer(self, right: Tensor) -> dict[str, Any]:
        """A check for a record of another model: whether these are as strong as images made for transfer.

        right: bool [N], which samples that model gets right when clean.
        """
        untouched = int((right & (self.broken_by == -2)).sum())
        white_box = self.facts["target"] == "white-box"
        why = [f"{untouched} images were never attacked, as the clean ones had been read wrongly"] if untouched else []
        why += ["made white-box, they stop where they fool their own model"] if white_box else []
        weaker = f"{'; '.join(why)}: rvlm eval --source makes stronger ones"
        return {"id": "made_for_transfer", "ok": not why, "detail": weaker if why else "images were made for transfer"}

    def samples(self, whole: Data) -> Data:
        """The clean samples of the images out of the data that they were made from.

        Raises:
            ValueError: they are not in it, or have other names, labels or sizes.
        """
        rule = "all" if len(self.index) == len(whole) else f"those of {self.path.name}"
        data = whole.numbered(self.index, rule)
        if data.fingerprint != self.facts["fingerprint"]:
            raise ValueError(
                f"{self.path} was made from {self.facts['data']}, {self.facts['split']} with the fingerprint "
                f"{self.facts['fingerprint']}; {data.name}, {data.split} has {data.fingerprint}"
            )
        shape = data.batch(slice(0, 1))[0].shape[1:]
        if self.shape[1:] != tuple(shape):
            raise ValueError(f"{self.path} holds images {list(self.shape[1:])}, the data {list(shape)}: see --size")
        return data


def load_images(path: str | Path) -> SavedImages:
    """Reads FILE.safetensors, FILE.npz or a folder of tars that `rvlm attack` wrote.

    Raises:
        FileNotFoundError: nothing there. ValueError: it lacks arrays or facts, or images and labels do not fit.
    """
    path = Path(path)
    if path.suffix == ".safetensors" and path.is_file():
        stored, facts = safetensors_rows(path)
        rows = stored.pop("x_adv", None)
        columns = {name: torch.from_numpy(column(np.arange(len(column)))) for name, column in stored.items()}
    elif path.suffix == ".npz" and path.is_file():
        with np.load(path, allow_pickle=False) as file:
            there = set(file.files)
            columns = {name: torch.from_numpy(file[name]) for name in there - {"x_adv", "facts"}}
            facts = json.loads(str(file["facts"])) if "facts" in there else {}
        rows = npz_rows(path, "x_adv") if "x_adv" in there else None
    elif (path / ABOUT).is_file():
        about = json.loads((path / ABOUT).read_text())
        data, facts = load_wds(str(path), "test"), about["facts"]
        columns = {name: torch.tensor(about[name]) for name in ("index", "broken_by")} | {"y": data.y}
        rows = data
    else:
        raise FileNotFoundError(f"no images at {path}: expected FILE.safetensors, FILE.npz or a folder with {ABOUT}")
    lacks = (["x_adv"] if rows is None else []) + [name for name in COLUMNS if name not in columns]
    if lacks := lacks + [fact for fact in FACTS if fact not in facts]:
        raise ValueError(f"{path} lacks {', '.join(lacks)}: expected what rvlm attack --format writes")
    if isinstance(rows, Data):
        read = functools.partial(_from_tars, rows)
        shape = (len(rows), *rows.batch(slice(0, 1))[0].shape[1:])
    else:
        read, shape = functools.partial(_from_rows, rows), rows.shape
    told = [columns[name] for name in COLUMNS]
    if len(shape) != 4 or any(column.shape != shape[:1] for column in told):
        shapes = ", ".join(f"{name} {list(columns[name].shape)}" for name in COLUMNS)
        raise ValueError(
            f"{path}: expected x_adv [N, 3, H, W] and a number of each for every image, got x_adv "
            f"{list(shape)}, {shapes}"
        )
    return SavedImages(path, read, shape, *told, facts)


def _from_tars(data: Data, rows: Tensor) -> Tensor:
    return data.batch(rows)[0]


def _from_rows(stored: StoredRows, rows: Tensor) -> Tensor:
    return torch.from_numpy(stored(rows)).float()
